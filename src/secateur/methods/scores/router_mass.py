"""Router mass: an expert matters by how much the router gives it. A baseline: it does not see what experts do.

    S_e = sum over tokens of the router's weight for expert e

Source: Muzio et al. 2024 (SEER-MoE), arXiv 2404.05089, counting activations of experts weighted by the router.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.engine.probes import RouterMass as Mass
from secateur.methods.base import UnitScore, UnitSite


@dataclass(frozen=True)
class RouterMass(UnitScore):
    """Sum of the router's weights given to each expert; experts only."""

    needs = (Mass,)
    spaces = ("expert",)

    def units(self, site: UnitSite) -> Tensor:
        return site.block_evidence[Mass].mass.reshape(site.space.shape)
