"""Products with packed matrices: y = x W^T, by kernels that skip zeros, or by torch where they are not built.

The kernels are a small C library (csrc/) that is loaded with ctypes: a call costs about two microseconds, and threads
are torch's own. Whether it is there, and for which instructions, is asked once. ``SECATEUR_NO_KERNELS=1`` hides it.

A :class:`Handle` is one matrix made ready: verified once, its addresses written down. Up to ``limit`` tokens go
through the packed kernel; more are multiplied by torch, panel by panel, with as many rows unpacked at a time as fit
a cache. Where the library is missing, the handle holds the matrix in torch's CSR (from 90 % zeros) or dense.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from secateur.errors import SecateurError, unknown
from secateur.sparse.formats import CSR_FROM, Packed, decode, unpack
from secateur.sparse.layout import ROWS, up
from secateur.sparse.native import LEVELS, available, levels, library, status, why_missing
from secateur.sparse.verify import tile_starts, verify

__all__ = ["Handle", "available", "levels", "library", "row_blocks", "status", "why_missing"]
KINDS = ("bitmask", "csr", "tile", "columns", "dense")
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
LIMIT = 16  # tokens up to which the packed kernel runs where nothing was calibrated
PANEL = 1 << 20  # weights unpacked at a time
WIDEST_PLANES = 1 << 16  # inputs up to which sums of int8 products fit 32 bits


class _Matrix(ctypes.Structure):
    """``Matrix`` of csrc/matrix.h. Addresses are plain integers; the handle keeps the tensors they point into."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("type", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "tile_rows", "tile_columns", "count")),
        *((name, ctypes.c_void_p) for name in ("values", "mask", "starts", "crow", "col")),
        ("col_bytes", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    )


class Handle:
    """One packed matrix made ready for products. Keeps its tensors alive; not to be changed or moved.

    Args:
        packed: the matrix, on the CPU; it is verified here.
        level: a forced instruction level, else the best there is.
    """

    def __init__(self, packed: Packed, level: str | None = None) -> None:
        verify(packed)
        if any(part.device.type != "cpu" for part in packed.parts.values()):
            received = packed.parts["values"].device
            raise SecateurError("packed products run on the CPU only", received=received, works="move it there")
        if level is not None and level not in levels():
            raise unknown("kernel level", level, levels() or ("none: " + why_missing(),))
        self.packed = packed
        self.limit = LIMIT
        self._level = LEVELS.index(level or available() or "portable")
        self._library = library()
        self._kept = {name: _aligned(part) for name, part in packed.parts.items()}
        self._plain: Callable[[Tensor], Tensor] | None = None
        if self._library:
            self._matrix = self._described()
            self._address = ctypes.addressof(self._matrix)

    @property
    def address(self) -> int:
        """Where the library finds the matrix; only where it is built."""
        return self._address

    @property
    def level(self) -> int:
        """The instruction level, as a place in ``LEVELS``."""
        return self._level

    def _described(self) -> _Matrix:
        packed, kept = self.packed, self._kept
        (rows, columns), (r, c) = packed.shape, packed.tile or (1, 1)
        if packed.kind in ("csr", "tile"):
            kept["starts"] = tile_starts(packed)
        if packed.dtype == torch.int8 and columns <= WIDEST_PLANES and packed.kind in ("bitmask", "dense"):
            kept["sums"] = _row_sums(packed)

        def at(name: str) -> int | None:
            return kept[name].data_ptr() if name in kept else None

        return _Matrix(
            kind=KINDS.index(packed.kind),
            type=TYPES.index(packed.dtype),
            rows=rows,
            columns=columns,
            tile_rows=r,
            tile_columns=c,
            count=kept["values"].numel(),
            values=at("values"),
            mask=at("mask"),
            starts=at("starts") or at("offsets"),
            crow=at("crow"),
            col=at("col"),
            col_bytes=kept["col"].element_size() if "col" in kept else 0,
            scales=at("scales"),
            sums=at("sums"),
        )

    def product(self, x: Tensor, bias: Tensor | None = None, threads: int | None = None) -> Tensor:
        """x [tokens, in] times the matrix plus bias: [tokens, out] in x's dtype (fp32 or bf16; others through fp32).

        Args:
            x: inputs on the CPU.
            bias: fp32 [out], or None.
            threads: how many to use; torch's own number by default.

        Raises:
            SecateurError: inputs of another width, which the library would read beyond.
        """
        if x.dim() != 2 or x.shape[1] != self.packed.shape[1] or not x.is_floating_point():
            raise SecateurError(
                "inputs do not fit the matrix",
                received=f"{tuple(x.shape)} {x.dtype}",
                works=f"give [tokens, {self.packed.shape[1]}]",
            )
        if x.dtype not in (torch.float32, torch.bfloat16):
            return self.product(x.float(), bias, threads).to(x.dtype)
        tokens = x.shape[0]
        if not self._library:
            return self._through_torch(x, bias)
        if tokens > self.limit:
            return self.by_panels(x, bias, threads)
        return self.direct(x, bias, threads)[0]

    def direct(self, x: Tensor, bias: Tensor | None = None, threads: int | None = None) -> tuple[Tensor, int]:
        """The packed kernel whatever the number of tokens; and, for kind ``columns``, how many products it took."""
        x = x.contiguous()
        y = x.new_empty(x.shape[0], self.packed.shape[0])
        count = self._library.secateur_product(  # type: ignore[union-attr]  # callers looked
            self._address,
            x.data_ptr(),
            x.dtype == torch.bfloat16,
            x.shape[0],
            y.data_ptr(),
            None if bias is None else bias.data_ptr(),
            self._level,
            threads or torch.get_num_threads(),
        )
        if count < 0:
            raise MemoryError("no memory for the inputs of a packed product")
        return y, count

    def by_panels(self, x: Tensor, bias: Tensor | None = None, threads: int | None = None) -> Tensor:
        """torch's dense product with a few rows of the matrix at a time, so that it never is in memory whole."""
        packed, (rows, columns) = self.packed, self.packed.shape
        bf16 = x.dtype == torch.bfloat16 and packed.dtype in (torch.bfloat16, torch.int8)
        inputs = x if bf16 or x.dtype == torch.float32 else x.float()
        scales = packed.parts.get("scales")
        if packed.kind == "dense" and packed.dtype == inputs.dtype:
            y = inputs @ packed.parts["values"].t()
        else:
            y = inputs.new_empty(x.shape[0], rows)
            height = ROWS if packed.kind == "bitmask" else packed.tile[0] if packed.tile else 1
            lines = up(rows, height)
            step = lines if packed.kind == "columns" else max(1, PANEL // (columns * height))
            for line in range(0, lines, step):
                last = min(line + step, lines)
                panel = inputs.new_empty(min(last * height, rows) - line * height, columns)
                self.fill(panel, line, last, threads)
                torch.mm(inputs, panel.t(), out=y[:, line * height : line * height + panel.shape[0]])
        if scales is not None:
            y = y * scales  # fp32, and so is what follows
        if bias is not None:
            y = y + bias
        return y.to(x.dtype)

    def fill(self, panel: Tensor, line: int, last: int, threads: int | None = None) -> None:
        """Writes lines [line, last) (16 rows, a row of tiles, a row) into a panel, int8 codes without their scales."""
        self._library.secateur_unpack(  # type: ignore[union-attr]  # callers looked
            self._address,
            panel.data_ptr(),
            panel.dtype == torch.bfloat16,
            line,
            last,
            self._level,
            threads or torch.get_num_threads(),
        )

    def _through_torch(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._plain is None:
            self._plain = _plain(self.packed)
        y = self._plain(x)
        return y if bias is None else y + bias.to(y.dtype)


def _aligned(part: Tensor) -> Tensor:
    """The tensor itself, or a copy where a file's offsets put it at an odd address."""
    return part.clone() if part.numel() and part.data_ptr() % part.element_size() else part


def _row_sums(packed: Packed) -> Tensor:
    """The sum of each row's int8 codes, int32 [out]; 4096 rows at a time."""
    if packed.kind == "dense":
        return packed.parts["values"].sum(1, dtype=torch.int32)
    sums = []
    for first in range(0, up(packed.shape[0], ROWS), 256):
        sums.append(decode(row_blocks(packed, first, first + 256)).sum(1, dtype=torch.int32))
    return torch.cat(sums)


def row_blocks(packed: Packed, first: int, last: int) -> Packed:
    """Row blocks [first, last) of a bitmask as a matrix of its own; parts are views."""
    parts = packed.parts
    offsets = parts["offsets"][first : last + 1]
    rows = min(last * ROWS, packed.shape[0]) - first * ROWS
    some = {
        "mask": parts["mask"][first:last],
        "offsets": offsets - offsets[0],
        "values": parts["values"][int(offsets[0]) : int(offsets[-1])],
    }
    if "scales" in parts:
        some["scales"] = parts["scales"][first * ROWS : first * ROWS + rows]
    return replace(packed, shape=(rows, packed.shape[1]), parts=some)


def _plain(packed: Packed) -> Callable[[Tensor], Tensor]:
    """The product through torch: its CSR from 90 % zeros, dense below. Int8 becomes fp32."""
    dense = unpack(packed)
    if dense.count_nonzero() <= (1 - CSR_FROM) * dense.numel():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch's CSR is in beta, once a process
            matrix = dense.float().to_sparse_csr()
        return lambda x: (matrix @ x.float().t()).t().to(x.dtype)
    casts = {dense.dtype: dense}

    def multiply(x: Tensor) -> Tensor:
        if x.dtype not in casts:
            casts[x.dtype] = dense.to(x.dtype)
        return x @ casts[x.dtype].t()

    return multiply
