"""What was measured, drawn: every window of the test text, sizes, and times with their spread."""

from __future__ import annotations

import math
from dataclasses import dataclass

from secateur.measure.types import Latency, Perplexity, Size, Timing
from secateur.report.markup import Markup
from secateur.report.numbers import change, count, perplexity, seconds, short, times
from secateur.report.svg import Scale, frame, line, log_ticks, mark, rect, responsive, text

MOST_WINDOWS = 96


@dataclass(frozen=True)
class Bar:
    """One bar: its value, how it is written, and its spread in the same unit."""

    name: str
    value: float
    words: str
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Group:
    """Bars that share an axis; the tip is the same for all."""

    label: str
    bars: tuple[Bar, ...]
    tip: str


def windows(dense: Perplexity, pruned: Perplexity) -> Markup:
    """Perplexity of each window, dense and pruned joined by a line, in order of the dense one."""
    pairs = sorted(zip(dense.window_nll, pruned.window_nll, strict=False))
    if len(pairs) > MOST_WINDOWS:
        step = len(pairs) / MOST_WINDOWS
        pairs = [pairs[int(i * step)] for i in range(MOST_WINDOWS)]
    values = [(_exp(a), _exp(b)) for a, b in pairs]
    return responsive(lambda width: _windows(values, width))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _windows(values: list[tuple[float, float]], width: int) -> Markup:
    left, right, top, height = 54, 8, 26, 200
    base = top + height
    finite = [v for pair in values for v in pair if math.isfinite(v)] or [1.0]
    y = Scale(min(finite) * 0.9, max(finite) * 1.1, base, top, log=True)
    pitch = (width - left - right) / max(len(values), 1)
    r = max(1.8, min(4.0, pitch * 0.3))
    drawn: list[Markup] = []
    for tick in log_ticks(y.low, y.high, 6):
        drawn.append(line((left, y(tick)), (width - right, y(tick)), "grid"))
        drawn.append(text(left - 8, y(tick) + 4, perplexity(tick).removesuffix(".00"), "t", "end"))
    for i, (a, b) in enumerate(values):
        x = left + (i + 0.5) * pitch
        tip = f"dense {perplexity(a)}, pruned {perplexity(b)} ({times(b / a) if a else '—'})"
        parts = [line((x, y(a)), (x, y(b)), "stem")]
        for value, kind in ((a, "dot dense"), (b, "dot c0")):
            parts.append(Markup(f'<circle cx="{x:.1f}" cy="{y(value):.1f}" r="{r:.1f}" class="{kind}"/>'))
        drawn.append(mark(tip, parts, rect((x - pitch / 2, top, pitch, height), "hit")))
    drawn.append(line((left, base), (width - right, base), "axis"))
    drawn.append(text(left - 54, top - 12, "perplexity", "t"))
    drawn.append(text(width - right, base + 18, "windows of test text, easiest first", "t", "end"))
    return frame(width, base + 26, "Perplexity of each window of the test text", drawn)


def sizes(dense: Size, pruned: Size) -> Markup:
    """Parameters, non-zeros, file, MACs and KV cache, dense beside pruned, each on its own axis."""
    rows = (
        ("Parameters", dense.parameters, pruned.parameters, ""),
        ("Non-zero parameters", dense.nonzero, pruned.nonzero, ""),
        ("File", dense.bytes, pruned.bytes, "B"),
        (f"MACs a token, context {count(pruned.context)}", dense.macs_per_token, pruned.macs_per_token, ""),
        (f"KV cache a token, {pruned.dtype}", dense.kv_bytes_per_token, pruned.kv_bytes_per_token, "B"),
    )
    groups = []
    for label, a, b, unit in rows:
        tip = f"{label}\ndense {count(a)}\npruned {count(b)} ({change(a, b)})"
        groups.append(Group(label, (Bar("dense", a, short(a, unit)), Bar("pruned", b, short(b, unit))), tip))
    return bars(tuple(groups), "Sizes of the dense and the pruned model")


def speeds(dense: Latency, pruned: Latency) -> Markup:
    """Prefill and decode times with the middle half of their repeats."""
    groups = []
    for label, a, b in (
        (f"Prefill of {count(pruned.prompt_tokens)} tokens", dense.prefill, pruned.prefill),
        ("Decoding, one token", dense.decode_per_token, pruned.decode_per_token),
    ):
        tip = f"{label}\n{_spread('dense', a)}\n{_spread('pruned', b)}\n{times(a.median / b.median)} as fast"
        groups.append(Group(label, (_bar("dense", a), _bar("pruned", b)), tip))
    if dense.peak_rss and pruned.peak_rss:
        was, now = dense.peak_rss, pruned.peak_rss
        tip = f"Peak memory of the process\ndense {count(was)} bytes\npruned {count(now)} bytes ({change(was, now)})"
        pair = (Bar("dense", was, short(was, "B")), Bar("pruned", now, short(now, "B")))
        groups.append(Group("Peak memory of the process", pair, tip))
    return bars(tuple(groups), "Prefill and decoding time of the dense and the pruned model")


def _bar(name: str, t: Timing) -> Bar:
    return Bar(name, t.median, seconds(t.median), (t.low, t.high))


def _spread(name: str, t: Timing) -> str:
    return f"{name} {seconds(t.median)} (middle half {seconds(t.low)} to {seconds(t.high)}, {t.repeats} repeats)"


def bars(groups: tuple[Group, ...], label: str) -> Markup:
    """Horizontal bars in groups, each group scaled to its own largest value."""
    return responsive(lambda width: _bars(groups, label, width))


def _bars(groups: tuple[Group, ...], label: str, width: int) -> Markup:
    left, room, thick = 58, 78, 15
    drawn: list[Markup] = []
    y = 0.0
    for group in groups:
        most = max([b.value for b in group.bars] + [b.spread[1] for b in group.bars if b.spread])
        x = Scale(0, most or 1.0, left, width - room)
        parts = [text(0, y + 14, group.label, "v")]
        start = y
        y += 24
        for bar in group.bars:
            kind = "dense" if bar.name == "dense" else "pruned"
            parts.append(text(0, y + 12, bar.name, "t"))
            parts.append(rect((left, y, x(bar.value) - left, thick), f"bar {kind}", 2))
            end = x(bar.value)
            if bar.spread:
                low, high = (x(v) for v in bar.spread)
                mid = y + thick / 2
                parts += [line((low, mid), (high, mid), "whisker")]
                parts += [line((at, mid - 4), (at, mid + 4), "whisker") for at in (low, high)]
                end = max(end, high)
            parts.append(text(end + 7, y + 12, bar.words, "v"))
            y += thick + 5
        parts.append(rect((0, start, width, y - start), "hit"))
        drawn.append(mark(group.tip, parts))
        y += 14
    return frame(width, y - 10, label, drawn)
