"""Relative contribution: a weight matters by its share in what its output adds up to.

    S_ij = mean over tokens of  |x_j w_ij| / sum_k |x_k w_ik|

Source: Hussien et al. 2024, arXiv 2410.16151. The paper prunes by the distribution of this share over the data
(its mean and deviation) with a threshold; here the mean ranks and the count is given, a design choice. The shares of
one output add up to 1, so whole experts and layers would all score alike: they are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.engine.probes import Contribution as Share
from secateur.engine.probes import Evidence
from secateur.methods.base import MatrixSite, Score


@dataclass(frozen=True)
class Contribution(Score):
    """Mean share of a weight in its output's sum of absolute contributions; folds over ``read`` ports."""

    needs = (Share,)
    roles = ("read",)
    spaces = ("weight", "ffn", "kv_group", "head")

    def score(self, site: MatrixSite, evidence: Evidence) -> Tensor:
        share = evidence[Share].share.to(site.weight.device)
        # inputs that never fire (an expert that no token reached) come last, by magnitude instead of all equal
        return torch.where(share == 0, 1e-20 * site.weight.abs(), share)
