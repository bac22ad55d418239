"""Rate and distortion: one more parameter is worth the same everywhere.

    minimise  sum over sites of D_l(keep_l)    so that    sum of R_l = budget
    <=>  dD_l / dR_l = -lambda  at every site that is neither whole nor empty

R_l are the parameters that site l keeps, D_l what is lost when only its best units stay. Every site's curve D_l is
summed up from its units' errors in one survey of the dense model (1,025 points, by the step's groups: row by row for
``row``), made convex (its lower hull), and lambda is where the hulls' steepest segments, taken in order over all sites,
fill the budget.

    by: loss      what the model's answers lose, to second order              (score `fisher`)
    by: output    the sub-layer's error by the diagonal of X^T X (of tiles: by X^T X inside each tile), as a share of
                  its whole output: sum of what went / sum of everything     (score `output_error`)
    by: score     whatever the step's own score adds up to                    (`taylor_block` for tiles: LPViT's curve)

Every site keeps at least a tenth (``least``), or what all keep if that is less, and none loses more than twice the
share that all lose (``most``): errors of weights that go alone say little of a site that loses much of what it has.

Source: the slope condition is Shoham and Gersho 1988, IEEE Trans. ASSP 36(9), "Efficient bit allocation for an
arbitrary set of quantizers"; for tiles of transformers Xu et al. 2024 (LPViT), arXiv 2407.02068, by the released code
(the paper was not read). Deviations: lambda is not searched for but is an order statistic of slopes; the published
code measures each curve by pruning at many levels and smooths it, here errors of single units are added up, so what
two units lose together is not seen; `least` and `most` are ours. The curves assume that what costs least goes first,
which is exact where the step ranks by the same score (and for `wanda` within rows), and a guess elsewhere.

Measured on SmolLM2 (`benchmarks/results/allocation.json`; Wanda 60 %): uniform 61.9, by loss 46.3, by output 88.9, by
Wanda's own score 18,314. A matrix's own error, even a relative one, hardly sees the other weights where one input
channel is huge, and nearly all of them go (down_proj of layers 2, 11 and 28). Tiles of 16 x 16 at 30 %, where every
model is broken: uniform 1902, by loss 4025, by output 108,754; ranked by `fisher` 986, 1972 and 22,595. `atp` is best.
These are from before ``most``, which does nothing where half of the weights go or more. At 10 %, ranked by `fisher`
(`benchmarks/results/tiles.json`): uniform 62.1, by loss 58.5, and 846.6 without ``most``, as q_proj loses 59 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from secateur.errors import SecateurError, unknown
from secateur.methods.base import Amount, Budget, SiteInfo
from secateur.methods.budgets.settle import afford, affordable
from secateur.methods.scores.fisher import FisherScore
from secateur.methods.scores.output_error import OutputError
from secateur.methods.top import check_scores

POINTS = 1024
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """What a site loses against how much it keeps.

    Attributes:
        kept: rising counts per group, from 0 to all.
        error: fp64, what is lost when only so many of the best units of every group stay.
    """

    kept: npt.NDArray[np.int64]
    error: Floats

    @staticmethod
    def of(scores: Tensor, groups: int = 1) -> Curve:
        """The curve of a site from the errors of its units; every group keeps as many."""
        check_scores(scores)
        parts = scores.detach().float().cpu().reshape(max(groups, 1), -1).numpy()
        n = parts.shape[1]
        best = np.sort(parts, axis=1)[:, ::-1]
        kept = np.unique(np.linspace(0, n, min(n, POINTS) + 1).round().astype(np.int64))
        if not n:
            return Curve(kept, np.zeros(1))
        if len(best) > 1:
            lost = np.add.reduceat(best.sum(0, dtype=np.float64), kept[:-1])
        else:
            lost = np.add.reduceat(best[0], kept[:-1], dtype=np.float64)
        return Curve(kept, np.append(np.cumsum(lost[::-1])[::-1], 0.0))

    def from_(self, least: int) -> Curve:
        """The part of the curve at ``least`` per group and above."""
        if least <= 0:
            return self
        above = self.kept > least
        start = np.interp(least, self.kept, self.error)
        return Curve(np.append(least, self.kept[above]), np.append(start, self.error[above]))

    def hull(self) -> Curve:
        """The lower convex hull: the points that are best for some slope."""
        x, y = self.kept.tolist(), self.error.tolist()
        points: list[int] = []
        for i in range(len(x)):
            while len(points) > 1:
                a, b = points[-2:]
                if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):  # b lies below the line from a to i
                    break
                points.pop()
            points.append(i)
        return Curve(self.kept[points], self.error[points])


@dataclass(frozen=True)
class RateDistortion(Budget):
    """Every site's next parameter is worth the same: equal slopes of the sites' own error curves.

    Attributes:
        by: what the curves tell: ``loss``, ``output`` or ``score``.
        least: share of a site's units that stays in any case.
        most: no site loses more than so many times the share that all lose together.
    """

    surveys = True
    by: Literal["loss", "output", "score"] = "loss"
    least: float = 0.1
    most: float = 2.0

    def __post_init__(self) -> None:
        rankings = {"loss": FisherScore, "output": OutputError, "score": None}
        if self.by not in rankings:
            raise unknown("distortion", self.by, rankings)
        if isinstance(self.least, bool) or not 0 <= self.least < 1:
            raise SecateurError("least is not a share below 1", received=self.least, works="least=0.1")
        if isinstance(self.most, bool) or not self.most >= 1:
            raise SecateurError("most is not a number from 1 on", received=self.most, works="most=2.0")
        object.__setattr__(self, "ranking", rankings[self.by])

    def observe(self, site: SiteInfo, scores: Tensor) -> Curve:
        assert scores.numel() == site.units, f"{site.name}: {scores.numel()} scores for {site.units} units"
        curve = Curve.of(scores, site.groups)
        whole = curve.error[0] if self.by == "output" else 1.0
        return Curve(curve.kept, curve.error / whole) if whole > 0 else curve

    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        budget, whole = float(affordable(sites, keep)), sum(s.units * s.cost for s in sites)
        kept = budget / whole if whole else 0.0
        share = max(min(self.least, kept), 1 - self.most * (1 - kept))
        curves = []
        for s in sites:
            each = s.units // max(s.groups, 1)
            curves.append(seen[s.name].from_(max(-(-s.minimum // max(s.groups, 1)), int(share * each))).hull())
        return afford(sites, waterfill(sites, curves, budget), keep)


def waterfill(sites: Sequence[SiteInfo], curves: Sequence[Curve], budget: float) -> list[float]:
    """Units per site, not rounded, whose parameters are ``budget`` and whose errors add up to the least.

    Args:
        curves: convex, per site; what they begin with is kept in any case.
    """
    price = [s.cost * max(s.groups, 1) for s in sites]  # of one more unit in every group
    at = np.concatenate([np.full(len(c.kept) - 1, i) for i, c in enumerate(curves)] or [np.zeros(0)]).astype(np.int64)
    cost = np.concatenate([np.diff(c.kept) * p for c, p in zip(curves, price, strict=True)] or [np.zeros(0)])
    gain = np.concatenate([-np.diff(c.error) for c in curves] or [np.zeros(0)])
    spent = np.array([c.kept[0] * p for c, p in zip(curves, price, strict=True)])
    left = budget - float(spent.sum())
    if len(at) and left > 0:
        slope = gain / cost
        order = np.argsort(-slope, kind="stable")
        reach = np.cumsum(cost[order])
        mark = slope[order[min(int(np.searchsorted(reach, left)), len(order) - 1)]]  # lambda
        sure, last = slope > mark, slope == mark  # at lambda itself any split is as good: in proportion
        taken = cost * sure + cost * last * min((left - float(cost[sure].sum())) / float(cost[last].sum()), 1.0)
        np.add.at(spent, at, taken)
    return [float(x) / s.cost for x, s in zip(spent, sites, strict=True)]
