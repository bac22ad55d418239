"""OWL: layers with more outliers keep more.

    D_l = share of the layer's Wanda scores above  M * their mean          M = 5
    keep_l = keep + 2 * lambda * (D_l - min D) / (max D - min D) + shift    lambda = 0.08

with the shift that makes the total what was asked for, and keep_l held within keep - lambda .. keep + lambda.

Source: Yin et al. 2023, arXiv 2310.05175, section 3. Deviations: the published code centres keep_l on its
unweighted mean over layers, and a lone outlying layer may then leave the band of 2 lambda; here the mean is weighted
by size so that the total is exact, and the band holds. The mean is exact, the count above M times it is to
1/2048 of the threshold (scores are seen as a histogram).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from secateur.errors import SecateurError
from secateur.methods.base import Amount, Budget, Score, SiteInfo
from secateur.methods.budgets.ranks import Ranks
from secateur.methods.budgets.settle import settle, shares_of, total_count
from secateur.methods.scores.wanda import Wanda


@dataclass(frozen=True)
class Owl(Budget):
    """Share of outliers decides how much a layer keeps."""

    surveys = True
    ranking: ClassVar[type[Score] | None] = Wanda
    m: float = 5.0
    strength: float = 0.08

    def __post_init__(self) -> None:
        if not (self.m > 0 and 0 <= self.strength <= 1):
            raise SecateurError(
                "owl's options are out of range",
                received=f"m={self.m}, strength={self.strength}",
                works="m=5 (above 0), strength=0.08 (lambda, 0 to 1)",
            )

    def observe(self, site: SiteInfo, scores: Tensor) -> Ranks:
        return Ranks.of(scores)

    def outliers(self, ranks: Sequence[Ranks]) -> float:
        """Share of outliers among all scores of one layer."""
        number = sum(r.number for r in ranks)
        mean = sum(r.total for r in ranks) / max(number, 1)
        return sum(r.above(self.m * mean) for r in ranks) / max(number, 1)

    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        layers: dict[int, list[SiteInfo]] = {}
        for site in sites:
            layers.setdefault(site.block, []).append(site)
        ratio = {at: self.outliers([seen[s.name] for s in members]) for at, members in layers.items()}
        low, spread = (
            min(ratio.values(), default=0.0),
            max(ratio.values(), default=0.0) - min(ratio.values(), default=0.0),
        )
        total = total_count(sites, keep)
        units = {at: sum(s.units for s in members) for at, members in layers.items()}
        base = total / max(sum(units.values()), 1)
        floor, ceiling = max(base - self.strength, 0.0), min(base + self.strength, 1.0)

        def shares(shift: float) -> dict[int, float]:
            raised = {at: 2 * self.strength * ((r - low) / spread if spread else 0.5) for at, r in ratio.items()}
            return {at: min(max(base + up + shift, floor), ceiling) for at, up in raised.items()}

        share = shares_of(units, total, shares, (-2 * self.strength - 1, 1.0))
        return settle(sites, [s.units * share[s.block] for s in sites], total)
