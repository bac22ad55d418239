"""Secateur prunes neural networks, large language models first. Importing it is quick and patches nothing.

All verbs live in `secateur.run`. `measure` and `report` are not repeated here because the rooms of those names
are: ``secateur.measure`` is a package whatever was imported first.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.engine.checkpoint import load as load
    from secateur.errors import SecateurError as SecateurError
    from secateur.packing import pack as pack
    from secateur.packing import unpack as unpack
    from secateur.recipe import Recipe as Recipe
    from secateur.recipe import Step as Step
    from secateur.recipe import TextSpec as TextSpec
    from secateur.run import inspect as inspect
    from secateur.run import plan as plan
    from secateur.run import prune as prune

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "SecateurError",
    "Step",
    "TextSpec",
    "inspect",
    "load",
    "pack",
    "plan",
    "prune",
    "unpack",
]

_HOME = (
    ("secateur.errors", ("SecateurError",)),
    ("secateur.recipe", ("Recipe", "Step", "TextSpec")),
    ("secateur.engine.checkpoint", ("load",)),
    ("secateur.run", ("inspect", "plan", "prune")),
    ("secateur.packing", ("pack", "unpack")),
)


def __getattr__(name: str) -> object:
    """Public names are fetched on first use, so that ``import secateur`` does not import torch."""
    for module, names in _HOME:
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'secateur' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
