"""Results as plain data (for ``--json``) and as text for people. Returns values; prints nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from decimal import Decimal
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from secateur.measure.types import Comparison, Measurement


def plain(value: Any) -> Any:
    """Anything a verb returns as JSON data: dataclasses become objects, paths text, infinities and NaN null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, Decimal):
        return plain(float(value))
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def measured(models: Sequence[Measurement], against: Sequence[Comparison]) -> dict[str, Any]:
    """The object ``secateur measure --json`` prints: one flat entry per model, in the order given.

    Args:
        models: measurements, the reference first.
        against: comparisons of the second and later models with the first.
    """
    entries = []
    for number, m in enumerate(models):
        entry: dict[str, Any] = {"model": m.model, "perplexity": m.perplexity.value if m.perplexity else None}
        if m.perplexity:
            entry["perplexity_conditions"] = {
                "text": m.perplexity.text,
                "windows": m.perplexity.windows,
                "length": m.perplexity.length,
                "stride": m.perplexity.stride,
                "tokens": m.perplexity.tokens,
                "dtype": m.perplexity.dtype,
            }
        size = asdict(m.size)
        entry |= {k: size[k] for k in ("parameters", "nonzero", "bytes", "macs_per_token", "kv_bytes_per_token")}
        if m.divergence:
            entry |= {"kl": m.divergence.kl, "top1": m.divergence.top1}
        if m.choices:
            entry |= {
                "accuracy_norm": m.choices.accuracy_norm,
                "accuracy": m.choices.accuracy,
                "items": m.choices.items,
            }
        if m.tasks:
            entry["tasks"] = dict(m.tasks)
        if m.latency:
            entry |= {
                "prefill_seconds": m.latency.prefill.median,
                "decode_seconds_per_token": m.latency.decode_per_token.median,
                "peak_rss": m.latency.peak_rss,
                "latency": asdict(m.latency),
            }
        if m.generations:
            entry["generations"] = [asdict(g) for g in m.generations]
        if number and number <= len(against):
            entry["against_first"] = {k: v for k, v in asdict(against[number - 1]).items() if v is not None}
        if m.notes:
            entry["notes"] = list(m.notes)
        entries.append(entry)
    return {"models": plain(entries)}


_BYTES = frozenset({"bytes", "rss", "ram", "disk"})  # words of a key whose integers are bytes
_WIDE = ("first_token_ms", "prefill_tokens_per_second", "decode_tokens_per_second")  # --json has them for every shape
_HIDDEN = ("model", "notes", "perplexity_conditions", "latency", "generations", "against_first", "shapes")


def page(data: Mapping[str, Any]) -> list[RenderableType]:
    """Plain data as rich renderables: words as lines, lists of objects as tables, in the data's own order."""
    from rich.table import Table
    from rich.text import Text

    lines = Table.grid(padding=(0, 2))
    out: list[RenderableType] = [lines]
    for key, value in data.items():
        name = key.replace("_", " ")
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            out += [Text(""), _sideways(name, value) if key == "models" else _table(name, value)]
            if shapes := [{"model": row["model"], **s} for row in value for s in row.get("shapes", ())]:
                kept = [{k: v for k, v in shape.items() if k not in _WIDE} for shape in shapes]
                out += [Text(""), _table("every shape: median (quartiles)", kept)]
            out += [
                Text(f"{row['model']}: {cell(row['notes'])}") for row in value if key == "models" and row.get("notes")
            ]
        elif key == "dry_run":
            out += _forecast(value)
        elif isinstance(value, dict):
            for inner, item in value.items():
                if item is None or item == []:
                    continue
                lines.add_row(Text(f"{name} {inner.replace('_', ' ')}"), Text(cell(item, inner)))
        elif value is not None and value != []:
            lines.add_row(Text(name), Text(cell(value, key)))
    return out


def _forecast(told: Mapping[str, Any]) -> list[RenderableType]:
    """A dry run: sizes before and after, then memory, time and disk with the parts they are made of."""
    from rich.table import Table
    from rich.text import Text

    from secateur.report.numbers import change, seconds

    sizes = _titled("what it will come to")
    for title in ("", "before", "after", "change"):
        sizes.add_column(title, justify="right" if title else "left")
    needs = Table.grid(padding=(0, 2))
    for key, value in told.items():
        name = key.replace("_", " ")
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) for v in value):
            sizes.add_row(name, *(cell(v, key) for v in value), change(*value))
        elif key == "notes":
            for note in value:
                needs.add_row(Text("note"), Text(note))
        elif key == "seconds":
            needs.add_row(Text("time"), Text(seconds(value)))
        elif key == "phases":
            needs.add_row(Text(""), Text(", ".join(f"{k} {seconds(v)}" for k, v in value.items())))
        else:
            needs.add_row(Text("" if key == "ram" else name), Text(cell(value, key)))
    return [sizes, Text(""), needs]


def _titled(name: str) -> Table:
    """An empty table under its name."""
    from rich.table import Table

    return Table(title=name, title_justify="left", box=None, header_style="bold", title_style="bold")


def _table(name: str, rows: list[dict[str, Any]]) -> RenderableType:
    """One line per object."""
    from rich.text import Text

    table = _titled(name)
    columns = list(dict.fromkeys(k for row in rows for k in row))
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(row.get(c), c)) for c in columns))
    return table


def _sideways(name: str, rows: list[dict[str, Any]]) -> RenderableType:
    """One column per model: there are few models and many numbers."""
    from rich.text import Text

    table = _titled(name)
    table.add_column("")
    for row in rows:
        table.add_column(Text(str(row.get("model", ""))), justify="right", overflow="fold")
    for key in dict.fromkeys(k for row in rows for k in row if k not in _HIDDEN):
        if any(row.get(key) is not None for row in rows):
            table.add_row(key.replace("_", " "), *(Text(cell(row.get(key), key)) for row in rows))
    return table


def cell(value: Any, key: str = "") -> str:
    """One value as text: bytes with a unit, counts in groups of three, shares and ratios with three digits."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int() if any(word in _BYTES for word in key.split("_")):
            unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if value >= 10 * s), ("B", 1))
            return f"{value:,} B" if size == 1 else f"{value / size:,.1f} {unit}"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        case list():
            return "; ".join(cell(v, key) for v in value)
        case {"median": middle, "low": low, "high": high}:
            return f"{cell(middle)} ({cell(low)} to {cell(high)})"
        case dict():
            return ", ".join(
                f"{k.replace('_', ' ')} {cell(v, f'{key}_{k}')}" for k, v in value.items() if v is not None
            )
    return str(value)
