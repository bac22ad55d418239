"""The dry run: what a recipe will need and what will come out, before anything heavy.

Sizes are exact: a skeleton is cut to the counts the budget allots, and weighed. Memory is a sum of named parts,
the largest of the run's phases counted; time comes from a short matrix product on this machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from secateur.engine.apply import cut_block, cut_layers, get_tensor
from secateur.engine.plan import Plan
from secateur.engine.probes import Gradient, Probe
from secateur.goals import settled
from secateur.measure.size import size
from secateur.parts import parts_of
from secateur.stage import Stage

if TYPE_CHECKING:
    from secateur.run import _Run

OVERHEAD = 1.35  # a forward pass takes this much longer than its matrix products alone


@dataclass(frozen=True)
class Forecast:
    """What a run will need and give.

    Attributes:
        parameters, bytes, kv_bytes_per_token, macs_per_token: (before, after) the whole recipe. A mask changes
            none of them but ``nonzero``.
        peak_ram: bytes, with the parts it is made of in ``ram``.
        seconds: wall time, measurement included.
        disk: bytes written, working files included.
    """

    parameters: tuple[int, int]
    nonzero: tuple[int, int]
    bytes: tuple[int, int]
    kv_bytes_per_token: tuple[int, int]
    macs_per_token: tuple[int, int]
    peak_ram: int
    ram: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    disk: int = 0
    notes: tuple[str, ...] = ()


def predict(run: _Run, first: Stage) -> Forecast:
    """Predict a run from its first stage (later steps are cut on the same skeleton)."""
    store = run.store
    notes: list[str] = []
    whole = sum(store.bytes_of_block(i) for i in [*range(store.blocks), None])
    context = run.measure_options().length
    before = size(first.model, context=context)
    after_model, zeros = _shrunk(run, notes)
    after = size(after_model, context=context)
    width = whole / max(before.parameters, 1)
    ram = _memory(run, first, whole)
    seconds = _seconds(run, first, before.macs_per_token)
    return Forecast(
        (before.parameters, after.parameters),
        (before.parameters, after.parameters - zeros),
        (whole, int(after.parameters * width)),
        (before.kv_bytes_per_token, after.kv_bytes_per_token),
        (before.macs_per_token, after.macs_per_token),
        sum(ram.values()),
        ram,
        seconds,
        2 * int(after.parameters * width) * len(run.steps),
        tuple(notes),
    )


def _shrunk(run: _Run, notes: list[str]) -> tuple[Any, int]:
    """The skeleton after all cuts, and the zeros that masks add. What only a survey or a search could tell is taken
    as uniform or left out, with a note."""
    zeros, model = 0.0, run.store.skeleton()
    for number, step in enumerate(run.steps):
        if step.worse is not None and run.replay is None:
            notes.append("how much stays is searched; sizes are those of the model as it is")
            continue
        stage = Stage(run.store, replace(step, budget="uniform"), number, run.conditions(), model)
        if run.replay is None and parts_of(step).budget.surveys:
            notes.append("the budget surveys the model first; counts were predicted as if it were uniform")
        if run.replay is not None:
            zeros += _replayed(stage, run.replay.step(number))
            continue
        if step.goal is not None:
            stage = Stage(run.store, settled(stage, stage.step), number, run.conditions(), model)
        if step.space == "layer":
            keep = torch.zeros(len(stage.blocks), dtype=torch.bool)
            keep[: stage.layer_count()] = True
            zeros += _without_layers(stage, keep)
            continue
        counts = stage.counts()
        for info in stage.infos:
            if step.apply == "cut":
                space = stage.anatomy.blocks[info.block].spaces[step.space]
                first = torch.zeros(space.shape, dtype=torch.bool)
                first[..., : counts[info.name] // space.copies] = True
                cut_block(stage.blocks[info.block], stage.anatomy.blocks[info.block], {step.space: first})
            else:
                zeros += (info.units - counts[info.name]) * info.cost
    return model, round(zeros)


def _replayed(stage: Stage, plan: Plan) -> float:
    """Cut the stage's model as a plan says; returns the zeros that it adds as a mask instead."""
    zeros, costs = 0.0, {info.name: info.cost for info in stage.infos}
    blocks = {block.name: block for block in stage.anatomy.blocks}
    stage.check_replay(plan)
    for key in plan:
        _, space, site = key.split("/", 2)
        if space == "layer":
            zeros += _without_layers(stage, plan[key])
        elif space == "weight":
            zeros += plan.total(key) - plan.kept(key)
        elif stage.step.apply == "cut":
            cut_block(stage.blocks[blocks[site].index], blocks[site], {space: plan[key]})
        else:
            zeros += (plan.total(key) - plan.kept(key)) * costs[site]
    return zeros


def _without_layers(stage: Stage, keep: Tensor) -> float:
    """Cut layers out of the stage's model; returns the zeros that a mask of them makes instead."""
    if stage.step.apply == "cut":
        cut_layers(stage.model, stage.anatomy, keep)
        return 0.0
    gone = (b for b, k in zip(stage.anatomy.blocks, keep.tolist(), strict=True) if not k)
    return float(sum(get_tensor(stage.blocks[b.index], name).numel() for b in gone for name in b.outputs))


def _memory(run: _Run, first: Stage, whole: int) -> dict[str, int]:
    """Peak resident bytes by part."""
    store, text = run.store, run.recipe.text
    model: Any = run.store.skeleton()
    anatomy = first.anatomy
    fp32 = 4 * sum(p.numel() for p in model.parameters())
    blocks = [4 * sum(p.numel() for p in b.parameters()) for b in model.get_submodule(anatomy.path)]
    block, outside = max(blocks), fp32 - sum(blocks)
    in_memory = store.origin is None or store.origin.kind == "gguf"
    needs = {*first.parts.needs, *first.parts.survey_needs}
    hidden = int(getattr(store.config.get_text_config(), "hidden_size", 0) or 0)
    base = psutil.Process().memory_info().rss - (fp32 if in_memory else 0)
    parts = {"libraries and tokenizer": max(base, 0)}
    parts["model in memory"] = fp32 if in_memory else 0
    walk: dict[str, int] = {"one block": block}
    walk["outside the blocks"] = 0 if in_memory else outside
    if needs:
        tokens = run.recipe.batch_size * text.length
        largest = max((max(m.shape) for b in anatomy.blocks for m in b.matrices), default=hidden)
        walk["activations"] = 0 if run._spill else text.samples * text.length * hidden * 4
        walk["one batch"] = tokens * (4 * largest + 6 * hidden) * 4
        walk["statistics"] = sum(_statistics(p, first) for p in needs)
        if Gradient in needs:
            walk["gradients"] = 2 * fp32
    walk["scores and masks"] = 4 * 4 * max(m.shape[0] * m.shape[1] for b in anatomy.blocks for m in b.matrices)
    measuring: dict[str, int] = {}
    if run.recipe.measure and run.how.measure and not run.how.only_plan:
        options = run.measure_options()
        vocabulary = int(getattr(store.config.get_text_config(), "vocab_size", 0) or 0)
        batch = max(1, (256 << 20) // (options.length * vocabulary * 4 or 1))
        measuring["dense and pruned model"] = 2 * whole if not in_memory else 2 * fp32
        measuring["logits"] = 3 * batch * options.length * vocabulary * 4
    return parts | (walk if sum(walk.values()) >= sum(measuring.values()) else measuring)


def _statistics(probe: type[Probe], first: Stage) -> int:
    """Bytes a probe's sums take at one block; matrices that read the same input share theirs where they can."""
    length = first.at.batches()[0].shape[-1] if probe.kind == "positions" else 1
    seen: set[tuple[str, int]] = set()
    total = 0
    for m in first.anatomy.blocks[0].matrices:
        key = (m.component, m.shape[1])
        if probe.kind in ("input", "positions") and key in seen and not m.experts:
            continue
        seen.add(key)
        total += probe.bytes(*m.shape, length) * max(m.experts, 1)
    return total


def _seconds(run: _Run, first: Stage, macs: int) -> float:
    """Wall seconds: passes over the text at the speed of a matrix product here."""
    text = run.recipe.text
    tokens = text.samples * text.length / run.world.size
    a = torch.randn(1024, 1024)
    (a @ a).sum()
    begin = time.perf_counter()
    for _ in range(4):
        a = (a @ a).clamp_(-1, 1)
    per_mac = (time.perf_counter() - begin) / (4 * 1024**3)
    head = sum(p.numel() for n, p in first.model.named_parameters() if "blocks" not in n and p.dim() == 2) // 2
    pass_seconds = tokens * max(macs - head, macs // 2) * per_mac * OVERHEAD
    total = 0.0
    for step in run.steps:
        parts = parts_of(step)
        passes = (2.0 if parts.needs and step.space != "layer" else 0.0) + (1.0 if parts.survey_needs else 0.0)
        passes += 3.0 if Gradient in (*parts.needs, *parts.survey_needs) else 0.0
        passes += 0.8 if step.method is not None else 0.0
        total += passes * pass_seconds
    if run.recipe.measure and run.how.measure and not run.how.only_plan:
        options = run.measure_options()
        total += 2 * options.windows * options.length * macs * per_mac * OVERHEAD + 20
    return round(total + 5, 1)
