"""The dry run: what a recipe will need and what will come out, before anything heavy.

Sizes are exact: a skeleton is cut to the counts the budget allots, and weighed. `predict_memory` adds up what each
phase holds, `predict_time` what each takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Space
from secateur.engine.apply import cut_block, cut_layers, get_tensor
from secateur.engine.heap import give_back
from secateur.engine.plan import Plan
from secateur.goals import settled
from secateur.measure.size import size
from secateur.packing import packed_bytes
from secateur.parts import parts_of
from secateur.predict.memory import ram, spilled
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
    packed = packed_bytes(after_model, zeros, run.recipe.pack) if run.recipe.pack else 0
    return Forecast(
        (before.parameters, after.parameters),
        (before.parameters, after.parameters - zeros),
        (whole, packed or written),
        (before.kv_bytes_per_token, after.kv_bytes_per_token),
        (before.macs_per_token, after.macs_per_token),
        sum(parts.values()),
        parts,
        round(sum(phases.values()), 3),
        {name: round(seconds, 3) for name, seconds in phases.items()},
        2 * written * len(run.steps) + packed + disk(run, first) + spilled(run, first),
        tuple(notes),
    )


@dataclass
class Zeros:
    """What masks have made zero, as shares: of tensors and their rows by block and name, of units by theirs and their
    space's. Shares of what a cut left stay as they were."""

    tensors: dict[tuple[nn.Module, str], float] = field(default_factory=dict)
    rows: dict[tuple[nn.Module, str], float] = field(default_factory=dict)
    units: dict[tuple[nn.Module, str], float] = field(default_factory=dict)

    def add(self, module: nn.Module, tensor: str, share: float, within_rows: bool = False) -> None:
        """Weights of a tensor go: those that are zero already are among them, for they rank lowest; of rows that keep
        their own shares, in every row that has any left."""
        was = self.tensors.get((module, tensor), 0.0)
        gone = self.rows.get((module, tensor), 0.0) if within_rows else 0.0
        left = max((was - gone) / (1 - gone), share) if gone < 1 else 0.0
        self.tensors[module, tensor] = gone + (1 - gone) * left

    def add_units(self, module: nn.Module, space: Space, share: float) -> None:
        """Units of a space go: those that went already are among them, the others have zeros as the rest has."""
        before = self.units.get((module, space.name), 0.0)
        if share <= before:
            return
        self.units[module, space.name] = share
        for port in space.ports:
            if port.role != "norm":
                shape = get_tensor(module, port.tensor).shape
                along = shape[port.axis] * (1 if port.copy_axis is None else shape[port.copy_axis])
                more = port.width * space.size * space.copies / along * (share - before) / (1 - before)
                key = (module, port.tensor)
                for shares in (self.tensors, self.rows) if port.role == "write" else (self.tensors,):
                    was = shares.get(key, 0.0)
                    shares[key] = was + more * (1 - was)

    def count(self, model: nn.Module) -> int:
        """Zeros in what is left of a model."""
        there = set(model.modules())
        kept = (item for item in self.tensors.items() if item[0][0] in there)
        return round(sum(share * get_tensor(module, name).numel() for (module, name), share in kept))


def _shrunk(run: _Run, notes: list[str], macs: list[int]) -> tuple[Any, int]:
    """The skeleton after all cuts, and the zeros that masks add; MACs per token before each step are noted. What only
    a survey or a search could tell is taken as uniform or left out, with a note."""
    zeros, model = Zeros(), run.store.skeleton()
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
            _replayed(stage, run.replay.step(number), zeros)
            continue
        if step.goal is not None:
            stage = Stage(run.store, settled(stage, stage.step, look=False), number, run.conditions(), model)
        if step.space == "layer":
            keep = torch.zeros(len(stage.blocks), dtype=torch.bool)
            keep[: stage.layer_count()] = True
            _without_layers(stage, keep, zeros)
            continue
        counts = stage.counts()
        if step.space == "weight":
            _without_weights(stage, counts, zeros)
            continue
        for info in stage.infos:
            module, block = stage.blocks[info.block], stage.anatomy.blocks[info.block]
            space = block.spaces[step.space]
            if step.apply == "cut":
                first = torch.zeros(space.shape, dtype=torch.bool)
                first[..., : counts[info.name] // space.copies] = True
                cut_block(module, block, {step.space: first})
            else:
                zeros.add_units(module, space, 1 - counts[info.name] / info.units)
    return model, zeros.count(model)


def _replayed(stage: Stage, plan: Plan, zeros: Zeros) -> None:
    """Cut the stage's model as a plan says, or note the zeros that it adds as a mask instead."""
    blocks = {block.name: block for block in stage.anatomy.blocks}
    tensors = {f"{block.name}.{m.tensor}": (block, m.tensor) for block in blocks.values() for m in block.matrices}
    stage.check_replay(plan)
    for key in plan:
        _, space, site = key.split("/", 2)
        if space == "layer":
            _without_layers(stage, plan[key], zeros)
            continue
        block, tensor = tensors[site] if space == "weight" else (blocks[site], "")
        module, gone = stage.blocks[block.index], 1 - plan.kept(key) / plan.total(key)
        if space == "weight":
            zeros.add(module, tensor, gone)
        elif stage.step.apply == "cut":
            cut_block(module, block, {space: plan[key]})
        else:
            zeros.add_units(module, block.spaces[space], gone)


def _without_weights(stage: Stage, counts: dict[str, int], zeros: Zeros) -> None:
    """Note the zeros of a mask of weights, of a stack's experts together."""
    shares: dict[tuple[int, str], list[float]] = {}
    within = False
    for info in stage.infos:
        shares.setdefault((info.block, info.kind), []).append(1 - counts[info.name] / info.units)
        within = info.groups > 1
    for (block, tensor), own in shares.items():
        zeros.add(stage.blocks[block], tensor, sum(own) / len(own), within)


def _without_layers(stage: Stage, keep: Tensor, zeros: Zeros) -> None:
    """Cut layers out of the stage's model, or note the zeros that a mask of them makes instead."""
    if stage.step.apply == "cut":
        cut_layers(stage.model, stage.anatomy, keep)
        return
    for block, stays in zip(stage.anatomy.blocks, keep.tolist(), strict=True):
        for name in block.outputs if not stays else ():
            zeros.add(stage.blocks[block.index], name, 1.0)
