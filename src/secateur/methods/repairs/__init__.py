"""Repairs: mend what stays after any choice of what that is; by their name on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from secateur.methods.base import Repair
from secateur.methods.repairs.block_reconstruction import BlockReconstruction
from secateur.methods.repairs.least_squares import LeastSquares
from secateur.methods.repairs.local_reconstruction import LocalReconstruction
from secateur.methods.repairs.mean_bias import MeanBias

REPAIRS: Mapping[str, type[Repair]] = MappingProxyType(
    {
        "least_squares": LeastSquares,
        "mean_bias": MeanBias,
        "local_reconstruction": LocalReconstruction,
        "block_reconstruction": BlockReconstruction,
    }
)
