"""Silence a router: the experts that were dropped are never chosen, and the weights of the others are
those that a model without them would give. In memory only; removing the handle restores every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.anatomy.ffn import CORRECTIONS
from secateur.anatomy.types import Port, Space


class Silence:
    """A handle on one silenced router."""

    def __init__(self, undo: list[Callable[[], None]]) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Let the router speak again."""
        while self._undo:
            self._undo.pop()()


class _Logits(TorchFunctionMode):
    """While a router runs: what its weight makes is minus infinity for the experts that are gone."""

    def __init__(self, weight: Callable[[], Tensor], dropped: Tensor) -> None:
        super().__init__()
        self._weight, self._dropped = weight, dropped

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul) and self._made(args, kwargs, out):
            out = out.masked_fill(self._dropped.to(out.device), float("-inf"))
        return out

    def _made(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None, out: Any) -> bool:
        weight = self._weight()
        inputs = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
        if not isinstance(out, Tensor) or out.shape[-1] != len(self._dropped):
            return False
        # the weight itself, its transpose, or its copy in another dtype
        return any(a is weight or a._base is weight or a.numel() == weight.numel() for a in inputs)


def silence(module: nn.Module, space: Space, keep: Tensor) -> Silence:
    """Silence the dropped experts of one block's router.

    Args:
        module: the block.
        space: its ``expert`` space.
        keep: bool [experts].
    """
    assert space.silence is not None
    router: Any = module.get_submodule(space.silence)
    dropped = ~keep.reshape(-1).cpu()
    undo: list[Callable[[], None]] = []
    modes: list[_Logits] = []

    def enter(_module: nn.Module, _args: Any) -> None:
        modes.append(_Logits(lambda: router.weight, dropped))
        modes[-1].__enter__()

    def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
        if modes:
            modes.pop().__exit__(None, None, None)

    for port in space.ports:
        if port.tensor in correction(space):
            undo.append(_silence_entries(module, port, dropped))
    undo.append(router.register_forward_pre_hook(enter).remove)
    undo.append(router.register_forward_hook(leave, always_call=True).remove)
    return Silence(undo)


def correction(space: Space) -> tuple[str, ...]:
    """Tensors that are added to the router's scores before it chooses: silenced, not zeroed, by a mask."""
    return tuple(p.tensor for p in space.ports if p.tensor.rpartition(".")[2] in CORRECTIONS)


def _silence_entries(module: nn.Module, port: Port, dropped: Tensor) -> Callable[[], None]:
    owner_name, _, leaf = port.tensor.rpartition(".")
    tensor = getattr(module.get_submodule(owner_name), leaf)
    before = tensor.detach().clone()
    at = dropped.nonzero().reshape(-1).to(tensor.device)
    with torch.no_grad():
        tensor.index_fill_(port.axis, at, float("-inf"))

    def restore() -> None:
        with torch.no_grad():
            tensor.copy_(before)

    return restore
