"""Every budget by its name in recipes and on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from secateur.methods.base import Budget
from secateur.methods.budgets.uniform import Uniform

BUDGETS: Mapping[str, type[Budget]] = MappingProxyType(
    {
        "uniform": Uniform,
    }
)
