"""Magnitude: small weights matter least; no text needed.

    S_ij = |w_ij|^p           of units: (sum over the unit's weights of |w|^p)^(1/p)

Source: Han et al. 2015, arXiv 1506.02626, section 3.1; norms of units as in Li et al. 2017, arXiv 1608.08710.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.engine.probes import Evidence
from secateur.errors import SecateurError
from secateur.methods.base import MatrixSite, Score, UnitSite


@dataclass(frozen=True)
class Magnitude(Score):
    """Absolute value of a weight; L1 (``p: 1``) or L2 (``p: 2``) norm of a unit's weights."""

    p: int = 1

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise SecateurError("magnitude knows the L1 and the L2 norm", received=self.p, works="p: 1 or p: 2")

    def score(self, site: MatrixSite, evidence: Evidence) -> Tensor:
        return site.weight.abs() if self.p == 1 else site.weight.square()

    def units(self, site: UnitSite) -> Tensor:
        total = super().units(site)
        return total if self.p == 1 else total.sqrt()
