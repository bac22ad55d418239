"""The dry run: what a recipe will need and what will come out, before anything heavy.

Sizes are exact: a skeleton is cut to the counts the budget allots, and weighed. `predict_memory` adds up what each
phase holds, `predict_time` what each takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.engine.apply import cut_block, cut_layers, get_tensor
from secateur.engine.heap import give_back
from secateur.engine.plan import Plan
from secateur.goals import settled
from secateur.measure.size import size
from secateur.packing import packed_bytes
from secateur.parts import parts_of
from secateur.predict.memory import ram
from secateur.predict.search import disk, searching
from secateur.predict.time import durations
from secateur.stage import Stage

if TYPE_CHECKING:
    from secateur.run import _Run


@dataclass(frozen=True)
class Forecast:
    """What a run will need and give.

    Attributes:
        parameters, bytes, kv_bytes_per_token, macs_per_token: (before, after) the whole recipe. A mask changes
            none of them but ``nonzero``.
        peak_ram: bytes, with the parts it is made of in ``ram``.
        seconds: wall time, measurement included, with the phases it is made of in ``phases``.
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
    phases: dict[str, float] = field(default_factory=dict)
    disk: int = 0
    notes: tuple[str, ...] = ()


def predict(run: _Run, first: Stage) -> Forecast:
    """Predict a run from its first stage (later steps are cut on the same skeleton)."""
    store = run.store
    notes: list[str] = []
    whole = sum(store.bytes_of_block(i) for i in [*range(store.blocks), None])
    context = run.measure_options().length
    before = size(first.model, context=context)
    macs: list[int] = []
    after_model, zeros = _shrunk(run, notes, macs)
    after = size(after_model, context=context)
    width = whole / max(before.parameters, 1)
    written = int(after.parameters * width)
    phases = durations(run, first, (*macs, after.macs_per_token), written)
    give_back()  # what was tried out has loaded libraries that stay, and used memory that does not
    parts = ram(run, first, run.store.skeleton(), (whole, written))
    return Forecast(
        (before.parameters, after.parameters),
        (before.parameters, after.parameters - zeros),
        (whole, packed_bytes(after_model, zeros, run.recipe.pack) if run.recipe.pack else written),
        (before.kv_bytes_per_token, after.kv_bytes_per_token),
        (before.macs_per_token, after.macs_per_token),
        sum(parts.values()),
        parts,
        round(sum(phases.values()), 3),
        {name: round(seconds, 3) for name, seconds in phases.items()},
        2 * written * len(run.steps) + disk(run, first),
        tuple(notes),
    )


def _shrunk(run: _Run, notes: list[str], macs: list[int]) -> tuple[Any, int]:
    """The skeleton after all cuts, and the zeros that masks add; MACs per token before each step are noted. What only
    a survey or a search could tell is taken as uniform or left out, with a note."""
    zeros, model = 0.0, run.store.skeleton()
    for number, step in enumerate(run.steps):
        macs.append(size(model, context=run.recipe.text.length).macs_per_token)
        if step.worse is not None and run.replay is None:
            notes.append("how much stays is searched; sizes are those of the model as it is")
            continue
        stage = Stage(run.store, replace(step, effort=None, budget="uniform"), number, run.conditions(), model)
        if run.replay is None and parts_of(step).budget.surveys:
            notes.append("the budget surveys the model first; counts were predicted as if it were uniform")
        if searching(run, step) is not None:
            notes.append("which site keeps how much is searched for; together they keep what uniform would")
        if run.replay is not None:
            zeros += _replayed(stage, run.replay.step(number))
            continue
        if step.goal is not None:
            stage = Stage(run.store, settled(stage, stage.step, look=False), number, run.conditions(), model)
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
