"""Taylor: what the loss would change by, to first order, if a weight went.

    taylor           S_ij = |w_ij * g_ij|            of units: the sum over their weights
    taylor_vector    S_u  = |sum over the unit's weights of w * g|        units only

g is the mean gradient of the loss on the calibration text; with ``local: true`` that of the norm of the block's own
output, which does not need the whole model in memory. Source: Molchanov et al. 2017, arXiv 1611.06440
(first-order criterion); on language models Ma et al. 2023 (LLM-Pruner), arXiv 2305.11627, section 3.2, element-wise
and vector-wise importance, of which this is the first-order term.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.engine.probes import Evidence, Gradient, LocalGradient
from secateur.errors import SecateurError
from secateur.methods.base import MatrixSite, Score


@dataclass(frozen=True)
class Taylor(Score):
    """|weight times gradient|, summed over a unit's weights."""

    needs = (Gradient,)
    local: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", (_gradient(self.local),))

    def score(self, site: MatrixSite, evidence: Evidence) -> Tensor:
        return _products(site, evidence[_gradient(self.local)]).abs()


@dataclass(frozen=True)
class TaylorVector(Score):
    """|Sum of weight times gradient| over a unit: first-order change of the loss if all of it went; units only."""

    needs = (Gradient,)
    reduce = "abs_sum"
    spaces = ("ffn", "kv_group", "head", "expert", "layer")
    local: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", (_gradient(self.local),))

    def score(self, site: MatrixSite, evidence: Evidence) -> Tensor:
        """Signed products, which only a fold over units makes an importance of."""
        return _products(site, evidence[_gradient(self.local)])


def _products(site: MatrixSite, slope: Gradient) -> Tensor:
    """Weights times gradients. Where these are 0 (an expert that no token reached) the products are all positive and
    tiny, so that such weights come last, by magnitude instead of all equal."""
    w, gradient = site.weight, slope.gradient.to(site.weight.device)
    return torch.where(gradient == 0, 1e-20 * w.abs(), w * gradient)


def _gradient(local: object) -> type[Gradient]:
    if not isinstance(local, bool):
        raise SecateurError("local is a yes or no", received=local, works="local: true or local: false")
    return LocalGradient if local else Gradient
