"""Pooled: units of many sites compete, and every site keeps what it wins.

    keep the best  sum of counts  units over the whole model, or within each layer

Scores of different sites may first be brought to one scale: ``zscore``, (S - mean) / deviation of the site, as
An et al. 2024 (FLAP), arXiv 2312.11983, standardise theirs; ``rms``, S / root mean square.
With ``cost: true`` units are ranked by score per parameter. Where units of different sites cost different
numbers of parameters, the total is kept in parameters (never above what was asked for).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from torch import Tensor

from secateur.errors import SecateurError, unknown
from secateur.methods.base import Amount, Budget, SiteInfo
from secateur.methods.budgets.ranks import Ranks, merged
from secateur.methods.budgets.settle import affordable, settle, total_count


@dataclass(frozen=True)
class Pooled(Budget):
    """The best units of all sites together stay, over the model or within each layer."""

    surveys = True
    over: Literal["model", "layer"] = "model"
    standardise: Literal["none", "zscore", "rms"] = "none"
    cost: bool = False

    def __post_init__(self) -> None:
        if self.over not in ("model", "layer"):
            raise unknown("pool", self.over, ("model", "layer"))
        if self.standardise not in ("none", "zscore", "rms"):
            raise unknown("standardisation", self.standardise, ("none", "zscore", "rms"))
        if not isinstance(self.cost, bool):
            raise SecateurError("cost is a yes or no", received=self.cost, works="cost: true or cost: false")
        if self.cost and self.standardise == "zscore":  # of two units below the mean it would prefer the dearer one
            raise SecateurError(
                "z-scores are negative below the mean, so they cannot be divided by what units cost",
                received="standardise: zscore with cost: true",
                works="standardise: rms with cost: true, or cost: false",
            )

    def observe(self, site: SiteInfo, scores: Tensor) -> Ranks:
        assert scores.numel() == site.units, f"{site.name}: {scores.numel()} scores for {site.units} units"
        scores = scores.float()
        if self.standardise != "none":
            wide = Ranks.of(scores)
            if self.standardise == "zscore":
                scores = (scores - wide.mean) / (wide.deviation or 1.0)
            else:
                scores = scores / (wide.size or 1.0)
        return Ranks.of(scores / site.cost if self.cost else scores)

    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        pools: dict[int, list[SiteInfo]] = {}
        for site in sites:
            pools.setdefault(site.block if self.over == "layer" else 0, []).append(site)
        counts: dict[str, int] = {}
        for pool in pools.values():
            ranks = [seen[site.name] for site in pool]
            if len({site.cost for site in pool}) > 1:
                counts |= fill(pool, ranks, keep)
            else:
                counts |= divide(pool, ranks, total_count(pool, keep))
        return {site.name: counts[site.name] for site in sites}


def divide(sites: Sequence[SiteInfo], ranks: Sequence[Ranks], total: int) -> dict[str, int]:
    """The ``total`` best units of all sites, every site at least its minimum."""
    table = merged(ranks)
    wishes = table.best(total)
    if any(wish < site.minimum for site, wish in zip(sites, wishes, strict=True)):
        low, high = 0, total  # the minima take places from the others: find how many are left to win
        while low < high:
            mid = (low + high + 1) // 2
            wishes = table.best(mid)
            taken = sum(max(site.minimum, wish) for site, wish in zip(sites, wishes, strict=True))
            low, high = (mid, high) if taken <= total else (low, mid - 1)
        wishes = table.best(low)
    return settle(sites, wishes, total)


def fill(sites: Sequence[SiteInfo], ranks: Sequence[Ranks], keep: Amount) -> dict[str, int]:
    """The best units whose parameters fit into what ``keep`` of all parameters is; in steps of whole groups.

    Raises:
        SecateurError: the minima alone cost more.
    """
    budget = affordable(sites, keep)
    low, high = 0, sum(site.units for site in sites)
    table = merged(ranks)

    def counts(best: int) -> list[int]:
        return [
            max(-(-site.minimum // g) * g, wish // g * g)
            for site, wish in zip(sites, table.best(best), strict=True)
            for g in (max(site.groups, 1),)
        ]

    def price(best: int) -> Decimal:
        return sum((n * Decimal(repr(s.cost)) for s, n in zip(sites, counts(best), strict=True)), Decimal(0))

    if price(0) > budget:
        raise SecateurError(
            f"at least {sum(counts(0))} units must stay",
            received=f"{int(budget)} parameters to keep",
            works="keep more of them",
        )
    while low < high:
        mid = (low + high + 1) // 2
        low, high = (mid, high) if price(mid) <= budget else (low, mid - 1)
    return {site.name: n for site, n in zip(sites, counts(low), strict=True)}
