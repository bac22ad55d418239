"""SparseGPT: choose and repair column by column; what stays takes over the work of what went.

    error saved by keeping w_ij:   w_ij^2 / [U]_jj^2          U upper, H^-1 = U^T U,  H = X^T X + damping
    after removing w_ij:           w_i,j: -= w_ij / [U]_jj * [U]_j,j:

The sweep never comes back to a column, so a survivor knows nothing of what goes after it. Ten steps of conjugate
gradients on the survivors at the end (`polish`) make up for most of that, for some 0.15 passes over 64 x 1,024 tokens;
``polish=0`` is the published method.

Source: Frantar & Alistarh 2023, arXiv 2301.00774, section 3 and algorithm 1 (mask by blocks of columns, n:m by
groups of m).

Deviations: counts are exact (the published code prunes one weight too many per block); damping is relative to
the mean over inputs that ever fire, so the unit of X^T X does not matter; if H is still not positive definite,
damping is raised tenfold a few times; where no token was seen at all (an expert that was never chosen), H is taken
as the identity, which keeps the largest weights. U comes from one Cholesky factorisation of H taken from the last
column backwards and one triangular inverse, instead of two factorisations and an inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.methods.grains import Columns, Grain, Matrix, NofM
from secateur.methods.joint.layer import Layer, check_damping, check_steps, needs_of
from secateur.methods.joint.sweeping import Sweeping
from secateur.methods.top import top_rows

LEAF = 32  # columns updated one by one; wider runs use matrix products

Choose = Callable[[int, int, Tensor], Tensor]


@dataclass(frozen=True)
class SparseGPT(Sweeping):
    """Second-order pruning with weight update; grains ``columns:B``, ``matrix`` and ``n:m``.

    Attributes:
        grain: who competes; with ``columns:B`` the mask of each B columns is chosen when the sweep gets there.
        damping: added to the diagonal of X^T X, as a share of its mean.
        polish: steps of conjugate gradients on the survivors at the end; 0 is the published method.
        rows: whether errors of all rows count alike (``even``), by their Fisher information (``fisher``), or by its
            ``root``, half way between.
    """

    blind = True
    grain: Grain = field(default_factory=Columns)
    damping: float = 0.01
    polish: int = 10
    rows: str = "even"

    def __post_init__(self) -> None:
        if not isinstance(self.grain, Columns | Matrix | NofM):
            raise SecateurError(
                "sparsegpt chooses by blocks of columns",
                received=f"grain {self.grain}",
                works="columns:128 (any width), matrix or n:m",
            )
        check_damping(self.damping)
        check_steps("polish", self.polish)
        object.__setattr__(self, "needs", needs_of(self.rows))

    def solve(self, layer: Layer) -> Sequence[tuple[Tensor, Tensor | None]]:
        rows = [len(w) for w in layer.weights]
        weight, factor = self.prepared(layer)
        choose, width = self._chooser(rows, len(weight), layer.counts, factor.diagonal().clone())
        keep = sweep(weight, factor, choose, width)
        del factor
        return self.polished(layer, keep, weight)

    def values(self, layer: Layer, stays: Tensor) -> Tensor:
        weight, factor = self.prepared(layer)
        sweep(weight, factor, partial(_chosen, stays), 4 * LEAF)
        return weight

    def _chooser(
        self, rows: Sequence[int], columns: int, counts: Sequence[int], diagonal: Tensor
    ) -> tuple[Choose, int]:
        """What chooses the mask of columns a to b from their weights now, and how many columns at a time."""
        grain = self.grain
        if isinstance(grain, NofM):
            return lambda a, b, w: grain.pick((w / diagonal[a:b, None]).square_().T).T, grain.m
        blocks = grain if isinstance(grain, Columns) else Columns(columns)
        places = [blocks.split((r, columns), count) for r, count in zip(rows, counts, strict=True)]

        def choose(a: int, b: int, w: Tensor) -> Tensor:
            saved = (w / diagonal[a:b, None]).square_()
            parts = []
            for part, seats in zip(saved.split(list(rows), dim=1), places, strict=True):
                flat = part.T.reshape(1, -1)  # row by row: ties are scattered by this index
                best = top_rows(flat, seats[a // blocks.width])
                parts.append(best.reshape(part.shape[1], part.shape[0]).T)
            return torch.cat(parts, dim=1)

        return choose, blocks.width


def _chosen(stays: Tensor, a: int, b: int, weight: Tensor) -> Tensor:
    return stays[a:b]


def sweep(weight: Tensor, factor: Tensor, choose: Choose, width: int) -> Tensor:
    """Prune ``weight`` [in, rows] in place, columns of the matrix (rows here) in order.

    Args:
        weight: transposed weights, changed in place to the survivors' new values (zeros elsewhere).
        factor: U as of `sweeping.inverse_factor`.
        choose: gives the booleans of rows a to b (True stays) from their present values.
        width: rows that ``choose`` decides on at a time.

    Returns:
        Booleans [in, rows].
    """
    n = len(weight)
    keep = torch.empty_like(weight, dtype=torch.bool)
    error = torch.empty_like(weight)
    diagonal = factor.diagonal().tolist()

    def update(a: int, mid: int, b: int) -> None:
        weight[mid:b].addmm_(factor[a:mid, mid:b].T, error[a:mid], alpha=-1)

    def within(a: int, b: int) -> None:
        if b - a > LEAF:
            mid = a + LEAF * ((b - a + LEAF) // (2 * LEAF))
            within(a, mid)
            update(a, mid, b)
            within(mid, b)
            return
        for i in range(a, b):
            torch.div(weight[i], diagonal[i], out=error[i])
            error[i].masked_fill_(keep[i], 0)
            if i + 1 < b:
                weight[i + 1 : b].addr_(factor[i, i + 1 : b], error[i], alpha=-1)

    def decide(a: int, b: int) -> None:
        if b - a > width:
            mid = a + width * ((-(-(b - a) // width)) // 2)
            decide(a, mid)
            update(a, mid, b)
            decide(mid, b)
            return
        keep[a:b] = choose(a, b, weight[a:b])
        within(a, b)

    decide(0, n)
    weight.masked_fill_(~keep, 0)
    return keep
