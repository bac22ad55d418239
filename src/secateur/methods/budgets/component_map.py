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
from fnmatch import fnmatchcase
from typing import Any

from secateur.errors import SecateurError
from secateur.methods.base import Amount, Budget, SiteInfo
from secateur.methods.budgets.settle import uniform_count


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
