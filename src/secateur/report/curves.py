"""Perplexity against sparsity: where it is calm, where the cliff is, and the plot that shows both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from secateur.report.markup import Markup
from secateur.report.model import Curve
from secateur.report.numbers import percent, perplexity, times
from secateur.report.svg import Scale, frame, line, log_ticks, mark, path, rect, responsive, text

CALM, CLIFF = 1.1, 2.0  # ratios to the dense perplexity: a sensible choice stays below one, the cliff is at the other


def reach(curve: Curve, ratio: float) -> float | None:
    """The largest sparsity whose perplexity is at most ``ratio`` times the curve's first point.

    Between points log perplexity is taken as linear in sparsity. None if the curve never leaves the bound.
    """
    points = sorted(curve.points, key=lambda p: p.sparsity)
    if not points:
        return None
    bound = math.log(points[0].perplexity * ratio)
    for before, after in itertools.pairwise(points):
        a, b = math.log(before.perplexity), math.log(after.perplexity)
        if not b <= bound:  # catches infinity and not-a-number
            part = (bound - a) / (b - a) if math.isfinite(b) else 0.0
            return before.sparsity + part * (after.sparsity - before.sparsity)
    return None


def advice(curve: Curve) -> str:
    """What a reader may take from the curve, in two sentences."""
    calm, cliff = reach(curve, CALM), reach(curve, CLIFF)
    last = max((p.sparsity for p in curve.points), default=0.0)
    said = (
        f"Up to about {percent(calm, 0)} sparsity perplexity stays within {percent(CALM - 1, 0)} of the dense model."
        if calm is not None
        else f"Up to {percent(last, 0)} sparsity perplexity stays within {percent(CALM - 1, 0)} of the dense model."
    )
    if cliff is not None:
        said += f" At about {percent(cliff, 0)} it has doubled: that is the cliff."
    return said


def plot(curves: Sequence[Curve]) -> Markup:
    """All curves on one logarithmic axis; the bands belong to the first."""
    return responsive(lambda width: _plot(curves, width))


def _plot(curves: Sequence[Curve], width: int) -> Markup:
    left, right, top, height = 54, 14, 26, 230 if width < 400 else 280
    base = top + height
    finite = [p.perplexity for c in curves for p in c.points if math.isfinite(p.perplexity)] or [1.0]
    x = Scale(0, max((p.sparsity for c in curves for p in c.points), default=1.0) or 1.0, left, width - right)
    y = Scale(min(finite) * 0.9, max(max(finite), min(finite) * CLIFF) * 1.15, base, top, log=True)
    drawn = _bands(curves[0], x, (top, height), width - right)
    for tick in log_ticks(y.low, y.high, 7):
        drawn.append(line((left, y(tick)), (width - right, y(tick)), "grid"))
        drawn.append(text(left - 8, y(tick) + 4, perplexity(tick).removesuffix(".00"), "t", "end"))
    for i in range(int(x.high * 10 + 1e-9) + 1):
        if width > 400 or i % 2 == 0:
            drawn.append(text(x(i / 10), base + 18, percent(i / 10, 0), "t", "middle"))
    drawn.append(line((left, base), (width - right, base), "axis"))
    drawn.append(text(left - 54, top - 12, "perplexity", "t"))
    drawn.append(text(width - right, base + 36, "weights removed", "t", "end"))
    for n, curve in enumerate(curves):
        drawn += _line(curve, n, x, y)
    return frame(width, base + 42, "Perplexity against sparsity, logarithmic", drawn)


def _bands(curve: Curve, x: Scale, box: tuple[float, float], end: float) -> list[Markup]:
    """The calm stretch, the cliff, and the choice of this run."""
    top, height = box
    drawn = []
    calm, cliff = reach(curve, CALM), reach(curve, CLIFF)
    edge = x(calm) if calm is not None else end
    drawn.append(rect((x.start, top, edge - x.start, height), "calm"))
    if edge - x.start > 80:
        drawn.append(text((x.start + edge) / 2 + 8, top - 8, f"within {percent(CALM - 1, 0)}", "t calm-word", "middle"))
    if cliff is not None and cliff < x.high:
        drawn.append(rect((x(cliff), top, end - x(cliff), height), "cliff"))
        drawn.append(text(end, top - 8, "over twice", "t cliff-word", "end"))
    return drawn


def _line(curve: Curve, n: int, x: Scale, y: Scale) -> list[Markup]:
    points = sorted(curve.points, key=lambda p: p.sparsity)
    at = [(x(p.sparsity), y(p.perplexity)) for p in points]
    drawn = [path(at, f"curve c{n % 3}")] if len(at) > 1 else []
    if (chosen := curve.chosen) is not None:
        drawn.append(line((x(chosen), y.end), (x(chosen), y.start), "chosen"))
        side, anchor = (6.0, "start") if x(chosen) < (x.start + x.end) / 2 else (-6.0, "end")
        words = f"this run, {percent(chosen)}"
        near = min(points, key=lambda p: abs(p.sparsity - chosen), default=None)
        high = near is not None and y(near.perplexity) < (y.start + y.end) / 2
        drawn.append(text(x(chosen) + side, y.start - 10 if high else y.end + 16, words, "v", anchor))
    first = points[0].perplexity if points else 1.0
    for (px, py), p in zip(at, points, strict=True):
        tip = f"{curve.label}\n{percent(p.sparsity)} removed: perplexity {perplexity(p.perplexity)}"
        if p is not points[0]:
            tip += f" ({times(p.perplexity / first)})"
        shape = Markup(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" class="dot c{n % 3}"/>')
        hit = Markup(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="14" class="hit"/>')
        drawn.append(mark(tip, shape, hit))
    return drawn
