"""Where the weights went: kept and removed parameters layer by layer, and the share kept by kind of matrix."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType

from secateur.report.markup import Markup
from secateur.report.model import SiteRecord, StepRecord
from secateur.report.numbers import count, percent, short
from secateur.report.svg import Scale, frame, line, mark, nice_ticks, rect, responsive, text

COMPONENTS = ("attention", "ffn", "other")
WORDS: Mapping[str, str] = MappingProxyType({"attention": "attention", "ffn": "FFN", "other": "other"})
EXPERT = re.compile(r"\[\d+\]|(?<=experts)\.\d+(?=\.)")
MOST_KINDS = 24


def by_layer(step: StepRecord) -> dict[int, dict[str, tuple[float, float]]]:
    """Per block and component: parameters that stay, and parameters that there were."""
    sums: dict[int, dict[str, tuple[float, float]]] = {}
    for s in step.sites:
        parts = sums.setdefault(s.block, {})
        name = s.component if s.component in COMPONENTS else "other"
        kept, total = parts.get(name, (0.0, 0.0))
        parts[name] = (kept + s.parameters * (s.kept / s.total if s.total else 1.0), total + s.parameters)
    return dict(sorted(sums.items()))


def by_kind(step: StepRecord) -> dict[str, dict[int, tuple[int, int]]]:
    """Per kind of site and block: units kept and units that there were, kinds in order of appearance."""
    kinds: dict[str, dict[int, tuple[int, int]]] = {}
    names = [kind_of(s) for s in step.sites]
    if len(set(names)) > MOST_KINDS:
        names = [WORDS.get(s.component, s.component) for s in step.sites]
    for s, name in zip(step.sites, names, strict=True):
        row = kinds.setdefault(name, {})
        kept, total = row.get(s.block, (0, 0))
        row[s.block] = (kept + s.kept, total + s.total)
    return kinds


def kind_of(site: SiteRecord) -> str:
    """The row of the map that a site belongs to; all experts share one."""
    name = site.kind or site.site.partition(f".{site.block}.")[2].removesuffix(".weight") or site.component
    return EXPERT.sub("", name)


def even(step: StepRecord) -> float | None:
    """The share every cell of the map keeps, if it is the same to a twentieth of a percent; else None."""
    shares = [k / t for row in by_kind(step).values() for k, t in row.values() if t]
    return shares[0] if shares and max(shares) - min(shares) < 5e-4 else None


def layers(step: StepRecord) -> Markup:
    """Stacked bars, one a layer: what stays, solid, below what went, hatched."""
    return responsive(lambda width: _layers(by_layer(step), width))


def _layers(sums: dict[int, dict[str, tuple[float, float]]], width: int) -> Markup:
    left, right, top, height = 46, 4, 8, 190 if width < 400 else 220
    base = top + height
    most = max((sum(t for _, t in parts.values()) for parts in sums.values()), default=1.0)
    y = Scale(0, most, base, top)
    pitch = (width - left - right) / max(len(sums), 1)
    gap = min(4.0, pitch * 0.22)
    drawn: list[Markup] = []
    for tick in nice_ticks(most, 4):
        drawn += [
            line((left, y(tick)), (width - right, y(tick)), "grid"),
            text(left - 8, y(tick) + 4, _tick(tick), "t", "end"),
        ]
    every = max(1, math.ceil(22 / pitch))
    for i, (block, parts) in enumerate(sums.items()):
        x, level = left + i * pitch + gap / 2, 0.0
        shapes, tips = [], [f"Layer {block}"]
        for name in COMPONENTS:
            kept = parts.get(name, (0.0, 0.0))[0]
            shapes.append(_segment(x, pitch - gap, y, (level, level + kept), f"kept {name}"))
            level += kept
        for name in reversed(COMPONENTS):
            kept, total = parts.get(name, (0.0, 0.0))
            shapes.append(_segment(x, pitch - gap, y, (level, level + total - kept), f"gone {name}"))
            level += total - kept
        for name, (kept, total) in parts.items():
            share = percent(kept / total) if total else "—"
            tips.append(f"{WORDS[name]}: {count(round(kept))} of {count(round(total))} parameters stay ({share})")
        hit = rect((x - gap / 2, top, pitch, height), "hit")
        drawn.append(mark("\n".join(tips), *shapes, hit))
        if i % every == 0:
            drawn.append(text(x + (pitch - gap) / 2, base + 18, str(block), "t", "middle"))
    drawn.append(line((left, base), (width - right, base), "axis"))
    drawn.append(text(width - right, base + 36, "layer", "t", "end"))
    return frame(width, base + 42, "Parameters kept and removed in each layer", drawn)


def _tick(value: float) -> str:
    """1 M rather than 1.00 M."""
    number, _, unit = short(value).partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}".rstrip()


def _segment(x: float, w: float, y: Scale, levels: tuple[float, float], kind: str) -> Markup:
    low, high = levels
    return rect((x, y(high), w, y(low) - y(high)), kind) if high > low else Markup("")


def kinds(step: StepRecord) -> Markup:
    """A map of the share kept: a row for each kind of matrix, a column for each layer."""
    rows = by_kind(step)
    shares = [k / t for row in rows.values() for k, t in row.values() if t]
    low, high = math.floor(min(shares) * 10 - 1e-9) / 10, math.ceil(max(shares) * 10 + 1e-9) / 10
    return responsive(lambda width: _kinds(rows, (max(low, 0.0), min(high, 1.0)), width))


def _kinds(rows: dict[str, dict[int, tuple[int, int]]], bounds: tuple[float, float], width: int) -> Markup:
    short_names = width < 500
    labels = {name: (name.rsplit(".", 1)[-1] if short_names else name) for name in rows}
    left = min(12 + 6.6 * max(len(n) for n in labels.values()), width * 0.42)
    blocks = sorted({b for row in rows.values() for b in row})
    pitch, cell = (width - left - 4) / len(blocks), 22
    gap = min(2.0, pitch * 0.15)
    drawn: list[Markup] = []
    for r, (name, row) in enumerate(rows.items()):
        drawn.append(text(left - 8, r * cell + 16, labels[name], "t", "end"))
        for i, block in enumerate(blocks):
            if block not in row:
                continue
            kept, total = row[block]
            share = kept / total if total else 1.0
            span = bounds[1] - bounds[0]
            level = round(9 * (share - bounds[0]) / span) if span else 9
            box = rect((left + i * pitch, r * cell + 2, pitch - gap, cell - 2), f"heat h{level}", 1.5)
            tip = f"Layer {block}, {name}\n{count(kept)} of {count(total)} stay ({percent(share, 2)})"
            drawn.append(mark(tip, box))
    base = len(rows) * cell + 18
    every = max(1, math.ceil(22 / pitch))
    for i, block in enumerate(blocks[::every]):
        drawn.append(text(left + (i * every + 0.5) * pitch, base, str(block), "t", "middle"))
    for level in range(10):
        drawn.append(rect((left + level * 14, base + 14, 14, 10), f"heat h{level}"))
    drawn.append(text(left - 8, base + 24, percent(bounds[0]), "t", "end"))
    drawn.append(text(left + 148, base + 24, f"{percent(bounds[1])} kept", "t"))
    return frame(width, base + 32, "Share kept for each kind of matrix in each layer", drawn)
