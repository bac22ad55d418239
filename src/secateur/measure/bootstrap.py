"""Paired bootstrap: how far a mean difference could move had other windows (or questions) been drawn.

Efron's percentile interval over resampled pairs: both models keep the same resampled windows, so what is hard for
both cancels. With a single pair nothing can be resampled and the interval has no width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from secateur.measure.types import Interval

RESAMPLES = 2000


def interval(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    transform: Callable[[float], float] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The weighted mean of paired differences and its percentile interval.

    Args:
        values: one per window or item; for a comparison, the model's minus the dense model's.
        weights: of the windows (tokens scored); equal if None.
        transform: an increasing function applied to mean and bounds (``exp`` turns differences of
            log-likelihood into a ratio of perplexities).
        level: probability the interval covers.
        resamples, seed: of the bootstrap.
    """
    x = torch.tensor(values, dtype=torch.float64)
    w = torch.ones_like(x) if weights is None else torch.tensor(weights, dtype=torch.float64)
    pick = torch.randint(0, len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(seed))
    means = ((x * w)[pick].sum(1) / w[pick].sum(1)).sort().values
    tail = (1 - level) / 2
    low, high = means[math.floor(tail * (resamples - 1))], means[math.ceil((1 - tail) * (resamples - 1))]
    f = transform or float
    return Interval(f(float((x * w).sum() / w.sum())), f(float(low)), f(float(high)), level)


def safe_exp(x: float) -> float:
    """exp, inf where it overflows."""
    return math.exp(x) if x < 709 else math.inf
