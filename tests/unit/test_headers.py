"""The header reader against the safetensors library: what we accept it reads alike, and nothing else escapes."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from secateur.engine.headers import read_header, read_headers, read_json
from secateur.errors import SecateurError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.ones(2, 5, dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_agrees_with_the_library(file: Path) -> None:
    header = read_header(file)
    raw = file.read_bytes()
    assert header.metadata == {"format": "pt"}
    assert header.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        entry = header.tensors[name]
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        held = bytearray(raw[entry.begin : entry.end])
        assert not held or torch.equal(torch.frombuffer(held, dtype=entry.dtype).reshape(entry.shape), tensor)


def _parts(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _put(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


LIES = [
    ("an impossible shape", lambda h: h["a.weight"].update(shape=[3, -4])),
    ("an impossible shape", lambda h: h["a.weight"].update(shape=[2**62, 2**62])),
    ("an impossible shape", lambda h: h["a.weight"].update(shape=[3, 4.0])),
    ("an impossible shape", lambda h: h["a.weight"].update(shape=[True, 12])),
    ("needs 64 bytes", lambda h: h["a.weight"].update(shape=[4, 4])),
    ("unknown dtype", lambda h: h["a.weight"].update(dtype="F31")),
    ("already quantised", lambda h: h["a.weight"].update(dtype="F8_E4M3")),
    ("impossible offsets", lambda h: h["a.weight"].update(data_offsets=["0", "48"])),
    ("impossible offsets", lambda h: h["a.weight"].update(data_offsets=[0, 48, 96])),
    ("exactly dtype, shape and data_offsets", lambda h: h["a.weight"].pop("shape")),
    ("exactly dtype, shape and data_offsets", lambda h: h.update({"a.weight": 3})),
    ("leaves a gap", lambda h: h.pop("a.weight")),
    ("metadata", lambda h: h.update({"__metadata__": {"step": 3}})),
]


@pytest.mark.parametrize(("says", "lie"), LIES)
def test_a_lying_header_is_refused(file: Path, says: str, lie) -> None:
    header, data = _parts(file)
    lie(header)
    _put(file, header, data)
    with pytest.raises(SecateurError, match=says):
        read_header(file)


def test_overlap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    row = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    _put(path, {"a": row, "b": {**row, "data_offsets": [4, 12]}}, bytes(12))
    with pytest.raises(SecateurError, match="overlaps"):
        read_header(path)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "truncated"),
        (b"\x04\0\0", "truncated"),
        ((2**63).to_bytes(8, "little") + b"{}", "truncated"),
        ((2).to_bytes(8, "little") + b"{", "truncated"),
        ((2).to_bytes(8, "little") + b"[]", "not a table"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "not valid JSON"),
        ((40000).to_bytes(8, "little") + b"[" * 40000, "not valid JSON"),
        ((15).to_bytes(8, "little") + b'{"a":1,"a":1}  ', "appears twice"),
        ((9).to_bytes(8, "little") + b'{"a":NaN}', "NaN"),
    ],
)
def test_what_is_no_header_is_refused(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(SecateurError, match=says):
        read_header(path)


@pytest.mark.parametrize("cut", [-1, 1])
def test_a_file_of_another_length_is_refused(file: Path, cut: int) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[:cut] if cut < 0 else raw + b"\0")
    with pytest.raises(SecateurError, match=r"truncated|longer"):
        read_header(file)


def test_fuzz(file: Path) -> None:
    """Whatever bytes are changed: refused in one sentence, or read just as the safetensors library does."""
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    accepted = 0
    for _ in range(600):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(length)
            match rng.randrange(4):
                case 0:
                    raw[at] = rng.randrange(256)
                case 1:
                    raw[at] = ord(rng.choice('0123456789[]{},":-.eFUI'))
                case 2:
                    del raw[at]
                case _:
                    raw.insert(at, ord(rng.choice("0123456789 ,")))
        file.write_bytes(raw)
        try:
            header = read_header(file)
        except SecateurError:
            continue
        accepted += 1
        with safe_open(file, "pt") as ours:
            assert set(ours.keys()) == set(header.tensors)
            for name, entry in header.tensors.items():
                assert tuple(ours.get_slice(name).get_shape()) == entry.shape
    assert 0 < accepted < 400


def test_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    def says(table: dict[str, str]) -> str:
        index.write_text(json.dumps({"weight_map": table}))
        with pytest.raises(SecateurError) as caught:
            read_headers(tmp_path)
        return str(caught.value)

    good = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index.write_text(json.dumps({"weight_map": good}))
    assert {n: e.shape for n, e in read_headers(tmp_path).items()} == {"a": (2,), "b": (3,)}
    assert "missing" in says({**good, "c": "model-3.safetensors"})
    assert "does not hold it" in says({**good, "c": "model-2.safetensors"})
    assert "says otherwise" in says({"a": "model-2.safetensors", "b": "model-1.safetensors"})
    assert "says otherwise" in says({"a": "model-1.safetensors", "c": "model-2.safetensors"})
    assert "not a safetensors file beside it" in says({"a": "../model-1.safetensors"})
    assert "not a safetensors file beside it" in says({"a": "/etc/passwd"})
    assert "weight_map" in says({})


def test_json_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text in ('{"a": 1, "a": 2}', "[1]", "{", "\x00", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(SecateurError):
            read_json(path)
    path.write_text('{"time_step_limit": [0.0, Infinity]}')  # as Transformers 4 wrote it for Mamba-2 and its hybrids
    assert read_json(path) == {"time_step_limit": [0.0, math.inf]}


def test_the_library_also_refuses_overlap(file: Path) -> None:
    """The oracle of the fuzz test is alive."""
    header, data = _parts(file)
    header["a.weight"]["data_offsets"][1] -= 4
    _put(file, header, data)
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
