"""ALPS: ADMM finds which weights stay, under a penalty that tightens as they settle; conjugate gradients set them.

    scaled so that every input has norm one, H = X^T X + damping,  and until the support D != 0 rests:
    W = (H + rho I)^-1 (H W0 - V + rho D)
    D = the projection of W + V / rho onto the mask's grain
    V = V + rho (W - D)
    every 3 iterations rho grows by 1.3, 1.2 or 1.1 as more than 10 %, 0.5 % or none of the kept weights changed place

Then the survivors of W are solved for by preconditioned conjugate gradients.

Source: Meng, Behdin, Wang and Mazumder 2024, arXiv 2406.07831; the penalty's factors, its first value and when it
starts anew are those of the released code, which was read (the paper was not). H is decomposed once (eigenvalues and
vectors) for all matrices that read the same input and all penalties.

Deviations: counts are exact for every grain, tiles included (projection by sums of squares); where the inverse for a
penalty costs more than it saves (few rows), both factors are applied instead; conjugate gradients stop early where a
row has converged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.methods.grains import Grain, Matrix
from secateur.methods.joint.layer import Layer, LayerMethod, check_damping, check_steps, needs_of
from secateur.methods.least_squares import conjugate_gradients

START, LONGEST = 0.1, 300  # first penalty; iterations at most
SETTLED, ENOUGH = 3e-4, 10  # share of places that changed, and penalties after which so few are enough
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of places that changed: factor on the penalty


@dataclass(frozen=True)
class ALPS(LayerMethod):
    """Support by ADMM with a rising penalty, then least squares on it; every grain.

    Attributes:
        grain: who competes in every projection.
        damping: added to the diagonal of X^T X, as a share of its mean.
        every: iterations under each penalty; twice as many find a support with 1 to 2 % less error.
        polish: steps of conjugate gradients on the survivors.
        rows: whether errors of all rows count alike (``even``), by their Fisher information (``fisher``), or by its
            ``root``, half way between.
    """

    grain: Grain = field(default_factory=Matrix)
    damping: float = 0.01
    every: int = 3
    polish: int = 10
    rows: str = "even"

    def __post_init__(self) -> None:
        check_damping(self.damping)
        object.__setattr__(self, "needs", needs_of(self.rows))
        check_steps("every", self.every, 1)
        check_steps("polish", self.polish)

    def solve(self, layer: Layer) -> list[tuple[Tensor, Tensor | None]]:
        h, norm = layer.scaled(before=self.damping)
        values, vectors = torch.linalg.eigh(h)
        values.clamp_(min=0)
        out: list[tuple[Tensor, Tensor | None]] = []
        for weight, count in zip(layer.weights, layer.counts, strict=True):
            w = weight * norm
            right = w @ h
            mask, found = self._support(w, right, Ridge(values, vectors, len(w)), count)
            out.append((mask, conjugate_gradients(h, right, mask, found, self.polish).div_(norm)))
        return out

    def _support(self, w: Tensor, right: Tensor, ridge: Ridge, count: int) -> tuple[Tensor, Tensor]:
        """Which weights stay, and W where the iterations ended."""
        rho, moved = START, False
        dense = self.grain.select(w.square(), count)  # the start: the largest scaled weights
        mask, seen = dense, dense
        pull = torch.where(mask, w, 0.0)  # D - V / rho
        dual = torch.zeros_like(w)  # V / rho
        kept = max(int(mask.sum()), 1)
        found = w
        ridge.at(rho)
        for t in range(1, LONGEST + 1):
            found = ridge.solve(pull.mul_(rho).add_(right))
            dual.add_(found)  # W + V / rho
            mask = self.grain.select(dual.square(), count)
            pull = torch.where(mask, dual, -dual)
            dual.masked_fill_(mask, 0)
            if t % self.every:
                continue
            changed = int((mask ^ seen).sum()) / kept
            seen = mask
            if changed == 0 and moved:
                break
            if not moved and changed <= GROWTH[1][0]:  # the first penalty was too strong to let anything move
                rho, mask, seen, found = rho / 5, dense, dense, w
                pull, dual = torch.where(mask, w, 0.0), torch.zeros_like(w)
                if rho < 1e-6:
                    break
            else:
                moved = True
                factor = next((f for share, f in GROWTH if changed > share), GROWTH[-1][1])
                rho *= factor
                dual.div_(factor)  # V stays, so V / rho shrinks
                pull = torch.where(mask, pull, -dual)
                if t >= ENOUGH * self.every and changed < SETTLED:
                    break
            ridge.at(rho)
        return self.grain.select(found.square(), count), found


class Ridge:
    """(H + rho I)^-1 for one rho at a time, from H's eigenvalues [in] and eigenvectors [in, in]."""

    def __init__(self, values: Tensor, vectors: Tensor, rows: int) -> None:
        self.values, self.vectors = values, vectors
        self.whole = 3 * rows > len(values)  # one inverse per penalty, or both factors in every iteration
        self.inverse = values

    def at(self, rho: float) -> None:
        self.inverse = (self.values + rho).reciprocal()
        if self.whole:
            self.inverse = (self.vectors * self.inverse) @ self.vectors.T

    def solve(self, right: Tensor) -> Tensor:
        """Rows [rows, in] times the inverse."""
        if self.whole:
            return right @ self.inverse
        return (right @ self.vectors).mul_(self.inverse) @ self.vectors.T
