"""Every score by its name in recipes and on the command line: one line per idea."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from secateur.methods.base import Score, UnitScore
from secateur.methods.scores.activation_norm import ActivationNorm
from secateur.methods.scores.contribution import Contribution
from secateur.methods.scores.cosine import BlockInfluence
from secateur.methods.scores.fisher import FisherScore
from secateur.methods.scores.magnitude import Magnitude
from secateur.methods.scores.output_error import OutputError
from secateur.methods.scores.random import Random
from secateur.methods.scores.ria import Ria
from secateur.methods.scores.router_mass import RouterMass
from secateur.methods.scores.taylor import Taylor, TaylorVector
from secateur.methods.scores.taylor_block import TaylorBlock
from secateur.methods.scores.wanda import Wanda

SCORES: Mapping[str, type[Score] | type[UnitScore]] = MappingProxyType(
    {
        "random": Random,
        "magnitude": Magnitude,
        "wanda": Wanda,
        "ria": Ria,
        "contribution": Contribution,
        "taylor": Taylor,
        "taylor_vector": TaylorVector,
        "taylor_block": TaylorBlock,
        "fisher": FisherScore,
        "output_error": OutputError,
        "activation_norm": ActivationNorm,
        "block_influence": BlockInfluence,
        "router_mass": RouterMass,
    }
)
