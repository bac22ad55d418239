"""A small, sortable summary of any number of scores: how many fall on each float32 bit pattern.

The bits of a float32, read as an integer, sort as the number does. A site with at most 65,536 units is kept
exactly; a larger one by the upper 20 bits (steps of 1/2048 of the value), at most 2^20 entries and in
practice some ten thousand, so that billions of weights fit. Counts are exact in either case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 1 << 16
SHIFT = 12
CHUNK = 1 << 22


@dataclass(frozen=True)
class Ranks:
    """Scores of one site, counted.

    Attributes:
        keys: sorted int32 keys that occur; a higher key is a higher score.
        counts: int64, how many scores have each key.
        shift: lower bits left out of the keys (0: exact).
        number, total, square: how many scores, their sum, and the sum of their squares (fp64).
    """

    keys: Tensor
    counts: Tensor
    shift: int
    number: int
    total: float
    square: float

    @staticmethod
    def of(scores: Tensor) -> Ranks:
        """Count the scores of one site."""
        flat = scores.detach().reshape(-1)
        total = square = 0.0
        bins = torch.zeros(1 << (32 - SHIFT), dtype=torch.int64, device=flat.device) if flat.numel() > EXACT else None
        for part in flat.split(CHUNK):  # copies of a piece at a time
            wide = part.double()
            total += float(wide.sum())
            square += float(wide.square().sum())
            if bins is not None:
                bins += torch.bincount((order_key(part.float()) >> SHIFT) + len(bins) // 2, minlength=len(bins))
        if bins is None:
            keys, counts = torch.unique(order_key(flat.float()), return_counts=True)
        else:
            at = bins.nonzero().squeeze(1)
            keys, counts = (at - len(bins) // 2).int(), bins[at]
        shift = 0 if bins is None else SHIFT
        return Ranks(keys.cpu(), counts.cpu(), shift, flat.numel(), total, square)

    @property
    def mean(self) -> float:
        return self.total / max(self.number, 1)

    @property
    def deviation(self) -> float:
        """Population standard deviation."""
        return max(self.square / max(self.number, 1) - self.mean**2, 0.0) ** 0.5

    @property
    def size(self) -> float:
        """Root mean square: the deviation of weights around zero, where scores are their absolute values."""
        return (self.square / max(self.number, 1)) ** 0.5

    def coarse(self, shift: int) -> tuple[Tensor, Tensor]:
        """Keys and counts with ``shift`` lower bits left out."""
        if shift == self.shift:
            return self.keys, self.counts
        keys = self.keys >> (shift - self.shift)
        unique, at = torch.unique_consecutive(keys, return_inverse=True)
        return unique, torch.zeros(len(unique), dtype=torch.int64).index_add_(0, at, self.counts)

    def above(self, value: float) -> int:
        """How many scores are greater than ``value`` (to the step of the keys: those in its own step count not)."""
        key = int(order_key(torch.tensor([value], dtype=torch.float32)) >> self.shift)
        return int(self.counts[self.keys > key].sum())


def order_key(values: Tensor) -> Tensor:
    """int32 keys that sort as the float32 values do (-0.0 and 0.0 are one)."""
    bits = (values + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@dataclass(frozen=True)
class Merged:
    """The ranks of several sites on one scale.

    Attributes:
        sites: per site, keys and counts with the same lower bits left out.
        keys: all keys that occur, highest first.
        reach: how many scores lie at each of these keys or above.
    """

    sites: tuple[tuple[Tensor, Tensor], ...]
    keys: Tensor
    reach: Tensor

    def best(self, count: int) -> list[int]:
        """How many of the ``count`` best of all sites belong to each. Exact in total; where several sites share
        the last step, its places go to them in proportion (largest remainder, earlier site first)."""
        if count <= 0 or not len(self.keys):
            return [0] * len(self.sites)
        if count >= int(self.reach[-1]):
            return [int(c.sum()) for _, c in self.sites]
        mark = int(self.keys[int(torch.searchsorted(self.reach, count))])
        sure = [int(c[k > mark].sum()) for k, c in self.sites]
        last = [int(c[k == mark].sum()) for k, c in self.sites]
        return [a + b for a, b in zip(sure, share_out(last, count - sum(sure)), strict=True)]


def merged(ranks: Sequence[Ranks]) -> Merged:
    """Bring the ranks of several sites together, at the coarsest one's resolution."""
    shift = max((r.shift for r in ranks), default=0)
    sites = tuple(r.coarse(shift) for r in ranks)
    if not sites:
        return Merged((), torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int64))
    keys, at = torch.unique(torch.cat([k for k, _ in sites]), return_inverse=True)
    counts = torch.zeros(len(keys), dtype=torch.int64).index_add_(0, at, torch.cat([c for _, c in sites]))
    return Merged(sites, keys.flip(0), counts.flip(0).cumsum(0))


def share_out(weights: Sequence[int], count: int) -> list[int]:
    """``count`` (at most their sum) divided in proportion to integer weights; largest remainders, earlier first."""
    total = sum(weights)
    if total == 0:
        return [0] * len(weights)
    parts = [w * count // total for w in weights]
    order = sorted(range(len(weights)), key=lambda i: (-(weights[i] * count % total), i))
    for i in order[: count - sum(parts)]:
        parts[i] += 1
    return parts
