"""SparseSwaps: exchange a kept weight for a pruned one of the same row while that lowers the row's exact error.

    error of a row:   L = r^T G r,   G = X^T X,   r = the row's pruned weights;   c = G r
    keep p instead of q:   dL = 2 w_q c_q + w_q^2 G_qq - 2 w_p c_p + w_p^2 G_pp - 2 w_p w_q G_pq

Source: the idea of SparseSwaps, arXiv 2512.10922 (1-swaps from the Gram matrix, warm-started from any mask, exact per
row), known here from a summary; the formulas are our derivation, neither the paper nor its code was read. A mask
without a better 1-swap is locally optimal for weights that stay as they are.

How it is looked for here: among the pairs of the `LIKELY` cheapest entries of either kind until none helps, then among
all pairs; every look yields up to `TAKE` swaps per row, each checked against the row as it is by then. Swaps stay
within the grain's groups (a row's n of m, or its part of a block of columns), so counts do not change. With ``refit``
the survivors are solved for by least squares afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.engine.probes import Evidence, Gram
from secateur.errors import SecateurError
from secateur.methods.base import MatrixSite
from secateur.methods.grains import Columns, Grain, NofM, Row, Tile
from secateur.methods.joint.layer import Layer, LayerMethod, check_damping, check_steps
from secateur.methods.joint.start import start_from
from secateur.methods.least_squares import refit

LIKELY = 48  # entries of either kind whose pairs are looked at first
TAKE = 16  # swaps tried per row after one look
LEAST = 1e-6  # of a row's error: what a swap must bring
BYTES = 192 << 20  # of costs of pairs at a time


@dataclass(frozen=True)
class SparseSwaps(LayerMethod):
    """Best 1-swaps within rows, from any mask; grains ``row``, ``matrix``, ``columns:B`` and ``n:m``.

    Attributes:
        grain: who competes.
        start: the mask to start from: a score, or ``sparsegpt``, ``obs``, ``admm``, ``alps``.
        rounds: looks at all pairs at most; it stops before where no swap helps any row.
        refit: solve for the survivors by least squares afterwards.
        damping: of the least squares, as a share of the mean diagonal of X^T X.
    """

    grain: Grain = field(default_factory=Row)
    start: str = "wanda"
    rounds: int = 25
    refit: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.grain, Tile):
            raise SecateurError(
                "sparseswaps exchanges single weights", received=f"grain {self.grain}", works="row, columns:128 or n:m"
            )
        check_damping(self.damping)
        check_steps("rounds", self.rounds)
        first = start_from(self.start, self.grain)
        object.__setattr__(self, "needs", tuple(dict.fromkeys((Gram, *first.needs))))

    def solve(self, layer: Layer) -> list[tuple[Tensor, Tensor | None]]:
        first = start_from(self.start, self.grain)
        kept = first.prune_many(layer.sites, layer.evidence, layer.counts)
        out: list[tuple[Tensor, Tensor | None]] = []
        for weight, keep in zip(layer.weights, kept, strict=True):
            mask = improve(weight, layer.gram, keep.mask, swap_width(self.grain, weight.shape[1]), self.rounds)
            out.append((mask, refit(layer.gram, weight, mask, self.damping) if self.refit else None))
        return out

    def reweigh(self, site: MatrixSite, evidence: Evidence, mask: Tensor) -> Tensor | None:
        return self.refitted(site, evidence, mask, self.damping) if self.refit else None


def swap_width(grain: Grain, columns: int) -> int:
    """Columns within which a swap leaves every count of the grain as it is."""
    return grain.m if isinstance(grain, NofM) else grain.width if isinstance(grain, Columns) else columns


def improve(weight: Tensor, gram: Tensor, mask: Tensor, width: int, rounds: int) -> Tensor:
    """The mask after swaps within every run of ``width`` columns.

    Args:
        weight: [out, in]; gram: X^T X [in, in]; mask: booleans [out, in], True stays (not changed).
        rounds: looks at all pairs at most.
    """
    state = _State(weight, gram, mask.clone())
    rows = torch.arange(len(weight), device=weight.device)
    whole = width >= weight.shape[1]
    for _ in range(rounds):
        state.refresh()
        look = rows
        while whole and len(look):  # likely pairs of the rows that still gain
            look = look[state.exchange(look, state.pairs(look, LIKELY))]
        state.refresh()
        found = state.pairs(rows, weight.shape[1]) if whole else state.within(rows, width)
        rows = rows[state.exchange(rows, found)]
        if not len(rows):
            break
    return state.mask


class _State:
    """Rows, what each has lost (r), and how that error couples to every input (c = G r)."""

    def __init__(self, weight: Tensor, gram: Tensor, mask: Tensor) -> None:
        self.weight, self.gram, self.mask, self.diagonal = weight, gram, mask, gram.diagonal().clone()
        self.refresh()

    def refresh(self) -> None:
        """c and the least gain anew, without what rounding left."""
        lost = self.weight.masked_fill(self.mask, 0)
        self.coupling = lost @ self.gram
        self.least = LEAST * (lost * self.coupling).sum(1).clamp_min(0)

    def alone(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Change of error by pruning (inf where pruned already) and by keeping (inf where kept): [rows, in]."""
        w, keep = self.weight[rows], self.mask[rows]
        cross, square = 2 * w * self.coupling[rows], w.square() * self.diagonal
        return (square + cross).masked_fill_(~keep, torch.inf), (square - cross).masked_fill_(keep, torch.inf)

    def pairs(self, rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Best swaps (p to keep, q to prune) [rows, up to TAKE], of pairs of the ``most`` cheapest of either kind."""
        drop, add = self.alone(rows)
        q_cost, q = drop.topk(min(most, int(self.mask[rows].sum(1).max())), dim=1, largest=False)
        p_cost, p = add.topk(min(most, int((~self.mask[rows]).sum(1).max())), dim=1, largest=False)
        if not q.shape[1] or not p.shape[1]:
            return p[:, :0], q[:, :0]
        p_weight, q_weight = -2 * self.weight[rows].gather(1, p), self.weight[rows].gather(1, q)
        best, other = torch.empty_like(p_cost), torch.empty_like(p)
        step = max(1, BYTES // (4 * q.shape[1]))  # pairs of one row and p
        at_once = max(1, step // p.shape[1])
        for a in range(0, len(rows), at_once):
            b = a + at_once
            for c in range(0, p.shape[1], step):
                d = c + step
                cost = self.gram[p[a:b, c:d].unsqueeze(2), q[a:b].unsqueeze(1)]
                cost.mul_(q_weight[a:b].unsqueeze(1)).mul_(p_weight[a:b, c:d].unsqueeze(2))
                low, where = cost.add_(q_cost[a:b].unsqueeze(1)).min(dim=2)
                best[a:b, c:d] = low + p_cost[a:b, c:d]
                other[a:b, c:d] = q[a:b].gather(1, where)
        order = best.topk(min(TAKE, best.shape[1]), dim=1, largest=False).indices
        return p.gather(1, order), other.gather(1, order)

    def within(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The same for swaps within runs of ``width`` columns: the best of every p, from all pairs of its run."""
        n = self.weight.shape[1]
        runs = -(-n // width)
        at = torch.arange(runs * width, device=rows.device).clamp_(max=n - 1).reshape(runs, width)
        gram = self.gram[at.unsqueeze(2), at.unsqueeze(1)]  # [runs, width, width]
        drop, add = self.alone(rows)
        fill = (0, runs * width - n)  # the last run may be narrower
        drop, add = (torch.nn.functional.pad(v, fill, value=torch.inf) for v in (drop, add))
        best, other = torch.empty_like(add), torch.empty_like(add, dtype=torch.long)
        at_once = max(1, BYTES // (4 * gram.numel()))
        for a in range(0, len(rows), at_once):
            b = a + at_once
            w = self.weight[rows[a:b]][:, at]  # [rows, runs, width]
            cost = gram * w.unsqueeze(2) * (-2 * w).unsqueeze(3)
            low, where = cost.add_(drop[a:b].reshape(-1, runs, 1, width)).min(dim=3)
            best[a:b] = low.reshape(len(w), -1) + add[a:b]
            other[a:b] = at[:, 0].unsqueeze(1).add(where).reshape(len(w), -1)
        order = best.topk(min(TAKE, n), dim=1, largest=False).indices
        return order.clamp(max=n - 1), other.gather(1, order).clamp_(max=n - 1)

    def exchange(self, rows: Tensor, found: tuple[Tensor, Tensor]) -> Tensor:
        """Make those of the swaps that help the rows as they are by then; which rows gained, [rows]."""
        gained = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for p, q in zip(*(f.unbind(1) for f in found), strict=True):
            out, into = self.weight[rows, q], self.weight[rows, p]
            change = 2 * (out * self.coupling[rows, q] - into * self.coupling[rows, p] - out * into * self.gram[p, q])
            change += out.square() * self.diagonal[q] + into.square() * self.diagonal[p]
            helps = ~self.mask[rows, p] & self.mask[rows, q] & (change < -self.least[rows])
            r, kept, gone = rows[helps], p[helps], q[helps]
            self.mask[r, kept], self.mask[r, gone] = True, False
            self.coupling[r] += self.gram[gone] * out[helps].unsqueeze(1) - self.gram[kept] * into[helps].unsqueeze(1)
            gained |= helps
        return gained
