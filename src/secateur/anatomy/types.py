"""What there is: matrices, ports, spaces, blocks. Facts about an architecture; no decisions, no weights.

A *space* is a family of interchangeable units (FFN neurons, KV groups, experts, ...). A unit is a set of
slices of tensor axes; a *port* says which slices of one axis of one tensor. Tensor names are module names
in memory, relative to the block (``self_attn.q_proj.weight``), never names on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

Role = Literal["write", "read", "norm"]
Reduce = Literal["sum", "mean", "max", "prod", "first", "abs_sum"]
Component = Literal["attention", "ffn", "other"]
EMPTY: Mapping = MappingProxyType({})


@dataclass(frozen=True)
class Port:
    """One axis of one tensor that carries a space's units.

    Unit ``u`` of copy ``c`` owns the entries ``start + c*copy_stride + (u*width + j)*stride`` for
    ``j < width`` along ``axis`` (of slice ``c`` along ``copy_axis`` if that is given, and then
    ``copy_stride`` is 0).
    """

    tensor: str
    axis: int
    role: Role
    width: int = 1
    start: int = 0
    stride: int = 1
    copy_axis: int | None = None
    copy_stride: int = 0

    def entries(self, units: Tensor, copy: int = 0) -> Tensor:
        """Indices along ``axis`` owned by ``units`` (int64, any order kept), flattened to one dimension."""
        within = torch.arange(self.width)
        base = self.start + (0 if self.copy_axis is not None else copy * self.copy_stride)
        return (base + (units.reshape(-1, 1) * self.width + within) * self.stride).reshape(-1)


@dataclass(frozen=True)
class ConfigRule:
    """How one config field says a space's new size: ``kept units x per_unit``; ``keep_list`` filters a list
    with one entry per unit instead (``layer_types``)."""

    per_unit: int = 1
    keep_list: bool = False
    fixed: int | None = None  # a field that must be written out as it is (``head_dim``), whatever is kept
    numbers: bool = False  # a list of layers by their numbers (``mlp_only_layers``): they are numbered anew
    first: bool = False  # how many of the first layers are of another kind (``first_k_dense_replace``)

    def layers(self, old: object, keep: Sequence[bool]) -> int | list[Any] | None:
        """The value of a field that speaks of layers once some are gone; None where it does not speak of these."""
        if isinstance(old, Sequence):
            if self.numbers:
                return [sum(keep[:n]) for n in old if keep[n]]
            fits = self.keep_list and len(old) == len(keep)
            return [v for v, k in zip(old, keep, strict=True) if k] if fits else None
        if isinstance(old, int) and self.first:
            return sum(keep[:old])
        return sum(keep) if old == len(keep) and not self.keep_list else None


@dataclass(frozen=True)
class Space:
    """Units that are interchangeable, and every place a unit lives.

    Attributes:
        name: ``ffn``, ``kv_group``, ``head``, ``expert``, ``layer``.
        size: units per copy.
        ports: everywhere the units live.
        copies: number of copies of the space that must keep equal counts (experts for ``ffn`` in a mixture
            of experts, KV groups for ``head`` in grouped-query attention). Choices are made per copy; a
            plan's booleans are ``[copies, size]`` when ``copies > 1`` and ``[size]`` otherwise.
        sizes: module attributes (dotted, relative to the block) to rewrite after a cut; the new value is
            ``kept units per copy x number``.
        config: config fields that can say the new size, as rules. Empty: the config has no word for it
            (such a cut loads with ``secateur.load`` only).
        silence: module (relative to the block) of the router whose dropped outputs a mask must silence.
        minimum: fewest units that may stay per copy (an MoE's top-k; 1 otherwise).
    """

    name: str
    size: int
    ports: tuple[Port, ...]
    copies: int = 1
    sizes: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, ConfigRule] = field(default_factory=dict)
    silence: str | None = None
    minimum: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of this space's booleans and scores."""
        return (self.copies, self.size) if self.copies > 1 else (self.size,)

    def fold(
        self, scores: Mapping[str, Tensor], reduce: Reduce = "sum", roles: tuple[Role, ...] = ("write", "read")
    ) -> Tensor:
        """Fold elementwise scores onto units through the ports.

        Args:
            scores: per tensor name, scores of the tensor's own shape. Tensors without an entry are left out.
            reduce: how a unit's members combine, within and across ports; ``first`` takes the first port
                that has scores (summed), ``abs_sum`` is |sum| of signed products (vector Taylor).
            roles: which ports count; scores made of input activations fold over ``read`` only.

        Returns:
            Scores of ``self.shape``.
        """
        parts: list[Tensor] = []
        units = torch.arange(self.size)
        for port in self.ports:
            if port.role not in roles or port.tensor not in scores:
                continue
            rows = []
            for copy in range(self.copies):
                s = scores[port.tensor]
                axis = port.axis
                if port.copy_axis is not None and self.copies > 1:
                    s = s.select(port.copy_axis, copy)
                    axis -= int(port.copy_axis < axis)
                at = port.entries(units, copy).to(s.device)
                s = s.index_select(axis, at).movedim(axis, 0)
                rows.append(s.reshape(self.size, -1))
            parts.append(torch.stack(rows))  # [copies, size, members]
            if reduce == "first":
                break
        if not parts:
            raise ValueError(f"no scores for any {roles} port of space {self.name!r}")
        members = torch.cat(parts, dim=-1)
        match reduce:
            case "sum" | "first":
                out = members.sum(-1)
            case "abs_sum":
                out = members.sum(-1).abs()
            case "mean":
                out = members.mean(-1)
            case "max":
                out = members.amax(-1)
            case "prod":
                out = members.double().clamp_min(1e-300).log().mean(-1)  # ranks as the product does
        return out.reshape(self.shape)


@dataclass(frozen=True)
class Matrix:
    """One prunable weight of a block: a 2-D tensor, or a 3-D stack with one matrix per expert.

    Attributes:
        tensor: parameter name relative to the block.
        module: module (relative to the block) whose input the matrix multiplies; where probes listen.
        shape: (out, in) of one matrix.
        transposed: True if stored [in, out] (GPT-2's Conv1D, gpt-oss experts).
        experts: 0, or the number of matrices stacked along axis 0.
        component: which sub-layer it belongs to.
    """

    tensor: str
    module: str
    shape: tuple[int, int]
    transposed: bool = False
    experts: int = 0
    component: Component = "other"

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1] * max(self.experts, 1)

    def view(self, tensor: Tensor, expert: int = 0) -> Tensor:
        """The [out, in] view of a tensor stored under this name (one expert's slice)."""
        w = tensor[expert] if self.experts else tensor
        return w.T if self.transposed else w


@dataclass(frozen=True)
class Block:
    """One decoder (encoder) layer.

    Attributes:
        name: module path in the model (``model.layers.3``).
        index: position in the stack.
        matrices: the ``weight`` space: every prunable matrix.
        spaces: unit spaces by name (without ``layer``, which lives in the anatomy).
        outputs: tensors whose zeroing makes the block the identity (weights and biases that write to the
            residual stream); empty where that is not so (post-norm encoders).
    """

    name: str
    index: int
    matrices: tuple[Matrix, ...]
    spaces: Mapping[str, Space]
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Anatomy:
    """All prunable parts of one model.

    Attributes:
        family: Transformers' ``model_type``.
        origin: ``declared`` or ``derived`` (guessed from the parallel plans; prove it with --check).
        path: module path of the list of blocks (``model.layers``).
        blocks: the blocks in order.
        layer: the ``layer`` space (its ``config`` names the fields that count or list layers), or None.
        refused: spaces this architecture does not allow, with the reason in one clause.
    """

    family: str
    origin: Literal["declared", "derived"]
    path: str
    blocks: tuple[Block, ...]
    layer: Space | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    def spaces(self) -> tuple[str, ...]:
        """Names of the spaces that can be pruned, ``weight`` first."""
        names = ["weight"] if any(b.matrices for b in self.blocks) else []
        for block in self.blocks:
            names += [n for n in block.spaces if n not in names]
        return (*names, "layer") if self.layer is not None else tuple(names)


@dataclass(frozen=True)
class TensorInfo:
    """A parameter of a skeleton: shape, and what kind of module owns it."""

    shape: tuple[int, ...]
    kind: Literal["linear", "conv1d", "norm", "embedding", "parameter", "buffer"]
    owner: str  # class name of the owning module


@dataclass(frozen=True)
class Skeleton:
    """A model without weights, as plain data: what anatomies are made from. `engine/host.py` fills it.

    Attributes:
        family: Transformers' ``model_type``.
        config: the (text) config as plain data.
        path: module path of the list of blocks.
        blocks: per block, tensor name (relative) to info: parameters, and buffers (kind ``buffer``).
        attributes: per block, dotted integer attributes of its modules (``self_attn.num_heads`` to 12).
        modules: per block, module name (relative) to class name.
        tp_plan, pp_plan: Transformers' tensor and pipeline parallel plans of the base model (may be empty).
        prefix: the base model's own path in front of ``layers`` (``model``), to match the plans.
        causal: True for decoders.
        shared: tensors (relative names) that several blocks share.
    """

    family: str
    config: Mapping[str, object]
    path: str
    blocks: tuple[Mapping[str, TensorInfo], ...]
    attributes: tuple[Mapping[str, int], ...]
    modules: tuple[Mapping[str, str], ...]
    tp_plan: Mapping[str, str] = field(default_factory=dict)
    pp_plan: Mapping[str, object] = field(default_factory=dict)
    prefix: str = ""
    causal: bool = True
    shared: tuple[str, ...] = ()
