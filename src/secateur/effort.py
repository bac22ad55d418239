"""``--effort``: chains of method, budget and repair for who wants the best weights and names none of these.

A chain is chosen by how long it may take, in dense forward passes over the calibration text (at most 4, 12 and 40).
The guide lists them, the README has what each part brought on a real model.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from secateur.errors import SecateurError, unknown

Words = Mapping[str, str]

# For n:m, whose grain leaves nothing to allocate and compares no rows; and what comes on top where it does not.
_FAST: Words = {"method": "alps"}
_BALANCED: Words = {"method": "alps", "repair": "block_reconstruction:passes=4"}
_BEST: Words = {"method": "alps", "repair": "block_reconstruction:passes=8"}
_FREE: Words = {"method": "alps:rows=root", "budget": "rate_distortion"}
CHAINS: Mapping[str, tuple[Words, Words]] = MappingProxyType(
    {
        "fast": ({**_FAST, **_FREE}, _FAST),
        "balanced": ({**_BALANCED, **_FREE}, _BALANCED),
        "best": ({**_BEST, **_FREE}, _BEST),
    }
)
PASSES: Mapping[str, int] = MappingProxyType({"fast": 4, "balanced": 12, "best": 40})
LEFT_OPEN: Words = MappingProxyType({"budget": "uniform", "fit_on": "pruned"})  # where nothing is said


def chain_of(effort: str, given: Mapping[str, str | None], fixed: bool) -> Words:
    """The words that an effort stands for.

    Args:
        effort: ``fast``, ``balanced`` or ``best``.
        given: the step's own words (space, score, method, budget, repair, fit_on, and what they are).
        fixed: the grain or a map fixes every site's count, so that there is nothing to allocate.

    Raises:
        SecateurError: unknown effort, not the weight space, or words that say otherwise.
    """
    if effort not in CHAINS:
        raise unknown("effort", effort, tuple(CHAINS))
    if given["space"] != "weight":
        raise SecateurError(
            "efforts are chains for single weights",
            received=f"effort {effort}, space {given['space']}",
            works="name a score for units, e.g. --score wanda --repair least_squares",
        )
    words = CHAINS[effort][1 if fixed else 0]
    for word, value in given.items():
        if word != "space" and value not in (None, words.get(word, LEFT_OPEN.get(word))):
            raise SecateurError(
                "an effort chooses the method, and a word says otherwise",
                received=f"effort {effort}, {word} {value}",
                works=f"leave {word} out, or leave effort out and name everything",
            )
    return words
