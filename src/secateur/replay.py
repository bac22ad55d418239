"""The steps that a plan speaks of, when it is replayed without a recipe."""

from __future__ import annotations

import re

from secateur.engine.plan import Plan
from secateur.errors import SecateurError
from secateur.step import SPACES, Step


def steps_of(plan: Plan | None) -> tuple[Step, ...]:
    """One step per number in the plan's keys: weights masked, units cut. The amounts are those of the plan.

    Raises:
        SecateurError: keys of unknown spaces, or numbers that do not count from 0.
    """
    spaces: dict[int, set[str]] = {}
    for key in plan or ():
        number, space, _ = key.split("/", 2)
        if not re.fullmatch("[0-9]{1,4}", number) or space not in SPACES:
            raise SecateurError(
                "the plan has a key that no step could have written",
                received=key,
                works=f"{', '.join(SPACES)} are spaces",
            )
        spaces.setdefault(int(number), set()).add(space)
    if not spaces or sorted(spaces) != list(range(len(spaces))) or any(len(s) > 1 for s in spaces.values()):
        raise SecateurError(
            "the plan's steps cannot be told from its keys",
            received=", ".join(f"{n}: {'+'.join(sorted(s))}" for n, s in sorted(spaces.items())) or "no keys",
            works="keys are step/space/site, one space per step, steps counted from 0",
        )
    return tuple(Step(space=next(iter(spaces[n])), score="magnitude", keep="1.0") for n in sorted(spaces))
