"""A score and a grain make a method, once and for all scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.engine.probes import Evidence
from secateur.errors import SecateurError
from secateur.methods.base import Keep, MatrixSite, Method, Score, UnitScore, UnitSite
from secateur.methods.grains import Grain, Unit


@dataclass(frozen=True)
class Composed(Method):
    """Keep what scores highest in every group of the grain; surviving weights are left as they are."""

    score: Score | UnitScore
    grain: Grain

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", self.score.needs)

    def scores(self, site: MatrixSite, evidence: Evidence) -> Tensor:
        """Importance of every weight of a matrix: fp32 [out, in]."""
        if isinstance(self.score, UnitScore):
            raise SecateurError(
                "this score ranks whole units, not single weights",
                received=type(self.score).__name__,
                works="--space ffn, kv_group, expert or layer",
            )
        return self.score.score(site, evidence)

    def prune(self, site: MatrixSite, evidence: Evidence, count: int) -> Keep:
        shape = tuple(site.weight.shape)
        if count == self.grain.units(shape):
            return Keep(torch.ones(shape, dtype=torch.bool, device=site.weight.device))
        try:
            return Keep(self.grain.select(self.scores(site, evidence), count))
        except SecateurError as error:
            raise SecateurError(f"{site.name}: {error.wrong}", received=error.received, works=error.works) from error

    def prune_units(self, site: UnitSite, count: int) -> Keep:
        """Keep ``count`` units of a space (over all its copies)."""
        shape = site.space.shape
        if count == Unit().units(shape):
            return Keep(torch.ones(shape, dtype=torch.bool))
        try:
            return Keep(Unit().select(self.score.units(site), count))
        except SecateurError as error:
            raise SecateurError(
                f"{site.name}, {site.space.name}: {error.wrong}", received=error.received, works=error.works
            ) from error
