"""DSnoT, dynamic sparse no training: exchange weights so that the pruned ones cancel in the mean.

    expected error of a row:   e = sum over pruned j of w_j E[x_j]
    keep p:   the pruned weight with the largest sign(e) w_p E[x_p] / Var[x_p]
    prune q:  of the kept weights with sign(e) w_q E[x_q] < 0, the one with the smallest |w_q| |x_q|_2
    again and again, up to ``cycles`` times, while |e| > threshold, e keeps its sign and shrinks

Source: Zhang et al. 2023, arXiv 2310.08915, by its released code (growing criterion with the variance, pruning
criterion with Wanda's metric); each weight changes place at most once, and for n:m the weight that goes is the smallest
of the group of the one that comes. Weights that stay keep their values.

Deviations: every exchange must shrink |e|, and e keeps its sign in rows as for n:m (the released code lets it turn in
rows, and exchanges on: ``turns=true``); all matrices take part (there by default those of attention alone); blocks of
columns exchange within their block as n:m does; a row whose candidates run out stops; counts stay exactly those of the
mask it starts from. On SmolLM2 it gains over Wanda at 2:4 and loses in whole rows (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.engine.probes import Evidence, InputMoments
from secateur.errors import SecateurError
from secateur.methods.base import Keep, MatrixSite, Method
from secateur.methods.grains import Grain, Row, Tile
from secateur.methods.joint.layer import check_steps
from secateur.methods.joint.start import start_from
from secateur.methods.joint.swaps import swap_width

TOKENS = 2048  # the released code's windows: its threshold is for sums over one


@dataclass(frozen=True)
class DSnoT(Method):
    """Training-free exchange by the expected error; grains ``row``, ``matrix``, ``columns:B`` and ``n:m``.

    Attributes:
        grain: who competes.
        start: the mask to start from: a score, or ``sparsegpt``, ``obs``, ``admm``, ``alps``.
        cycles: exchanges per row at most; fewer suit narrow models (50 of 4,096 inputs are 7 of 576).
        threshold: expected error, summed over 2,048 tokens, at which a row stops.
        turns: in grains of whole rows, go on when the error has changed its sign, whether or not it shrank.
    """

    grain: Grain = field(default_factory=Row)
    start: str = "wanda"
    cycles: int = 50
    threshold: float = 0.1
    turns: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.grain, Tile):
            raise SecateurError(
                "dsnot exchanges single weights", received=f"grain {self.grain}", works="row, columns:128 or n:m"
            )
        check_steps("cycles", self.cycles)
        if not self.threshold >= 0:
            raise SecateurError("threshold must not be negative", received=self.threshold, works="threshold: 0.1")
        first = start_from(self.start, self.grain)
        object.__setattr__(self, "needs", tuple(dict.fromkeys((InputMoments, *first.needs))))

    def prune(self, site: MatrixSite, evidence: Evidence, count: int) -> Keep:
        return self.prune_many([site], [evidence], [count])[0]

    def prune_many(
        self, sites: Sequence[MatrixSite], evidence: Sequence[Evidence], counts: Sequence[int]
    ) -> list[Keep]:
        first = start_from(self.start, self.grain).prune_many(sites, evidence, counts)
        out = []
        for site, seen, keep in zip(sites, evidence, first, strict=True):
            if bool(keep.mask.all()):
                out.append(Keep(keep.mask))
                continue
            moments, w = seen[InputMoments], site.weight.float()
            norm = (moments.variance + moments.mean.square()).sqrt()
            width = swap_width(self.grain, w.shape[1])
            out.append(Keep(self._exchange(w, keep.mask.clone(), (moments.mean, moments.variance, norm), width)))
        return out

    def _exchange(self, w: Tensor, mask: Tensor, input_: tuple[Tensor, Tensor, Tensor], width: int) -> Tensor:
        mean, variance, norm = (v.to(w.device) for v in input_)
        share = w * mean  # what a weight adds to the mean of its output
        ease = share / torch.where(variance > 0, variance, torch.inf)
        size = w.abs() * norm
        error = share.masked_fill(mask, 0).sum(1)
        turns, stop = self.turns and width == w.shape[1], self.threshold / TOKENS
        sign = error.sign()
        run = torch.arange(w.shape[1], device=w.device) // width
        moved = torch.zeros_like(mask)  # each weight changes place once
        rows = (error.abs() > stop).nonzero().squeeze(1)
        for _ in range(self.cycles):
            if not len(rows):
                break
            s, kept = (error if turns else sign)[rows].sign().unsqueeze(1), mask[rows]
            still = moved[rows]
            gain, p = (s * ease[rows]).masked_fill_(kept | still, -torch.inf).max(1)
            leaves = kept & ~still & (run == run[p].unsqueeze(1) if width < w.shape[1] else s * share[rows] < 0)
            cost, q = size[rows].masked_fill_(~leaves, torch.inf).min(1)
            after = error[rows] - share[rows, p] + share[rows, q]
            made = (gain > 0) & torch.isfinite(cost)
            if not turns:
                made &= (after.sign() == sign[rows]) & (after.abs() < error[rows].abs())
            rows, p, q = rows[made], p[made], q[made]
            mask[rows, p], mask[rows, q] = True, False
            moved[rows, p], moved[rows, q] = True, True
            error[rows] = after[made]
            rows = rows[error[rows].abs() > stop]
        return mask
