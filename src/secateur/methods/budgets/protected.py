"""Protected: the first and last layers keep everything, whatever the budget inside says of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from secateur.errors import SecateurError
from secateur.methods.base import Amount, Budget, SiteInfo


@dataclass(frozen=True)
class Protected(Budget):
    """Layers 0 .. first-1 and the ``last`` ones keep everything; the others share ``keep`` among themselves."""

    inner: Budget
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0:
            raise SecateurError(
                "protected layers are counted from the ends",
                received=f"first:{self.first},last:{self.last}",
                works="first:2,last:1",
            )
        object.__setattr__(self, "surveys", self.inner.surveys)
        object.__setattr__(self, "searches", self.inner.searches)
        object.__setattr__(self, "ranking", self.inner.ranking)

    def covers(self, site: SiteInfo) -> bool:
        """Whether a site is protected."""
        return site.block < self.first or site.block >= site.blocks - self.last

    def observe(self, site: SiteInfo, scores: Tensor) -> Any:
        return None if self.covers(site) else self.inner.observe(site, scores)

    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        open_sites = [site for site in sites if not self.covers(site)]
        if not open_sites:
            raise SecateurError(
                "every layer is protected, nothing is left to prune",
                received=f"first:{self.first},last:{self.last}",
                works="fewer protected layers",
            )
        counts = self.inner.allot(open_sites, keep, seen)
        return {site.name: counts.get(site.name, site.units) for site in sites}
