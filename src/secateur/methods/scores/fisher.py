"""Fisher: what the model's answers would lose if a weight went, to second order.

    S_ij = 1/2 F_ij w_ij^2        nats per token;  of units: the sum over their weights

with F the diagonal of the Fisher information (`engine.fisher`), as the product of its margins. The first-order term is
zero: at the dense model the KL divergence to it is least. Unlike Wanda's |w| |x|, which knows a matrix's inputs only,
it knows what becomes of the outputs, so scores of different rows, matrices and layers are in one unit and may compete.
Within a row Wanda chooses better on SmolLM2 (60 %, `benchmarks/results/allocation.json`: 61.9 against 70.8); of tiles
this score loses half as much as `output_error` (986 against 1902 at 30 %).

Source: Theis et al. 2018, arXiv 1801.05787; the margins are those of Adafactor (arXiv 1804.04235).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.engine.probes import Evidence, Fisher
from secateur.methods.base import MatrixSite, Score


@dataclass(frozen=True)
class FisherScore(Score):
    """Half of the Fisher information times the weight squared: KL divergence in nats per token."""

    needs = (Fisher,)

    def score(self, site: MatrixSite, evidence: Evidence) -> Tensor:
        # where nothing is felt (an expert that no token reached) weights come last, by magnitude instead of all equal
        diagonal = evidence[Fisher].diagonal.clamp_min(1e-25)
        return site.weight.float().square() * diagonal.to(site.weight.device) / 2
