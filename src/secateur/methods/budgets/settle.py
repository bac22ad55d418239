"""From wishes to counts: whole groups, nobody below its minimum or above what it has, the total exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal

from secateur.errors import SecateurError
from secateur.methods.base import Amount, SiteInfo


def uniform_count(site: SiteInfo, keep: Amount) -> int:
    """What one site keeps under ``keep``: so much of each of its groups, rounded half up.

    Raises:
        SecateurError: more than there is, or fewer than the site's minimum.
    """
    groups = max(site.groups, 1)
    each = site.units // groups
    kept = keep.of(each)
    if not 0 <= kept <= each:
        raise SecateurError(
            f"{site.name} cannot keep {kept} of {each}",
            received=keep.share if keep.share is not None else keep.count,
            works=f"a share from 0.0 to 1.0, or a count from 0 to {each}",
        )
    if groups * kept < site.minimum:
        raise SecateurError(
            f"{site.name} needs at least {site.minimum} of its {site.units} units",
            received=f"{groups * kept} kept",
            works=f"keep at least {site.minimum}",
        )
    return groups * kept


def total_count(sites: Sequence[SiteInfo], keep: Amount) -> int:
    """What all sites keep together.

    Where units are free to move (no groups), a share is of all of them together: half of 30 x 3 heads is 45,
    not 30 x 2. Where sites are single units (layers), a count is of all sites. Otherwise the total is
    what ``uniform`` would keep.
    """
    free = all(site.groups <= 1 for site in sites)
    units = sum(site.units for site in sites)
    single = all(site.units == 1 for site in sites)
    if free and (keep.count is None or single):
        kept = keep.of(units)
        if not 0 <= kept <= units:
            raise SecateurError(
                f"cannot keep {kept} of {units}",
                received=keep.share if keep.share is not None else keep.count,
                works=f"a share from 0.0 to 1.0, or a count from 0 to {units}",
            )
        return kept
    return sum(uniform_count(site, keep) for site in sites)


def shares_of(
    weight: Mapping[int, float], wanted: float, shares: Callable[[float], dict[int, float]], ends: tuple[float, float]
) -> dict[int, float]:
    """Blocks' shares that add up, by weight, to what is wanted (or just above).

    Args:
        weight: of every block.
        shares: of every block by one number; none falls as that rises.
        ends: numbers that give too little and too much.
    """
    below, above = ends
    for _ in range(100):
        middle = (below + above) / 2
        kept = sum(weight[at] * share for at, share in shares(middle).items())
        below, above = (middle, above) if kept < wanted else (below, middle)
    return shares(above)


def affordable(sites: Sequence[SiteInfo], keep: Amount) -> Decimal:
    """Parameters that may stay in all sites together: what `total_count` units cost where all cost the same, otherwise
    ``keep`` of all parameters (for a count: what uniform would keep)."""
    costs = {site.cost for site in sites}
    if len(costs) <= 1:
        return total_count(sites, keep) * Decimal(repr(costs.pop() if costs else 1.0))
    if keep.share is not None:
        return sum((site.units * Decimal(repr(site.cost)) for site in sites), Decimal(0)) * keep.share
    return sum((uniform_count(site, keep) * Decimal(repr(site.cost)) for site in sites), Decimal(0))


def afford(sites: Sequence[SiteInfo], wishes: Sequence[float], keep: Amount) -> dict[str, int]:
    """Counts next to the wishes: multiples of each site's groups, between its minimum and its units. Where all units
    cost the same, their total is exactly `total_count`; otherwise their parameters are at most `affordable`, and
    there is no room left for one more group of any site.

    Raises:
        SecateurError: the minima alone cost more.
    """
    if len({site.cost for site in sites}) <= 1:
        return settle(sites, wishes, total_count(sites, keep))
    steps = [max(site.groups, 1) for site in sites]
    least = [-(-site.minimum // g) * g for site, g in zip(sites, steps, strict=True)]
    prices = [g * Decimal(repr(site.cost)) for site, g in zip(sites, steps, strict=True)]
    counts = [
        max(low, min(int(wish) // g * g, site.units // g * g))
        for site, wish, low, g in zip(sites, wishes, least, steps, strict=True)
    ]
    left = affordable(sites, keep) - sum(
        (n // g * price for n, g, price in zip(counts, steps, prices, strict=True)), Decimal(0)
    )
    while left != 0:
        gap = [(wish - n) / g for wish, n, g in zip(wishes, counts, steps, strict=True)]
        if left < 0:
            able = [i for i, n in enumerate(counts) if n - steps[i] >= least[i]]
            if not able:
                raise SecateurError(
                    f"at least {sum(least)} units must stay", received="fewer parameters", works="keep more of them"
                )
            at = min(able, key=lambda i: (gap[i], i))
        else:
            able = [i for i, n in enumerate(counts) if n + steps[i] <= sites[i].units and prices[i] <= left]
            if not able:
                break
            at = max(able, key=lambda i: (gap[i], -i))
        sign = 1 if left > 0 else -1
        counts[at] += sign * steps[at]
        left -= sign * prices[at]
    return {site.name: count for site, count in zip(sites, counts, strict=True)}


def settle(sites: Sequence[SiteInfo], wishes: Sequence[float], total: int) -> dict[str, int]:
    """Counts next to the wishes: multiples of each site's groups, between its minimum and its units, adding up
    to ``total``.

    Whole groups are handed to (or taken from) whoever is furthest from its wish, the earlier site first. Where
    no sum of whole groups gives the total exactly, the result stays the least possible below it.

    Raises:
        SecateurError: the minima alone exceed the total.
    """
    steps = [max(site.groups, 1) for site in sites]
    least = [-(-site.minimum // g) * g for site, g in zip(sites, steps, strict=True)]
    if sum(least) > total:
        raise SecateurError(
            f"at least {sum(least)} units must stay", received=f"{total} to keep", works="keep more of them"
        )
    counts = [
        max(low, min(int(wish) // g * g, site.units))
        for site, wish, low, g in zip(sites, wishes, least, steps, strict=True)
    ]
    left = _hand_out(sites, wishes, counts, steps, least, total - sum(counts))
    while left:
        if (pair := _exchange(sites, counts, steps, least, left)) is not None:
            more, less = pair
            counts[more] += steps[more]
            counts[less] -= steps[less]
        elif left < 0:  # never above what was asked for
            able = [i for i, g in enumerate(steps) if counts[i] - g >= least[i]]
            at = min(able, key=lambda i: (steps[i], i))
            counts[at] -= steps[at]
        else:
            break
        left = _hand_out(sites, wishes, counts, steps, least, total - sum(counts))
    return {site.name: count for site, count in zip(sites, counts, strict=True)}


def _hand_out(
    sites: Sequence[SiteInfo],
    wishes: Sequence[float],
    counts: list[int],
    steps: Sequence[int],
    least: Sequence[int],
    left: int,
) -> int:
    """Give (or take, if ``left`` is negative) one group at a time without overshooting; returns what is left."""
    sign = 1 if left > 0 else -1
    moved = True
    while left and moved:
        moved = False
        for at in sorted(range(len(steps)), key=lambda i: (-sign * (wishes[i] - counts[i]) / steps[i], i)):
            step = steps[at]
            room = counts[at] + step <= sites[at].units if sign > 0 else counts[at] - step >= least[at]
            if room and step <= sign * left:
                counts[at] += sign * step
                left -= sign * step
                moved = True
    return left


def _exchange(
    sites: Sequence[SiteInfo], counts: Sequence[int], steps: Sequence[int], least: Sequence[int], left: int
) -> tuple[int, int] | None:
    """Two sites, one to gain and one to lose a group, which together change the total by ``left``."""
    losers: dict[int, int] = {}
    for j, g in enumerate(steps):
        if counts[j] - g >= least[j]:
            losers.setdefault(g, j)
    for i, g in enumerate(steps):
        if counts[i] + g <= sites[i].units and g - left in losers and losers[g - left] != i:
            return i, losers[g - left]
    return None
