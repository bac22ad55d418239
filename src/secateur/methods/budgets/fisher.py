"""Fisher: every weight of the model competes by what the model's answers would lose without it.

    keep the largest   1/2 F_ij w_ij^2   of all matrices together; each matrix keeps at least a tenth

Sites then differ by depth and by what they are: on SmolLM2 at 60 % the query projections keep a sixth, the value
projections three quarters, and layers in the middle less than those at both ends. Only counts are taken from it; which
weights stay is the method's to say.

Source: Theis et al. 2018, arXiv 1801.05787 (one threshold on Fisher information for all layers). Deviations: for counts
only, and the least share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, ClassVar

from torch import Tensor

from secateur.errors import SecateurError
from secateur.methods.base import Amount, Budget, Score, SiteInfo
from secateur.methods.budgets.pooled import Pooled
from secateur.methods.budgets.settle import affordable
from secateur.methods.scores.fisher import FisherScore


@dataclass(frozen=True)
class Fisher(Budget):
    """Counts by one threshold on the Fisher information of all weights, over the model or within each layer.

    Attributes:
        over: ``model`` or ``layer``.
        least: share of a site's units that stays whatever it scores (never more than what all keep).
    """

    surveys = True
    ranking: ClassVar[type[Score] | None] = FisherScore
    over: str = "model"
    least: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.least, bool) or not 0 <= self.least < 1:
            raise SecateurError("least is not a share below 1", received=self.least, works="least=0.1")
        self._pooled()  # refuses what it does not know

    def _pooled(self) -> Pooled:
        return Pooled(over=self.over)  # type: ignore[arg-type]

    def observe(self, site: SiteInfo, scores: Tensor) -> Any:
        return self._pooled().observe(site, scores)

    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        units = sum(site.units * site.cost for site in sites)
        share = min(self.least, float(affordable(sites, keep)) / units if units else 0.0)
        held = [replace(s, minimum=max(s.minimum, min(ceil(share * s.units - 1e-9), s.units))) for s in sites]
        return self._pooled().allot(held, keep, seen)
