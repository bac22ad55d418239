"""What a checkpoint says about itself beside its weights: config fields, sizes, record, further files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.anatomy.types import Anatomy
from secateur.engine.apply import ConfigChange, updated_config
from secateur.errors import SecateurError

Sizes = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Outcome:
    """What a finished step says about itself.

    Attributes:
        fields: config fields with a new value (``intermediate_size``, ``num_hidden_layers``, ``layer_types``).
        per_layer: fields by layer index where blocks differ; the global fields then stay dense.
        sizes: units per block and space that the config has no word for; ``secateur.load`` goes by them.
        record: everything else that secateur.json holds.
        files: further files, by name: their bytes, or a file to copy.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    per_layer: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes | Path] = field(default_factory=dict)


def check_layers(config: Any, anatomy: Anatomy, keep: Tensor) -> None:
    """Refuse a cut of layers that no config says: it would load as another model, or not at all.

    Args:
        config: the model's before the cut.
        keep: bool [layers].
    """
    reason = updated_config(config, anatomy, {"model": {"layer": keep}}).reason
    if reason:
        raise SecateurError(
            f"{anatomy.family} cannot be written without these layers: {reason}",
            received=f"without layers {', '.join(str(int(i)) for i in (~keep).nonzero())}",
            works="--apply mask, or other layers (--keep, --protect, --score)",
        )


def outcome_of(
    anatomy: Anatomy,
    change: ConfigChange,
    before: Sizes | None = None,
    record: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Path] | None = None,
) -> Outcome:
    """What to write of a cut.

    Args:
        anatomy: the model's before the cut.
        change: what the cut does to the config.
        before: sizes the model had already (`Store.sizes`): a ragged checkpoint that was cut further.
        record: what else goes into secateur.json.
        files: further files.
    """
    sizes = {name: dict(spaces) for name, spaces in (before or {}).items()}
    if not change.uniform:
        by_name = {block.name: block.spaces for block in anatomy.blocks}
        for name, spaces in change.sizes.items():
            ports = {space: found.ports for space, found in by_name[name].items()}
            # where every query head has keys of its own, head and kv_group are one space under two names
            same = {other: spaces[s] for s in spaces for other in sizes.get(name, ()) if ports.get(other) == ports[s]}
            sizes[name] = {**sizes.get(name, {}), **same, **spaces}
    stay = change.layers if change.layers is not None else tuple(range(len(anatomy.blocks)))
    renamed: dict[str, dict[str, int]] = {}
    per_layer: dict[int, dict[str, Any]] = {}
    for position, index in enumerate(stay):
        block = anatomy.blocks[index]
        if block.name not in sizes:
            continue
        renamed[f"{anatomy.path}.{position}"] = sizes[block.name]
        for space, count in sizes[block.name].items():
            for word, rule in block.spaces[space].config.items() if space in block.spaces else ():
                value = rule.fixed if rule.fixed is not None else count * rule.per_unit
                per_layer.setdefault(position, {})[word] = value
    if len({tuple(sorted(words.items())) for words in per_layer.values()}) <= 1 and len(per_layer) == len(stay):
        per_layer = {}  # every layer alike: it is the config that lacks a word
    return Outcome(dict(change.fields), per_layer, renamed, record or {}, files or {})
