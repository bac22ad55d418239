"""What a step's cut does to config.json and secateur.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.anatomy.types import Anatomy
from secateur.engine.apply import updated_config
from secateur.engine.plan import Plan
from secateur.engine.store import Store


@dataclass(frozen=True)
class Resized:
    """New sizes, as they are written.

    Attributes:
        fields: config fields with a new value.
        per_layer: config fields by (new) layer index, where blocks differ.
        sizes: units per block (new name) and space that the config cannot say alone.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    per_layer: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def record_of(store: Store, anatomy: Anatomy, plan: Plan, apply: str, dropped: Sequence[int]) -> Resized:
    """New sizes after a step.

    Args:
        store: the model before the step (it may be ragged already).
        anatomy: of that model.
        plan: the step's plan.
        apply: ``mask`` changes no size.
        dropped: layers that were cut out.
    """
    position = {b.index: n for n, b in enumerate(b for b in anatomy.blocks if b.index not in dropped)}
    names = {b.name: f"{anatomy.path}.{position[b.index]}" for b in anatomy.blocks if b.index in position}
    sizes = {names[k]: dict(v) for k, v in store.sizes.items() if k in names}
    if apply == "mask":
        return Resized({}, _per_layer(store, anatomy, sizes, names), sizes)
    keeps: dict[str, dict[str, torch.Tensor]] = {}
    for key in plan:
        _, space, site = key.split("/", 2)
        if space != "weight":
            keeps.setdefault(site, {})[space] = plan[key]
    if not store.sizes:
        change = updated_config(store.config, anatomy, keeps)
        sizes = {} if change.uniform else {names[k]: dict(v) for k, v in change.sizes.items() if k in names}
        return Resized(change.fields, _per_layer(store, anatomy, sizes, names), sizes)
    fields: Mapping[str, Any] = {}
    if dropped:
        fields = updated_config(store.config, anatomy, {"model": keeps["model"]}).fields
    for block in anatomy.blocks:
        for space, keep in keeps.get(block.name, {}).items():
            if block.name in names:
                count = int(keep.reshape(block.spaces[space].copies, -1)[0].sum())
                sizes.setdefault(names[block.name], {})[space] = count
    return Resized(fields, _per_layer(store, anatomy, sizes, names), sizes)


def _per_layer(
    store: Store, anatomy: Anatomy, sizes: Mapping[str, Mapping[str, int]], names: Mapping[str, str]
) -> dict[int, dict[str, Any]]:
    """Config fields per layer, in Transformers' own ``per_layer_config`` words, where the config has any."""
    out: dict[int, dict[str, Any]] = {}
    blocks = {names[b.name]: b for b in anatomy.blocks if b.name in names}
    for name, given in sizes.items():
        words: dict[str, Any] = {}
        for space, count in given.items():
            known = blocks[name].spaces.get(space)
            for word, rule in (known.config if known is not None else {}).items():
                words[word] = rule.fixed if rule.fixed is not None else count * rule.per_unit
        if words:
            out[int(name.rsplit(".", 1)[-1])] = words
    return out
