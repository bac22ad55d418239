"""The page's tables: every measured number with all its digits, predictions, recipe, provenance, how to load."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import yaml

from secateur.measure.types import Measurement
from secateur.report.markup import Child, Markup, el
from secateur.report.model import Report
from secateur.report.numbers import change, count, percent, perplexity, quantity, seconds


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table whose first column names the rows."""
    head = el("thead", None, el("tr", None, [el("th", {"scope": "col"}, h) for h in heads]))
    body = [
        el("tr", None, el("th", {"scope": "row"}, row[0]), [el("td", None, cell) for cell in row[1:]]) for row in rows
    ]
    return el("table", None, head, el("tbody", None, body))


def facts(rows: Sequence[tuple[str, Child]]) -> Markup:
    """A table of names and what they are; rows without a value are left out."""
    body = [el("tr", None, el("th", {"scope": "row"}, k), el("td", None, v)) for k, v in rows if v not in (None, "")]
    return el("table", {"class": "facts"}, el("tbody", None, body))


def measured(report: Report) -> list[list[str]]:
    """Rows of every number that was measured: name, one column a model, and the change from first to last."""
    models = report.measurements
    if not models:
        return []
    rows = [_row(name, [get(m) for m in models], write) for name, get, write in METRICS]
    for task in sorted({t for m in models for t in m.tasks}):
        rows.append(_row(task, [m.tasks.get(task) for m in models], lambda v: f"{v:.4g}"))
    return [row for row in rows if any(cell != "—" for cell in row[1:])]


def _row(name: str, values: list[float | None], write: Callable[[float], str]) -> list[str]:
    cells = ["—" if v is None else write(v) for v in values]
    first, last = values[0], values[-1]
    if len(values) > 1:
        cells.append("—" if first is None or last is None else _difference(first, last, write))
    return [name, *cells]


def _difference(first: float, last: float, write: Callable[[float], str]) -> str:
    """Relative for amounts, in points for shares (a percentage of a percentage misleads)."""
    if write is _share:
        points = (last - first) * 100
        return f"{points:+.1f} points".replace("-", "−") if points else "unchanged"
    return change(first, last)


def _share(value: float) -> str:
    return percent(value, 2)


def _whole(value: float) -> str:
    return count(int(value))


def _latency(m: Measurement, name: str) -> float | None:
    return getattr(m.latency, name).median if m.latency else None


METRICS: tuple[tuple[str, Callable[[Measurement], float | None], Callable[[float], str]], ...] = (
    ("Perplexity", lambda m: m.perplexity.value if m.perplexity else None, perplexity),
    ("KL divergence, nats a token", lambda m: m.divergence.kl if m.divergence else None, lambda v: f"{v:.4f}"),
    ("Same next token", lambda m: m.divergence.top1 if m.divergence else None, _share),
    ("Multiple choice, length-normalised", lambda m: m.choices.accuracy_norm if m.choices else None, _share),
    ("Multiple choice, plain", lambda m: m.choices.accuracy if m.choices else None, _share),
    ("Parameters", lambda m: m.size.parameters, _whole),
    ("Non-zero parameters", lambda m: m.size.nonzero, _whole),
    ("Bytes on disk", lambda m: m.size.bytes, _whole),
    ("MACs a token", lambda m: m.size.macs_per_token, _whole),
    ("KV-cache bytes a token", lambda m: m.size.kv_bytes_per_token, _whole),
    ("Prefill", lambda m: _latency(m, "prefill"), seconds),
    ("Decoding, a token", lambda m: _latency(m, "decode_per_token"), seconds),
    ("Peak memory, bytes", lambda m: m.latency.peak_rss if m.latency else None, _whole),
)


def numbers(report: Report) -> Markup | None:
    """The section of all measured numbers."""
    rows = measured(report)
    if not rows:
        return None
    many = len(report.measurements) > 1
    heads = ["", *[m.model for m in report.measurements], *(["change"] if many else [])]
    notes = [note for m in report.measurements for note in m.notes]
    more = el("ul", {"class": "notes"}, [el("li", None, n) for n in dict.fromkeys(notes)]) if notes else None
    return el("section", None, el("h2", None, "Every number"), el("div", {"class": "scroll"}, table(heads, rows)), more)


def snippet(report: Report, place: str) -> str:
    """Python that loads the result from ``place``."""
    where = json.dumps(place, ensure_ascii=False)
    if report.recipe.get("trust_remote_code"):
        where += ", trust_remote_code=True"
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({where})\n"
    if report.loader == "secateur.load":
        return f"import secateur\nfrom transformers import AutoTokenizer\n\nmodel = secateur.load({where})\n{tokenizer}"
    return (
        f"from transformers import {report.loader}, AutoTokenizer\n\n"
        f"model = {report.loader}.from_pretrained({where})\n{tokenizer}"
    )


def loading(report: Report) -> Markup | None:
    """How to load the result, and with what."""
    if any(step.apply == "plan" for step in report.steps):
        return None
    if report.recipe.get("pack"):
        said = "The weights are packed, which Transformers' loaders cannot read; Secateur runs them as they are."
    elif report.loader == "secateur.load":
        said = "The layers have sizes of their own, which Transformers' loaders cannot rebuild yet; Secateur can."
    else:
        said = "An ordinary checkpoint: plain Transformers is enough."
    return el(
        "section",
        None,
        el("h2", None, "Load it"),
        el("p", None, said),
        el("pre", {"tabindex": "0"}, el("code", None, snippet(report, report.out))),
    )


def notes(report: Report) -> Markup | None:
    """What a reader must know."""
    if not report.notes:
        return None
    return el(
        "section",
        None,
        el("h2", None, "Notes"),
        el("ul", {"class": "notes"}, [el("li", None, n) for n in report.notes]),
    )


def recipe(report: Report) -> Markup | None:
    """The effective recipe, as it would be written in a file."""
    if not report.recipe:
        return None
    words = yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=100)
    said = "Saved in a file, this repeats the run: secateur prune --recipe FILE.yaml -o OUT"
    code = el("pre", {"tabindex": "0"}, el("code", None, words))
    return el("section", None, el("h2", None, "Recipe"), el("p", None, said), code)


def predicted(report: Report) -> Markup | None:
    """What the dry run said beside what happened."""
    if not report.predictions:
        return None
    rows = [
        [
            p.what,
            quantity(p.predicted, p.unit),
            "—" if p.actual is None else quantity(p.actual, p.unit),
            "—" if p.actual is None else change(p.actual, p.predicted).replace("unchanged", "exact"),
        ]
        for p in report.predictions
    ]
    said = "What the dry run says before anything heavy, beside what happened."
    grid = table(["", "predicted", "actual", "prediction off by"], rows)
    return el("section", None, el("h2", None, "Predicted"), el("p", None, said), el("div", {"class": "scroll"}, grid))


def provenance(report: Report) -> Markup:
    """Versions, seed, device, threads, hashes, times."""
    p = report.provenance
    versions = ", ".join(f"{name} {version}" for name, version in p.versions.items())
    phases = ", ".join(f"{name} {seconds(t)}" for name, t in p.phases.items())
    steps = ", ".join(seconds(s.seconds) for s in report.steps if s.seconds is not None)
    rows: list[tuple[str, Child]] = [
        ("Model", report.model),
        ("Result", report.out),
        ("Command", el("code", None, p.command) if p.command else None),
        ("Date", p.date),
        ("Seed", str(p.seed)),
        ("Device", ", ".join(w for w in (p.device, p.cpu, f"{p.threads} threads" if p.threads else "") if w)),
        ("Versions", versions),
        ("Time", phases or steps),
        ("Peak memory of the run", quantity(p.peak_rss, "bytes") if p.peak_rss else None),
        *((f"SHA-256 of {name}", el("code", None, digest)) for name, digest in p.hashes.items()),
    ]
    return el("section", None, el("h2", None, "Provenance"), facts(rows))
