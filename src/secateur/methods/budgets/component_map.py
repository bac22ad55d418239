"""A map: what every component keeps, said by hand.

    - {match: attention, keep: 0.8}       all attention matrices
    - {match: "layers:0-3", keep: 1.0}    the first four layers
    - {match: "*.down_proj.weight", keep: 0.6}

The first rule that matches a site counts; a site that no rule matches keeps what the step says. As in the
component-wise study of Stable Diffusion 2, arXiv 2411.15113, where text encoder and generator keep different shares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fnmatch import fnmatchcase
from typing import Any

from secateur.errors import SecateurError
from secateur.methods.base import Amount, Budget, SiteInfo
from secateur.methods.budgets.settle import uniform_count

WORKS = '{match: attention | ffn | layers:0-9 | "*.down_proj.weight", keep: 0.8}'


@dataclass(frozen=True)
class Rule:
    """Sites whose name or component matches keep this much."""

    match: str
    keep: Amount

    def covers(self, site: SiteInfo) -> bool:
        if self.match in ("attention", "ffn", "other"):
            return site.component == self.match
        if span := re.fullmatch(r"layers:(\d{1,6})(?:-(\d{1,6}))?", self.match):
            return int(span[1]) <= site.block <= int(span[2] or span[1])
        return fnmatchcase(site.name, self.match)


@dataclass(frozen=True)
class ComponentMap(Budget):
    """What each part keeps, by component, range of layers or name.

    Attributes:
        rules: in order; the first that matches counts.
    """

    rules: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, listed: object) -> ComponentMap:
        """A map from parsed YAML: a list of ``{match, keep}``.

        Raises:
            SecateurError: it is anything else.
        """
        if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
            raise SecateurError("a map is a list of rules", received=listed, works=WORKS)
        rules = []
        for item in listed:
            if not isinstance(item, Mapping) or set(item) != {"match", "keep"} or not isinstance(item["match"], str):
                raise SecateurError("a rule of the map has two words, match and keep", received=item, works=WORKS)
            rules.append(Rule(item["match"], amount_of(item["keep"])))
        return cls(tuple(rules))

    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        if not self.rules:
            raise SecateurError("the budget component_map needs rules", works="--map FILE")
        for rule in self.rules:
            if not any(rule.covers(site) for site in sites):
                raise SecateurError(
                    "a rule of the map matches nothing",
                    received=rule.match,
                    works=f"attention, ffn, layers:0-9 or a pattern such as {sites[0].name if sites else '*'}",
                )
        return {
            site.name: uniform_count(site, next((r.keep for r in self.rules if r.covers(site)), keep)) for site in sites
        }


def amount_of(value: object) -> Amount:
    """An amount as people write it: 0.8 and 80% are shares, a bare integer is a count."""
    if isinstance(value, Amount):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Amount(count=value)
    text = str(value).strip()
    try:
        if text.endswith("%"):
            share = Decimal(text[:-1]) / 100
        elif re.fullmatch(r"\d+", text):
            return Amount(count=int(text))
        else:
            share = Decimal(text)
    except InvalidOperation:
        share = Decimal(-1)
    if isinstance(value, bool) or not 0 <= share <= 1:
        raise SecateurError("keep is not an amount", received=value, works="keep: 0.8, keep: 80% or a count")
    return Amount(share=share)
