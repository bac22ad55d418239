"""A linear layer that stays packed: drop-in for ``torch.nn.Linear``, run by the kernels that skip zeros.

Its buffers are the parts of the format, so that no dense copy is in memory; casting the model's dtype leaves them as
they are, because a packed weight's dtype is part of its format. Under ``torch.compile`` the product is one operator
with a meta implementation; in eager mode the library is called without a detour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.sparse.calibrate import calibrated
from secateur.sparse.formats import PARTS, Packed, fused, pack, unpack
from secateur.sparse.kernels import Handle, levels
from secateur.sparse.operator import facts_of, register

__all__ = ["PackedLinear", "calibrate", "fused", "pack"]


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed. Takes any floating activations and returns their dtype.

    Args:
        packed: the weight [out, in].
        bias: [out], or None. Kept in its own dtype; the kernels add it in fp32.
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        register()
        self.kind, self.dtype, self.tile = packed.kind, packed.dtype, packed.tile
        self.out_features, self.in_features = packed.shape
        for name in self._names():
            self.register_buffer(name, packed.parts[name])
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.limit = 0  # tokens up to which the packed kernel runs; 0: not calibrated
        self._ready: tuple[Handle, Tensor | None] | None = None

    def _names(self) -> tuple[str, ...]:
        return (*PARTS[self.kind], *(("scales",) if self.dtype == torch.int8 else ()))

    @property
    def packed(self) -> Packed:
        """The weight as it is now."""
        parts = {name: self._buffers[name] for name in self._names()}
        shape = (self.out_features, self.in_features)
        return Packed(self.kind, shape, self.dtype, parts, self.tile)  # type: ignore[arg-type]  # no buffer is None

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], unpacked on each access: for reading, not for running."""
        return unpack(self.packed)

    def handle(self) -> Handle:
        """The weight made ready for products, verified at the first call after a change."""
        return self._made()[0]

    def _made(self) -> tuple[Handle, Tensor | None]:
        if self._ready is None:
            handle = Handle(self.packed)
            handle.limit = self.limit or handle.limit
            self._ready = handle, None if self.bias is None else self.bias.detach().float().contiguous()
        return self._ready

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            parts = list(self.packed.parts.values())
            facts = facts_of(self.kind, self.dtype, (self.out_features, self.in_features), self.tile, self.limit)
            return torch.ops.secateur.product(x, parts, self.bias, facts)
        if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, self.weight.to(x.dtype), bias)
        handle, bias = self._ready or self._made()
        if x.dim() == 2:
            return handle.product(x, bias)
        return handle.product(x.reshape(-1, self.in_features), bias).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLinear:
        """Moves parts to other devices, never to another dtype; the bias follows freely."""
        self._ready = None
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.detach()), requires_grad=False)
        for name, part in self._buffers.items():
            assert part is not None
            moved = fn(part)
            self._buffers[name] = moved if moved.dtype == part.dtype else part.to(moved.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ready = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave addresses behind."""
        return self.__dict__ | {"_ready": None}

    def extra_repr(self) -> str:
        words = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{words}, kind={self.kind}, dtype={self.dtype}"


def calibrate(modules: Iterable[nn.Module]) -> None:
    """Measures, once per shape, kind and density, up to how many tokens the packed kernel beats torch, and sets it.

    Activations are taken to have the dtype of the first parameter that belongs to no packed layer, and fp32 where there
    is none: in a model that is the embedding's.
    """
    everything = list(modules)
    packed = [module for module in everything if isinstance(module, PackedLinear)]
    own = (p.dtype for m in everything if not isinstance(m, PackedLinear) for p in m.parameters(recurse=False))
    dtype = torch.bfloat16 if next(own, None) == torch.bfloat16 else torch.float32
    if not levels():
        return
    limits: dict[tuple[object, ...], int] = {}
    for module in packed:
        handle = module.handle()
        key = (module.kind, module.dtype, handle.packed.shape, module.tile, round(handle.packed.bytes, -4))
        if key not in limits:
            limits[key] = calibrated(handle, dtype)
        module.limit = handle.limit = limits[key]
