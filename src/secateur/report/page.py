"""One self-contained HTML page from a report: opens offline, light and dark, from a telephone to a wide screen.

Nothing is fetched: style and script are inside, fonts are the reader's own. A content policy allows this script
by its hash and nothing else, in case a model's words should ever look like one.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from secateur.report import sections, tables
from secateur.report.markup import Markup, el
from secateur.report.model import Report
from secateur.report.story import title


def page(report: Report) -> str:
    """The whole page as text. The same report gives the same page."""
    css, js = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = el(
        "head",
        None,
        el("meta", {"charset": "utf-8"}),
        el("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        el("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        el("meta", {"name": "generator", "content": "Secateur"}),
        el("title", None, f"{title(report)} {report.model}, pruned by Secateur"),
        el("style", None, Markup(css)),
    )
    main = el(
        "main",
        None,
        sections.hero(report),
        sections.tiles(report),
        sections.balance(report),
        sections.where(report),
        sections.quality(report),
        sections.cost(report),
        sections.generations(report),
        tables.numbers(report),
        tables.loading(report),
        tables.notes(report),
        tables.recipe(report),
        tables.predicted(report),
        tables.provenance(report),
    )
    foot = el(
        "footer",
        {"class": "foot"},
        "Drawn from report.json by `secateur report`. Every number in it is in that file.",
    )
    body = el("body", None, sections.HATCH, sections.top(report), main, foot, el("script", None, Markup(js)))
    return f"<!DOCTYPE html>\n{el('html', {'lang': 'en'}, head, body)}\n"


def _asset(name: str) -> str:
    """A file of this package, as text."""
    return files("secateur.report").joinpath("assets", name).read_text(encoding="utf-8")
