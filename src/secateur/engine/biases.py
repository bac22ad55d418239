"""Biases where a family's Linears have none: only where a field of its config can say that they are there.

Llama's config has ``attention_bias`` and ``mlp_bias``; Qwen2's has no word for a bias of ``o_proj``. Which fields there
are is tried out on skeletons: a switch of the config that is off, has to do with biases, and makes the wanted tensors
appear (others may appear with them) and nothing else change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from secateur.engine.apply import get_tensor
from secateur.engine.host.build import changed_config, differences, skeleton_model, text_config
from secateur.engine.ragged import cut_to_sizes
from secateur.engine.store import Store
from secateur.errors import SecateurError


def lacking(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Of these parameters, those that the model does not have."""
    present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [name for name in names if name not in present]


def with_biases(store: Store, names: Iterable[str]) -> Store:
    """A store of the same model with these biases as well, zero so far; its config says so.

    Args:
        names: full names in memory (``model.layers.0.mlp.down_proj.bias``). Those that are there are left as they are.

    Raises:
        SecateurError: no field of the config can say that one of them is there.
    """
    wanted = lacking(store.skeleton(), names)
    if not wanted:
        return store
    fields = {}
    left = set(wanted)
    for word, made in _switches(store):
        if left & made:
            fields[word] = True
            left -= made
    if left:
        raise SecateurError(
            f"{type(store.skeleton()).__name__} has no bias at {_short(left)}, and its config has no word to add one",
            received="repair mean_bias",
            works="--repair least_squares, or --include only matrices with a bias",
        )
    model: Any = store.skeleton()
    twin = _twin(store, fields)
    for name, parameter in twin.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if getattr(model.get_submodule(owner), leaf, None) is None:
            ghost = torch.empty(parameter.shape, dtype=_dtype_beside(store, name), device="meta")
            model.get_submodule(owner).register_parameter(leaf, nn.Parameter(ghost, requires_grad=False))
    for word in fields:
        setattr(text_config(model.config), word, True)
    found = differences(model, twin, store.blocks_path)
    if found:
        raise SecateurError(
            f"{', '.join(fields)} would change more than biases: {found}",
            received="repair mean_bias",
            works="--repair least_squares",
        )
    return store.widened(model, fields)


def _switches(store: Store) -> Iterator[tuple[str, set[str]]]:
    """Config fields that are off and make biases appear, with the names that do."""
    config = text_config(store.config)
    before = {name for name, _ in store.skeleton().named_parameters()}
    for word, value in config.to_dict().items():
        if value is False and "bias" in word:
            try:
                after = {name for name, _ in _twin(store, {word: True}).named_parameters()}
            except SecateurError:
                continue  # a switch that this family's config class does not let go with its other values
            new = after - before
            if new and before <= after and all(name.endswith("bias") for name in new):
                yield word, new


def _twin(store: Store, fields: dict[str, Any]) -> nn.Module:
    """The skeleton that a config with these fields builds, at the store's sizes."""
    model = skeleton_model(changed_config(copy.deepcopy(store.config), fields))
    cut_to_sizes(model, store.sizes)
    return model.eval()


def _dtype_beside(store: Store, name: str) -> torch.dtype:
    weight = name.removesuffix("bias") + "weight"
    return get_tensor(store.skeleton(), weight).dtype


def _short(names: set[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[0].split(".", 3)[-1] for name in names})[:4])
