"""Small SVG parts: a plot's frame, axes, ticks. Colours and type come from the page's style sheet by class.

Every plot is drawn four times, for four widths, and the style sheet shows the one that fits: text in a scaled
drawing would be unreadable on a telephone. Hover texts are ``<title>`` elements, so they work without a script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur.report.markup import Child, Markup, el

LONGEST = 44
WIDTHS = (("s", 320), ("m", 480), ("l", 720), ("x", 980))


def responsive(draw: Callable[[int], Markup]) -> Markup:
    """The same plot for several widths; a container query picks one."""
    return el("div", {"class": "plot"}, [el("div", {"class": f"fit-{name}"}, draw(width)) for name, width in WIDTHS])


def frame(width: int, height: float, label: str, *children: Child) -> Markup:
    """An SVG of its own coordinates, focusable so that the arrow keys walk its marks."""
    box = f"0 0 {width} {math.ceil(height)}"
    return el("svg", {"viewBox": box, "role": "img", "aria-label": label, "tabindex": "0"}, *children)


def text(x: float, y: float, words: str, kind: str = "t", anchor: str = "start") -> Markup:
    """Text at a baseline, cut to what a plot has room for; ``kind`` is a class of the style sheet."""
    words = words if len(words) <= LONGEST else words[: LONGEST - 1] + "…"
    return el("text", {"x": x, "y": y, "class": kind, "text-anchor": None if anchor == "start" else anchor}, words)


def line(a: tuple[float, float], b: tuple[float, float], kind: str) -> Markup:
    """A straight line."""
    return el("line", {"x1": a[0], "y1": a[1], "x2": b[0], "y2": b[1], "class": kind})


def rect(box: tuple[float, float, float, float], kind: str, radius: float = 0) -> Markup:
    """A rectangle (x, y, width, height)."""
    x, y, w, h = box
    attributes = {"x": float(x), "y": float(y), "width": max(float(w), 0.0), "height": max(float(h), 0.0)}
    return el("rect", {**attributes, "rx": radius or None, "class": kind})


def mark(tip: str, *children: Child) -> Markup:
    """Something to hover: the tip is its title."""
    return el("g", {"class": "mark"}, el("title", None, tip), *children)


@dataclass(frozen=True)
class Scale:
    """Values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside are held at the edge."""
        f = math.log if self.log else float
        value = min(max(value, self.low), self.high)
        span = f(self.high) - f(self.low)
        return self.start + (self.end - self.start) * ((f(value) - f(self.low)) / span if span else 0.5)


def nice_ticks(high: float, most: int) -> list[float]:
    """Round numbers from 0 to at most ``high``, at most ``most`` steps."""
    if not high > 0:
        return [0.0]
    rough = high / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [i * step for i in range(int(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """1, 2, 5 of each decade between the bounds; only the decades, or fewer, if those are too many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for kinds in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in kinds if low <= m * 10.0**e <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def path(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    """A line through points."""
    steps = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return el("path", {"d": f"M{steps}", "class": kind})
