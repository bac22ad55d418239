"""Capture: what the host feeds its blocks, without copying the host's logic.

A recorder stands in the place of every block, notes its arguments and returns its input. One run of the
host's own forward then yields the first block's input and each block's own masks, rotary tables and positions
(they differ from layer to layer in Gemma, sliding-window and hybrid families). Blocks keep no weights in
this, so it runs on a skeleton whose embedding alone is real.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from secateur.errors import SecateurError


@dataclass
class Call:
    """How the host calls one block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None  # the hidden states' name if they were passed by keyword


@dataclass
class Captured:
    """The first block's inputs, and how every block is called.

    Attributes:
        inputs: per batch, hidden states [batch, length, hidden].
        calls: per batch and block. Equal calls are one object.
        as_tuple: whether blocks answer with a tuple.
    """

    inputs: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    as_tuple: bool = False


class _Recorder(nn.Module):
    """Stands for a block: notes the call and hands its input on."""

    def __init__(self, block: nn.Module, log: list[tuple[Tensor, Call]]) -> None:
        super().__init__()
        # held outside the module registry: parameters of the block must not appear twice
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "log", log)
        object.__setattr__(self, "as_tuple", None)
        object.__setattr__(self, "answer", None)  # hidden states to hand on instead of the input

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(_no_cache(a) for a in args), {k: _no_cache(v) for k, v in kwargs.items()}
        if args and torch.is_tensor(args[0]):
            hidden, call = args[0], Call(args[1:], kwargs, None)
        else:
            key = next((k for k, v in kwargs.items() if torch.is_tensor(v) and v.is_floating_point()), None)
            assert key is not None, "a block was called without hidden states"
            hidden = kwargs[key]
            call = Call(args, {k: v for k, v in kwargs.items() if k != key}, key)
        if self.as_tuple is None:
            object.__setattr__(self, "as_tuple", _answers_tuple(self.block, hidden, call))
        self.log.append((hidden.detach(), call))
        hidden = hidden if self.answer is None else self.answer
        return (hidden,) if self.as_tuple else hidden


def _no_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value


def _answers_tuple(block: nn.Module, hidden: Tensor, call: Call) -> bool:
    """Whether a block answers with a tuple: from its annotation, else from a run on the meta device."""
    annotation = str(inspect.signature(type(block).forward).return_annotation)
    if "tuple" not in annotation.lower() and "Tensor" in annotation:
        return False
    twin = copy.deepcopy(block).to("meta")
    try:
        out = run_block(twin, hidden.to("meta"), _map(call, lambda t: t.to("meta")))
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return "tuple" in annotation.lower() and "Tensor |" not in annotation
    return isinstance(out, tuple)


def _map(value: Any, change: Any) -> Any:
    """Apply ``change`` to every tensor in nested calls, tuples, lists and dicts."""
    if torch.is_tensor(value):
        return change(value)
    if isinstance(value, Call):
        return Call(_map(value.args, change), _map(value.kwargs, change), value.keyword)
    if type(value) in (tuple, list):
        return type(value)(_map(v, change) for v in value)
    if type(value) is dict:
        return {k: _map(v, change) for k, v in value.items()}
    return value


def move_call(call: Call, device: torch.device) -> Call:
    """The call with its tensors on ``device``."""
    return _map(call, lambda t: t.to(device))


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Any:
    """Call a block the way the host does."""
    if call.keyword is None:
        return block(hidden, *call.args, **call.kwargs)
    return block(*call.args, **{call.keyword: hidden}, **call.kwargs)


def hidden_of(output: Any) -> Tensor:
    """A block's hidden states, whether it answers with a tensor or with a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _standing_in(blocks: nn.ModuleList, log: list[tuple[Tensor, Call]]) -> Iterator[list[_Recorder]]:
    originals = list(blocks)
    recorders = [_Recorder(b, log) for b in originals]
    for i, r in enumerate(recorders):
        blocks[i] = r
    try:
        yield recorders
    finally:
        for i, b in enumerate(originals):
            blocks[i] = b


def capture(model: nn.Module, path: str, batches: Sequence[Tensor]) -> Captured:
    """Run the host's forward once per batch with recorders in place of the blocks.

    Args:
        model: embedding, norms and buffers real; blocks may be on the meta device.
        path: module path of the list of blocks.
        batches: token ids [batch, length] each, on any device; what is captured lies on the CPU.

    Raises:
        SecateurError: a forward that does not pass through every block once (such a family cannot be walked).
    """
    base = getattr(model, "base_model", model)
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    out = Captured()
    log: list[tuple[Tensor, Call]] = []
    accepts = inspect.signature(type(base).forward).parameters
    extra = {"use_cache": False} if "use_cache" in accepts or "kwargs" in accepts else {}
    with torch.no_grad(), _standing_in(blocks, log) as recorders:
        for ids in batches:
            log.clear()
            base(input_ids=ids.to(_front(model)), **extra)
            if len(log) != len(blocks):
                raise SecateurError(
                    f"{type(model).__name__} does not call each of its {len(blocks)} blocks once in a forward pass",
                    received=f"{len(log)} calls",
                    works="score it by magnitude, which needs no text",
                )
            out.inputs.append(log[0][0].cpu())
            calls = [c for _, c in log]
            if out.calls:
                calls = [_shared(c, first) for c, first in zip(calls, out.calls[0], strict=True)]
            out.calls.append(calls)
        out.as_tuple = bool(recorders and recorders[0].as_tuple)
    return out


def finish(model: Any, path: str, ids: Tensor, hidden: Tensor) -> Any:
    """What the host makes of a batch whose last block gives these hidden states; gradients pass through.

    Args:
        model, path: as for `capture`; everything outside the blocks real.
        ids: token ids [batch, length].
        hidden: [batch, length, hidden].
    """
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    with _standing_in(blocks, []) as recorders:
        device = _front(model)
        object.__setattr__(recorders[-1], "answer", hidden.to(device))
        return model(input_ids=ids.to(device), use_cache=False)


def _front(model: Any) -> torch.device:
    """Where the host expects tokens: where its embedding lies."""
    return model.get_input_embeddings().weight.device


def _shared(call: Call, first: Call) -> Call:
    """The first batch's call if this one is equal to it (masks and rotary tables of full windows are)."""
    return first if _equal(call.args, first.args) and _equal(call.kwargs, first.kwargs) else call


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return bool(a == b) if isinstance(a, int | float | str | bool | type(None)) else False
