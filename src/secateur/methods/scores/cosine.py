"""Block influence: a layer that hardly turns the hidden state can go.

    S = 1 - mean over tokens of cos(x_in, x_out)

Source: Men et al. 2024 (ShortGPT), arXiv 2403.03853, equation 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.engine.probes import Cosine
from secateur.methods.base import UnitScore, UnitSite


@dataclass(frozen=True)
class BlockInfluence(UnitScore):
    """One minus the mean cosine between a layer's input and its output; layers only."""

    needs = (Cosine,)
    spaces = ("layer",)

    def units(self, site: UnitSite) -> Tensor:
        return torch.tensor([1.0 - site.block_evidence[Cosine].cosine])
