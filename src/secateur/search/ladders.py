"""Levels: how much a site may keep besides what it keeps now, and which sites can exchange exactly.

Sites change in steps that cost whole numbers of parameters. Within a pool, every step is a multiple of the pool's
smallest (a common multiple of what whole groups of units cost), so that any step of one site can be paid for exactly by
steps of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm


@dataclass(frozen=True)
class Ladder:
    """The levels of one site; level 0 is what it keeps to begin with.

    Attributes:
        step: parameters that one level more costs.
        low, high: lowest and highest level (both 0: the site is not part of the search).
        pool: sites of one pool exchange with each other.
    """

    step: int
    low: int
    high: int
    pool: int = 0

    @property
    def levels(self) -> range:
        return range(self.low, self.high + 1)


@dataclass(frozen=True)
class Rungs:
    """What a ladder is made from.

    Attributes:
        size: parameters of the whole site.
        group: parameters of the least that can be added or taken away.
        kept: parameters that stay at level 0.
        least: parameters that must stay.
    """

    size: int
    group: int
    kept: int
    least: int = 0


def ladders(sites: Sequence[Rungs], levels: int, share: float) -> list[Ladder]:
    """A ladder for every site: up to ``levels`` steps of about ``share`` of the site to either side.

    Sites of equal size are one pool, and pools are joined (large sites first) as long as the common unit is at most
    twice ``share`` of the smallest site in it. The smallest site's step is then the unit of all others': nobody is far
    from its share, and few sites pay for any step. A site whose least group costs more than its share still has steps
    of one group.
    """
    sizes = sorted({site.size for site in sites}, reverse=True)
    pools: list[tuple[int, list[int]]] = []  # unit, and the sizes of the sites in it
    for size in sizes:
        unit = lcm(*(site.group for site in sites if site.size == size))
        for at, (other, members) in enumerate(pools):
            joined = lcm(unit, other)
            if joined <= 2 * share * min(*members, size):
                pools[at] = (joined, [*members, size])
                break
        else:
            pools.append((unit, [size]))
    where = {
        size: (at, unit * max(1, round(share * min(members) / unit)))
        for at, (unit, members) in enumerate(pools)
        for size in members
    }
    out = []
    for site in sites:
        pool, unit = where[site.size]
        step = max(1, round(share * site.size / unit)) * unit
        low = -min(levels, max(0, site.kept - max(site.least, site.group)) // step)
        out.append(Ladder(step, low, min(levels, (site.size - site.kept) // step), pool))
    return out


def closed(ladder: Ladder) -> Ladder:
    """The ladder of a site that stays as it is."""
    return replace(ladder, low=0, high=0)


def together(steps: Sequence[Ladder], groups: Sequence[Sequence[int]]) -> list[Ladder]:
    """One ladder for each group of sites that go up and down as one; groups exchange where a step costs the same."""
    out = []
    for members in groups:
        own = [steps[at] for at in members]
        step = sum(ladder.step for ladder in own)
        out.append(Ladder(step, max(m.low for m in own), min(m.high for m in own), pool=step))
    return out
