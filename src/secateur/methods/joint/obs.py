"""Optimal brain surgeon on sets: of every group of columns the best set of weights goes at once, exactly.

    B = [H^-1]_GG of what is still open, H = X^T X + damping
    error of removing the set Q of a row:   w_Q ([B]_QQ)^-1 w_Q^T
    the best update of all others:          w <- w - w_Q ([B]_QQ)^-1 [H^-1]_Q,:

n:m looks at every way to keep n of m (the 6 of 2:4, the 70 of 4:8) and takes the one with the smallest exact error.
Blocks of columns rank single weights by w_j^2 / [B]_jj, with all others of the block still free to take over, and
remove what goes in one exact step. Columns left of a group are settled, as in SparseGPT.

Source: "Pruning foundation models for high accuracy without retraining" 2024, arXiv 2410.15567 (multiple removal
problem; no code was released, so the formulas are those of Hassibi and Stork 1993 for a set of weights). With
H^-1 = U^T U, U upper triangular, B is U_GG^T U_GG, and one product per group carries the update to the columns right
of it.

Deviations: removals are joint within ``group`` columns (all of n:m's m); wider blocks are removed group by group;
survivors are polished at the end (``polish=0`` is the published method).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.methods.grains import Columns, Grain, Matrix, NofM
from secateur.methods.joint.layer import Layer, check_damping, check_steps
from secateur.methods.joint.sweeping import Sweeping
from secateur.methods.least_squares import masked_least_squares
from secateur.methods.top import top_rows

MASKS = 300  # ways to keep n of m that are looked at
LAZY = 128  # columns after which the rest of the matrix hears of n:m's updates
ROWS = 4096  # rows whose masks are looked at together


@dataclass(frozen=True)
class SetOBS(Sweeping):
    """Best sets of weights removed jointly, in a sweep over the columns; grains ``n:m``, ``columns:B``, ``matrix``.

    Attributes:
        grain: who competes.
        damping: added to the diagonal of X^T X, as a share of its mean.
        group: columns whose removals are joint (n:m: its own m).
        polish: steps of conjugate gradients on the survivors at the end; 0 is the published method.
    """

    grain: Grain = field(default_factory=Columns)
    damping: float = 0.01
    group: int = 128
    polish: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.grain, Columns | Matrix | NofM):
            raise SecateurError(
                "obs chooses by groups of columns",
                received=f"grain {self.grain}",
                works="n:m, columns:128 (any width) or matrix",
            )
        if isinstance(self.grain, NofM) and comb(self.grain.m, self.grain.n) > MASKS:
            raise SecateurError(
                f"obs looks at every mask of n:m, at most {MASKS}",
                received=f"{self.grain}, which has {comb(self.grain.m, self.grain.n)}",
                works="2:4, 4:8 or n:m with so few; sparsegpt and alps take any n:m",
            )
        check_damping(self.damping)
        check_steps("group", self.group, 1)
        check_steps("polish", self.polish)

    def solve(self, layer: Layer) -> Sequence[tuple[Tensor, Tensor | None]]:
        sweep = self._sweep(layer)
        if isinstance(self.grain, NofM):
            sweep.by_patterns(self.grain)
        else:
            sweep.by_blocks(self.grain, [len(w) for w in layer.weights], layer.counts)
        keep, weight = sweep.keep, sweep.weight
        del sweep
        return self.polished(layer, keep, weight)

    def values(self, layer: Layer, stays: Tensor) -> Tensor:
        sweep = self._sweep(layer)
        sweep.keep = stays
        n = len(sweep.weight)
        blocks = self.grain if isinstance(self.grain, Columns) else Columns(n)
        if isinstance(self.grain, NofM):
            blocks, sweep.group = Columns(self.grain.m * max(1, LAZY // self.grain.m)), self.grain.m
        for a, b in blocks.blocks((1, n)):
            sweep.remove(a, b)
        return sweep.weight

    def _sweep(self, layer: Layer) -> Sweep:
        return Sweep(*self.prepared(layer), self.group)


@dataclass
class Sweep:
    """Matrices side by side, transposed [in, rows], and U of their inputs; ``weight`` is changed in place."""

    weight: Tensor
    factor: Tensor
    group: int

    def __post_init__(self) -> None:
        self.keep = torch.ones_like(self.weight, dtype=torch.bool)
        self.error = torch.zeros_like(self.weight)

    def by_blocks(self, grain: Grain, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Every block of columns keeps its seats; the best single weights, each as if it went alone."""
        n = len(self.weight)
        blocks = grain if isinstance(grain, Columns) else Columns(n)
        seats = [blocks.split((r, n), count) for r, count in zip(rows, counts, strict=True)]
        for number, (a, b) in enumerate(blocks.blocks((1, n))):
            saved = self.weight[a:b].square() / self._alone(a, b).unsqueeze(1)
            chosen = []
            for part, own in zip(saved.split(list(rows), dim=1), seats, strict=True):
                best = top_rows(part.T.reshape(1, -1), own[number])  # row by row: ties are scattered by this index
                chosen.append(best.reshape(part.shape[1], part.shape[0]).T)
            self.keep[a:b] = torch.cat(chosen, dim=1)
            self.remove(a, b)

    def _alone(self, a: int, b: int) -> Tensor:
        """[B]_jj of columns a to b: how freely the others of j's group and all to the right take over."""
        groups = [(g, min(g + self.group, b)) for g in range(a, b, self.group)]
        return torch.cat([self.factor[g:h, g:h].square().sum(0) for g, h in groups])

    def remove(self, a: int, b: int) -> None:
        """Remove what `keep` lets go in columns a to b, group by group; all columns to the right hear of it."""
        for start in range(a, b, self.group):
            end = min(start + self.group, b)
            u = self.factor[start:end, start:end]
            gone = ~self.keep[start:end]
            pull = masked_least_squares(u.T @ u, self.weight[start:end], gone.T, 0.0).T  # ([B]_QQ)^-1 w_Q
            self._settle(start, end, b, pull)
        self._tell(a, b)

    def by_patterns(self, grain: NofM) -> None:
        """n of every m columns stay: the set whose joint removal costs least, of all there are."""
        n, m = self.weight.shape[0], grain.m
        stays = torch.ones(comb(m, grain.n), m, dtype=torch.bool, device=self.weight.device)
        for i, out in enumerate(combinations(range(m), m - grain.n)):
            stays[i, list(out)] = False
        lazy = m * max(1, LAZY // m)
        for a in range(0, n, lazy):
            b = min(a + lazy, n)
            for start in range(a, b, m):
                u = self.factor[start : start + m, start : start + m]
                solves = _inverses(u.T @ u, ~stays)
                pull = torch.empty(m, self.weight.shape[1], device=u.device, dtype=u.dtype)
                for at in range(0, self.weight.shape[1], ROWS):
                    w = self.weight[start : start + m, at : at + ROWS]
                    pulls = (solves.reshape(-1, m) @ w).reshape(len(stays), m, -1)
                    best = (pulls * w).sum(1).argmin(0)  # [rows]; the first among equals
                    self.keep[start : start + m, at : at + ROWS] = stays[best].T
                    pull[:, at : at + ROWS] = pulls.gather(0, best.expand(1, m, -1)).squeeze(0)
                self._settle(start, start + m, b, pull)
            self._tell(a, b)

    def _settle(self, a: int, b: int, end: int, pull: Tensor) -> None:
        """Columns a to b take their final values, those up to ``end`` hear of it. ``pull`` is ([B]_QQ)^-1 w_Q."""
        error = self.factor[a:b, a:b] @ pull
        self.error[a:b] = error
        self.weight[a:end].addmm_(self.factor[a:b, a:end].T, error, alpha=-1)
        self.weight[a:b].masked_fill_(~self.keep[a:b], 0)

    def _tell(self, a: int, b: int) -> None:
        """The columns right of b hear of what was removed from a to b."""
        if b < len(self.weight):
            self.weight[b:].addmm_(self.factor[a:b, b:].T, self.error[a:b], alpha=-1)


def _inverses(b: Tensor, sets: Tensor) -> Tensor:
    """([B]_QQ)^-1 for every set Q (rows of booleans [sets, m]), zero outside Q: [sets, m, m]."""
    both = sets.unsqueeze(2) & sets.unsqueeze(1)
    open_ = torch.where(both, b.double(), torch.eye(len(b), dtype=torch.float64, device=b.device))
    return torch.where(both, torch.linalg.inv(open_), 0.0).to(b.dtype)
