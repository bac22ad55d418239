"""Random: the baseline every score must beat, at the same grain and budget.

S_ij ~ uniform(0, 1), from a generator seeded by the recipe's seed and the site's name
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.engine.probes import Evidence
from secateur.methods.base import MatrixSite, Score, UnitSite


@dataclass(frozen=True)
class Random(Score):
    """Uniform noise, per weight or per unit."""

    def score(self, site: MatrixSite, evidence: Evidence) -> Tensor:
        return torch.rand(site.weight.shape, generator=site.generator).to(site.weight.device)

    def units(self, site: UnitSite) -> Tensor:
        # drawn per unit: a sum of many draws would be nearly the same for all of them
        return torch.rand(site.space.shape, generator=site.generator)
