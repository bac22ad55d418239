"""Write docs/methods.md from the methods' own docstrings: python benchmarks/methods_table.py"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

from secateur.methods import fitting, grains
from secateur.methods.base import PartRepair
from secateur.methods.budgets import BUDGETS, protected
from secateur.methods.joint import METHODS
from secateur.methods.legal import legal_spaces
from secateur.methods.repairs import REPAIRS
from secateur.methods.scores import SCORES

TARGET = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
HEAD = """# Methods

<!-- Written by benchmarks/methods_table.py from the docstrings; do not edit. -->

A method is a score (what matters), a grain (who competes with whom) and a budget (how much every site keeps), or a
joint method that chooses and repairs in one sweep. A repair may follow. Higher scores stay; *keep* is what stays.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, "## Scores\n", _table(("`--score`", "what", "spaces", "statistics", "options"), _scores())]
    parts += [_details(SCORES)]
    parts += ["## Grains\n", _body(grains.__doc__ or "")]
    parts += ["## Budgets\n", _table(("`--budget`", "what", "looks at scores first", "options"), _budgets())]
    parts += [_details(BUDGETS), "### protect\n", protected.__doc__ or ""]
    parts += ["## Joint methods\n", _table(("`--method`", "what", "statistics", "options"), _joint())]
    parts += [_details(METHODS)]
    parts += ["## Repairs\n", _table(("`--repair`", "what", "spaces", "statistics", "options"), _repairs())]
    parts += [_details(REPAIRS), "### fit-on\n", _body(fitting.__doc__ or "")]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _scores() -> Iterable[tuple[str, ...]]:
    for name, cls in SCORES.items():
        yield f"`{name}`", _first(cls), ", ".join(legal_spaces(cls)), _needs(cls), _options(cls)


def _budgets() -> Iterable[tuple[str, ...]]:
    for name, cls in BUDGETS.items():
        looks = "no" if not cls.surveys else f"yes ({cls.ranking.__name__})" if cls.ranking else "yes"
        looks = "tries out whole models" if cls.searches else looks
        yield f"`{name}`", _first(cls), looks, _options(cls)


def _joint() -> Iterable[tuple[str, ...]]:
    for name, cls in METHODS.items():
        yield f"`{name}`", _first(cls), _needs(cls), _options(cls)


def _repairs() -> Iterable[tuple[str, ...]]:
    for name, cls in REPAIRS.items():
        statistics = "activations" if issubclass(cls, PartRepair) else _needs(cls)
        yield f"`{name}`", _first(cls), ", ".join(cls.spaces), statistics, _options(cls)


def _first(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def _needs(cls: type) -> str:
    return ", ".join(p.__name__ for p in getattr(cls, "needs", ())) or "none"


def _options(cls: type) -> str:
    shown = []
    for f in fields(cls) if is_dataclass(cls) else ():
        if f.name not in ("grain", "rules"):
            shown.append(f"`{f.name.rstrip('_')}`" + (f": {_word(f.default)}" if f.default is not MISSING else ""))
    return ", ".join(shown) or "none"


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _details(table: Mapping[str, type]) -> str:
    """Each module's docstring once, under the names it defines."""
    names: dict[str, list[str]] = {}
    for name, cls in table.items():
        names.setdefault(cls.__module__, []).append(name)
    parts = []
    for module, own in names.items():
        text = sys.modules[module].__doc__ or ""
        parts.append(f"### {', '.join(own)}\n\n{_body(text)}")
    return "\n".join(parts)


def _body(text: str) -> str:
    return text.strip() + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
