"""Taylor per tile: the loss to first and second order if a whole tile goes.

    S_t = mean over t of (w g)^2  +  1/2 dw^T H dw        dw = -w_t,  H = g_t g_t^T + lambda I
        = mean over t of (w g)^2  +  1/2 (sum over t of w g)^2  +  lambda / 2 ||w_t||^2

g is the mean gradient of the loss on the calibration text, lambda = ``damping`` times the mean of g^2 over the matrix.
With any other grain every weight is a tile of its own. These scores add up to the distortion of a
matrix, so `--budget rate_distortion:by=score` with them is LPViT's allocation.

Source: Xu et al. 2024 (LPViT), arXiv 2407.02068, by the released code (the paper was not read), which takes both terms
over all the weights of a matrix that go at one level; here tile by tile, without the products between tiles. Deviation:
the code's lambda is 1e-7 whatever the size of the gradients; here it is relative to them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from secateur.engine.probes import Evidence, Gradient
from secateur.errors import SecateurError
from secateur.methods.base import MatrixSite, Score
from secateur.methods.grains import Grain, Row, Tile


@dataclass(frozen=True)
class TaylorBlock(Score):
    """First- and second-order change of the loss if a tile goes, H by the gradient's outer product; weights only."""

    needs = (Gradient,)
    spaces = ("weight",)
    grain: Grain = field(default_factory=Row)
    damping: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.damping, bool) or not 0 <= self.damping <= 1e6:
            raise SecateurError("damping is out of range", received=self.damping, works="damping: 0.01 (0 to 1e6)")

    def score(self, site: MatrixSite, evidence: Evidence) -> Tensor:
        tile = self.grain if isinstance(self.grain, Tile) else Tile(1, 1)
        gradient = evidence[Gradient].gradient.to(site.weight.device).double()
        w = site.weight.double()
        product = w * gradient
        first = tile.unit_scores(product.square()) / (tile.rows * tile.columns)
        # without a slope (an expert that no token reached) a tiny last term is left: by magnitude, not all equal
        level = (self.damping * gradient.square().mean()).clamp_min(1e-25)
        second = tile.unit_scores(product).square() + level * tile.unit_scores(w.square())
        return tile.spread(first + second / 2)
