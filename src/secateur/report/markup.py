"""Building HTML and SVG so that text is escaped unless it was built here."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping

VOID = frozenset({"meta", "br", "hr", "link", "img", "input", "col"})
# Characters that HTML does not allow, lone surrogates among them (they cannot be encoded).
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class Markup(str):
    """Text that is already markup."""

    __slots__ = ()


Child = Markup | str | int | None | Iterable["Child"]


def escape(text: str) -> Markup:
    """Text as markup shows it, quotes included; characters HTML forbids become U+FFFD."""
    return Markup(html.escape(FORBIDDEN.sub("\ufffd", text), quote=True))


def el(tag: str, attributes: Mapping[str, object] | None = None, *children: Child) -> Markup:
    """One element. Attributes that are None or False are left out; True writes the bare name."""
    words = [tag]
    for name, value in (attributes or {}).items():
        if value is None or value is False:
            continue
        words.append(name if value is True else f'{name}="{escape(_number(value))}"')
    head = " ".join(words)
    if tag in VOID:
        return Markup(f"<{head}>")
    return Markup(f"<{head}>{join(children)}</{tag}>")


def join(children: Child) -> Markup:
    """Children one after another: Markup as it is, other text escaped, None left out."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str | int):
        return escape(str(children))
    return Markup("".join(join(child) for child in children))


def _number(value: object) -> str:
    """Coordinates to a hundredth of a pixel, without trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
