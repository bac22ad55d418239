"""ATP: early layers keep more, and what a layer keeps falls in equal steps over the depth.

    keep_b = keep + rise * (1/2 - (b - first) / (last - first)) + shift        rise = 0.12

with b the block, first and last the outermost blocks that are pruned, keep_b held within 0 and 1, and the shift that
makes the total what uniform would keep; what one layer cannot give or take, the others share equally. All sites of a
block keep the same share. ``rise`` is how much sparser the last block is than the first; a negative one turns the
slope around.

Source: Huang et al. 2025, arXiv 2502.14770, "Determining Layer-wise Sparsity for Large Language Models Through a
Theoretical Perspective": sparsity as an increasing arithmetic progression (abstract; errors of early layers explode
on their way through the later ones). Deviations: the paper searches a grid for the common difference, here
rise / (blocks - 1) is an option; the mean is weighted by parameters, so that the total is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import SecateurError
from secateur.methods.base import Amount, Budget, SiteInfo
from secateur.methods.budgets.settle import afford, affordable, shares_of


@dataclass(frozen=True)
class Atp(Budget):
    """Sparsity rises in equal steps from the first block to the last."""

    rise: float = 0.12

    def __post_init__(self) -> None:
        if isinstance(self.rise, bool) or not -1 <= self.rise <= 1:
            raise SecateurError("atp's rise is out of range", received=self.rise, works="rise=0.12 (-1 to 1)")

    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        weight: dict[int, float] = {}
        for site in sites:
            weight[site.block] = weight.get(site.block, 0.0) + site.units * site.cost
        first, last = min(weight, default=0), max(weight, default=0)
        want = float(affordable(sites, keep))

        def shares(level: float) -> dict[int, float]:
            depth = {b: (b - first) / (last - first) if last > first else 0.5 for b in weight}
            return {b: min(max(level + self.rise * (0.5 - depth[b]), 0.0), 1.0) for b in weight}

        share = shares_of(weight, want, shares, (-1.0, 2.0))
        return afford(sites, [site.units * share[site.block] for site in sites], keep)
