"""Where the cliff is: perplexity against sparsity, and the largest sparsity that stays within a bound.

The model is held whole in memory. Evidence is gathered once, on the dense model's own activations ("dense-stream");
every sparsity is then decided from it, masked, measured on held-out text and undone. The run itself prunes block by
block, each block fed by the pruned ones before it, so its perplexity can differ from the curve's; a bound is
therefore verified by pruning for real before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.engine.probes import walked
from secateur.engine.store import Store
from secateur.engine.text import documents, pack, test_windows
from secateur.engine.walk import Visit, running_as
from secateur.errors import SecateurError
from secateur.measure.perplexity import perplexity
from secateur.methods.base import Amount
from secateur.report.model import Curve, CurvePoint
from secateur.stage import Conditions, Nowhere, Stage
from secateur.step import Step
from secateur.words import amount_word

if TYPE_CHECKING:
    from secateur.run import _Run

LEVELS = tuple(Decimal(n) / 10 for n in range(8))  # 0 to 70 %
FINEST = 128  # a bound is bisected to 1 / FINEST of the units
TRIES = 4  # how often a sparsity that fails for real is lowered
WINDOWS, LENGTH = 8, 512  # of the builtin test text: what a bound is verified on
CURVE_WINDOWS = 4  # a curve shows where the cliff is; its points share their windows, so fewer tell them apart


@dataclass(frozen=True)
class Found:
    """A step at its largest sparsity within a bound, how it was found, and what to tell."""

    step: Step
    curve: Curve
    notes: tuple[str, ...] = ()


class _Held:
    """A store whose model is in memory already: walks find every block where it is."""

    def __init__(self, store: Store, model: nn.Module) -> None:
        self._store, self._model = store, model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def skeleton(self) -> nn.Module:
        return self._model

    def load_rest(self, model: nn.Module, device: Any) -> None:
        return None

    def release_rest(self, model: nn.Module) -> None:
        return None

    def load_block(self, model: nn.Module, index: int, device: Any) -> None:
        return None

    def release_block(self, model: nn.Module, index: int) -> None:
        return None


class Dial:
    """A model that can be set to any keep of one step, from one set of dense-stream evidence.

    Args:
        store: the model before the step.
        step: what is turned; units are masked, which is the same function as cutting them.
        conditions: as for a `Stage`.
        windows: test text, int64 [windows, length].
    """

    def __init__(self, store: Store, step: Step, number: int, conditions: Conditions, windows: Tensor) -> None:
        self.model: Any = store.skeleton()
        store.load_whole(self.model, conditions.device)
        self.step = replace(step, apply="mask", target=None, at_most_worse=None, keep=step.keep or "1.0")
        self.stage = Stage(_Held(store, self.model), self.step, number, conditions)  # type: ignore[arg-type]
        self.windows, self.dtype = windows, conditions.dtype
        self.dense = [{k: v.clone() for k, v in b.state_dict().items()} for b in self.stage.blocks]
        self._visits: list[Visit] = []
        self._perplexities: dict[Decimal, float] = {}
        self._layers: Tensor | None = None

    def perplexity(self, sparsity: Decimal) -> float:
        """Perplexity with this share of units (or weights) masked."""
        if sparsity not in self._perplexities:
            self._turn(sparsity)
            self._perplexities[sparsity] = self._measure()
        return self._perplexities[sparsity]

    def measured(self) -> dict[Decimal, float]:
        """Every perplexity measured so far, by sparsity."""
        return dict(self._perplexities)

    def sequential(self, sparsity: Decimal) -> float:
        """Perplexity after pruning for real, block by block on the pruned model's own activations."""
        self.restore()
        keep = amount_word(Amount(share=1 - sparsity))
        stage = Stage(self.stage.store, replace(self.step, keep=keep), self.stage.number, self.stage.at)
        stage.run(Nowhere())
        value = self._measure()
        for handle in stage.silenced:
            handle.remove()
        self.restore()
        return value

    def restore(self) -> None:
        """The dense weights again."""
        for handle in self.stage.silenced:
            handle.remove()
        self.stage.silenced.clear()
        with torch.no_grad():
            for block, dense in zip(self.stage.blocks, self.dense, strict=True):
                for name, value in block.state_dict().items():
                    value.copy_(dense[name])

    def _turn(self, sparsity: Decimal) -> None:
        self.restore()
        if sparsity == 0:
            return
        amount = Amount(share=1 - sparsity)
        if self.step.space == "layer":
            plan, counts = self.stage.choose_layers(amount), {}
        else:
            plan, counts = None, self.stage.counts(amount)
            self._gather()
        for visit in self._visits or self.stage.visits((), "layers"):
            self.stage.prune_block(visit, counts, plan)

    def _gather(self) -> None:
        if not self._visits:
            needs = self.stage.parts.needs
            told = self.stage.whole.tell(needs)
            self._visits = list(self.stage.visits(walked(needs), "dense evidence", dense=True, told=told))

    def _measure(self) -> float:
        with running_as(self.model, self.dtype):
            return perplexity(self.model, self.windows).value


def dial_of(run: _Run, store: Store, step: Step, number: int, windows: int) -> Dial:
    """A dial on so many windows of the builtin test text, with the run's conditions."""
    if run.tokenizer is None:
        raise SecateurError(
            "perplexity cannot be measured: the model has no tokenizer",
            received=run.recipe.model,
            works="give keep or sparsity instead of --at-most-worse",
        )
    text = test_windows(pack(run.tokenizer, documents("builtin", "test")), windows, LENGTH)
    return Dial(store, step, number, run.conditions(), text)


def curve_step(step: Step) -> Step:
    """What a step's curve turns: the step without its repair, or Wanda where its method is joint; row by row where n:m
    fixes counts."""
    step = replace(step, repair=None, fit_on="pruned")
    if step.method is not None:
        step = Step(space=step.space, score="wanda", keep="1.0", include=step.include, exclude=step.exclude)
    return replace(step, grain="row", keep="1.0") if step.pattern is not None else step


def curve_of(run: _Run, store: Store, step: Step) -> Curve:
    """Perplexity from 0 to 70 %. A joint method's curve is that of Wanda on the same space, row by row."""
    chosen = None if step.amount is None or step.amount.share is None else float(1 - step.amount.share)
    step = curve_step(step)
    dial = dial_of(run, store, step, 0, CURVE_WINDOWS)
    points = []
    for done, level in enumerate(LEVELS, 1):
        points.append(CurvePoint(float(level), dial.perplexity(level)))
        run.conditions().tick("curve", done, len(LEVELS))
    label = f"{step.score}, {step.space} by {step.grain}"
    note = (
        f"One set of dense-stream {step.score} evidence: every sparsity was decided from the dense model's activations "
        f"and measured on {CURVE_WINDOWS} windows of {LENGTH} tokens of the builtin test text. The run itself prunes "
        "block by block, so its own result can lie beside the curve."
    )
    return Curve(label, tuple(points), note, chosen)


def within_bound(run: _Run, store: Store, step: Step, number: int) -> Found:
    """The largest sparsity (to 1/128) whose perplexity is at most ``step.worse`` above the dense model's.

    Bisected on dense-stream evidence, then pruned for real in memory; if that breaks the bound, lowered.

    Raises:
        SecateurError: not even the smallest sparsity stays within the bound.
    """
    assert step.worse is not None
    dial = dial_of(run, store, step, number, WINDOWS)
    bound = dial.perplexity(Decimal(0)) * float(1 + step.worse)
    low, high = 0, FINEST  # low holds, high does not (nothing left)
    refused: SecateurError | None = None
    while high - low > 1:
        middle = (low + high) // 2
        try:
            holds, refused = dial.perplexity(Decimal(middle) / FINEST) <= bound, None
        except SecateurError as error:  # so much cannot go: a layer would be left without units
            holds, refused = False, error
        low, high = (middle, high) if holds else (low, middle)
    if not low and refused is not None:  # not even the smallest part
        raise refused
    notes, reached = [], float("nan")
    back = max(1, low // 16)
    for _ in range(TRIES):
        if low <= 0:
            break
        reached = dial.sequential(Decimal(low) / FINEST)
        if reached <= bound:
            break
        notes.append(f"sparsity {low / FINEST:.3f} gave {reached:.2f} when pruned block by block, above {bound:.2f}")
        low, back = low - back, 2 * back  # further every time: where units are few, a small step changes nothing
    if low <= 0 or not reached <= bound:
        raise SecateurError(
            f"no sparsity was found within {step.at_most_worse} of the dense perplexity",
            received=f"--at-most-worse {step.at_most_worse}",
            works="a looser bound, more calibration text, or another score",
        )
    dense = dial.perplexity(Decimal(0))
    notes.append(
        f"largest sparsity within {step.at_most_worse} worse: {low / FINEST:.4g} (perplexity {dense:.2f} to "
        f"{reached:.2f} on {WINDOWS} windows of {LENGTH} tokens of the builtin test text)"
    )
    points = tuple(CurvePoint(float(s), p) for s, p in sorted(dial.measured().items()))
    share = Decimal(low) / FINEST
    curve = Curve(f"{step.score or step.method}, {step.space} by {step.grain}", points, notes[-1], float(share))
    keep = amount_word(Amount(share=1 - share))
    return Found(replace(step, keep=keep, at_most_worse=None), curve, tuple(notes))
