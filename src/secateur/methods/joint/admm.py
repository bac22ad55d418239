"""ADMM: weights and mask chosen by alternating a ridge regression and a projection.

    scaled so that every input has norm one, H = X^T X + damping I, and then for a number of iterations:
    Z = (W + U) * mask        mask: the largest |W + U|, fewer and fewer of them
    U = U + W - Z
    W = (H + I)^-1 (H W0 + Z - U)

Source: Boza 2024, arXiv 2401.02938, by its released code (rho = 1; the share that goes rises as 1 - (1 - t/15)^3 over
the first 15 of 20 iterations; one factorisation for all iterations). Scaled by input norms, |W + U| ranks as Wanda.

Deviations: the schedule works for every grain (the released code's per-matrix branch goes to the final sparsity at
once); counts are exact; n:m works for every n and m (its n best per group always stay while the rest is taken away);
tiles are ranked by their sums of squares, which is the exact projection. ``polish`` (off as published) ends with
steps of conjugate gradients on the survivors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.methods.grains import Grain, Matrix, NofM, Row
from secateur.methods.joint.layer import Layer, LayerMethod, check_damping, check_steps, needs_of
from secateur.methods.least_squares import conjugate_gradients
from secateur.methods.top import top_rows


@dataclass(frozen=True)
class ADMM(LayerMethod):
    """Gradual mask and weight update by ADMM, one factorisation per layer; every grain.

    Attributes:
        grain: who competes in every projection.
        damping: added to the unit diagonal of the scaled X^T X.
        iterations, gradual: how many, and over how many of them the mask shrinks (0: the final mask at once).
        polish: steps of conjugate gradients on the survivors at the end.
        rows: whether errors of all rows count alike (``even``), by their Fisher information (``fisher``), or by its
            ``root``, half way between.
    """

    grain: Grain = field(default_factory=Matrix)
    damping: float = 0.1
    iterations: int = 20
    gradual: int = 15
    polish: int = 0
    rows: str = "even"

    def __post_init__(self) -> None:
        check_damping(self.damping)
        object.__setattr__(self, "needs", needs_of(self.rows))
        check_steps("iterations", self.iterations, 1)
        check_steps("gradual", self.gradual)
        check_steps("polish", self.polish)

    def solve(self, layer: Layer) -> list[tuple[Tensor, Tensor | None]]:
        h, norm = layer.scaled(after=self.damping)
        ridge = h.clone()
        ridge.diagonal().add_(1.0)
        lower, info = torch.linalg.cholesky_ex(ridge)
        if int(info) != 0:
            raise SecateurError(
                f"{layer.sites[0].name}: X^T X is not positive definite",
                received=f"damping {self.damping:g}",
                works="more calibration text or a larger damping",
            )
        inverse = torch.cholesky_inverse(lower)
        del ridge, lower
        return [self._one(w * norm, h, inverse, n, norm) for w, n in zip(layer.weights, layer.counts, strict=True)]

    def _one(self, w: Tensor, h: Tensor, inverse: Tensor, count: int, norm: Tensor) -> tuple[Tensor, Tensor]:
        right = w @ h
        sum_ = w  # W + U
        for t in range(self.iterations):
            if t <= max(self.gradual - 1, 0):
                mask = project(self.grain, sum_, self._count(t, tuple(w.shape), count), count)
            signed = torch.where(mask, sum_, -sum_)  # Z - U after U took up what Z left out
            sum_ = torch.addmm(sum_.masked_fill(mask, 0), signed.add_(right), inverse)
        if self.gradual > self.iterations:  # the schedule did not come to its end
            mask = project(self.grain, sum_, count, count)
        if self.polish:
            sum_ = conjugate_gradients(h, right, mask, sum_, self.polish)
        return mask, sum_ / norm

    def _count(self, t: int, shape: tuple[int, ...], count: int) -> int:
        """Units that stay in iteration t (from 0); for n:m in elements."""
        if t >= self.gradual:
            return count
        units, groups = self.grain.units(shape), self.grain.groups(shape) if isinstance(self.grain, Row) else 1
        gone = 1 - (1 - (t + 1) / self.gradual) ** 3
        return count + groups * round((units - count) / groups * (1 - gone))


def project(grain: Grain, values: Tensor, now: int, count: int) -> Tensor:
    """The ``now`` largest in square; for n:m the n best of each m, and the best others beyond its ``count``."""
    squares = values.square()
    if not isinstance(grain, NofM):
        return grain.select(squares, now)
    best = grain.pick(squares)
    if now <= count:
        return best
    return top_rows(squares.masked_fill_(best, torch.inf).reshape(1, -1), now).reshape(best.shape)
