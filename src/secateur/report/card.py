"""The model card: a ``README.md`` with the recipe and the measured numbers, in the hub's own form."""

from __future__ import annotations

import re

import yaml

from secateur.report.model import Report
from secateur.report.numbers import count, percent
from secateur.report.story import lead, removed, title, units
from secateur.report.tables import measured, snippet

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SPECIAL = re.compile(r"([\\`*_\[\]<>|#~&])")


def card(report: Report, base_model: str | None = None) -> str:
    """Markdown with YAML front matter.

    Args:
        report: the finished run's report.
        base_model: the hub id (``owner/name``) of the model that was pruned; anything else is left out, because
            a path is of no use to others.
    """
    front: dict[str, object] = {"library_name": "transformers", "tags": _tags(report)}
    if base_model and HUB_ID.fullmatch(base_model):
        front = {"base_model": base_model, **front}
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    name = plain(re.split(r"[/\\]", report.model.rstrip("/\\"))[-1])
    parts = [
        f"---\n{head}---",
        f"# {name}, pruned",
        f"**{plain(title(report))}** {plain(' '.join(lead(report)))}",
        f"## Load it\n\n```python\n{snippet(report, 'path/to/this/directory')}```",
        _measured(report),
        _steps(report),
        _recipe(report),
        "## Notes\n\n" + "\n".join(f"- {plain(n)}" for n in report.notes) if report.notes else "",
        _origin(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _tags(report: Report) -> list[str]:
    tags = ["secateur", "pruned"]
    if any(step.apply == "mask" for step in report.steps):
        tags.append("sparse")
    return tags


def _measured(report: Report) -> str:
    rows = measured(report)
    if not rows:
        return ""
    names = ["dense", *["step"] * (len(report.measurements) - 2), "pruned"] if len(rows[0]) > 2 else ["this model"]
    heads = ["", *names, *(["change"] if len(names) > 1 else [])]
    grid = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    lines = ["| " + " | ".join(plain(c) if i != 1 else c for c in row) + " |" for i, row in enumerate(grid)]
    conditions = _conditions(report)
    return "## Measured\n\n" + "\n".join(lines) + (f"\n\n{conditions}" if conditions else "")


def _conditions(report: Report) -> str:
    last = report.measurements[-1]
    said = []
    if p := last.perplexity:
        said.append(f"Perplexity: {p.windows} windows of {count(p.length)} tokens of {plain(p.text)}, {p.dtype}.")
    if (c := report.comparison) and (r := c.perplexity_ratio):
        said.append(f"Its ratio to the dense model is {r.value:.3f} ({percent(r.level)} {r.low:.3f} to {r.high:.3f}).")
    if t := last.latency:
        said.append(
            f"Times: batch {t.batch}, prompt of {count(t.prompt_tokens)} tokens, {t.threads} threads on {t.device}, "
            f"{t.dtype}, medians of {t.decode_per_token.repeats} interleaved repeats."
        )
    return " ".join(said)


def _steps(report: Report) -> str:
    lines = []
    for step in report.steps:
        gone, total = removed(step)
        parts = ", ".join(f"{slot} `{part}`" for slot, part in step.chain.items()) or f"`{step.method}`"
        amount = f": {count(total - gone)} of {count(total)} {units(step.space)} stay" if total else ""
        lines.append(f"- `{step.space}` by {parts}, {step.apply}{amount}")
    return "## What was done\n\n" + "\n".join(lines) if lines else ""


def _recipe(report: Report) -> str:
    if not report.recipe:
        return ""
    words = yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", words)), default=0))
    return f"## Recipe\n\n{fence}yaml\n{words}{fence}"


def _origin(report: Report) -> str:
    version = report.provenance.versions.get("secateur", "")
    return f"Made with Secateur {version}".rstrip() + "; `report.html` beside this file shows where the weights went."
