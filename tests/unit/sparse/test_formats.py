"""Packed formats: exact round trips, predicted bytes, bits counted by hand, and files that lie."""

from __future__ import annotations

import itertools
import json
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import SecateurError
from secateur.sparse import from_tensors, fused, header, pack, to_tensors, unpack, verify
from secateur.sparse.formats import DTYPES, PARTS
from secateur.sparse.kernels import Handle, library
from secateur.sparse.layout import popcount, to_bits

KINDS = tuple(PARTS)
sides = st.integers(1, 70)
densities = st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.9, 1.0])


def sparse(shape: tuple[int, int], density: float, seed: int) -> Tensor:
    """Random weights of which about ``density`` are not zero, and some zeros are negative."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < density)
    return torch.where((w == 0) & (torch.rand(shape, generator=g) < 0.5), torch.tensor(-0.0), w)


@settings(max_examples=60, deadline=None)
@given(sides, sides, densities, st.sampled_from(KINDS), st.sampled_from(list(DTYPES)), st.integers(0, 9999))
def test_what_is_unpacked_is_what_was_packed(
    out: int, width: int, density: float, kind: str, dtype: str, seed: int
) -> None:
    w = sparse((out, width), density, seed)
    tile = (1 + seed % 5, 1 + seed % 7) if kind == "tile" else None
    packed = pack(w, DTYPES[dtype], kind, tile)  # type: ignore[arg-type]
    verify(packed)
    said = json.loads(json.dumps(header(packed)))
    back = unpack(from_tensors("a.weight", to_tensors(packed, "a.weight"), said))
    assert not torch.signbit(back[back == 0]).any(), "a negative zero"
    if dtype == "int8":
        scales = packed.parts["scales"]
        assert ((back - w).abs() <= scales[:, None] * 0.5001).all()
        assert torch.equal(unpack(pack(back, torch.int8, kind, tile)), back), "codes changed"  # type: ignore[arg-type]
    else:
        assert torch.equal(back, w.to(DTYPES[dtype]))
    assert packed.nonzeros == int(back.count_nonzero())


def test_a_word_of_the_bitmask_is_what_the_specification_says() -> None:
    """Each single weight of a 16 x 4 matrix sets the bit 16 V (c // V) + V r + c % V."""
    for (word, v), (r, c) in itertools.product(
        (("fp32", 1), ("bf16", 2), ("int8", 4)), itertools.product((0, 3, 15), range(4))
    ):
        w = torch.zeros(16, 4)
        w[r, c] = 1.0
        mask = int(pack(w, DTYPES[word], "bitmask").parts["mask"])
        assert mask % (1 << 64) == 1 << (16 * v * (c // v) + v * r + c % v)


def test_bytes_fall_as_predicted() -> None:
    """bf16 at one half: 9/16 of the matrix and an offset per 16 rows; fp32 at 70 %: 0.3 + 1/32."""
    w = torch.randn(256, 320)
    w.view(-1)[::2] = 0
    assert pack(w, torch.bfloat16).bytes == 256 * 320 * 2 * 9 // 16 + 8 * 17
    keep = torch.zeros(256 * 320, dtype=torch.bool)
    keep[torch.randperm(256 * 320)[: 256 * 96]] = True
    w = torch.where(keep.view(256, 320), torch.ones(256, 320), 0)
    assert pack(w, torch.float32).bytes == 256 * 96 * 4 + 256 * 320 // 8 + 8 * 17


def test_the_kind_follows_the_density() -> None:
    w = torch.ones(64, 64)
    assert pack(w, torch.bfloat16).kind == "dense", "no zeros: nothing to gain"
    w[:, ::2] = 0
    assert pack(w, torch.bfloat16).kind == "bitmask"
    assert pack(w, torch.bfloat16, tile=(16, 1)).kind == "tile"
    w[:, 6:] = 0
    assert pack(w, torch.float32).kind == "bitmask", "95 % zeros, but a pointer a row is more than a bit a weight"
    wide = torch.zeros(64, 4096)
    wide[:, ::40] = 1
    assert pack(wide, torch.float32).kind == "csr"


def test_bits_are_counted_as_python_counts_them() -> None:
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (1000,))
    words[:3] = torch.tensor([0, -1, -(1 << 63)])
    assert popcount(words).tolist() == [(int(x) % (1 << 64)).bit_count() for x in words]
    assert int(to_bits(torch.arange(64) == 63)) == -(1 << 63)


@pytest.mark.parametrize("rows", [(16, 32, 16), (16, 5, 16), (3, 1, 64)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_fused_is_one_above_the_other(rows: tuple[int, ...], kind: str, dtype: str) -> None:
    tile = (4, 8) if kind == "tile" else None
    packs = [pack(sparse((n, 21), 0.4, n), DTYPES[dtype], kind, tile) for n in rows]  # type: ignore[arg-type]
    whole = fused(packs)
    verify(whole)
    assert whole.kind == kind and torch.equal(unpack(whole), torch.cat([unpack(p) for p in packs]))


@pytest.mark.parametrize("tile", [(512, 2**31 - 1), (2**20, 2**20)])
def test_a_tile_beyond_the_matrix_takes_no_more_than_the_matrix(tile: tuple[int, int]) -> None:
    """As many bytes as such a tile has are more than a machine gives; the format allows it."""
    w, x = sparse((576, 576), 0.1, 1), torch.ones(2, 576)
    w[512:] = 0
    packed = pack(w, torch.float32, "tile", tile)
    verify(packed)
    assert packed.nonzeros == int(w.count_nonzero())
    assert torch.equal(unpack(packed), w + 0.0)
    for tokens in (Handle(packed).direct(x)[0], Handle(packed).by_panels(x)) if library() else ():
        torch.testing.assert_close(tokens, x @ w.T, rtol=1e-4, atol=1e-4)


def test_fusing_different_inputs_is_refused() -> None:
    with pytest.raises(SecateurError, match="same inputs"):
        fused([pack(torch.ones(4, 4), torch.float32), pack(torch.ones(4, 5), torch.float32)])


def test_what_a_dtype_cannot_hold_is_refused() -> None:
    with pytest.raises(SecateurError, match=r"fp16.*1e\+06"):
        pack(torch.tensor([[1e6, 0.0]]), torch.float16)
    with pytest.raises(SecateurError, match="finite"):
        pack(torch.tensor([[float("nan"), 0.0]]), torch.int8)
    with pytest.raises(SecateurError, match="matrices"):
        pack(torch.ones(3), torch.float32)
    with pytest.raises(SecateurError, match="did you mean"):
        pack(torch.ones(3, 3), torch.float32, "bitmsk")  # type: ignore[arg-type]
    with pytest.raises(SecateurError, match="tile"):
        pack(torch.ones(3, 3), torch.float32, "tile")


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-30, 1e30])
def test_int8_scales_survive_extreme_rows(magnitude: float) -> None:
    w = torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 0.0]]) * magnitude
    back = unpack(pack(w, torch.int8, "bitmask"))
    assert torch.equal(unpack(pack(back, torch.int8, "bitmask")), back)
    assert ((back - w).abs() <= max(magnitude / 127, 2.0**-126) * 0.51).all()


LIES = (
    ("bitmask", "mask", lambda t: t.__setitem__((-1, -1), -1), "beyond the matrix"),
    ("bitmask", "mask", lambda t: t.__setitem__((0, 0), ~t[0, 0]), "offsets"),
    ("bitmask", "offsets", lambda t: t.__setitem__(1, 1 << 40), "offsets"),
    ("columns", "mask", lambda t: t.__setitem__((0, -1), -1), "beyond the matrix"),
    ("csr", "col", lambda t: t.__setitem__(0, 30000), "indices outside"),
    ("csr", "col", lambda t: t.__setitem__(0, -1), "indices outside"),
    ("csr", "col", lambda t: t.__setitem__(1, t[0]), "do not rise"),
    ("csr", "crow", lambda t: t.__setitem__(1, 1 << 40), "rising"),
    ("csr", "crow", lambda t: t.__setitem__(0, 1), "rising"),
    ("tile", "col", lambda t: t.__setitem__(0, 30000), "indices outside"),
)


@pytest.mark.parametrize(("kind", "part", "lie", "words"), LIES)
def test_a_part_that_lies_is_one_error(kind: str, part: str, lie: object, words: str) -> None:
    packed = pack(sparse((50, 50), 0.5, 1), torch.float32, kind, (4, 4) if kind == "tile" else None)  # type: ignore[arg-type]
    verify(packed)
    lie(packed.parts[part])  # type: ignore[operator]
    with pytest.raises(SecateurError, match=words):
        verify(packed, "x")


def test_row_pointers_that_wrap_around_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 64 bits all of their differences are counts; whoever repeats something as often writes out of bounds."""
    w = torch.zeros(4, 50)
    w[3, ::2] = 1
    packed = pack(w, torch.float32, "csr")
    packed.parts["crow"][1:4] = torch.tensor([2**62, 2**63 - 1, -(2**62)])
    assert bool((packed.parts["crow"].diff() >= 0).all())
    monkeypatch.setattr(import_module("secateur.sparse.verify"), "tile_starts", lambda _: pytest.fail("believed"))
    with pytest.raises(SecateurError, match="rising"):
        verify(packed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [50, 53]}, "should have the shape"),
        ({"shape": [1 << 30, 1 << 30]}, "absurdly"),
        ({"shape": [50]}, "two counts"),
        ({"shape": [50, 50.0]}, "two counts"),
        ({"shape": [True, 50]}, "two counts"),
        ({"kind": "bitmsk"}, "did you mean 'bitmask'"),
        ({"kind": 3}, "no kind"),
        ({"dtype": "bf16"}, "float32"),
        ({"dtype": "int8"}, "missing.*scales"),
        ({"kind": "csr"}, "missing.*crow"),
    ],
)
def test_a_header_that_lies_is_one_error(change: dict[str, object], words: str) -> None:
    packed = pack(sparse((50, 50), 0.5, 1), torch.float32, "bitmask")
    with pytest.raises(SecateurError, match=words):
        from_tensors("a", to_tensors(packed, "a"), header(packed) | change)
