"""How long a run will take: every phase counted in units of work, at the speeds of a few short trials on this machine.

Work is counted exactly where it can be (multiply-accumulates of every pass, scores compared, bytes written); what a
search will need is not known before, so `TRIED` verifications are assumed. Other programs on the machine, a disk of
its own speed, and text that must be tokenised are not foreseen.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from math import log2, prod
from typing import TYPE_CHECKING

import torch

from secateur.cliff import CURVE_WINDOWS, FINEST, LENGTH, LEVELS, WINDOWS, curve_step
from secateur.engine.fisher import FISHER_WINDOWS
from secateur.engine.probes import Contribution, CrossGram, Fisher, Gradient, Gram, LocalGradient, Probe, walked
from secateur.engine.walk import products_in
from secateur.measure.size import TOP_K
from secateur.methods.base import Amount
from secateur.methods.budgets.evopress import EvoPress
from secateur.methods.repairs.least_squares import LeastSquares
from secateur.methods.repairs.local_reconstruction import WITNESSES, LocalReconstruction, paces
from secateur.methods.sites import block_matrices
from secateur.parts import Parts, parts_of
from secateur.predict.memory import head_macs, inputs, pruned, share_of, vocabulary
from secateur.predict.methods import Work, aim_work, method_work, repair_work
from secateur.predict.search import passes, searching
from secateur.stage import Stage
from secateur.step import Step

if TYPE_CHECKING:
    from secateur.run import _Run

OVERHEAD = 1.35  # a forward pass takes this much longer than its matrix products alone
GRADIENT = 4  # passes: forward, forward again block by block, and a backward of twice the work
FACTOR = 4  # a triangular factorisation runs this much slower than a product of as many multiply-accumulates
PASS = 0.1  # going over weights once, elementwise, is so much of scoring and comparing them
COLUMN = 40e-6  # seconds a sweep spends on one column beside its products
CALL = 0.4e-3  # seconds a block takes however little it computes
LOSS = 2  # softmaxes' worth of work on each logit: its loss, and its distance from the dense one
DISK = 300e6  # bytes per second, written and synced
TRIAL = 0.1  # seconds that each kind of work is tried for
TRIED = 2  # prunings for real that a search ends with


@dataclass(frozen=True)
class Speed:
    """Seconds per unit of work here and now.

    Attributes:
        product: per multiply-accumulate, many rows at once, in the dtype of the passes.
        measured: the same in the dtype the models are measured in.
        vector: per multiply-accumulate of one row (a decoded token).
        score: per weight scored, compared and masked.
        logit: per entry of a softmax.
        hashed: per byte.
        fitted: as product, in the dtype in which a repair fits by gradient.
    """

    product: float
    measured: float
    vector: float
    score: float
    logit: float
    hashed: float
    fitted: float


def durations(
    run: _Run, first: Stage, macs: tuple[int, ...], written: int, speed: Speed | None = None
) -> dict[str, float]:
    """Wall seconds by phase, in the order they run.

    Args:
        first: the first step's stage.
        macs: per token, head included: of the model before each step, and after the last.
        written: bytes of the result.
        speed: of this machine; None tries it out.
    """
    at = speed or speed_of(run, first)
    head = head_macs(first.model)
    out = {"open": run.clock.phases.get("open", 0.0)}
    for n, step in enumerate(run.steps):
        own = macs[n] - head
        out[f"step {n + 1}"] = _step(run, first, step, own, head, at) + 3 * written / DISK
        if step.worse is not None and run.replay is None:
            out[f"search of step {n + 1}"] = _search(run, first, step, own, head, at)
        if (options := searching(run, step)) is not None:
            out[f"search of step {n + 1}"] = _evolution(run, first, step, own, head, at) + _candidates(
                run, options, own + head, at
            )
    if run.recipe.curve and not run.how.only_plan:
        step = curve_step(run.steps[0])
        each = _perplexity(run, CURVE_WINDOWS, macs[0], at)
        points = len(LEVELS) * each + (len(LEVELS) - 1) * _decide(first, step, at)
        out["curve"] = _gather(run, first, parts_of(step).needs, macs[0] - head, head, at, dense=True) + points
    if run.recipe.measure and run.how.measure and not run.how.only_plan:
        out["measurement"] = _measurement(run, first, (macs[0], macs[-1]), head, at)
    out["hash"] = written * at.hashed
    return out


def speed_of(run: _Run, first: Stage) -> Speed:
    """Try out each kind of work for a moment."""
    device, passes = first.at.device, first.at.dtype
    matrix = max((m for b in first.anatomy.blocks for m in b.matrices), key=lambda m: m.shape[0] * m.shape[1])
    rows, inner = min(matrix.shape[0], 2048), min(matrix.shape[1], 2048)
    tokens = min(run.recipe.batch_size * run.recipe.text.length, 1024)
    w, x = torch.randn(rows, inner, device=device), torch.randn(tokens, inner, device=device)
    stored = run.store.dtype_of(run.store.names(0)[0])

    def products(dtype: torch.dtype) -> float:
        with torch.no_grad(), products_in(dtype, device):
            return _timed(lambda: x @ w.T, device) / (rows * inner * tokens)

    product = products(passes)
    repairs = [parts_of(step).repair for step in run.steps]
    fits = [r.dtype(device) for r in repairs if isinstance(r, LocalReconstruction)]
    fitted = products(fits[0]) if fits and fits[0] not in (None, passes) else product
    measured = product
    if stored != passes:
        narrow = (x.to(stored), w.T.to(stored))
        measured = _timed(lambda: narrow[0] @ narrow[1], device) / (rows * inner * tokens)
    big = torch.randn(2048, 2048, device=device, dtype=stored)  # larger than most caches, as a model is
    one = torch.randn(1, 2048, device=device, dtype=stored)
    vector = _timed(lambda: one @ big, device) / 2048**2
    grain, step = first.parts.grain, first.step
    within = (step.include, step.exclude) if step.space == "weight" else ((), ())
    chosen = [m.shape for b in first.anatomy.blocks for m in block_matrices(b, *within)]
    usual = [shape for shape in chosen if prod(shape) <= 2**21] or [min(chosen, key=prod)]
    scores = torch.rand(max(usual, key=prod), device=device)

    def decide() -> None:
        ranked = scores.abs() * scores[0]
        if step.space == "weight":
            count = grain.count(tuple(scores.shape), step.amount or Amount(share=Decimal("0.5")))
            scores.masked_fill_(~grain.select(ranked, count), 0.5)

    logits = torch.randn(64, 16384, device=device)
    logit = _timed(lambda: logits.log_softmax(-1), device) / logits.numel()
    data = bytes(1 << 20)
    hashed = _timed(lambda: hashlib.sha256(data).digest(), device) / len(data)
    return Speed(product, measured, vector, _timed(decide, device) / scores.numel(), logit, hashed, fitted)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Least seconds of a few runs: what the machine can do when it is not interrupted."""
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < TRIAL and len(seconds) < 100):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _step(run: _Run, first: Stage, step: Step, own: int, head: int, at: Speed) -> float:
    """A survey if the budget asks for one, the walk, and what deciding takes; ``own`` is without the head."""
    parts = parts_of(step)
    replayed = run.replay is not None
    mended = run._text_wanted and (parts.joint or parts.repair is not None)
    if replayed and not mended:
        return _decide(first, step, at) / 2  # applied as it is
    surveys = not replayed and (step.space == "layer" or parts.budget.surveys)
    seconds = _gather(run, first, parts.ranking.needs, own, head, at, dense=True) if surveys else 0.0
    if step.space != "layer":
        needs = parts.needs_of(choosing=not replayed, fitting=True)
        if surveys:  # what the whole model told the survey is not asked again
            needs = tuple(p for p in needs if p.kind != "gradient" or p not in parts.ranking.needs)
        seconds += _gather(run, first, needs, own, head, at, dense=parts.fit_on.name == "dense") + _mend(
            run, first, parts, own, at
        )
    return seconds + _decide(first, step, at) * (2 if surveys else 1)


def _mend(run: _Run, first: Stage, parts: Parts, own: int, at: Speed) -> float:
    """What a repair takes beside its statistics, and the dense stream where one is walked."""
    tokens = run.recipe.text.samples * run.recipe.text.length / run.world.size
    passes = float(parts.beside)
    if isinstance(parts.repair, LocalReconstruction):  # notes inputs and targets, looks twice at the error, descends
        noted = 0 if parts.repair.whole else 3
        seen = 2 * min(1.0, WITNESSES / run.recipe.text.samples)
        taken = len(paces(parts.repair.passes * run.recipe.text.samples)) / run.recipe.text.samples
        passes += noted + seen + 3 * taken * at.fitted / at.product + (0 if parts.needs else 1)
    work, step = Work(), first.step
    for block in first.anatomy.blocks if step.space != "layer" else ():
        for g in pruned(block, step):
            for rows in g.rows:
                work += repair_work(parts.repair, rows, g.columns, share_of(step), step.space != "weight").times(
                    g.count
                )
            if parts.fit_on.name == "mix" and (parts.joint or isinstance(parts.repair, LeastSquares)):
                work += aim_work(sum(g.rows), g.columns).times(g.count)
    return tokens * passes * own * OVERHEAD * at.product + seconds(work, at)


def _gather(
    run: _Run, first: Stage, needs: tuple[type[Probe], ...], own: int, head: int, at: Speed, dense: bool = False
) -> float:
    """Passes over the text that these statistics take, and the statistics' own products."""
    tokens = run.recipe.text.samples * run.recipe.text.length / run.world.size
    seconds = 0.0
    if Gradient in needs:
        seconds += tokens * (GRADIENT * own + 2 * head) * at.product * OVERHEAD
    if Fisher in needs:
        some = min(FISHER_WINDOWS, run.recipe.text.samples) * run.recipe.text.length / run.world.size
        seconds += some * (GRADIENT * own * at.fitted + 2 * head * at.product) * OVERHEAD
    walking = walked(needs)
    if not walking:
        return seconds
    block = first.anatomy.blocks[0]
    weights = sum(m.numel for m in block.matrices)
    passes = 1.0 if dense else 2.0 - 1 / len(first.anatomy.blocks)
    if not dense and all(p.kind in ("input", "weighted", "paired", "positions") for p in walking):
        passes -= block.matrices[-1].numel / weights  # the first pass stops before the last product
    passes += 2.0 * sum(issubclass(p, LocalGradient) for p in walking)
    products = sum(_products(run, first, p) for p in walking)
    calls = passes * len(first.anatomy.blocks) * tokens / (run.recipe.batch_size * run.recipe.text.length)
    return seconds + tokens * (passes * own * OVERHEAD + products) * at.product + calls * CALL


def _products(run: _Run, first: Stage, probe: type[Probe]) -> float:
    """Multiply-accumulates per token of a statistic's own sums, over all blocks."""
    config = run.store.config.get_text_config()
    top = next((k for name in TOP_K if isinstance(k := getattr(config, name, None), int)), None)
    total = 0.0
    for block in first.anatomy.blocks:
        for m, new in inputs(block):
            reached = min(top or m.experts, m.experts) if m.experts else 1
            if probe is CrossGram and new:
                total += reached * m.shape[1] ** 2
            elif probe is Gram and new:
                total += reached * m.shape[1] * min(m.shape[1], (m.shape[1] + Gram.tile) / 2)
            elif probe is Contribution:
                total += 2 * reached * m.shape[0] * m.shape[1]
    return total


def _decide(first: Stage, step: Step, at: Speed) -> float:
    """Scoring and comparing every weight once; what a joint method solves for."""
    parts, spent = parts_of(step), 0.0
    for block in first.anatomy.blocks:
        weights = sum(m.numel for m in block.matrices)
        if step.space == "weight":
            chosen = pruned(block, step)
            weights = sum(g.weights * g.count for g in chosen)
            for g in chosen if parts.joint else ():
                work = method_work(parts.method, sum(g.rows), g.columns, share_of(step))
                spent += seconds(work.times(g.count), at)
        spent += weights * at.score
    return spent


def seconds(work: Work, at: Speed) -> float:
    """What a method's or a repair's work takes."""
    passed = work.chosen + work.passed * PASS
    return (work.products + FACTOR * work.factors) * at.product + passed * at.score + work.columns * COLUMN


def _perplexity(run: _Run, windows: int, macs: int, at: Speed) -> float:
    """One model over the windows of a curve or search."""
    logits = LENGTH * windows * vocabulary(run.store.config)
    return windows * LENGTH * macs * at.measured * OVERHEAD + logits * at.logit * LOSS


def _search(run: _Run, first: Stage, step: Step, own: int, head: int, at: Speed) -> float:
    """Bisecting on dense-stream evidence, then pruning for real in memory."""
    once = _perplexity(run, WINDOWS, own + head, at) + _decide(first, step, at)
    gathered = _gather(run, first, parts_of(step).needs, own, head, at, dense=True)
    return gathered + (1 + log2(FINEST)) * once + TRIED * (once + _step(run, first, step, own, head, at))


def _evolution(run: _Run, first: Stage, step: Step, own: int, head: int, at: Speed) -> float:
    """Before a search by evolution: layers ranked, or every site made at every level."""
    parts, options = parts_of(step), searching(run, step)
    assert options is not None
    if step.space == "layer":
        return _gather(run, first, parts.ranking.needs, own, head, at, dense=True)
    gathered = _gather(run, first, parts.needs, own, head, at, dense=True)
    return gathered + (2 * options.levels + 1) * _decide(first, step, at)


def _candidates(run: _Run, options: EvoPress, macs: int, at: Speed) -> float:
    """The text through the dense model, and each candidate's share of it through that."""
    tokens, blocks = passes(run, options), run.store.blocks
    each = macs * at.product * OVERHEAD + vocabulary(run.store.config) * at.logit * LOSS
    return tokens * (each + blocks * CALL / run.recipe.text.length)


def _measurement(run: _Run, first: Stage, macs: tuple[int, int], head: int, at: Speed) -> float:
    """Both models over the windows, on the prompts and on the clock."""
    options, blocks = run.measure_options(), len(first.anatomy.blocks)
    seconds = 0.0
    for each in macs:
        tokens = options.windows * options.length
        logits = tokens * vocabulary(run.store.config)
        seconds += tokens * each * at.measured * OVERHEAD + logits * at.logit * LOSS
        decoded = len(options.prompts) * options.new_tokens
        if options.latency is not None:
            rounds = options.latency.repeats + 1
            seconds += rounds * options.latency.prompt_tokens * (each - head) * at.measured * OVERHEAD
            decoded += rounds * options.latency.new_tokens
        seconds += decoded * (each * at.vector + blocks * CALL)
    return seconds
