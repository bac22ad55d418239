"""How much memory a run will need: named parts of each phase, the largest phase counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil
from torch import nn

from secateur.anatomy.types import Block, Matrix
from secateur.cliff import curve_step
from secateur.engine.probes import Gradient, Probe
from secateur.measure.passes import LOGIT_BYTES
from secateur.parts import parts_of
from secateur.predict_search import memory
from secateur.stage import Stage
from secateur.step import Step

if TYPE_CHECKING:
    from secateur.run import _Run

ALLOCATOR = 1.1  # the C library keeps some of what was let go


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
    phases = [_walk(run, first, max(blocks))]
    phases.append({"outside the blocks": outside, "activations": phases[0].get("activations", 0)})
    if Gradient in {*first.parts.needs, *first.parts.survey_needs}:
        grads = 4 * sum(m.numel for b in first.anatomy.blocks for m in b.matrices)
        phases.append({"model to differentiate": sum(blocks) + outside, "gradients": grads, "logits": 3 * _logits(run)})
        phases[0]["gradients"] = grads
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


def inputs(block: Block) -> Iterator[tuple[Matrix, bool]]:
    """A block's matrices, and whether each is the first that reads its input (later ones share its statistic).

    Matrices that read the same units (``o_proj`` those of attention, ``down_proj`` the neurons) or the residual
    stream in the same component share their input.
    """
    reads = {p.tensor: space for space, s in block.spaces.items() for p in s.ports if p.role == "read"}
    seen: set[tuple[str, str, int]] = set()
    for m in block.matrices:
        key = (m.component, reads.get(m.tensor, ""), m.shape[1])
        yield m, key not in seen or bool(m.experts)
        seen.add(key)


def statistics(needs: set[type[Probe]], block: Block, length: int) -> int:
    """Bytes the probes' sums take at one block."""
    total = 0
    for probe in needs:
        for m, first in inputs(block):
            if first or probe.kind not in ("input", "paired", "positions"):
                total += probe.bytes(*m.shape, length) * max(m.experts, 1)
    return total


def _walk(run: _Run, first: Stage, block: int) -> dict[str, int]:
    """A step's walk: one block, activations, statistics, what deciding takes, and what was decided, a bit each."""
    text, anatomy = run.recipe.text, first.anatomy
    needs = {*first.parts.needs, *first.parts.survey_needs} - {Gradient}
    parts = {"one block": block}
    shapes = [m.shape for b in anatomy.blocks for m in b.matrices]
    if needs or first.parts.streams:
        hidden, widest = _hidden(run), max(max(shape) for shape in shapes)
        kept = -(-text.samples // run.world.size) * text.length * hidden * 4
        parts["activations"] = 0 if run._spill else kept * first.parts.held
        parts["one batch"] = run.recipe.batch_size * text.length * (4 * widest + 6 * hidden) * 4
        parts["statistics"] = max(statistics(needs, b, text.length) for b in anatomy.blocks)
        if first.parts.fit_on == "mix":  # what the dense stream has at every matrix
            parts["one batch"] += run.recipe.batch_size * text.length * (widest + 3 * hidden) * 4
        if first.parts.streams:  # the dense block; gradients, Adam's two moments, the values before; a way back
            parts["fit of a sub-layer"] = 5 * block + parts["one batch"]
    if first.step.space == "weight":
        parts["plan"] = sum(m.numel for b in anatomy.blocks for m in b.matrices) // 8
    parts["scores and masks"] = 4 * 4 * max(rows * columns for rows, columns in shapes)
    return parts


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
