"""Mean bias: what the removed weights contributed on average goes into the bias.

    b += (W - W') E[x]        (on a mix:  b += W E[x_a] - W' E[x],  x_a as for `--fit-on mix`)

so that every output keeps its mean over the calibration text: exactly the bias that minimises the squared error when
the weights are left alone. For units that are cut, W - W' are their columns of the matrix that reads them.

Source: FLAP, arXiv 2312.11983 (bias compensation: b += W_pruned E[X_pruned]); here for any mask, and after joint
methods too. Means are over all tokens in fp64 (the published code's running variance and half-precision means are not
repeated). Where a family's Linears have no bias, one is added only if a field of its config can say so.
"""

from __future__ import annotations

from dataclasses import dataclass

from secateur.engine.probes import DenseMean, Evidence, InputMoments
from secateur.methods.base import Keep, MatrixRepair, MatrixSite, Mended


@dataclass(frozen=True)
class MeanBias(MatrixRepair):
    """The mean of what was removed, E[x] through the removed weights, is added to the bias."""

    needs = (InputMoments,)
    biases = True

    def mend(self, site: MatrixSite, evidence: Evidence, keep: Keep) -> Mended:
        weight = site.weight.double()
        now = (site.weight if keep.weight is None else keep.weight).double()
        mean = evidence[InputMoments].mean.to(weight.device).double()
        aim = evidence[DenseMean].mean.to(weight.device).double() if DenseMean in evidence else mean
        return Mended(bias=(weight @ aim - now.masked_fill(~keep.mask.to(weight.device), 0) @ mean).float())
