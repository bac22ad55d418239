"""From a goal to an amount: how much may stay so that a step reaches a target in parameters or bytes."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

from secateur.engine.apply import get_tensor
from secateur.errors import SecateurError
from secateur.methods.base import Amount
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
        size = sum(store.bytes_of_block(i) for i in [*range(store.blocks), None])
        per_parameter = size / sum(p.numel() for p in store.skeleton().parameters())
    now = round(sum(p.numel() for p in model.parameters()) * per_parameter)
    limit = goal.limit(now)
    if limit >= now and (goal.change is None or goal.change != 0):
        raise SecateurError(f"the model has only {now:,} {goal.of}", received=f"target {step.target}", works="ask less")

    if step.space == "layer":
        amount, reached = _layers(stage, step, (now - limit) / per_parameter, look)
        if reached > 0:
            raise _unmet(step, now, limit + reached * per_parameter)
        return replace(step, keep=amount_word(amount), target=None)
    if look and stage.parts.budget.surveys:
        store.load_rest(model, "cpu")

    def left(thousandths: int) -> float:
        counts = stage.counts(Amount(share=Decimal(thousandths) / FINEST))
        return now - sum((i.units - counts[i.name]) * i.cost for i in stage.infos) * per_parameter

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
        fewest = now - sum((i.units - max(i.minimum, 1)) * i.cost for i in stage.infos) * per_parameter
        raise _unmet(step, now, fewest)
    return replace(step, keep=amount_word(Amount(share=Decimal(low) / FINEST)), target=None)


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
