"""The three ways of See et al.: one threshold for all, the same share for each, or a threshold of so many deviations.

    class_blind          remove the smallest of all classes together
    class_uniform        remove the same share of every class
    class_distribution   remove |w| < lambda * sigma_c in class c, lambda so that the total is as asked

A class is one matrix (or one space of one layer). sigma_c is the root mean square of the class's scores, which
for magnitude is the deviation of its weights around zero; lambda need not be searched for: it is an order
statistic of |w| / sigma_c over all classes.

Source: See et al. 2016, arXiv 1606.09274, the three pruning schemes of section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from secateur.methods.base import Amount, Budget, SiteInfo
from secateur.methods.budgets.pooled import Pooled
from secateur.methods.budgets.ranks import Ranks
from secateur.methods.budgets.uniform import Uniform


@dataclass(frozen=True)
class ClassBlind(Budget):
    """One threshold for the whole model."""

    surveys = True

    def observe(self, site: SiteInfo, scores: Tensor) -> Ranks:
        return Pooled().observe(site, scores)

    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        return Pooled().allot(sites, keep, seen)


@dataclass(frozen=True)
class ClassUniform(Budget):
    """The same share of every class; another word for ``uniform``."""

    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        return Uniform().allot(sites, keep, seen)


@dataclass(frozen=True)
class ClassDistribution(Budget):
    """In every class, a threshold of lambda times its own deviation, with one lambda for all."""

    surveys = True

    def observe(self, site: SiteInfo, scores: Tensor) -> Ranks:
        return Pooled(standardise="rms").observe(site, scores)

    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        return Pooled(standardise="rms").allot(sites, keep, seen)
