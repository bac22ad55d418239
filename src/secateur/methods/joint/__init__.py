"""Methods that choose and repair in one sweep, by their name on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from secateur.methods.base import Method
from secateur.methods.joint.sparsegpt import SparseGPT

METHODS: Mapping[str, type[Method]] = MappingProxyType({"sparsegpt": SparseGPT})
