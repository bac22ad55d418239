"""mask and cut: the only code that edits weights to a plan.

``keeps`` maps a space's name to booleans (True stays) of the space's shape; under ``weight`` it maps tensor
names (relative to the block) to booleans of the tensor's stored shape; ``layer`` is one boolean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Anatomy, Block, Port, Space
from secateur.engine.silence import Silence, silence
from secateur.errors import SecateurError

Keeps = Mapping[str, Any]


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
                if space.silence is not None and not bool(keep.all()):
                    handles.append(silence(module, space, keep))
                for port in space.ports:
                    if port.role != "norm":
                        tensor_ = get_tensor(module, port.tensor)
                        _zero(tensor_, _spread(entries_kept(port, space, keep, tensor_.shape), port, tensor_.dim()))
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
            owner, _, attribute = dotted.rpartition(".")
            setattr(module.get_submodule(owner) if owner else module, attribute, count * number)


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
    for copy in range(space.copies):
        dropped = (~keep[copy]).nonzero().reshape(-1)
        row = out[copy] if stacked else out
        row[port.entries(dropped, copy)] = False
    return out


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


def resize(module: nn.Module) -> None:
    """Make a module's own sizes say what its weight is."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif type(module).__name__ == "Conv1D":
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(weight.shape)


def mask(model: nn.Module, anatomy: Anatomy, keeps: Mapping[str, Keeps]) -> list[Silence]:
    """`mask_block` over a model: ``keeps`` by block name."""
    handles = []
    for block in anatomy.blocks:
        if block.name in keeps:
            handles += mask_block(model.get_submodule(block.name), block, keeps[block.name])
    return handles


def cut(model: nn.Module, anatomy: Anatomy, keeps: Mapping[str, Keeps]) -> None:
    """`cut_block` over a model: ``keeps`` by block name. Layers are removed by `cut_layers`."""
    for block in anatomy.blocks:
        if block.name in keeps:
            cut_block(model.get_submodule(block.name), block, keeps[block.name])
