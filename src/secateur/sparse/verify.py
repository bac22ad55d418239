"""Packed weights in and out of files, and the checks that let a kernel read them without looking.

Whatever a file says is compared with what its tensors can bear, sizes first and contents after, so that nothing is
allocated from a number in a header and no index leads out of a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from secateur.errors import SecateurError, unknown
from secateur.sparse.formats import DTYPES, PARTS, Kind, Packed, starts
from secateur.sparse.layout import COLUMNS, ROWS, WORD, inside, per_step, popcount, up

LARGEST = 1 << 40  # weights in one matrix
Header = Mapping[str, Any]


def header(packed: Packed) -> dict[str, Any]:
    """What the tensors alone do not say, as plain JSON: kind, shape, dtype, and the tile where there is one."""
    words = {dtype: word for word, dtype in DTYPES.items()}
    said: dict[str, Any] = {"kind": packed.kind, "shape": list(packed.shape), "dtype": words[packed.dtype]}
    return said | ({"tile": list(packed.tile)} if packed.tile else {})


def to_tensors(packed: Packed, prefix: str) -> dict[str, Tensor]:
    """The parts under ``prefix.part``, contiguous, for a safetensors file."""
    return {f"{prefix}.{name}": part.contiguous() for name, part in packed.parts.items()}


def from_tensors(prefix: str, tensors: Mapping[str, Tensor], header: Header) -> Packed:
    """The matrix that :func:`to_tensors` and :func:`header` wrote, verified. Other tensors may lie beside its parts."""
    kind, dtype = _word(header, "kind", get_args(Kind), prefix), _word(header, "dtype", tuple(DTYPES), prefix)
    shape = _pair(header.get("shape"), "shape", prefix)
    tile = _pair(header.get("tile"), "tile", prefix) if kind == "tile" else None
    names = PARTS[kind] + (("scales",) if dtype == "int8" else ())
    missing = [name for name in names if f"{prefix}.{name}" not in tensors]
    if missing:
        raise _broken(prefix, "parts are missing", ", ".join(missing))
    parts = {name: tensors[f"{prefix}.{name}"] for name in names}
    packed = Packed(kind, shape, DTYPES[dtype], parts, tile)  # type: ignore[arg-type]  # checked against Kind above
    verify(packed, prefix)
    return packed


def _word(header: Header, word: str, known: tuple[str, ...], name: str) -> str:
    said = header.get(word)
    if not isinstance(said, str):
        raise _broken(name, f"the header has no {word}", said)
    if said not in known:
        raise unknown(f"{word} of packed weights", said, known)
    return said


def _pair(said: object, word: str, name: str) -> tuple[int, int]:
    counts = [n for n in said if type(n) is int and n > 0] if isinstance(said, list | tuple) else []
    if len(counts) != 2 or len(said) != 2:  # type: ignore[arg-type]  # a list, or counts were empty
        raise _broken(name, f"{word} is not two counts of at least 1", said)
    a, b = counts
    if max(a, b) >= 1 << 31 or a * b > LARGEST:
        raise _broken(name, f"{word} is absurdly large", said)
    return a, b


def _broken(name: str, wrong: str, received: object) -> SecateurError:
    return SecateurError(
        f"packed weights {name!r} are broken: {wrong}", received=received, works="pack the model again"
    )


def verify(packed: Packed, name: str = "weights") -> None:
    """Raises one SecateurError unless every part fits every other: types, lengths, offsets, bits, indices, scales.

    Args:
        packed: what to check; its sizes are compared before its contents are read.
        name: how the error calls it.
    """
    _pair(list(packed.shape), "shape", name)
    v, (out, width) = packed.parts, packed.shape
    words = PARTS[packed.kind] + (("scales",) if packed.dtype == torch.int8 else ())
    if set(v) != set(words):
        raise _broken(name, "wrong parts", ", ".join(sorted(v)))
    for part, tensor in v.items():
        if not tensor.is_contiguous() or tensor.layout != torch.strided:
            raise _broken(name, f"{part} is not contiguous", tuple(tensor.stride()))
    _typed(v["values"], (packed.dtype,), 2 if packed.kind == "dense" else 1, f"{name}.values")
    if packed.kind == "dense":
        _sized(v["values"], (out, width), f"{name}.values")
    elif packed.kind in ("bitmask", "columns"):
        _masked(packed, name)
    else:
        _indexed(packed, name)
    if packed.dtype == torch.int8:
        _typed(v["scales"], (torch.float32,), 1, f"{name}.scales")
        _sized(v["scales"], (out,), f"{name}.scales")
        if not bool((v["scales"].isfinite() & (v["scales"] > 0)).all()):
            raise _broken(name, "scales are not all finite and above 0", "see the file")


def _typed(part: Tensor, dtypes: tuple[torch.dtype, ...], dims: int, name: str) -> None:
    if part.dtype not in dtypes or part.dim() != dims:
        raise _broken(name, f"not {dims}-dimensional {' or '.join(map(str, dtypes))}", f"{part.dim()}-d {part.dtype}")


def _sized(part: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(part.shape) != shape:
        raise _broken(name, f"should have the shape {shape}", tuple(part.shape))


def _masked(packed: Packed, name: str) -> None:
    (out, width), mask, offsets = packed.shape, packed.parts["mask"], packed.parts["offsets"]
    bitmask = packed.kind == "bitmask"
    lines, words = (up(out, ROWS), up(width, COLUMNS)) if bitmask else (width, up(out, WORD))
    _typed(mask, (torch.int64,), 2, f"{name}.mask")
    _sized(mask, (lines, words), f"{name}.mask")
    _typed(offsets, (torch.int64,), 1, f"{name}.offsets")
    _sized(offsets, (lines + 1,), f"{name}.offsets")
    if bitmask:
        bottom, right = inside(packed.shape, per_step(packed.dtype))
        stray = bool((mask[-1] & ~bottom).any()) or bool((mask[:, -1] & ~right).any())
    else:
        left = out - WORD * (words - 1)
        stray = left < WORD and bool((mask[:, -1] >> left).any())
    if stray:
        raise _broken(name, "mask bits are set beyond the matrix", packed.shape)
    if not torch.equal(offsets, starts(popcount(mask).sum(1))):
        raise _broken(name, "offsets do not count the bits of the mask", "see the file")
    _sized(packed.parts["values"], (int(offsets[-1]),), f"{name}.values")


def _indexed(packed: Packed, name: str) -> None:
    (out, width), (r, c) = packed.shape, packed.tile or (1, 1)
    _pair([r, c], "tile", name)
    crow, col, lines, across = packed.parts["crow"], packed.parts["col"], up(out, r), up(width, c)
    _typed(crow, (torch.int64,), 1, f"{name}.crow")
    _sized(crow, (lines + 1,), f"{name}.crow")
    _typed(col, (torch.int16, torch.int32), 1, f"{name}.col")
    # Compared, not subtracted: differences of numbers from a file may wrap around.
    if int(crow[0]) != 0 or int(crow[-1]) != col.numel() or bool((crow[1:] < crow[:-1]).any()):
        raise _broken(f"{name}.crow", "not rising from 0 to the number of indices", col.numel())
    if col.numel() and not 0 <= int(col.min()) <= int(col.max()) < across:
        raise _broken(f"{name}.col", f"indices outside 0 to {across - 1}", f"{int(col.min())} to {int(col.max())}")
    rises = col.long().diff() > 0
    begins = crow[1:-1]
    begins = begins[(begins > 0) & (begins < col.numel())]
    rises[begins - 1] = True
    if not bool(rises.all()):
        raise _broken(f"{name}.col", "indices of a row do not rise", "see the file")
    _sized(packed.parts["values"], (int(tile_starts(packed)[-1]),), f"{name}.values")


def tile_starts(packed: Packed) -> Tensor:
    """Where the values of each row of tiles begin, and their number last: int64 [tile rows + 1]. For csr, ``crow``."""
    (out, width), (r, c) = packed.shape, packed.tile or (1, 1)
    crow, col, lines, across = packed.parts["crow"], packed.parts["col"], up(out, r), up(width, c)
    # All tiles are c wide but those of the last column, and r high but those of the last row.
    widths = crow.diff() * c
    rows = torch.arange(lines, device=crow.device).repeat_interleave(crow.diff())
    widths.index_add_(0, rows, (col == across - 1).long() * (width - across * c))
    heights = torch.full_like(widths, r)
    heights[-1] = out - r * (lines - 1)
    return starts(widths * heights)
