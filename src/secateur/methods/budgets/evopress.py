"""EvoPress: which site keeps more and which less is searched for, by what the whole model then answers.

    levels        what uniform keeps, and up to ``levels`` steps more or less, of about ``step`` of the site each
    mutation      one site goes a level up, another down, and the parameters that stay are as many; 1 to 3 times
    generation    ``offspring`` mutants of one parent; the best ``survivors`` on ``tokens`` tokens stay, stage by stage
                  on ever more tokens; in the last stage the parent takes part, and the best is the next parent
    best          the smallest KL(dense || pruned) of the next-token predictions, on calibration text

Source: Sieberling et al. 2024, arXiv 2410.14649, by the released code (the paper was not read): level switches,
selection in several steps, elitism; the number of switches is the smaller of two draws from 1 to 3. For ``layer`` the
levels are stay and go.

The model at each level is made once, by the step's own method on the dense model's activations, and kept beside the
output in packed form; candidates put these parts together. The winner's counts are then pruned for real, block by
block.

Deviations: sites of different size exchange, too, where whole groups of their units cost the same (several small ones
against a large one), and the total of parameters is exactly uniform's in every candidate; KL is that of the 512
likeliest tokens and of all others together (never more than the whole); the winner replaces uniform only if it is
better on all of the text; layers begin as the step's score ranks them, not at random; with ``each=layer`` a layer's
sites move together, which leaves far less to search.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secateur.errors import SecateurError, unknown
from secateur.methods.base import Amount, Budget, SiteInfo
from secateur.methods.budgets.settle import uniform_count


@dataclass(frozen=True)
class EvoPress(Budget):
    """Evolutionary search over levels per site, by KL to the dense model; never worse than uniform on its text.

    Attributes:
        generations, offspring: how long, and how many mutants each.
        survivors, tokens: per stage of selection, divided by slashes (``4/1``, ``1024/4096``); the last leaves one.
        levels: steps above and below uniform.
        step: one level, as a share of the site (rounded to what sites can exchange).
        each: what has a level of its own: ``site``, or ``layer``, whose sites then go up and down together.
    """

    searches = True
    generations: int = 50
    offspring: int = 16
    survivors: int | str = "4/1"
    tokens: int | str = "1024/4096"
    levels: int = 3
    step: float = 0.05
    each: Literal["site", "layer"] = "site"

    def __post_init__(self) -> None:
        if self.each not in ("site", "layer"):
            raise unknown("holder of levels", self.each, ("site", "layer"))
        stages = list(zip(self.kept, self.read, strict=False))
        falling = all(a > b for a, b in zip([self.offspring, *self.kept], self.kept, strict=False))
        fine = (
            _whole(self.generations)
            and _whole(self.offspring, 2)
            and _whole(self.levels)
            and len(self.kept) == len(self.read) == len(stages)
            and falling
            and self.kept[-1:] == (1,)
            and sorted(self.read) == list(self.read)
            and isinstance(self.step, float)
            and 0 < self.step < 1
        )
        if not fine:
            raise SecateurError(
                "evopress's options are out of range",
                received=", ".join(f"{k}={v}" for k, v in vars(self).items()),
                works="generations=50,offspring=16,survivors=4/1,tokens=1024/4096,levels=3,step=0.05: ever fewer "
                "survivors (the last one alone) on ever more tokens, levels of at least 1, a step between 0.0 and 1.0",
            )

    @property
    def kept(self) -> tuple[int, ...]:
        """Survivors of every stage."""
        return _numbers(self.survivors)

    @property
    def read(self) -> tuple[int, ...]:
        """Tokens that every stage reads."""
        return _numbers(self.tokens)

    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        """Where the search begins: uniform."""
        return {site.name: uniform_count(site, keep) for site in sites}


def _whole(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= 1_000_000


def _numbers(value: object) -> tuple[int, ...]:
    """``4/1`` as numbers; nothing if it is not understood."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    return tuple(int(n) for n in text.split("/")) if re.fullmatch(r"[1-9]\d{0,8}(/[1-9]\d{0,8})*", text) else ()
