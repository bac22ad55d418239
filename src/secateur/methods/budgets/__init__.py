"""Every budget by its name in recipes and on the command line: one line per idea."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from secateur.methods.base import Budget
from secateur.methods.budgets.atp import Atp
from secateur.methods.budgets.classes import ClassBlind, ClassDistribution, ClassUniform
from secateur.methods.budgets.component_map import ComponentMap
from secateur.methods.budgets.evopress import EvoPress
from secateur.methods.budgets.owl import Owl
from secateur.methods.budgets.pooled import Pooled
from secateur.methods.budgets.rate_distortion import RateDistortion
from secateur.methods.budgets.uniform import Uniform

BUDGETS: Mapping[str, type[Budget]] = MappingProxyType(
    {
        "uniform": Uniform,
        "pooled": Pooled,
        "owl": Owl,
        "atp": Atp,
        "rate_distortion": RateDistortion,
        "class_blind": ClassBlind,
        "class_uniform": ClassUniform,
        "class_distribution": ClassDistribution,
        "component_map": ComponentMap,
        "evopress": EvoPress,
    }
)
