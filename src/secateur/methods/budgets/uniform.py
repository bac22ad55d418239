"""Uniform: every site keeps the same share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.methods.base import Amount, Budget, SiteInfo
from secateur.methods.budgets.settle import uniform_count


@dataclass(frozen=True)
class Uniform(Budget):
    """The same share (or count) at every site; rounded half up per site, or per group of a site."""

    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        return {site.name: uniform_count(site, keep) for site in sites}
