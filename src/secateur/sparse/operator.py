"""The product as a PyTorch operator, for compiled graphs only: an operator written in Python costs ten microseconds.

It takes the parts of the matrix and what a header says, so that a graph holds nothing but tensors and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch import library as operators

from secateur.sparse.formats import PARTS, Packed
from secateur.sparse.kernels import KINDS, LIMIT, TYPES, Handle

SCHEMA = "product(Tensor x, Tensor[] parts, Tensor? bias, int[] facts) -> Tensor"


@cache
def register() -> operators.Library:
    """Makes ``torch.ops.secateur.product`` known, once; it stays known while the process lives."""
    library = operators.Library("secateur", "DEF")
    library.define(SCHEMA)
    library.impl("product", _product, "CPU")
    library.impl("product", _shape, "Meta")
    return library


def facts_of(
    kind: str, dtype: torch.dtype, shape: tuple[int, int], tile: tuple[int, int] | None, limit: int
) -> list[int]:
    """A header as numbers: kind, dtype, out, in, tile (0, 0 for none), limit."""
    return [KINDS.index(kind), TYPES.index(dtype), *shape, *(tile or (0, 0)), limit]


def _product(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, facts: Sequence[int]) -> Tensor:
    kind, dtype, out, width, r, c, limit = facts
    word = KINDS[kind]
    names = PARTS[word] + (("scales",) if TYPES[dtype] == torch.int8 else ())
    packed = Packed(word, (out, width), TYPES[dtype], dict(zip(names, parts, strict=True)), (r, c) if r else None)  # type: ignore[arg-type]
    handle = Handle(packed)
    handle.limit = limit or LIMIT
    y = handle.product(x.reshape(-1, width), None if bias is None else bias.detach().float().contiguous())
    return y.view(*x.shape[:-1], out)


def _shape(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, facts: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], facts[2])
