"""How much memory a run will need: named parts of each phase, the largest phase counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil
from torch import nn

from secateur.anatomy.types import Block, Matrix
from secateur.cliff import curve_step
from secateur.engine.backward import GROUP
from secateur.engine.probes import Gradient, Probe, walked
from secateur.measure.passes import LOGIT_BYTES
from secateur.methods.mending import read_matrices
from secateur.methods.repairs.least_squares import LeastSquares
from secateur.methods.sites import block_matrices
from secateur.parts import Parts, parts_of
from secateur.predict.methods import Group, deciding_bytes, mending_bytes
from secateur.predict.search import memory
from secateur.stage import Stage
from secateur.step import Step

if TYPE_CHECKING:
    from secateur.run import _Run

ALLOCATOR = 1.1  # the C library keeps some of what was let go
HEAP = 32 << 20  # bytes of the largest piece that the C library (glibc) keeps for later instead of giving it back
WIDEST, WIDTHS = 3, 4  # activations, the widest and hidden states, that a pass through a block holds at once, and
WAY_BACK = 12  # activations that a block keeps for its backward, in widths of its widest matrix
BEHIND = 12  # hidden states that it leaves on the heap where they fit (seen on Llama blocks 2,048 and 4,096 wide)


def ram(run: _Run, first: Stage, model: Any, stored: tuple[int, int]) -> dict[str, int]:
    """Peak resident bytes by part: what is there all the time, and the largest of the run's phases.

    Args:
        first: the first step's stage.
        model: a skeleton of the model before the run.
        stored: bytes of the weights as stored, before and after.
    """
    held = run.store.origin is None or run.store.origin.kind == "gguf"
    blocks = [4 * sum(p.numel() for p in b.parameters()) for b in model.get_submodule(first.anatomy.path)]
    fp32 = 4 * sum(p.numel() for p in model.parameters())
    base = psutil.Process().memory_info().rss - (fp32 if held else 0)
    steady = {"libraries and tokenizer": max(base, 0), "model in memory": fp32 if held else 0}
    outside = 0 if held else fp32 - sum(blocks)
    phases = _walk(run, first, max(blocks))
    activations = phases[0].get("activations", 0)
    phases.append({"outside the blocks": outside, "activations": activations})
    phases.append({"outside the blocks": outside, "a tensor as stored": 0 if held else _largest(run)})
    asked = {*first.parts.needs, *first.parts.survey_needs}
    if any(probe.kind == "gradient" for probe in asked):
        phases += _back(run, first, blocks, outside)
    if Gradient in asked:  # spilled ones are read while blocks are decided, and count as long as memory is free
        for parts in phases:
            parts["gradients"] = _gradients(first)
    turned = [curve_step(run.steps[0])] if run.recipe.curve and not run.how.only_plan else []
    for step in [*turned, *(step for step in run.steps if step.worse is not None)]:
        phases.append(_turned(run, first, step, sum(blocks), outside))
    for step in run.steps:
        phases += memory(run, first, step, blocks, outside)
    if run.recipe.measure and run.how.measure and not run.how.only_plan:
        dense = sum(blocks) if held else stored[0]  # of a model in memory, what lies outside the blocks is not copied
        pair = {"dense and pruned model": max(dense + stored[1], sum(blocks) + outside)}
        phases.append(pair | {"logits of both": 2 * _logits(run)})
    largest = max(phases, key=lambda parts: sum(parts.values()))
    return steady | {name: round(size * ALLOCATOR) for name, size in largest.items()}


def spilled(run: _Run, first: Stage) -> int:
    """Bytes that lie beside the output instead of in memory, at the most: the text's activations, or what the way back
    through the model keeps, and gradients beside either."""
    if run._spill is None or not run._text_wanted:
        return 0
    most, choosing = 0, run.replay is None
    for step in run.steps:
        parts = parts_of(step)
        needs = {*parts.needs_of(choosing, fitting=True), *(parts.survey_needs if choosing else ())}
        back = {probe for probe in needs if probe.kind == "gradient"} if choosing else set()
        walks = _activations(run, parts) if walked(needs) or parts.streams else 0
        fronts = _fronts(run, len(first.anatomy.blocks)) if back else 0
        most = max(most, max(walks, fronts) + (_gradients(first) if Gradient in back else 0))
    return most * run.world.size


def _activations(run: _Run, parts: Parts) -> int:
    """Bytes of one process's part of the text's activations, in as many sets as a walk holds."""
    text = run.recipe.text
    return -(-text.samples // run.world.size) * text.length * _hidden(run) * 4 * parts.held


def _fronts(run: _Run, blocks: int) -> int:
    """Bytes of what went into so many blocks, of the windows that go there and back together."""
    text = run.recipe.text
    return blocks * min(GROUP, text.samples) * text.length * _hidden(run) * 4


def _gradients(first: Stage) -> int:
    """Bytes of a gradient for every weight of the blocks."""
    return 4 * sum(m.numel for b in first.anatomy.blocks for m in b.matrices)


def groups(block: Block) -> list[list[Matrix]]:
    """A block's matrices by the input they read, whose statistic they share.

    Matrices that read the same units (``o_proj`` those of attention, ``down_proj`` the neurons) or the residual
    stream in the same component share their input; an expert's matrices do not.
    """
    reads = {p.tensor: space for space, s in block.spaces.items() for p in s.ports if p.role == "read"}
    found: dict[tuple[str, str, int, str], list[Matrix]] = {}
    for m in block.matrices:
        key = (m.component, reads.get(m.tensor, ""), m.shape[1], m.tensor if m.experts else "")
        found.setdefault(key, []).append(m)
    return list(found.values())


def inputs(block: Block) -> Iterator[tuple[Matrix, bool]]:
    """A block's matrices, and whether each is the first that reads its input."""
    for together in groups(block):
        for at, m in enumerate(together):
            yield m, at == 0


def statistics(needs: set[type[Probe]], block: Block, length: int) -> int:
    """Bytes the probes' sums take at one block."""
    total = 0
    for probe in needs:
        for m, first in inputs(block):
            if first or probe.kind not in ("input", "paired", "positions"):
                total += probe.bytes(*m.shape, length) * max(m.experts, 1)
    return total


def _walk(run: _Run, first: Stage, block: int) -> list[dict[str, int]]:
    """A step's walk at a block: while text passes through it, and while what stays of it is decided. Of finished blocks
    nothing is left."""
    text, anatomy, step = run.recipe.text, first.anatomy, first.step
    needs = set(walked((*first.parts.needs, *first.parts.survey_needs)))
    parts, batch, fit = {"one block": block}, 0, 0
    shapes = [m.shape for b in anatomy.blocks for m in b.matrices]
    if needs or first.parts.streams:
        hidden, widest = _hidden(run), max(max(shape) for shape in shapes)
        parts["activations"] = 0 if run._spill else _activations(run, first.parts)
        tokens = (1 if first.parts.streams else run.recipe.batch_size) * text.length
        widths = WIDTHS + (BEHIND if 4 * tokens * hidden <= HEAP else 0)
        batch = 4 * tokens * (WIDEST * widest + widths * hidden)
        parts["statistics"] = max(statistics(needs, b, text.length) for b in anatomy.blocks)
        if first.parts.fit_on.name == "mix":  # what the dense stream has at every matrix
            batch += 4 * tokens * (widest + 3 * hidden)
        if first.parts.streams:  # the dense block; gradients, Adam's two moments, the values before; a way back
            fit = 5 * block + batch
    chosen = [pruned(b, step) for b in anatomy.blocks]
    if step.space == "weight":
        scores = max(deciding_bytes(first.parts, matrices, share_of(step)) for matrices in chosen)
    else:
        scores = 4 * 4 * max(rows * columns for rows, columns in shapes)
        if isinstance(first.parts.repair, LeastSquares):
            mended = [mending_bytes(max(g.rows), g.columns, share_of(step)) for own in chosen for g in own]
            scores = max([scores, *mended])
    return [parts | {"one batch": batch}, parts | {"scores and masks": scores, "fit of a part": fit}]


def _back(run: _Run, first: Stage, blocks: list[int], outside: int) -> list[dict[str, int]]:
    """The way back through the model for gradients or the Fisher information: at the head, and at a block."""
    length = run.recipe.text.length
    widest = max(max(m.shape) for b in first.anatomy.blocks for m in b.matrices)
    kept = 0 if run._spill else _fronts(run, len(blocks) + 1)
    there = {"outside the blocks": outside, "what went into the blocks": kept}
    back = length * 4 * (WAY_BACK * widest + WIDTHS * _hidden(run))
    return [
        there | {"logits": 4 * length * vocabulary(run.store.config) * 4},
        there | {"a block, its gradients, both in bf16": 3 * max(blocks), "what its way back needs": back},
    ]


def share_of(step: Step) -> float:
    """The share of weights or units that stays, where the step says one; else a half."""
    return float(step.amount.share) if step.amount is not None and step.amount.share is not None else 0.5


def pruned(block: Block, step: Step) -> list[Group]:
    """A block's matrices that are pruned, or that read the units that are, those together that read the same input."""
    if step.space == "weight":
        wanted = set(block_matrices(block, step.include, step.exclude))
    else:
        wanted = set(read_matrices(block, block.spaces[step.space])) if step.space in block.spaces else set()
    found = [[m for m in together if m in wanted] for together in groups(block)]
    return [Group(tuple(m.shape[0] for m in own), own[0].shape[1], max(own[0].experts, 1)) for own in found if own]


def _largest(run: _Run) -> int:
    """Bytes, as stored, of the largest tensor outside the blocks: it is read before it becomes fp32."""
    memory = run.store.skeleton().state_dict()
    names = run.store.names(None)
    return max((memory[name].numel() * run.store.dtype_of(name).itemsize for name in names), default=0)


def _turned(run: _Run, first: Stage, step: Step, blocks: int, outside: int) -> dict[str, int]:
    """A curve or a search: the whole model, its dense weights beside it, every block's statistics at once."""
    needs = {*parts_of(step).needs}
    return {
        "model to turn": blocks + outside,
        "its dense weights": blocks,
        "statistics of all blocks": sum(statistics(needs, b, run.recipe.text.length) for b in first.anatomy.blocks),
        "logits": _logits(run),
    }


def _logits(run: _Run) -> int:
    """Bytes of one model's logits in fp32: as many windows at once as the measurement takes, at least one."""
    length = run.measure_options().length
    window = length * vocabulary(run.store.config) * 4
    return window * max(1, LOGIT_BYTES // max(window, 1))


def vocabulary(config: Any) -> int:
    """Number of tokens, 0 if the config does not say."""
    return int(getattr(config.get_text_config(), "vocab_size", 0) or 0)


def _hidden(run: _Run) -> int:
    return int(getattr(run.store.config.get_text_config(), "hidden_size", 0) or 0)


def head_macs(model: Any) -> int:
    """Multiply-accumulates per token of the output head, 0 where there is none."""
    head = model.get_output_embeddings()
    return int(head.weight.numel()) if isinstance(head, nn.Linear) else 0
