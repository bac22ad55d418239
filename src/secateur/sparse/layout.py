"""Order and bits: which weight goes to which lane of a packed word, and booleans to bits and back.

A *word* is 64 weights with one bit each. In the bitmask format it covers 16 rows by 4 columns, ordered as the kernels
eat them: steps of 16 rows by V columns, row after row (V values of one row fill 32 bits: 1 fp32, 2 bf16 or fp16,
4 int8). Bit ``16 V (c // V) + V r + c % V`` belongs to row r, column c of the word. In the column format a word is 64
rows of one column, bit r for row r. Bit 0 is the least significant; bytes are little-endian.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS, COLUMNS, WORD = 16, 4, 64


def per_step(dtype: torch.dtype) -> int:
    """V: how many values of one row share 32 bits."""
    return 4 // dtype.itemsize


def up(n: int, to: int) -> int:
    """How many groups of ``to`` it takes to hold n."""
    return -(-n // to)


def to_lanes(w: Tensor) -> Tensor:
    """Weights [out, in] as words [row blocks, words, 64], zeros beyond the edges."""
    out, width = w.shape
    v, blocks, words = per_step(w.dtype), up(out, ROWS), up(width, COLUMNS)
    padded = torch.nn.functional.pad(w, (0, words * COLUMNS - width, 0, blocks * ROWS - out))
    grid = padded.view(blocks, ROWS, words, COLUMNS // v, v)
    return grid.permute(0, 2, 3, 1, 4).reshape(blocks, words, WORD)


def from_lanes(lanes: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of :func:`to_lanes`: [out, in], contiguous."""
    blocks, words, _ = lanes.shape
    v = per_step(lanes.dtype)
    grid = lanes.view(blocks, words, COLUMNS // v, ROWS, v).permute(0, 3, 1, 2, 4)
    return grid.reshape(blocks * ROWS, words * COLUMNS)[: shape[0], : shape[1]].contiguous()


def to_columns(w: Tensor) -> Tensor:
    """Weights [out, in] as words [in, words, 64] down each column, zeros beyond the last row."""
    out, width = w.shape
    words = up(out, WORD)
    return torch.nn.functional.pad(w.t(), (0, words * WORD - out)).reshape(width, words, WORD)


def from_columns(lanes: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of :func:`to_columns`: [out, in], contiguous."""
    return lanes.reshape(shape[1], lanes.shape[1] * WORD)[:, : shape[0]].t().contiguous()


def to_bits(mask: Tensor) -> Tensor:
    """Booleans [..., 64] as int64 words [...]."""
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    octets = mask.reshape(-1, 8).to(torch.uint8).mul_(place).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int64).reshape(mask.shape[:-1])


def from_bits(words: Tensor) -> Tensor:
    """int64 words [...] as booleans [..., 64]."""
    shift = torch.arange(8, dtype=torch.uint8, device=words.device)
    octets = words.contiguous().view(torch.uint8).reshape(-1, 1)
    return octets.bitwise_right_shift(shift).bitwise_and_(1).bool().reshape(*words.shape, WORD)


def popcount(words: Tensor) -> Tensor:
    """How many bits of each int64 word are set, as int64, a few rows at a time so that no large copy is made."""
    flat, counts = words.reshape(-1), torch.empty(words.numel(), dtype=torch.int64, device=words.device)
    for start in range(0, flat.numel(), 1 << 20):
        x = flat[start : start + (1 << 20)]
        # The textbook reduction by twos, fours and eights; the sign bit is cleared after each arithmetic shift.
        x = x - ((x >> 1) & 0x5555555555555555)
        x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
        counts[start : start + x.numel()] = ((x * 0x0101010101010101) >> 56) & 0xFF
    return counts.reshape(words.shape)


def inside(shape: tuple[int, int], v: int) -> tuple[int, int]:
    """Bits that may be set at the edges of the bitmask format, as int64: in the last row block, in the last word."""
    rows, columns = shape[0] - ROWS * (up(shape[0], ROWS) - 1), shape[1] - COLUMNS * (up(shape[1], COLUMNS) - 1)
    grid = torch.zeros(2, ROWS, COLUMNS, dtype=torch.bool)
    grid[0, :rows], grid[1, :, :columns] = True, True
    lanes = grid.view(2, ROWS, COLUMNS // v, v).permute(0, 2, 1, 3).reshape(2, WORD)
    bottom, right = to_bits(lanes).tolist()
    return bottom, right
