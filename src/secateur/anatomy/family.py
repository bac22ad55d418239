"""A family's description, and the anatomy it gives for one skeleton."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from secateur.anatomy.attention import Attention, Latent
from secateur.anatomy.ffn import Experts, Ffn
from secateur.anatomy.look import Look
from secateur.anatomy.types import Anatomy, Block, Component, ConfigRule, Matrix, Skeleton, Space

LAYER_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers")
FIRST_FIELDS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")  # so many are dense
UNHEARD = ("mamba.dt_proj",)  # its weight is read by a kernel; the module itself never runs, so nothing listens there
CROSS = ("encoder_attn.", "crossattention.", "cross_attn.")  # never run by a decoder on its own
LAYER_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx")
ROUTERS = ("gate", "router", "wg", "router_proj", "shared_expert_gate", "shared_experts_gate", "classifier")


@dataclass(frozen=True)
class Family:
    """How the layers of a family are built. In each layer the first part that is present counts.

    Attributes:
        attention: descriptions of attention, tried in order.
        ffn: descriptions of feed-forward parts and mixtures of experts, tried in order; a shared expert
            beside a mixture is named in ``shared``.
        shared: modules that write to the residual stream beside the mixture of experts.
        mixers: modules that write to it in the place of attention or beside it (a convolution, a state space).
        alone: True if each layer has one part only, attention or feed-forward.
        layer: the reason why layers cannot be removed, or "".
        layer_when: a condition on the config under which that reason holds; None: always.
        refused: spaces that the family does not allow, with the reason.
    """

    attention: tuple[Attention | Latent, ...] = ()
    ffn: tuple[Ffn | Experts, ...] = ()
    shared: tuple[str, ...] = ()
    mixers: tuple[str, ...] = ()
    alone: bool = False
    layer: str = ""
    layer_when: Callable[[Mapping[str, object]], bool] | None = None
    refused: tuple[tuple[str, str], ...] = ()


def build(family: Family, skeleton: Skeleton, origin: Literal["declared", "derived"]) -> Anatomy:
    """The anatomy of a skeleton by its family's description. Sizes come from the tensors."""
    holds = family.layer_when is None or family.layer_when(skeleton.config)
    blocks, refused, reason = [], dict(family.refused), family.layer if holds else ""
    for index in range(len(skeleton.blocks)):
        look = Look(skeleton.blocks[index], skeleton.attributes[index], skeleton.modules[index], skeleton.config)
        spaces, outputs, why = _parts(family, look)
        blocks.append(Block(f"{skeleton.path}.{index}", index, _matrices(family, look), spaces, outputs))
        refused |= {k: v for k, v in why.items() if k not in refused}
        stranger = "" if outputs and origin == "declared" else _stranger(family, look)
        if (not outputs or stranger) and not reason:
            reason = (
                f"what {stranger} adds to the residual stream is not known"
                if stranger
                else "what its layers add to the residual stream is not known"
            )
    reason = reason or _numbered(skeleton)
    if skeleton.shared:
        text = f"layers share parameters ({skeleton.shared[0]})"
        refused |= {n: text for b in blocks for n in b.spaces}
        blocks = [Block(b.name, b.index, b.matrices, {}, b.outputs) for b in blocks]
        reason = reason or text
    offered = {n for b in blocks for n in b.spaces}
    refused = {k: v for k, v in refused.items() if k not in offered}
    layer = None
    if reason or len(blocks) < 2:
        refused["layer"] = reason or "there is only one layer"
        blocks = [Block(b.name, b.index, b.matrices, b.spaces) for b in blocks] if reason else blocks
    else:
        layer = Space("layer", len(blocks), (), config=_layer_config(skeleton))
    return Anatomy(skeleton.family, origin, skeleton.path, tuple(blocks), layer, refused)


def _parts(family: Family, look: Look) -> tuple[dict[str, Space], tuple[str, ...], dict[str, str]]:
    """Spaces, outputs to the residual stream, and reasons for what is not offered, of one block."""
    spaces: dict[str, Space] = {}
    refused: dict[str, str] = {}
    outputs: list[str] = []
    for module in family.mixers:
        outputs += look.outputs(module) if look.has(module) else ()
    sides = {"mixer"} if outputs else set()
    for attention in family.attention:
        fits = not isinstance(attention, Attention) or attention.when is None or attention.when(look)
        if fits and look.has(*attention.names()):
            found, why = attention.spaces(look)
            spaces |= found
            refused |= why
            outputs += look.outputs(attention.at(attention.o))
            sides.add("mixer")
            break
    for part in family.ffn:
        if isinstance(part, Experts):
            if not part.present(look):
                continue
            found, why = part.spaces(look)
            stem = f"{part.experts}.{part.down}"
            outputs += [n for n in (stem, f"{stem}_bias") if n in look.tensors]
        elif look.has(*part.names()):
            found, why = part.spaces(look)
            outputs += look.outputs(part.down)
        else:
            continue
        spaces |= found
        refused |= why
        sides.add("ffn")
        break
    for module in family.shared:
        if look.has(module):
            outputs += [t for t in look.outputs(module) if t not in outputs]
    return spaces, tuple(outputs) if len(sides) == 2 or (sides and family.alone) else (), refused


def _stranger(family: Family, look: Look) -> str:
    """The first part of a block that is neither a norm nor known to the family's description."""
    known = [a.module for a in family.attention]
    for part in family.ffn:
        known += [part.experts.rpartition(".")[0]] if isinstance(part, Experts) else [*part.names()]
    known += [*family.mixers, *family.shared, *CROSS]
    heads = {k.partition(".")[0] for k in known}
    for name, info in look.tensors.items():
        if info.kind != "norm" and name.partition(".")[0] not in heads and "norm" not in name.partition(".")[0].lower():
            return name
    return ""


def _numbered(skeleton: Skeleton) -> str:
    """The reason why layers cannot be removed where each knows its place in the stack by more than its number."""
    count = len(skeleton.blocks)
    for name in skeleton.attributes[0]:
        module, _, own = name.rpartition(".")
        values = [attributes.get(name) for attributes in skeleton.attributes]
        if count > 2 and len(set(values)) == count and own not in LAYER_NUMBERS:
            shapes = [{n for t, i in b.items() if t.startswith(module) for n in i.shape} for b in skeleton.blocks]
            if all(value in sizes for value, sizes in zip(values, shapes, strict=True)):
                continue  # cut to a size of its own
            return f"each layer computes with its place in the stack ({name})"
    kinds = {frozenset(n.partition(".")[0] for n, i in b.items() if i.kind != "norm") for b in skeleton.blocks}
    if len(kinds) > 1 and not any(rule.keep_list or rule.numbers for rule in _layer_config(skeleton).values()):
        return "the kind of a layer follows from its number: no list in the config says it"
    return ""


def _matrices(family: Family, look: Look) -> tuple[Matrix, ...]:
    """Every matrix of a block that can be pruned element by element: all but routers."""
    out = []
    for name, info in look.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or info.kind not in ("linear", "conv1d") or len(info.shape) != 2:
            continue
        if module.rpartition(".")[2] in ROUTERS or module in _routers(family):
            continue
        if module.startswith(CROSS) or module.endswith(UNHEARD):
            continue
        turned = info.kind == "conv1d"
        shape = (info.shape[1], info.shape[0]) if turned else (info.shape[0], info.shape[1])
        out.append(Matrix(name, module, shape, turned, 0, _component(family, module)))
    for part in family.ffn:
        if isinstance(part, Experts) and part.present(look):
            out += part.matrices(look)
    return tuple(out)


def _routers(family: Family) -> set[str]:
    return {p.router for p in family.ffn if isinstance(p, Experts)}


def _component(family: Family, module: str) -> Component:
    for attention in family.attention:
        if attention.module and module.startswith(attention.module + "."):
            return "attention"
    for part in family.ffn:
        stems = [part.experts] if isinstance(part, Experts) else list(part.names())
        parents = {s.rpartition(".")[0] or s for s in stems}
        if any(module == s or (p and module.startswith(p + ".")) for s in stems for p in parents):
            return "ffn"
    return "ffn" if any(module.startswith(s.rpartition(".")[0]) for s in family.shared) else "other"


def _layer_config(skeleton: Skeleton) -> dict[str, ConfigRule]:
    """Fields that count layers, lists with one entry per layer, and those that name layers by their numbers."""
    count = len(skeleton.blocks)
    rules = {n: ConfigRule() for n in LAYER_FIELDS if skeleton.config.get(n) == count}
    for name, value in skeleton.config.items():
        if name in FIRST_FIELDS and isinstance(value, int) and value > 0:
            rules[name] = ConfigRule(first=True)
        if not isinstance(value, list) or not value or count < 2:
            continue
        if "layer" in name and value == [i for i in range(count) if i in value] and bool not in map(type, value):
            rules[name] = ConfigRule(numbers=True)
        elif len(value) == count:
            rules[name] = ConfigRule(keep_list=True)
    return rules
