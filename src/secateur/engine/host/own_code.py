"""Models that bring their own code: their classes, looked up once, only for a source that is trusted.

The classes travel as an attribute of the config's class, a subclass made here, so that every config derived from it
(a toy copy, a smaller one) builds the same model. Nothing is registered with Transformers, and no word of a config can
name code: without `with_own_code` an ``auto_map`` is a string that nobody reads.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

from secateur.errors import SecateurError

ORDER = (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel)
NAMES = tuple(auto.__name__ for auto in ORDER)
BROKEN = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip
"""What a stranger's module may raise while it is imported."""


def with_own_code(config: PreTrainedConfig, auto_map: Mapping[str, Any], place: Path) -> None:
    """Import the model classes that a trusted directory's ``auto_map`` names, and let the config build them.

    Args:
        config: of that directory; changed in place (its class becomes a subclass that knows the model classes).
        auto_map: of its config.json, ``{"AutoModelForCausalLM": "modeling_x.XForCausalLM", ...}``.
        place: the directory; the modules lie in it, or in the hub repository before a ``--``.

    Raises:
        SecateurError: no language model is named, or its module cannot be imported.
    """
    named = {name: auto_map[name] for name in NAMES if isinstance(auto_map.get(name), str)}
    if not named:
        if any(name.startswith("AutoModel") for name in auto_map):
            raise SecateurError(
                "the model's own code (auto_map in config.json) holds no language model",
                received=", ".join(auto_map),
                works=f"{', '.join(NAMES)} can be pruned",
            )
        return  # only its config or its tokenizer is its own
    classes = {}
    for name, reference in named.items():
        try:
            with redirect_stdout(io.StringIO()):  # what it prints is no part of our answer
                classes[name] = add_generation_mixin_to_remote_model(get_class_from_dynamic_module(reference, place))
        except BROKEN as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SecateurError(
                f"the model's own code cannot be imported: {first}",
                received=reference,
                works="install what it imports, or fetch the model again",
            ) from error
    kind = type(config)

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)  # Transformers would give a subclass without one its own

    words = {
        "own_classes": classes,
        "__init__": begin,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    config.__class__ = type(kind.__name__, (kind,), words)


def own_classes(config: PreTrainedConfig) -> Mapping[str, Any]:
    """The model classes a config brings, by the Auto class that builds them; empty for Transformers' own."""
    return getattr(type(config), "own_classes", {})


def own_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """Their class names: causal, masked language model, plain encoder."""
    classes = own_classes(config)
    return tuple(classes[name].__name__ for name in NAMES if name in classes)
