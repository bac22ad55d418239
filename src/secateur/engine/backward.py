"""Backward: a loss's gradients through a model that may be larger than memory, one block of it there at a time.

    for turn in Backward(model, anatomy, source, ...).turns(windows, loss):
        ...                     # one block, one window: its weights' gradients are complete here

Windows go in groups: forwards through all blocks, with what went into each of them kept; through the head, where the
loss is taken; and back through the blocks from the last to the first, each run again with gradients on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Anatomy, Block
from secateur.engine.heap import give_back
from secateur.engine.host.capture import Captured, capture, finish, hidden_of, move_call, run_block
from secateur.engine.walk import Activations, Source, products_in
from secateur.errors import SecateurError

GROUP = 8  # windows that go there and back together, for which hidden states in front of every block are kept


@dataclass(frozen=True)
class Turn:
    """What one window's loss says of one block.

    Attributes:
        block: its anatomy.
        weights, grads: of its matrices (`Block.matrices`, in that order), shaped as stored. Gradients go with the turn.
        tokens: of the window.
    """

    block: Block
    weights: list[Tensor]
    grads: list[Tensor]
    tokens: int


@dataclass
class Backward:
    """The way back through a model.

    Attributes:
        model: a skeleton whose embedding, norms and head are real; blocks are loaded by ``source`` one at a time.
        anatomy: of this model.
        source: where blocks come from.
        device: where the block being worked on lives.
        dtype: of the blocks' matrix products.
        spill: directory for hidden states that do not fit; None keeps them in memory.
        tick: told how many blocks were passed, there and back, and of how many.
    """

    model: Any
    anatomy: Anatomy
    source: Source
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    spill: Path | None = None
    tick: Callable[[int, int], None] = lambda done, total: None

    def turns(self, windows: Sequence[Tensor], loss: Callable[[int, Tensor], Tensor]) -> Iterator[Turn]:
        """Every block (the last first) with every window of a group, group after group.

        Args:
            windows: token ids [1, length] each.
            loss: what is differentiated, from a window's number and its logits, fp32 [length, vocabulary] on the CPU.

        Raises:
            SecateurError: the model gives no probabilities of tokens (a plain encoder).
        """
        self.model.requires_grad_(False)
        depth, groups = len(self.anatomy.blocks), -(-len(windows) // GROUP)
        done, total = 0, 2 * depth * groups
        fronts = [Activations(self.spill and self.spill / f"front-{i:05d}") for i in range(depth)]

        def passed() -> None:
            nonlocal done
            done += 1
            self.tick(done, total)

        self.tick(0, total)
        try:
            for first in range(0, len(windows), GROUP):
                group = windows[first : first + GROUP]
                captured = capture(self.model, self.anatomy.path, group)
                slopes = [
                    self._slope(ids, x, partial(loss, at))
                    for at, (ids, x) in enumerate(zip(group, self._there(captured, fronts, passed), strict=True), first)
                ]
                yield from self._back(captured, fronts, slopes, passed)
        finally:
            for front in fronts:
                front.clear()

    def _there(self, captured: Captured, fronts: list[Activations], passed: Callable[[], None]) -> list[Tensor]:
        """Forwards; what went into every block goes to its front."""
        ends = captured.inputs
        for i, front in enumerate(fronts):
            self.source.load_block(self.model, i, self.device)
            with torch.no_grad():
                for w, x in enumerate(ends):
                    front.append(x)
                    ends[w] = self._run(i, captured, w, x.to(self.device)).cpu()
            self.source.release_block(self.model, i)
            give_back()
            passed()
        return ends

    def _back(
        self, captured: Captured, fronts: list[Activations], slopes: list[Tensor], passed: Callable[[], None]
    ) -> Iterator[Turn]:
        for i in reversed(range(len(fronts))):
            self.source.load_block(self.model, i, self.device)
            module, block = self._block(i), self.anatomy.blocks[i]
            module.requires_grad_(False)
            weights = [module.get_parameter(m.tensor).requires_grad_(True) for m in block.matrices]
            for w, slope in enumerate(slopes):
                x = fronts[i][w].to(self.device).requires_grad_(True)
                with torch.enable_grad():
                    y = self._run(i, captured, w, x)
                    found = torch.autograd.grad(y, [x, *weights], slope.to(self.device), allow_unused=True)
                slopes[w] = found[0].cpu()
                own = zip(weights, found[1:], strict=True)
                grads = [torch.zeros_like(weight) if grad is None else grad for weight, grad in own]
                del found, own
                yield Turn(block, weights, grads, x.shape[1])
                grads.clear()  # before the next window's come
            for weight in weights:
                weight.requires_grad_(False)
            self.source.release_block(self.model, i)
            fronts[i].clear()
            give_back()
            passed()

    def _slope(self, ids: Tensor, hidden: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss's gradient with respect to what leaves the last block."""
        hidden = hidden.requires_grad_(True)
        with torch.enable_grad():
            logits = getattr(finish(self.model, self.anatomy.path, ids, hidden), "logits", None)
            if logits is None:
                raise SecateurError(
                    f"{type(self.model).__name__} gives no probabilities of tokens, so it has no loss to differentiate",
                    works="what needs no gradient: score wanda or magnitude, method alps, budget atp or uniform",
                )
            (slope,) = torch.autograd.grad(loss(logits[0].float().cpu()), hidden)
        return slope

    def _block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.anatomy.blocks[index].name)

    def _run(self, index: int, captured: Captured, window: int, x: Tensor) -> Tensor:
        with products_in(self.dtype, self.device):
            return hidden_of(run_block(self._block(index), x, move_call(captured.calls[window][index], self.device)))
