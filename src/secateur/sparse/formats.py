"""Packed weights: one matrix, its zeros left out, as a few plain tensors. docs/packed-format.md is the specification.

Kinds: ``bitmask`` (one bit per weight and the non-zeros in the order the kernels read them), ``csr`` (row pointers and
column indices), ``tile`` (kept rectangles), ``columns`` (a bitmask down the columns, whose product skips inputs that
are zero) and ``dense``. Packing is exact: unpacking gives the weights cast to the dtype bit for bit, except that -0.0
becomes +0.0. int8 keeps codes of -127 to 127 and a scale per output row and is exact for its own codes. Scales carry
at most 16 significant bits, so that code times scale is exact in fp32 and packing what was unpacked changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from secateur.errors import SecateurError, unknown
from secateur.sparse.layout import (
    COLUMNS,
    ROWS,
    from_bits,
    from_columns,
    from_lanes,
    popcount,
    to_bits,
    to_columns,
    to_lanes,
    up,
)
from secateur.sparse.native import library

Kind = Literal["bitmask", "csr", "tile", "columns", "dense"]
VERSION = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
CSR_FROM = 0.90  # share of zeros from which column indices may beat a bit per weight
PARTS: dict[str, tuple[str, ...]] = {
    "bitmask": ("mask", "offsets", "values"),
    "columns": ("mask", "offsets", "values"),
    "csr": ("crow", "col", "values"),
    "tile": ("crow", "col", "values"),
    "dense": ("values",),
}


@dataclass(frozen=True, eq=False)
class Packed:
    """One packed matrix.

    Attributes:
        kind: the format.
        shape: (out, in) of the matrix.
        dtype: of the values: fp32, bf16, fp16, or int8 codes with fp32 ``scales`` [out].
        parts: the tensors, by the names in ``PARTS`` and ``scales`` for int8.
        tile: (rows, columns) of a tile; for kind ``tile`` only.
    """

    kind: Kind
    shape: tuple[int, int]
    dtype: torch.dtype
    parts: Mapping[str, Tensor]
    tile: tuple[int, int] | None = None

    @property
    def bytes(self) -> int:
        """What all parts take, in memory as in a file."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def nonzeros(self) -> int:
        """How many weights are stored; for ``dense`` and ``tile``, how many of the stored are not zero."""
        values = self.parts["values"]
        return int(values.count_nonzero()) if self.kind in ("dense", "tile") else values.numel()


def pack(weight: Tensor, dtype: torch.dtype, kind: Kind | None = None, tile: tuple[int, int] | None = None) -> Packed:
    """Packs a matrix [out, in] of any floating dtype; -0.0 is a zero.

    Args:
        weight: the matrix, neither side empty.
        dtype: what to keep: fp32, bf16, fp16 (values beyond its range are refused) or int8 (finite values only).
        kind: the format; None takes ``tile`` when a tile is given, else ``csr`` from 90 % zeros where it is not larger
            than ``bitmask`` (about 94 % in bf16), else ``bitmask``, and ``dense`` where even that would be larger than
            the matrix itself. Fewer bytes were also less time wherever both were timed.
        tile: (rows, columns) of a tile; edges may hold part of one.
    """
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise SecateurError(
            "only matrices of floating-point numbers can be packed",
            received=f"{tuple(weight.shape)} {weight.dtype}",
            works="give a tensor [out, in], experts one by one",
        )
    if kind is not None and kind not in get_args(Kind):
        raise unknown("packed kind", kind, get_args(Kind))
    if (kind == "tile") > (tile is not None) or (tile is not None and min(tile) < 1):
        raise SecateurError("a tile has two sides of at least 1", received=tile, works="give tile=(rows, columns)")
    codes, scales = cast(weight, dtype)
    return encode(codes, scales, kind, tile)


def unpack(packed: Packed) -> Tensor:
    """The matrix [out, in] in its dtype, contiguous; int8 comes back as codes times scales in fp32."""
    codes = decode(packed)
    scales = packed.parts.get("scales")
    return codes if scales is None else codes.float().mul_(scales[:, None])


def cast(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weight in a dtype without negative zeros; for int8 codes and their scales [out]."""
    if dtype not in DTYPES.values():
        raise unknown("packed dtype", dtype, DTYPES)
    weight = weight.detach()
    if dtype == torch.int8:
        return _quantise(weight.float())
    codes = weight.to(dtype)
    if dtype == torch.float16 and bool((codes.isinf() & weight.isfinite()).any()):
        largest = float(weight[weight.isfinite()].abs().max())
        raise SecateurError("weights do not fit into fp16", received=f"{largest:g}", works="bf16 or fp32 hold them")
    return codes.masked_fill(codes == 0, 0), None


def _quantise(w: Tensor) -> tuple[Tensor, Tensor]:
    if not bool(w.isfinite().all()):
        raise SecateurError("int8 needs finite weights", received="inf or nan", works="bf16 or fp32 keep them")
    mantissa, exponent = torch.frexp((w.abs().amax(1) / 127).double())
    scales = torch.ldexp(torch.ceil(mantissa * 65536) / 65536, exponent).float()
    # Subnormal scales lose bits: rows that small are rounded with the smallest normal scale instead.
    scales = scales.clamp(min=2.0**-126).masked_fill_(scales == 0, 1.0)
    return torch.round(w / scales[:, None]).clamp_(-127, 127).to(torch.int8), scales


def encode(codes: Tensor, scales: Tensor | None, kind: Kind | None, tile: tuple[int, int] | None = None) -> Packed:
    """Packs codes [out, in] that are already in their dtype."""
    shape, dtype = (int(codes.shape[0]), int(codes.shape[1])), codes.dtype
    wanted: Kind = kind or ("tile" if tile else _lightest(codes))
    packed = Packed(wanted, shape, dtype, _parts(codes, wanted, tile), tile if wanted == "tile" else None)
    if kind is None and packed.bytes > codes.numel() * codes.element_size():
        packed = Packed("dense", shape, dtype, {"values": codes.contiguous()})
    return packed if scales is None else replace(packed, parts={**packed.parts, "scales": scales})


def _lightest(codes: Tensor) -> Kind:
    (out, width), nonzeros = codes.shape, int(codes.count_nonzero())
    if codes.numel() - nonzeros < CSR_FROM * codes.numel():
        return "bitmask"
    by_index = 8 * (out + 1) + nonzeros * _index(width).itemsize
    by_bit = 8 * (up(out, ROWS) * up(width, COLUMNS) + up(out, ROWS) + 1)
    return "csr" if by_index <= by_bit else "bitmask"


def _index(width: int) -> torch.dtype:
    return torch.int16 if width <= 1 << 15 else torch.int32


def _parts(codes: Tensor, kind: Kind, tile: tuple[int, int] | None) -> dict[str, Tensor]:
    if kind == "dense":
        return {"values": codes.contiguous()}
    if kind == "tile":
        assert tile is not None
        kept = _tiled(codes, tile)
        crow, col = _compressed(kept)
        return {"crow": crow, "col": col, "values": codes[_spread(kept, tile, codes.shape)]}
    if kind == "csr":
        crow, col = _compressed(codes != 0)
        return {"crow": crow, "col": col, "values": codes[codes != 0]}
    if kind == "bitmask" and codes.device.type == "cpu" and library():
        return _by_library(codes.contiguous())
    lanes = to_lanes(codes) if kind == "bitmask" else to_columns(codes)
    nonzero = lanes != 0
    mask = to_bits(nonzero)
    return {"mask": mask, "offsets": starts(popcount(mask).sum(1)), "values": lanes[nonzero]}


def _by_library(codes: Tensor) -> dict[str, Tensor]:
    """The parts of a bitmask as the C library makes them: the same, fifty times as fast."""
    found, (out, width), threads = library(), codes.shape, torch.get_num_threads()
    assert found is not None
    mask = torch.empty(up(out, ROWS), up(width, COLUMNS), dtype=torch.int64)
    offsets = torch.empty(len(mask) + 1, dtype=torch.int64)
    whole = (codes.data_ptr(), codes.element_size(), out, width, mask.data_ptr(), offsets.data_ptr())
    found.secateur_pack(*whole, None, threads)
    # One spare value keeps the address of no values from being null, which asks for the first pass.
    values = torch.empty(int(offsets[-1]) + 1, dtype=codes.dtype)
    found.secateur_pack(*whole, values.data_ptr(), threads)
    return {"mask": mask, "offsets": offsets, "values": values[:-1]}


def starts(counts: Tensor) -> Tensor:
    """Where each run begins, and the total last: int64 [n + 1]."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int64)


def _tiled(codes: Tensor, tile: tuple[int, int]) -> Tensor:
    """Which tiles hold anything: [tile rows, tile columns]."""
    (out, width), (r, c) = codes.shape, _clipped(tile, codes.shape)
    grid = torch.nn.functional.pad(codes != 0, (0, up(width, c) * c - width, 0, up(out, r) * r - out))
    return grid.view(up(out, r), r, up(width, c), c).any(3).any(1)


def _spread(kept: Tensor, tile: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """Kept tiles as kept weights [out, in]."""
    r, c = _clipped(tile, shape)
    return kept.repeat_interleave(r, 0)[: shape[0]].repeat_interleave(c, 1)[:, : shape[1]]


def _clipped(tile: tuple[int, int], shape: Sequence[int]) -> tuple[int, int]:
    """A tile within the matrix: how far it reaches beyond says nothing, and might be a number from a header."""
    return min(tile[0], shape[0]), min(tile[1], shape[1])


def _compressed(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Row pointers (int64) and column indices (int16 where they fit, else int32) of what is True, row by row."""
    return starts(kept.sum(1)), kept.nonzero()[:, 1].to(_index(kept.shape[1]))


def decode(packed: Packed) -> Tensor:
    """The codes [out, in] in the dtype they are stored in."""
    parts, (out, width) = packed.parts, packed.shape
    values = parts["values"]
    if packed.kind == "dense":
        return values.clone()
    found = library() if packed.kind == "bitmask" and values.device.type == "cpu" else None
    if found:
        codes = torch.empty(packed.shape, dtype=packed.dtype)
        addresses = (parts["mask"].data_ptr(), parts["offsets"].data_ptr(), values.data_ptr())
        found.secateur_decode(*addresses, values.element_size(), out, width, codes.data_ptr(), torch.get_num_threads())
        return codes
    if packed.kind in ("bitmask", "columns"):
        nonzero = from_bits(parts["mask"])
        lanes = torch.zeros(nonzero.shape, dtype=packed.dtype, device=values.device)
        lanes[nonzero] = values
        return from_lanes(lanes, packed.shape) if packed.kind == "bitmask" else from_columns(lanes, packed.shape)
    r, c = packed.tile or (1, 1)
    kept = torch.zeros(up(out, r), up(width, c), dtype=torch.bool, device=values.device)
    counts = parts["crow"].diff()
    rows = torch.arange(counts.numel(), device=values.device).repeat_interleave(counts)
    kept[rows, parts["col"].long()] = True
    codes = torch.zeros(packed.shape, dtype=packed.dtype, device=values.device)
    codes[_spread(kept, (r, c), packed.shape)] = values
    return codes


def fused(packs: Sequence[Packed]) -> Packed:
    """One matrix whose outputs are those of all, one after another: for matrices that read the same input.

    Bitmasks are joined as they are where all but the last have a multiple of 16 rows; csr and dense always; anything
    else is decoded and packed again as the first is. Values never change.
    """
    first = packs[0]
    if any(p.shape[1] != first.shape[1] or p.dtype != first.dtype for p in packs):
        received = ", ".join(f"{p.shape} {p.dtype}" for p in packs)
        raise SecateurError("only matrices with the same inputs and dtype fuse", received=received, works="check both")
    scales = torch.cat([p.parts["scales"] for p in packs]) if "scales" in first.parts else None
    shape = (sum(p.shape[0] for p in packs), first.shape[1])
    whole = first.kind != "bitmask" or all(p.shape[0] % 16 == 0 for p in packs[:-1])
    if any(p.kind != first.kind for p in packs) or first.kind in ("tile", "columns") or not whole:
        return encode(torch.cat([decode(p) for p in packs]), scales, first.kind, first.tile)
    parts = {}
    for name in PARTS[first.kind]:
        pieces = [p.parts[name] for p in packs]
        if name in ("offsets", "crow"):
            parts[name] = starts(torch.cat([piece.diff() for piece in pieces]))
        else:
            parts[name] = torch.cat(pieces)
    return replace(first, shape=shape, parts=parts if scales is None else {**parts, "scales": scales})
