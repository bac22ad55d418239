"""mask and cut: the only code that edits weights to a plan.

``keeps`` maps a space's name to booleans (True stays) of the space's shape; under ``weight`` it maps tensor
names (relative to the block) to booleans of the tensor's stored shape; ``layer`` is one boolean. For a whole
model such mappings lie under the blocks' names, and layers under ``model``: ``{"layer": bool [layers]}``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.family import LAYER_NUMBERS
from secateur.anatomy.types import Anatomy, Block, Port, Space
from secateur.engine.host.build import changed_config, differences, skeleton_model
from secateur.engine.silence import Silence, correction, silence
from secateur.errors import SecateurError

Keeps = Mapping[str, Any]
ALIGNED = 8  # entries of bf16 in the 16 bytes that Transformers' grouped kernel wants a multiple of


def mask_block(module: nn.Module, block: Block, keeps: Keeps) -> list[Silence]:
    """Zero what is not kept in one block, in place; zeros are +0.0.

    Returns:
        Handles of the routers that were silenced (``remove()`` gives them their voices back).
    """
    handles = []
    with torch.no_grad():
        for name, keep in keeps.items():
            if name == "weight":
                for tensor, booleans in keep.items():
                    _zero(get_tensor(module, tensor), booleans)
            elif name == "layer":
                for tensor in block.outputs if not bool(keep) else ():
                    get_tensor(module, tensor).zero_()
            else:
                space = _space(block, name, keep)
                chosen_by: tuple[str, ...] = ()
                if space.silence is not None and not bool(keep.all()):
                    handles.append(silence(module, space, keep))
                    chosen_by = correction(space)
                for port in space.ports:
                    if port.role != "norm" and port.tensor not in chosen_by:
                        tensor_ = get_tensor(module, port.tensor)
                        _zero(tensor_, port_mask(port, space, keep, tensor_.shape))
    return handles


def cut_block(module: nn.Module, block: Block, keeps: Keeps) -> None:
    """Make the tensors of one block smaller, in place: gather what is kept, rewrite sizes, rescale norms.

    Works on meta tensors too, so that a skeleton takes the shapes of a cut checkpoint.

    Raises:
        SecateurError: for single weights, which cannot be cut.
    """
    for name, keep in keeps.items():
        if name == "weight":
            raise SecateurError(
                "elements cannot be cut; only whole units can",
                received="--apply cut with --space weight",
                works="use --apply mask, or prune a space of units (ffn, kv_group, head, expert, layer)",
            )
        if name == "layer":
            continue
        space = _space(block, name, keep)
        if bool(keep.all()):
            continue
        _cut_space(module, space, keep)


def _cut_space(module: nn.Module, space: Space, keep: Tensor) -> None:
    with torch.no_grad():
        # all ports of one axis are cut at once: a fused matrix has several
        axes: dict[tuple[str, int], list[Port]] = {}
        for port in space.ports:
            axes.setdefault((port.tensor, port.axis), []).append(port)
        for (name, axis), ports in axes.items():
            old = get_tensor(module, name)
            kept = entries_kept(ports[0], space, keep, old.shape)
            for port in ports[1:]:
                kept &= entries_kept(port, space, keep, old.shape)
            new = _gather(old, axis, ports[0].copy_axis if space.copies > 1 else None, kept)
            if any(p.role == "norm" for p in ports):
                new = new * (old.shape[axis] / new.shape[axis]) ** 0.5
            set_tensor(module, name, new)
        count = kept_per_copy(space, keep)
        for dotted, number in space.sizes.items():
            _set_size(module, dotted, count * number)
        if _unaligned(space, count):
            for owner in {port.tensor.rpartition(".")[0] for port in space.ports}:
                if hasattr(module.get_submodule(owner), "config"):
                    _set_size(module, f"{owner}.config._experts_implementation", "eager")


def _unaligned(space: Space, count: int, to: int = ALIGNED) -> bool:
    """Whether a cut leaves rows of experts that the grouped kernel refuses: they then run one by one, in memory."""
    stacked = space.copies > 1 and any(p.copy_axis is not None for p in space.ports)
    return stacked and space.size % to == 0 and count % to != 0


def _set_size(module: nn.Module, dotted: str, value: int | str) -> None:
    """Set an attribute of a module inside the block, or a field of the config that this module reads: the
    module then gets a config of its own."""
    owner, _, attribute = dotted.rpartition(".")
    if owner.rpartition(".")[2] == "config":
        owner = owner.rpartition(".")[0]
        holder: Any = module.get_submodule(owner) if owner else module
        holder.config = copy.copy(holder.config)
        setattr(holder.config, attribute, value)
    else:
        setattr(module.get_submodule(owner) if owner else module, attribute, value)


def kept_per_copy(space: Space, keep: Tensor) -> int:
    """Units that stay in each copy of a space.

    Raises:
        SecateurError: if copies keep different numbers, or fewer than the space's minimum.
    """
    counts = keep.reshape(space.copies, space.size).sum(-1)
    if int(counts.min()) != int(counts.max()):
        raise SecateurError(
            f"all {space.copies} copies of {space.name!r} must keep the same number of units",
            received=f"{int(counts.min())} to {int(counts.max())}",
            works="keep the same number in each",
        )
    if int(counts[0]) < space.minimum:
        raise SecateurError(
            f"at least {space.minimum} of {space.size} units of {space.name!r} must stay",
            received=int(counts[0]),
            works=f"keep {space.minimum} or more",
        )
    return int(counts[0])


def entries_kept(port: Port, space: Space, keep: Tensor, shape: torch.Size) -> Tensor:
    """Which entries along a port's axis stay: bool [n], or [copies, n] where copies lie along an axis."""
    keep = keep.reshape(space.copies, space.size).cpu()
    n = shape[port.axis]
    stacked = port.copy_axis is not None and space.copies > 1
    out = torch.ones((space.copies, n) if stacked else (n,), dtype=torch.bool)
    for number in range(space.copies):
        dropped = (~keep[number]).nonzero().reshape(-1)
        row = out[number] if stacked else out
        row[port.entries(dropped, number)] = False
    return out


def port_mask(port: Port, space: Space, keep: Tensor, shape: torch.Size) -> Tensor:
    """Which entries of a port's tensor stay, as booleans that broadcast to its shape."""
    return _spread(entries_kept(port, space, keep, shape), port, len(shape))


def _spread(kept: Tensor, port: Port, dims: int) -> Tensor:
    shape = [1] * dims
    shape[port.axis] = kept.shape[-1]
    if kept.dim() == 2:
        assert port.copy_axis is not None
        shape[port.copy_axis] = kept.shape[0]
    return kept.reshape(shape) if kept.dim() == 1 or port.copy_axis < port.axis else kept.T.reshape(shape)  # type: ignore[operator]


def _gather(old: Tensor, axis: int, copy_axis: int | None, kept: Tensor) -> Tensor:
    if kept.dim() == 1:
        return old.index_select(axis, kept.nonzero().reshape(-1).to(old.device))
    assert copy_axis is not None
    inner = axis - int(copy_axis < axis)
    parts = [
        old.select(copy_axis, c).index_select(inner, row.nonzero().reshape(-1).to(old.device))
        for c, row in enumerate(kept)
    ]
    return torch.stack(parts, copy_axis)


def _zero(tensor: Tensor, kept: Tensor) -> None:
    tensor.copy_(torch.where(kept.to(tensor.device), tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device)))


def _space(block: Block, name: str, keep: Tensor) -> Space:
    if name not in block.spaces:
        raise SecateurError(
            f"{block.name} has no space {name!r}", received=name, works=f"it has {', '.join(block.spaces) or 'none'}"
        )
    space = block.spaces[name]
    if keep.dtype != torch.bool or keep.numel() != space.size * space.copies:
        raise SecateurError(
            f"{name!r} of {block.name} takes booleans of shape {list(space.shape)}",
            received=f"{keep.dtype} of shape {list(keep.shape)}",
            works="one boolean per unit",
        )
    kept_per_copy(space, keep)
    return space


def get_tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner) if owner else module, leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def set_tensor(module: nn.Module, name: str, new: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, and tell its module the new size."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name) if owner_name else module
    old = getattr(owner, leaf)
    new = new.contiguous()
    setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)
    resize(owner)


def resize(module: Any) -> None:
    """Make a module's own sizes say what its weight is."""
    weight = getattr(module, "weight", None)
    part: Any = module
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif type(module).__name__ == "Conv1D":
        part.nx, part.nf = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif hasattr(module, "normalized_shape"):
        part.normalized_shape = tuple(weight.shape)


def mask(model: nn.Module, anatomy: Anatomy, keeps: Mapping[str, Keeps]) -> list[Silence]:
    """`mask_block` over a whole model, in place."""
    blocks = [(model.get_submodule(block.name), block, given) for block, given in _by_block(anatomy, keeps)]
    return [handle for each in blocks for handle in mask_block(*each)]


def cut(model: nn.Module, anatomy: Anatomy, keeps: Mapping[str, Keeps]) -> None:
    """`cut_block` over a whole model, in place, and `cut_layers` where layers are dropped."""
    for block, given in _by_block(anatomy, keeps):
        cut_block(model.get_submodule(block.name), block, given)
    if "layer" in keeps.get("model", {}):
        cut_layers(model, anatomy, keeps["model"]["layer"])


def _by_block(anatomy: Anatomy, keeps: Mapping[str, Keeps]) -> list[tuple[Block, Keeps]]:
    layers = keeps.get("model", {}).get("layer")
    if layers is not None:
        _check_layers(anatomy, layers)
    out: list[tuple[Block, Keeps]] = []
    for block in anatomy.blocks:
        given = dict(keeps.get(block.name, {}))
        if layers is not None:
            given["layer"] = bool(layers[block.index])
        if given:
            out.append((block, given))
    return out


def _check_layers(anatomy: Anatomy, keep: Tensor) -> None:
    if anatomy.layer is None:
        why = anatomy.refused.get("layer", "not known to be safe")
        works = f"another space ({', '.join(anatomy.spaces())})"
        raise SecateurError(f"layers of {anatomy.family!r} cannot be removed: {why}", works=works)
    if keep.dtype != torch.bool or tuple(keep.shape) != (len(anatomy.blocks),) or not bool(keep.any()):
        got = f"{keep.dtype} of shape {list(keep.shape)}, {int(keep.sum())} True"
        raise SecateurError(f"layers take {len(anatomy.blocks)} booleans", received=got, works="at least one True")


def cut_layers(model: nn.Module, anatomy: Anatomy, keep: Tensor) -> None:
    """Remove layers, renumber those that stay (caches look them up by number), and say so in the config.

    Args:
        model: changed in place, with its config.
        keep: bool [layers].
    """
    _check_layers(anatomy, keep)
    parent, _, leaf = anatomy.path.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    old: Any = getattr(owner, leaf)
    kept = [i for i in range(len(old)) if bool(keep[i])]
    for new, index in enumerate(kept):
        for module in old[index].modules():
            for name in LAYER_NUMBERS:
                if isinstance(vars(module).get(name), int):
                    setattr(module, name, new)
    setattr(owner, leaf, nn.ModuleList([old[i] for i in kept]))
    assert anatomy.layer is not None
    config: Any = model.config
    configs = {id(c): c for c in (config.get_text_config(), *(getattr(m, "config", config) for m in owner.modules()))}
    for text in configs.values():
        for name, value in _layer_fields(text, anatomy.layer, keep).items():
            setattr(text, name, value)
    for module in (owner, model):
        for name, value in list(vars(module).items()):
            if isinstance(value, int) and not isinstance(value, bool) and name in LAYER_COUNTS:
                setattr(module, name, len(kept))
            if isinstance(value, list) and len(value) == len(old) and not name.startswith("_"):
                setattr(module, name, [value[i] for i in kept])


def _layer_fields(config: Any, layer: Space, keep: Tensor) -> dict[str, Any]:
    """New values of the config fields that count or list layers."""
    found = {name: rule.layers(getattr(config, name, None), keep.tolist()) for name, rule in layer.config.items()}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class ConfigChange:
    """What a cut does to the config.

    Attributes:
        fields: new values of (text) config fields; for a ragged cut only those that count or list layers.
        uniform: True if a plain ``from_pretrained`` with these fields builds the cut model.
        per_layer: True if blocks differ in size (false with ``uniform`` false: the config has no word).
        sizes: per block (numbered as before), units per copy that each cut space has now.
        layers: numbers of the layers that stay, or None if all do.
        reason: why the cut is not uniform, in one clause.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    uniform: bool = True
    per_layer: bool = False
    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    reason: str = ""


def updated_config(config: Any, anatomy: Anatomy, keeps: Mapping[str, Keeps]) -> ConfigChange:
    """What the config of a model says after ``keeps`` is cut, and whether that suffices to build it.

    The answer is tried out: a skeleton of the new config is held against a cut skeleton, tensor by tensor.

    Args:
        config: the config before the cut; not changed.
        anatomy: the anatomy before the cut.
        keeps: booleans by block and space, as for `cut`.
    """
    sizes: dict[str, dict[str, int]] = {}
    fields: dict[str, Any] = {}
    reason, per_layer = "", False
    to = 16 // getattr(getattr(config, "dtype", None), "itemsize", 2)
    layers = keeps.get("model", {}).get("layer")
    stay = [b for b in anatomy.blocks if layers is None or bool(layers[b.index])]
    for name in sorted({n for b in stay for n in keeps.get(b.name, {}) if n not in ("weight", "layer")}):
        counts: dict[str, int] = {}
        rules: list[Mapping[str, Any]] = []
        for block in (b for b in stay if name in b.spaces):
            space = block.spaces[name]
            given = keeps.get(block.name, {}).get(name)
            counts[block.name] = space.size if given is None else kept_per_copy(space, given)
            rules.append(space.config)
            sizes.setdefault(block.name, {})[name] = counts[block.name]
        if len(set(counts.values())) > 1 and all(r == rules[0] for r in rules):
            reason, per_layer = f"layers keep different numbers of {name}", True
        elif any(_unaligned(b.spaces[name], counts[b.name], to) for b in stay if name in b.spaces):
            reason = f"experts need a multiple of {to} neurons to load plainly"
        elif not all(rules):
            reason = f"the config has no word for the size of {name}"
        for block_name, rule in zip(counts, rules, strict=True):
            for word, how in rule.items():
                value = how.fixed if how.fixed is not None else counts[block_name] * how.per_unit
                if fields.setdefault(word, value) != value:
                    reason = reason or f"layers disagree about {word}"
    text = config.get_text_config()
    by_layer = _layer_fields(text, anatomy.layer, layers) if layers is not None and anatomy.layer else {}
    kept = tuple(b.index for b in stay) if layers is not None else None
    reason = reason or _misfit(config, {**fields, **by_layer}, anatomy, keeps)
    if reason:
        fields = {}
    return ConfigChange({**fields, **by_layer}, not reason, per_layer, sizes, kept, reason)


def _misfit(config: Any, fields: Mapping[str, Any], anatomy: Anatomy, keeps: Mapping[str, Keeps]) -> str:
    """Why a plain load with these config fields does not give the cut model, or ""."""
    wanted = skeleton_model(copy.deepcopy(config))
    try:
        fresh = skeleton_model(changed_config(config, fields))
    except SecateurError as error:
        return error.wrong
    try:
        cut(wanted, anatomy, keeps)
    except (IndexError, RuntimeError) as error:  # already ragged: the config does not say this anatomy's sizes
        return f"the config does not say what the model is ({str(error).splitlines()[0][:80]})"
    found = differences(wanted, fresh, anatomy.path)
    return f"its config builds another model ({found})" if found else ""


LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
