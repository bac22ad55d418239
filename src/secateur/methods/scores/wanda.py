"""Wanda: a weight matters as much as it is large and its input is loud.

    S_ij = |w_ij| * ||x_j||_2        norm over all calibration tokens

Source: Sun et al. 2023, arXiv 2306.11695, equation 1. In a mixture of experts the token is multiplied by the
router's weight first, ||g x_j||_2: Xie et al. 2024 (MoE-Pruner), arXiv 2410.12013. For neurons this is the sum over
a column of the matrix that reads them (known as Wanda-sp).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.engine.probes import Evidence, InputNorm
from secateur.methods.base import MatrixSite, Score


@dataclass(frozen=True)
class Wanda(Score):
    """|weight| times the norm of its input; router-weighted in experts; folds over ``read`` ports."""

    needs = (InputNorm,)
    roles = ("read",)

    def score(self, site: MatrixSite, evidence: Evidence) -> Tensor:
        # inputs that never fire (an expert that no token reached) come last, by magnitude instead of all equal
        norm = evidence[InputNorm].norm.clamp_min(1e-20)
        return site.weight.abs() * norm.to(site.weight.device)
