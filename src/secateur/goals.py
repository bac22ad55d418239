"""From a goal to an amount: how much may stay so that a step reaches a target in parameters, bytes or MACs.

MACs are those of one decoded token, as `measure.size` counts them (head included, 1,024 tokens in the cache). Units
count as what is left multiplies once they are cut; a masked tile counts as skipped, which takes a kernel that knows
tiles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal

import torch

from secateur.engine.apply import cut_block, cut_layers, get_tensor
from secateur.errors import SecateurError
from secateur.measure.size import chosen_share, size
from secateur.methods.base import Amount
from secateur.methods.grains import Tile
from secateur.stage import Stage
from secateur.step import Step
from secateur.words import amount_word

FINEST = 100_000  # shares are tried in steps of 1 / FINEST


def settled(stage: Stage, step: Step, look: bool = True) -> Step:
    """The step with its target said as a keep: the largest share (or number of layers) that meets it.

    Args:
        stage: on the model the step will prune. Its weights are read only if the budget surveys, or if it is layers
            that go and they differ in size: then which ones go decides how many must.
        look: False never reads; layers of different size are then taken as equal.

    Raises:
        SecateurError: the target cannot be met in this space, or asks for more than there is.
    """
    goal = step.goal
    if goal is None:
        return step
    if goal.of == "bytes" and step.apply == "mask":
        raise SecateurError(
            "a mask leaves the file as large as it was",
            received=f"target {step.target}",
            works="cut units (ffn, kv_group, layer, ...), or give a target in params (non-zeros)",
        )
    model, store = stage.model, stage.store
    per_parameter = 1.0
    if goal.of == "bytes":
        size_ = sum(store.bytes_of_block(i) for i in [*range(store.blocks), None])
        per_parameter = size_ / sum(p.numel() for p in store.skeleton().parameters())
    if goal.of == "macs":
        _check_macs(stage, step)
        now = size(model).macs_per_token
    else:
        now = round(sum(p.numel() for p in model.parameters()) * per_parameter)
    limit = goal.limit(now)
    if limit >= now and (goal.change is None or goal.change != 0):
        raise SecateurError(f"the model has only {now:,} {goal.of}", received=f"target {step.target}", works="ask less")

    if step.space == "layer" and goal.of == "macs":
        return _layers_by_macs(stage, step, limit, look)
    if step.space == "layer":
        amount, reached = _layers(stage, step, (now - limit) / per_parameter, look)
        if reached > 0:
            raise _unmet(step, now, limit + reached * per_parameter)
        return replace(step, keep=amount_word(amount), target=None)
    if look and stage.parts.budget.surveys:
        store.load_rest(model, "cpu")

    def parameters(counts: Mapping[str, int]) -> float:
        return now - sum((i.units - counts[i.name]) * i.cost for i in stage.infos) * per_parameter

    weigh = parameters if goal.of != "macs" else _tile_macs(stage, now) if step.space == "weight" else _cut_macs(stage)

    def left(thousandths: int) -> float:
        return weigh(stage.counts(Amount(share=Decimal(thousandths) / FINEST)))

    low, high = 0, FINEST  # left(low) <= limit is wanted; left grows with the share
    while low < high:
        middle = (low + high + 1) // 2
        try:
            fits = left(middle) <= limit
        except SecateurError:  # below a space's minimum
            fits = True
        low, high = (middle, high) if fits else (low, middle - 1)
    try:
        reached = left(low) if low else float("inf")
    except SecateurError:
        reached = float("inf")
    if reached > limit:
        raise _unmet(step, now, weigh({i.name: max(i.minimum, i.groups) for i in stage.infos}))
    return replace(step, keep=amount_word(Amount(share=Decimal(low) / FINEST)), target=None)


def _check_macs(stage: Stage, step: Step) -> None:
    """Refuse what multiplies as much as before.

    Raises:
        SecateurError: single zeros, or masks of units.
    """
    if step.space == "weight" and not isinstance(stage.parts.grain, Tile):
        raise SecateurError(
            "a count of MACs skips no single zeros",
            received=f"target {step.target}, grain {step.grain}",
            works="--grain tile:16x16, cut units (ffn, kv_group, layer, ...), or a target in params (non-zeros)",
        )
    if step.space != "weight" and step.apply == "mask":
        raise SecateurError(
            "a mask leaves as many multiplications as there were",
            received=f"target {step.target}",
            works="apply cut, or a target in params (non-zeros)",
        )


def _tile_macs(stage: Stage, now: int) -> Callable[[Mapping[str, int]], float]:
    """MACs per token without the tiles that go; an expert's count as often as it is chosen."""
    share = chosen_share(stage.model)
    price = {i.name: i.cost * (share if i.name.endswith("]") else 1.0) for i in stage.infos}
    return lambda counts: now - sum((i.units - counts[i.name]) * price[i.name] for i in stage.infos)


def _cut_macs(stage: Stage) -> Callable[[Mapping[str, int]], float]:
    """MACs per token of the stage's model with so many units in every block: a copy is cut and weighed."""
    empty, step = copy.deepcopy(stage.model).to("meta"), stage.step
    found: dict[tuple[int, ...], float] = {}

    def weigh(counts: Mapping[str, int]) -> float:
        key = tuple(counts[info.name] for info in stage.infos)
        if key not in found:
            model = copy.deepcopy(empty)
            blocks = list(model.get_submodule(stage.anatomy.path).children())
            for info, count in zip(stage.infos, key, strict=True):
                block = stage.anatomy.blocks[info.block]
                space = block.spaces[step.space]
                first = torch.zeros(space.shape, dtype=torch.bool)
                first[..., : count // space.copies] = True
                cut_block(blocks[info.block], block, {step.space: first})
            found[key] = size(model).macs_per_token
        return found[key]

    return weigh


def _layers_by_macs(stage: Stage, step: Step, limit: int, look: bool) -> Step:
    """The step with the largest number of layers whose model is within ``limit``."""
    least, n = max(1, sum(step.ends)), len(stage.blocks)
    equal = not look or len({_cost(stage, index) for index in range(n)}) == 1
    if not equal:
        stage.store.load_rest(stage.model, "cpu")
    reached, empty = 0, copy.deepcopy(stage.model).to("meta")
    for count in range(n, least - 1, -1):
        keep = torch.arange(n) < count
        if not equal:
            (keep,) = stage.choose_layers(Amount(count=count)).values()
        model = copy.deepcopy(empty)
        cut_layers(model, stage.anatomy, keep)
        reached = size(model).macs_per_token
        if reached <= limit:
            return replace(step, keep=count, target=None)
    raise _unmet(step, size(stage.model).macs_per_token, reached)


def _layers(stage: Stage, step: Step, excess: float, look: bool) -> tuple[Amount, float]:
    """How many layers may stay so that those that go hold at least ``excess`` parameters, and what is still missing
    with as few layers as may be (0 or less: nothing)."""
    costs = [_cost(stage, index) for index in range(len(stage.blocks))]
    if not look:
        costs = [sum(costs) / len(costs)] * len(costs)
    equal = len(set(costs)) == 1
    if not equal:
        stage.store.load_rest(stage.model, "cpu")
    missing = excess
    least = max(1, sum(step.ends))
    for count in range(len(costs), least - 1, -1):
        if equal:
            gone = (len(costs) - count) * costs[0]
        else:
            (keep,) = stage.choose_layers(Amount(count=count)).values()
            gone = sum(cost for cost, stays in zip(costs, keep.tolist(), strict=True) if not stays)
        missing = excess - gone
        if missing <= 0:
            return Amount(count=count), missing
    return Amount(count=least), missing


def _cost(stage: Stage, index: int) -> float:
    """Parameters that go with a layer: all of a cut one's, of a masked one only what it writes with."""
    module = stage.blocks[index]
    if stage.step.apply == "mask":
        return float(sum(get_tensor(module, name).numel() for name in stage.anatomy.blocks[index].outputs))
    return float(sum(p.numel() for p in module.parameters()))


def _unmet(step: Step, now: int, fewest: float) -> SecateurError:
    what = step.goal.of if step.goal is not None else "params"
    return SecateurError(
        f"this target cannot be met in {step.space} alone",
        received=f"target {step.target} of {now:,} {what}",
        works=f"the smallest it can get is about {max(fewest, 0):,.0f}; add a step in another space",
    )
