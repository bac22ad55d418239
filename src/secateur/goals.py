"""From a goal to an amount: how much may stay so that a step reaches a target in parameters or bytes."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

from secateur.errors import SecateurError
from secateur.methods.base import Amount
from secateur.stage import Stage
from secateur.step import Step
from secateur.words import amount_word

FINEST = 100_000  # shares are tried in steps of 1 / FINEST


def settled(stage: Stage, step: Step) -> Step:
    """The step with its target said as a keep: the largest share that meets it.

    Args:
        stage: on the model the step will prune (nothing is read unless the budget surveys).

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

    def left(thousandths: int) -> float:
        amount = Amount(share=Decimal(thousandths) / FINEST)
        if step.space == "layer":
            info = stage.infos[0]
            gone = info.units - amount.of(info.units)
            return now - gone * info.cost * per_parameter
        counts = stage.counts(amount)
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
        raise SecateurError(
            f"this target cannot be met in {step.space} alone",
            received=f"target {step.target} of {now:,} {goal.of}",
            works=f"the smallest it can get is about {max(fewest, 0):,.0f}; add a step in another space",
        )
    return replace(step, keep=amount_word(Amount(share=Decimal(low) / FINEST)), target=None)
