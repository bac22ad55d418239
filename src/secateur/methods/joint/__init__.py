"""Methods that choose and repair in one sweep, by their name on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from secateur.methods.base import Method
from secateur.methods.joint.admm import ADMM
from secateur.methods.joint.alps import ALPS
from secateur.methods.joint.dsnot import DSnoT
from secateur.methods.joint.obs import SetOBS
from secateur.methods.joint.sparsegpt import SparseGPT
from secateur.methods.joint.swaps import SparseSwaps

METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {
        "sparsegpt": SparseGPT,
        "obs": SetOBS,
        "admm": ADMM,
        "alps": ALPS,
        "sparseswaps": SparseSwaps,
        "dsnot": DSnoT,
    }
)


def default_grain(name: str) -> str:
    """The grain a method declares for itself; a stranger's method, named by its module, gets SparseGPT's."""
    return str(getattr(METHODS.get(name, SparseGPT)(), "grain"))  # noqa: B009 (not every Method has one)
