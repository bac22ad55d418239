"""RIA, relative importance and activations: large among what shares its input and among what shares its output.

    S_ij = (|w_ij| / sum_k |w_kj|  +  |w_ij| / sum_k |w_ik|) * ||x_j||_2^a        a = 0.5

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
ICLR 2024 (preprint doi 10.20944/preprints202310.1487), the definition of RIA. Router-weighted in experts, as Wanda.
The released code ranks over a whole matrix unless told otherwise: that is ``--grain matrix`` here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.engine.probes import Evidence, InputNorm
from secateur.errors import SecateurError
from secateur.methods.base import MatrixSite, Score


@dataclass(frozen=True)
class Ria(Score):
    """Share of a weight in its row and in its column, times the input's norm to the power ``a``."""

    needs = (InputNorm,)
    roles = ("read",)
    a: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.a <= 8:
            raise SecateurError("RIA's exponent is out of range", received=self.a, works="a: 0.5 (0 to 8)")

    def score(self, site: MatrixSite, evidence: Evidence) -> Tensor:
        w = site.weight.abs()
        tiny = torch.finfo(w.dtype).tiny  # a row or column of zeros has no shares: 0, not 0/0
        relative = w / w.sum(1, keepdim=True).clamp_min(tiny)
        relative += w / w.sum(0, keepdim=True).clamp_min(tiny)
        # inputs that never fire (an expert that no token reached) come last, by share instead of all equal
        return relative * evidence[InputNorm].norm.clamp_min(1e-20).to(w.device) ** self.a
