"""A model's matrices on our kernels, and several that read the same input as one product.

Nothing is copied where it can be helped: a plain matrix's `PackedLinear` holds the very memory of the parameter (so a
head tied to the embedding stays tied), and matrices laid side by side become views of the one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur.engine.host.stand_ins import is_linear
from secateur.sparse.formats import Packed, fused
from secateur.sparse.kernels import TYPES, Handle, row_blocks
from secateur.sparse.layout import ROWS
from secateur.sparse.linear import PackedLinear
from secateur.sparse.step import Product


def to_kernels(model: nn.Module) -> None:
    """Every plain linear layer of a model becomes one on our dense kernel; stacks of experts stay as they are."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            weight: Any = getattr(child, "weight", None)
            bias: Any = getattr(child, "bias", None)
            if is_linear(child) and weight.dtype in TYPES:
                values = (weight if isinstance(child, nn.Linear) else weight.t()).detach().contiguous()
                packed = Packed("dense", (values.shape[0], values.shape[1]), values.dtype, {"values": values})
                setattr(owner, name, PackedLinear(packed, bias))


def product_of(module: PackedLinear) -> Product:
    """One module's matrix and bias."""
    return _product([module.handle()], [module])


def beside(owner: nn.Module, names: Sequence[str]) -> Product:
    """Up to three modules of one owner that read the same input, outputs side by side.

    Where their matrices can lie in one piece (bitmasks of whole row blocks, or dense), they are laid so.
    """
    modules: list[PackedLinear] = [getattr(owner, name) for name in names]
    packs = [module.packed for module in modules]
    first = packs[0]
    alike = all((p.kind, p.dtype) == (first.kind, first.dtype) for p in packs)
    blocks = all(p.shape[0] % ROWS == 0 for p in packs[:-1])
    if not alike or not (first.kind == "dense" or (first.kind == "bitmask" and blocks)):
        return _product([module.handle() for module in modules], modules)
    whole, start = fused(packs), 0
    for name, module in zip(names, modules, strict=True):
        view = PackedLinear(_rows(whole, start, start + module.out_features), module.bias)
        view.limit = module.limit
        setattr(owner, name, view)
        start += module.out_features
    return _product([Handle(whole)], modules)


def _rows(whole: Packed, start: int, end: int) -> Packed:
    """Rows [start, end) as views."""
    if whole.kind == "bitmask":
        return row_blocks(whole, start // ROWS, -(-end // ROWS))
    parts = {name: part[start:end] for name, part in whole.parts.items()}
    return replace(whole, shape=(end - start, whole.shape[1]), parts=parts)


def _product(handles: Sequence[Handle], modules: Sequence[PackedLinear]) -> Product:
    biases = [module.bias for module in modules]
    if all(b is None for b in biases):
        return Product(tuple(handles))
    zeros = [torch.zeros(module.out_features) for module in modules]
    bias = torch.cat([z if b is None else b.detach().float() for z, b in zip(zeros, biases, strict=True)])
    return Product(tuple(handles), bias)
