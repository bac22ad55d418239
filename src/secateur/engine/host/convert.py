"""Names and layouts on disk against names and layouts in memory, through Transformers' own conversion mapping.

Mixtral, Qwen3-MoE and OLMoE store one matrix per expert and fuse them on loading; GPT-2 checkpoints may lack
the base model's prefix. A `Group` is a set of tensors on disk that makes a set of tensors in memory. It can be
tried out on the meta device, so that every contradiction between config and headers shows before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictInfo

from secateur.engine.host.origin import UNBUILDABLE
from secateur.errors import SecateurError


@dataclass
class Group:
    """Tensors on disk that together make tensors in memory.

    Attributes:
        first: the name in memory that they are gathered under.
        sources: (name on disk, the converter's pattern that it matched), in loading order.
        converter: what turns them, or None where the tensor is taken as it is.
        shapes: shape per name in memory, found on the meta device.
    """

    first: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    converter: WeightConverter | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def convert(self, model: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Read the sources and turn them into tensors by name in memory."""
        if self.converter is None:
            return {self.first: read(self.sources[0][0])}
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first, name, pattern, _later(read, name))
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass
class Correspondence:
    """How a checkpoint's tensors become a model's, and what is left over on either side."""

    groups: list[Group]
    missing: set[str]  # and nothing on disk makes up for it
    unexpected: set[str]
    absent: set[str] = field(default_factory=set)  # not on disk: missing or tied to what is
    added_prefix: bool = False  # names in memory carry the base model's prefix, names on disk do not


def correspond(model: Any, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Correspondence:
    """Match tensors on disk with a skeleton's, on the meta device.

    Args:
        model: a skeleton; it remembers the conversions that were used, for `to_disk`.
        entries: dtype and shape by name on disk.

    Raises:
        SecateurError: tensors that do not fit together.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    memory = model.state_dict()
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
    unexpected: set[str] = set()
    added = False
    for name in sorted(entries, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, memory)
        if renamed not in memory and name in memory:
            renamed, pattern = rename_source_key(name, [], [], prefix, memory)
        if renamed not in memory:
            unexpected.add(renamed)
            continue
        if renamed in groups and pattern is None:
            raise SecateurError(
                "two tensors on disk mean the same one in memory",
                received=f"{name} for {renamed}",
                works="fetch the checkpoint again, or convert it with save_pretrained first",
            )
        group = groups.setdefault(renamed, Group(renamed, [], by_pattern[pattern] if pattern else None))
        group.sources.append((name, pattern or name))
        added = added or (pattern is None and renamed == f"{prefix}.{name}")
    made: set[str] = set()
    for group in groups.values():
        group.shapes = _try(group, model, entries)
        made |= group.shapes.keys()
    info = LoadStateDictInfo(
        missing_keys=set(memory) - made,
        unexpected_keys=unexpected,
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    for target, source in model.all_tied_weights_keys.items():
        if target in made or source in made:
            info.missing_keys -= {target, source}
    model._weight_conversions = [m for m in mapping if m.was_used()]
    return Correspondence(list(groups.values()), info.missing_keys, info.unexpected_keys, set(memory) - made, added)


def to_disk(model: Any, tensors: Mapping[str, Tensor], added_prefix: bool = False) -> dict[str, Tensor]:
    """Tensors by name in memory (with everything a converter needs) as tensors by name on disk."""
    out = revert_weight_conversion(model, dict(tensors))
    prefix = f"{model.base_model_prefix}."
    return {name.removeprefix(prefix) if added_prefix else name: value for name, value in out.items()}


def tied_names(model: Any) -> dict[str, str]:
    """Names in memory that share another's tensor: name to the name it is kept under."""
    return dict(model.all_tied_weights_keys)


def tie(model: Any, missing: set[str]) -> None:
    """Tie what the architecture ties, as loading by Transformers would."""
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)


def initialise_buffers(model: Any, device: torch.device) -> None:
    """Give every non-persistent buffer (rotary tables, position ids) its value, as Transformers would.

    Parameters that are already real must carry ``_is_hf_initialized`` (`set_tensor` sees to it); parameters
    still on the meta device stay there.
    """
    named = list(model.named_non_persistent_buffers())
    for name, buffer in named:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = torch.empty_like(buffer, device=device)
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    try:
        with torch.random.fork_rng(devices=[]):
            model.initialize_weights()
    except UNBUILDABLE as error:
        raise SecateurError(
            f"Transformers cannot give this model's buffers their values: {error}",
            received=type(model).__name__,
            works="use the config.json that came with these weights",
        ) from error


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor where ``name`` says, as a parameter or a buffer, whatever was there."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = value
        value._is_hf_initialized = True  # type: ignore[attr-defined]
        return
    parameter = nn.Parameter(value, requires_grad=value.is_floating_point())
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    module._parameters[leaf] = parameter


def kept_wide(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which tensors (by name in memory) the architecture keeps in fp32 when the others are loaded as ``dtype``."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: False
    pattern, _, _ = build_glob_alternation(list(plan))
    return lambda name: pattern.search(name) is not None


def cast(model: Any, dtype: torch.dtype) -> None:
    """Give a model another dtype, as loading it so does: tables that no file holds (rotary frequencies) and what the
    architecture keeps in fp32 are not rounded, which ``model.to`` would do."""
    wide = kept_wide(model, dtype)
    tables = dict(model.named_non_persistent_buffers())
    kept = {name: t.float() for name, t in model.state_dict().items() if wide(name)}
    model.to(dtype)
    for name, value in (tables | kept).items():
        set_tensor(model, name, value)


def _try(group: Group, model: Any, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Any]:
    def ghost(name: str) -> Tensor:
        dtype, shape = entries[name]
        return torch.empty(shape, dtype=dtype, device="meta")

    try:
        return {name: tuple(value.shape) for name, value in group.convert(model, ghost).items()}
    except UNBUILDABLE as error:
        raise SecateurError(
            f"the tensors for {group.first} do not fit together",
            received=", ".join(f"{n} {list(entries[n][1])}" for n, _ in group.sources[:4]),
            works=str(error).splitlines()[0] if str(error) else "check the checkpoint",
        ) from error


def _later(read: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: read(name)
