"""Least squares: the best values of what stays, for the mask as it is.

    minimise |X (W' - W)^T|^2 + shift |W' - W|^2    over W' that is zero where the mask is,
    shift = damping * mean diag(X^T X)

Every output row is a problem of its own with the same X^T X; a structured cut (the same columns in every row) is solved
with one factorisation. Where a layer is fitted on both streams (`--fit-on mix`), W is the weight to aim at.

Source: the normal equations on the support, the optimal update for a given mask (arXiv 2401.02938, section 3). A row
that would fit its inputs worse than before (rounding; a joint method's values, damped otherwise) is left as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.engine.probes import Evidence, Gram
from secateur.errors import SecateurError
from secateur.methods.base import Keep, MatrixRepair, MatrixSite, Mended
from secateur.methods.fitting import fitted
from secateur.methods.least_squares import refit


@dataclass(frozen=True)
class LeastSquares(MatrixRepair):
    """Exact masked least squares on the inputs' X^T X: survivors take over what went.

    Attributes:
        damping: pull towards the weights as they were, as a share of the mean diagonal of X^T X.
    """

    needs = (Gram,)
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.damping < 1e6:
            raise SecateurError("damping must not be negative", received=self.damping, works="damping: 0.01")

    def mend(self, site: MatrixSite, evidence: Evidence, keep: Keep) -> Mended:
        return self.mend_many([site], [evidence], [keep])[0]

    def mend_many(
        self, sites: Sequence[MatrixSite], evidence: Sequence[Evidence], keeps: Sequence[Keep]
    ) -> list[Mended]:
        """The weights to aim at are found together for matrices that read the same input."""
        aims = fitted(sites, evidence, self.damping)
        return [Mended(self._refit(*each)) for each in zip(sites, aims, evidence, keeps, strict=True)]

    def _refit(self, site: MatrixSite, aim: MatrixSite, evidence: Evidence, keep: Keep) -> Tensor:
        gram = evidence[Gram].gram.to(site.weight.device)
        mask = keep.mask.to(site.weight.device)
        now = site.weight if keep.weight is None else keep.weight
        now = now.float().masked_fill(~mask, 0)
        if not bool((gram.diagonal() > 0).any()):  # an expert that no token reached
            return now
        try:
            new = refit(gram, aim.weight.float(), mask, self.damping, now)
        except SecateurError as error:
            raise SecateurError(f"{site.name}: {error.wrong}", received=error.received, works=error.works) from error
        better = error_of(new, aim.weight, gram) < error_of(now, aim.weight, gram)
        return torch.where(better.unsqueeze(1), new, now)


def error_of(weight: Tensor, aim: Tensor, gram: Tensor) -> Tensor:
    """|X (w - aim)|^2 of every row [out]."""
    off = weight - aim
    return ((off @ gram) * off).sum(1)
