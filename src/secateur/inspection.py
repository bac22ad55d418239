"""What `inspect` tells: anatomy, sizes, what can be pruned and what cannot and why. Needs only config.json (of a
packed checkpoint, also the headers of its shards)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy import anatomy_of
from secateur.anatomy.types import Anatomy, Block
from secateur.engine.apply import updated_config
from secateur.engine.check import check
from secateur.engine.host.build import describe_skeleton, skeleton_model
from secateur.engine.host.origin import Origin, read_config
from secateur.errors import SecateurError
from secateur.measure.size import size
from secateur.methods.sites import unit_cost
from secateur.packing import packed_facts
from secateur.sparse.kernels import status


def inspection(origin: Origin, prove: bool) -> dict[str, Any]:
    """Facts about a model as plain data, in the order they are printed.

    Args:
        origin: where the model is; its weights are not read (but those of a packed one that its format keeps dense).
        prove: also prove mask = cut = reloaded on a toy copy; adds ``proved`` and, if that failed, ``reason``.
    """
    config = read_config(origin)
    model = skeleton_model(config)
    out: dict[str, Any] = {"model": origin.given, "family": config.model_type, "class": type(model).__name__}
    out |= packed_facts(origin)
    try:
        anatomy = anatomy_of(describe_skeleton(model))
    except SecateurError as error:
        out |= {"anatomy": "none", "parameters": sum(p.numel() for p in model.parameters()), "reason": str(error)}
        return out | ({"proved": {}} if prove else {})
    out |= {"anatomy": anatomy.origin, **_sizes(model), "layers": len(anatomy.blocks)}
    out["kernels"] = status().partition(": ")[2]
    out["tied_embedding"] = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    out["spaces"] = _spaces(config, anatomy, model)
    out["refused"] = [{"space": k, "why": v} for k, v in anatomy.refused.items()]
    if prove:
        result = check(config)
        out["proved"] = dict(result.proved)
        failed = [f"{name}: {result.reasons.get(name, 'not proved')}" for name, ok in result.proved.items() if not ok]
        useful = any(result.proved.get(name) for name in ("ffn", "expert"))
        if failed or not useful:
            why = "; ".join(failed) or "neither ffn nor expert is among what can be pruned"
            out["reason"] = f"not proved for {config.model_type}: {why}"
    return out


def _sizes(model: nn.Module) -> dict[str, Any]:
    weighed = size(model)
    return {
        "parameters": weighed.parameters,
        "macs_per_token": weighed.macs_per_token,
        "macs_context": weighed.context,
        "kv_bytes_per_token": weighed.kv_bytes_per_token,
        "dtype": weighed.dtype,
    }


def _spaces(config: Any, anatomy: Anatomy, model: nn.Module) -> list[dict[str, Any]]:
    """One row per space: how many units where, what one costs, how a cut of it loads."""
    matrices = [m for b in anatomy.blocks for m in b.matrices]
    total = sum(m.numel for m in matrices)
    rows: list[dict[str, Any]] = []
    if matrices:
        rows.append({"space": "weight", "units": f"{total:,} weights in {len(matrices)} tensors", "apply": "mask"})
    kv = size(model).kv_bytes_per_token
    for name in anatomy.spaces():
        if name == "layer":
            costs = [sum(p.numel() for p in model.get_submodule(b.name).parameters()) for b in anatomy.blocks]
            rows.append(
                {
                    "space": "layer",
                    "units": f"{len(costs)} layers",
                    "parameters_each": _each(costs),
                    "kv_bytes_each": kv // len(anatomy.blocks),  # a mean: not every kind of layer has a cache
                    **_layers_load(config, anatomy),
                }
            )
        elif name != "weight":
            having = [b for b in anatomy.blocks if name in b.spaces]
            space = having[0].spaces[name]
            each = f"{space.copies} x {space.size}" if space.copies > 1 else f"{space.size}"
            one_size = len({b.spaces[name].shape for b in having}) == 1
            plain = one_size and _plain(config, anatomy, _fewer(having, name))
            rows.append(
                {
                    "space": name,
                    "units": f"{each} in each of {len(having)} layers" if one_size else f"in {len(having)} layers",
                    "parameters_each": _each(
                        [round(unit_cost(b, b.spaces[name], model.get_submodule(b.name))) for b in having]
                    ),
                    "kv_bytes_each": round(kv / sum(b.spaces[name].size for b in having)) if name == "kv_group" else 0,
                    "apply": "mask, cut",
                    "loads_with": "AutoModel if uniform, else secateur.load" if plain else "secateur.load",
                }
            )
    return rows


def _each(costs: Sequence[int]) -> int:
    """Parameters of a unit; their mean where layers differ."""
    return round(sum(costs) / len(costs))


def _fewer(blocks: Sequence[Block], name: str) -> dict[str, dict[str, Tensor]]:
    """A uniform cut: the first half of every block's units, but no fewer than must stay."""
    keeps = {}
    for block in blocks:
        space = block.spaces[name]
        keep = torch.zeros(space.shape, dtype=torch.bool)
        keep[..., : max(space.minimum, space.size // 2)] = True
        keeps[block.name] = {name: keep}
    return keeps


def _layers_load(config: Any, anatomy: Anatomy) -> dict[str, str]:
    """Whether layers can be cut. Where they differ, a config often says only every how many layers another kind comes,
    and not that any layer is absent; so every kind of layer is left out once."""
    kinds: dict[tuple[str, ...], int] = {}
    for block in anatomy.blocks:
        kinds.setdefault(tuple(sorted(m.tensor for m in block.matrices)), block.index)
    answers = []
    for index in {0, len(anatomy.blocks) - 1, *kinds.values()}:
        keep = torch.ones(len(anatomy.blocks), dtype=torch.bool)
        keep[index] = False
        answers.append(_plain(config, anatomy, {"model": {"layer": keep}}))
    some = "mask, cut if the config can say what stays" if any(answers) else "mask"
    return {"apply": "mask, cut" if all(answers) else some, "loads_with": "AutoModel"}


def _plain(config: Any, anatomy: Anatomy, keeps: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether a cut loads with plain ``from_pretrained``: tried out on a skeleton."""
    return updated_config(config, anatomy, keeps).uniform
