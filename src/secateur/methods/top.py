"""Exact selection of the best: asked for k, gives k, ties included.

Among equals, places are scattered over the matrix: every flat index has a fixed rank (`scattered`), and the highest
rank wins. Weights that were quantised once are full of ties, and a rule such as "the lowest index wins" always takes
from the same end of every row. Multiples of one constant modulo 2^32 would not do either: at some widths (Knuth's
2654435761 at 576) they are almost the same from row to row, so that whole columns win or lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError

CHUNK = 1 << 22  # scores looked at together: bounds the copies that a selection makes
LOW = 0xFFFFFFFF


def check_scores(scores: Tensor) -> None:
    """Refuse scores that cannot be ranked (NaN, Inf)."""
    if not scores.numel():
        return
    low, high = torch.aminmax(scores)  # NaN passes through
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise SecateurError(
            "scores are not finite, so nothing can be ranked",
            received=f"smallest {float(low)}, largest {float(high)}",
            works="check the weights and the calibration text for NaN and Inf",
        )


def scattered(index: Tensor) -> Tensor:
    """Indices below 2^32 as numbers below 2^32 without any pattern, no two the same (MurmurHash3's last step)."""
    index = index & LOW
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = ((index ^ (index >> shift)) * factor) & LOW
    return index ^ (index >> 16)


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest entry (k from 1) of every row of [rows, n]: [rows]."""
    n = scores.shape[1]
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # numpy's selection keeps no indices and is vectorised: ten times faster than kthvalue
        return torch.from_numpy(np.partition(scores.detach().numpy(), n - k, axis=1)[:, n - k].copy())
    return scores.topk(k, dim=1, sorted=True).values[:, -1]


def top_rows(scores: Tensor, k: int) -> Tensor:
    """True at the k largest of every row of [rows, n]; ties are scattered (see above)."""
    rows, n = scores.shape
    if k <= 0 or k >= n:
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    keep = torch.empty_like(scores, dtype=torch.bool)
    step = max(1, CHUNK // n)
    for at in range(0, rows, step):
        s = scores[at : at + step]
        threshold = kth_largest(s, k).unsqueeze(1)
        mask = s >= threshold
        tied = (mask.sum(1) > k).nonzero().squeeze(1)  # rows with more entries at the threshold than places
        if len(tied):
            s, threshold = s[tied], threshold[tied]
            above = s > threshold
            mask[tied] = above | spread(s == threshold, k - above.sum(1), tied + at)
        keep[at : at + step] = mask
    return keep


def spread(equal: Tensor, room: Tensor, rows: Tensor) -> Tensor:
    """True at ``room`` of the True entries of every row: which ones, does not depend on how many.

    Args:
        equal: booleans [t, n], rows of a matrix.
        room: int64 [t], at most as many as the row has.
        rows: int64 [t], the rows' indices in the matrix.
    """
    r, c = equal.nonzero(as_tuple=True)
    rank = scattered(rows[r] * equal.shape[1] + c)
    order = ((r << 32) | (LOW - rank)).argsort()
    sorted_rows = r[order]
    first = torch.searchsorted(sorted_rows, torch.arange(len(rows), device=r.device))
    place = torch.arange(len(order), device=r.device) - first[sorted_rows]
    won = order[place < room[sorted_rows]]
    keep = torch.zeros_like(equal)
    keep[r[won], c[won]] = True
    return keep


def top_total(scores: Tensor, count: int) -> Tensor:
    """True at ``count`` entries of [rows, n], as evenly over the rows as can be.

    Every row keeps ``count // rows`` of its best; what remains goes to the rows whose next-best score is
    highest, so that a larger count always keeps a superset.
    """
    rows = scores.shape[0]
    each, extra = divmod(count, rows)
    keep = top_rows(scores, each)
    if extra:
        best = scores.masked_fill(keep, -torch.inf).amax(1)
        lucky = top_rows(best.unsqueeze(0), extra).squeeze(0).nonzero().squeeze(1)
        next_best = (scores[lucky] == best[lucky].unsqueeze(1)) & ~keep[lucky]
        keep[lucky] |= spread(next_best, torch.ones_like(lucky), lucky)
    return keep


def apportion(sizes: Sequence[int], count: int) -> tuple[list[int], list[int], int]:
    """Divide ``count`` among groups in proportion to their sizes (Webster's method, exact arithmetic).

    Webster's divisor method hands out places one after another, so a larger count never takes one away (shares
    with a largest remainder would), and it agrees with rounding every group's share half up where these add up
    to the count.

    Returns:
        places that are certain, groups that compete for the rest with an equal claim, and how many of those
        groups get one more.
    """
    total = sum(sizes)
    assert 0 <= count <= total
    seats = [min(s, (2 * s * count + total) // (2 * total)) if total else 0 for s in sizes]

    def claim(g: int, seat: int) -> Fraction:  # the larger, the earlier this seat is handed out
        return Fraction(sizes[g], 2 * seat - 1)

    def worst() -> tuple[Fraction, int]:
        return min((claim(g, n), -g) for g, n in enumerate(seats) if n > 0)

    def best() -> tuple[Fraction, int]:
        return max((claim(g, n + 1), -g) for g, n in enumerate(seats) if n < sizes[g])

    while (spare := count - sum(seats)) != 0:
        at = -(best() if spare > 0 else worst())[1]
        seats[at] += 1 if spare > 0 else -1
    while 0 < count < total and best()[0] > worst()[0]:
        give, take = -worst()[1], -best()[1]
        seats[give] -= 1
        seats[take] += 1
    if not 0 < count < total:
        return seats, [], 0
    mark = worst()[0]
    last = [g for g, n in enumerate(seats) if n > 0 and claim(g, n) == mark]
    after = [g for g, n in enumerate(seats) if n < sizes[g] and claim(g, n + 1) == mark]
    if not after:
        return seats, [], 0
    for g in last:
        seats[g] -= 1
    return seats, sorted({*last, *after}), len(last)
