"""Every score by its name in recipes and on the command line: one line per idea."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from secateur.methods.base import Score, UnitScore
from secateur.methods.scores.magnitude import Magnitude
from secateur.methods.scores.random import Random
from secateur.methods.scores.wanda import Wanda

SCORES: Mapping[str, type[Score] | type[UnitScore]] = MappingProxyType(
    {
        "magnitude": Magnitude,
        "random": Random,
        "wanda": Wanda,
    }
)
