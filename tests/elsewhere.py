"""A second device that exists on every machine, for tests of code that moves tensors: it computes on the CPU, but
refuses what a GPU would refuse.

A tensor that was moved there (``tensor.to(DEVICE)``) says that it lives on ``DEVICE``, and an operation that mixes it
with one of the CPU raises `Mixed`, as CUDA's kernels do. Allowed across devices, as there, are copies, numbers (tensors
without dimensions, in arithmetic) and indices of the CPU. ``tensor.numpy()`` raises, and so does a generator of the
CPU that is to fill a tensor elsewhere. Results are those of the CPU to the bit where the same kernels run.

    with elsewhere():
        x = torch.randn(3).to(DEVICE)
        x + torch.randn(3)          # Mixed
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

# A type that torch knows and has no kernels for here, and that backward takes on its own thread.
DEVICE = torch.device("lazy:0")
CPU = torch.device("cpu")
aten: Any = torch.ops.aten
_AUTOCAST, _TENSOR = torch.autocast, torch.tensor
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {  # operations whose indices may stay on the CPU
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


class Mixed(RuntimeError):
    """Tensors of two devices in one operation."""


class Elsewhere(Tensor):
    """A tensor that says it lives on ``DEVICE``; ``held`` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE,
            requires_grad=held.requires_grad,
        )  # type: ignore[attr-defined]  # fmt: skip
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held!r})"

    def tolist(self) -> Any:  # type: ignore[override]
        return self.held.tolist()  # as a GPU's tensor gives; torch has it for no subclass

    def data_ptr(self) -> int:
        return self.held.data_ptr()  # tells one tensor's memory from another's

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """What makes tensors there, or moves them there, without having one of there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Tensors can be made on, and moved to, the device given. There is no autocast there: fp32 stays fp32."""
    with _Factories(), patch.object(torch, "autocast", _autocast), patch.object(torch, "tensor", _tensor):
        yield DEVICE


def _tensor(data: Any, *, device: Any = None, **more: Any) -> Tensor:
    made = _TENSOR(data, device=None if _is_there(device) else device, **more)
    return made.to(DEVICE) if _is_there(device) else made


def _autocast(kind: str, *args: Any, enabled: bool = True, **more: Any) -> Any:
    if kind == DEVICE.type and not enabled:
        return nullcontext()
    return _AUTOCAST(kind, *args, enabled=enabled, **more)


def computed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of an operation, on the device it belongs to."""
    if torch.is_inference_mode_enabled():  # which hands on operations made of others whole
        with _Factories():
            if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
    there = [t for t in _tensors(args, kwargs) if isinstance(t, Elsewhere)]
    asked = kwargs.get("device")
    if not there and not _is_there(asked):
        return func(*args, **kwargs)
    if there and func not in COPIES:
        _check(func, args, kwargs)
    if any(isinstance(v, torch.Generator) for v in (*args, *kwargs.values())):
        raise Mixed(f"{func}: a generator of the CPU for a tensor on {DEVICE}")
    plain = {k: CPU if k == "device" and _is_there(v) else v for k, v in kwargs.items()}
    found = _carried_out(func, tree_map(_held, tuple(args)), tree_map(_held, plain))
    if func is aten.copy_.default:
        return args[0]
    stays = bool(there) if asked is None else _is_there(asked)
    if func is aten._to_copy.default:
        found = found.clone() if any(found is t.held for t in there) else found
        return _wrapped(found) if stays else found
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrapped, found)) if stays else found


def _carried_out(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is aten.histc.default and not args[0].is_floating_point():  # CUDA counts integers, too
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _check(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    plain = [t for t in _tensors(args, kwargs) if not isinstance(t, Elsewhere)]
    if func in INDEXED and isinstance(args[0], Elsewhere):
        plain = [t for t in plain if not any(t is i for i in args[1])]
    if wrong := [t for t in plain if t.dim() and t.device.type != "meta"]:
        raise Mixed(f"{func}: tensors on {DEVICE} and, of shape {[tuple(t.shape) for t in wrong]}, on the CPU")
    if plain and isinstance(args[0], Tensor) and not isinstance(args[0], Elsewhere) and func._schema.is_mutable:
        raise Mixed(f"{func}: changes a tensor of the CPU by one on {DEVICE}")


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among the arguments, and in lists of these: an operation's arguments nest no deeper."""
    found = []
    for value in (*args, *kwargs.values()):
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, Tensor):
                found.append(each)
    return found


def _is_there(device: Any) -> bool:
    return device is not None and (device if isinstance(device, torch.device) else torch.device(device)).type == "lazy"


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def _wrapped(value: Any) -> Any:
    return Elsewhere(value) if isinstance(value, Tensor) and not isinstance(value, Elsewhere) else value
