"""Packed products against the dense product in double precision, at every level, thread count, kind and dtype."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import SecateurError
from secateur.sparse import pack, unpack
from secateur.sparse.formats import DTYPES, PARTS
from secateur.sparse.kernels import Handle, available, levels, status, why_missing
from secateur.sparse.linear import PackedLinear

KINDS = tuple(PARTS)
DENSITIES = [0.0, 0.02, 0.3, 0.5, 0.9, 1.0]
built = pytest.mark.skipif(available() is None, reason=f"no kernels: {why_missing()}")


def sparse(shape: tuple[int, int], density: float, seed: int) -> Tensor:
    """Random weights of which about ``density`` are not zero; some rows are empty."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < density)
    return w * (torch.rand(shape[0], 1, generator=g) < 0.9)


def worst(y: Tensor, x: Tensor, w: Tensor, planes: bool = False) -> float:
    """The largest error relative to the sum of the products' sizes, which is what rounding is relative to.

    With two planes of 8-bit inputs it is relative to the sum of the weights times the token's largest input.
    """
    exact, size = x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t()
    error = (y.double() - exact).abs()
    assert (error[size == 0] == 0).all() or planes, "something came from nothing"
    if planes:
        size = x.double().abs().amax(1, keepdim=True) * w.double().abs().sum(1)
    return float((error / size.clamp(min=1e-300)).max())


def allowed(dtype: str, x: Tensor) -> float:
    """1e-5 in fp32. Outputs in bf16 are rounded to 8 bits, with int8 panels twice. Planes: half of 1 / (127 * 254)."""
    if x.dtype == torch.bfloat16:
        return 2.0**-7 if dtype == "int8" else 2.0**-8 + 1e-5
    return 1.6e-5 if dtype == "int8" else 1e-5


@built
@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 100),
    st.integers(1, 150),
    st.sampled_from(DENSITIES),
    st.sampled_from(KINDS),
    st.sampled_from(list(DTYPES)),
    st.integers(1, 18),
    st.integers(1, 8),
    st.integers(0, 99999),
)
def test_products_are_the_dense_product(
    out: int, width: int, density: float, kind: str, dtype: str, tokens: int, threads: int, seed: int
) -> None:
    tile = (1 + seed % 20, 1 + seed % 18) if kind == "tile" else None
    packed = pack(sparse((out, width), density, seed), DTYPES[dtype], kind, tile)  # type: ignore[arg-type]
    w = unpack(packed)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    x = x.bfloat16() if seed % 3 == 0 else x
    for level in levels():
        handle = Handle(packed, level)
        for y in (handle.direct(x, None, threads)[0], handle.by_panels(x, None, threads)):
            assert y.shape == (tokens, out) and y.dtype == x.dtype
            assert worst(y, x, w, dtype == "int8") <= allowed(dtype, x), level


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(list(DTYPES)), st.integers(1, 40), st.integers(0, 9999))
def test_whatever_is_built_the_product_is_right(kind: str, dtype: str, tokens: int, seed: int) -> None:
    packed = pack(sparse((33, 50), 0.3, seed), DTYPES[dtype], kind, (4, 8) if kind == "tile" else None)  # type: ignore[arg-type]
    x = torch.randn(tokens, 50)
    assert worst(Handle(packed).product(x), x, unpack(packed), dtype == "int8") <= allowed(dtype, x)


@built
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_zero_inputs_are_skipped_and_counted(dtype: str) -> None:
    """EIE's promise (arXiv 1602.01528): as many products as there are pairs of non-zero weight and input."""
    w = sparse((130, 70), 0.3, 5)
    packed = pack(w, DTYPES[dtype], "columns")
    for share in (0.0, 0.1, 0.5, 1.0):
        x = torch.randn(3, 70) * (torch.rand(3, 70) < share)
        for level in levels():
            y, macs = Handle(packed, level).direct(x, None, 2)
            codes = unpack(packed) != 0
            assert macs == sum(int((codes & (row != 0)).sum()) for row in x)
            assert worst(y, x, unpack(packed)) <= allowed("fp32", x)


@built
def test_a_stray_inf_stays_where_it_belongs() -> None:
    """An infinite input spoils its own token; an infinite weight its own row; lanes do not mix."""
    w = sparse((40, 30), 0.5, 1)
    w[7, 3], w[:, 4] = float("inf"), 1.0
    x = torch.ones(3, 30)
    x[1, 4] = float("inf")
    for kind in KINDS:
        packed = pack(w, torch.float32, kind, (4, 4) if kind == "tile" else None)  # type: ignore[arg-type]
        y = Handle(packed).direct(x)[0]
        assert y[1].isinf().all() or y[1].isnan().any()
        assert (~y[[0, 2]].isfinite()).sum(0).nonzero().flatten().tolist() == [7], kind


def test_inputs_that_do_not_fit_are_refused() -> None:
    packed = pack(torch.ones(4, 6), torch.float32)
    for call in (Handle(packed).product, PackedLinear(packed)):
        with pytest.raises(SecateurError, match=r"give \[tokens, 6\]"):
            call(torch.ones(2, 5))
    with pytest.raises(SecateurError, match="kernel level"):
        Handle(packed, "avx1024")


def test_without_the_library_everything_goes_through_torch() -> None:
    code = (
        "import torch; from secateur.sparse import pack, unpack; from secateur.sparse.kernels import *;"
        "assert available() is None and levels() == () and 'SECATEUR_NO_KERNELS' in status(), status();"
        "w = torch.randn(20, 30) * (torch.rand(20, 30) < 0.1); x = torch.randn(5, 30);"
        "p = [pack(w, torch.float32, k) for k in ('bitmask', 'csr', 'columns', 'dense')];"
        "p += [pack(w, torch.bfloat16, 'csr'), pack(w, torch.int8, 'csr'), pack(w, torch.float32, tile=(4, 4))];"
        "[torch.testing.assert_close(Handle(q).product(x), x @ unpack(q).float().t(), atol=2e-2, rtol=1e-2) for q in p]"
    )
    environment = os.environ | {"SECATEUR_NO_KERNELS": "1"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_status_is_one_line_that_says_what_runs() -> None:
    assert "\n" not in status()
    assert (available() or "missing") in status()
