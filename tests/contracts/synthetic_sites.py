"""One block's worth of sites with random weights and evidence, and the same block with its units permuted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.anatomy.types import Matrix, Port, Space
from secateur.engine.probes import (
    BlockOutput,
    Contribution,
    Cosine,
    Evidence,
    Fisher,
    Gradient,
    Gram,
    InputNorm,
    LocalGradient,
    PositionSquares,
    Probe,
    RouterMass,
)
from secateur.methods.base import MatrixSite, UnitSite

HIDDEN, WINDOWS, LENGTH = 12, 3, 5
WHOLE = Space("layer", 1, ())


@dataclass(frozen=True)
class Layer:
    """A block as plain tensors.

    Attributes:
        tensors, grads: per name, stored shape.
        inputs: per (name, expert), what the matrix read: [windows, length, in].
        gates: per expert, the router's weight of each token.
    """

    matrices: Mapping[str, Matrix]
    spaces: Mapping[str, Space]
    tensors: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]
    inputs: Mapping[tuple[str, int], Tensor]
    gates: Mapping[int, Tensor]
    routed: Tensor
    before: Tensor
    after: Tensor
    index: int = 1

    def matrix_sites(self, tensor: str, seed: int = 0) -> list[MatrixSite]:
        m, out = self.matrices[tensor], []
        for e in range(max(m.experts, 1)):
            name = f"layers.{self.index}.{tensor}" + (f"[{e}]" if m.experts else "")
            weight = m.view(self.tensors[tensor], e)
            out.append(MatrixSite(name, weight, m.component, self.index, 4, seeded(seed, name)))
        return out

    def evidence(self, tensor: str, expert: int = 0) -> Evidence:
        m, x = self.matrices[tensor], self.inputs[tensor, expert]
        weight, flat = m.view(self.tensors[tensor], expert), self.inputs[tensor, expert].reshape(-1, x.shape[-1])
        gate = self.gates[expert] if m.experts else None
        probes: dict[type[Probe], Probe] = {p: p() for p in (InputNorm, Gram, Contribution, PositionSquares)}
        probes[InputNorm].update(flat, gate)
        probes[Gram].update(flat, gate)
        probes[Contribution].update(flat, gate, weight)
        probes[PositionSquares].update(x if gate is None else (flat * gate.unsqueeze(1)).unsqueeze(1))
        for kind in (Gradient, LocalGradient, Fisher):
            probes[kind] = kind()
            probes[kind].update(m.view(self.grads[tensor], expert), weight)
        return Evidence(f"{tensor}[{expert}]", probes)

    def unit_site(self, space: str, seed: int = 0) -> UnitSite:
        s = WHOLE if space == "layer" else self.spaces[space]
        touched = [t for t in self.matrices if not s.ports or any(p.tensor == t for p in s.ports)]
        block: dict[type[Probe], Probe] = {p: p() for p in (Cosine, BlockOutput, RouterMass)}
        block[Cosine].update(self.before, self.after)
        block[BlockOutput].update(self.before, self.after)
        block[RouterMass].update(self.routed)
        matrices = {t: self.matrix_sites(t, seed) for t in touched}
        return UnitSite(
            name=f"layers.{self.index}",
            space=s,
            tensors={t: self.tensors[t] for t in touched},
            matrices=matrices,
            evidence={m.name: self.evidence(t, e) for t, sites in matrices.items() for e, m in enumerate(sites)},
            block_evidence=Evidence("block", block),
            transposed=frozenset(t for t, m in self.matrices.items() if m.transposed),
            block=self.index,
            blocks=4,
            generator=seeded(seed, f"layers.{self.index}/{space}"),
        )

    def permuted(self, space: str, order: Tensor) -> Layer:
        """The same function with the units of a space in another order; ``order`` [copies, units]."""
        s = self.spaces[space]
        tensors, grads, inputs = dict(self.tensors), dict(self.grads), dict(self.inputs)
        gates, routed = dict(self.gates), self.routed
        for port in s.ports:
            tensors[port.tensor] = _moved(tensors[port.tensor], port, s, order)
            if port.tensor in grads:
                grads[port.tensor] = _moved(grads[port.tensor], port, s, order)
                m = self.matrices[port.tensor]
                if port.role == "read":
                    for e in range(max(m.experts, 1)):
                        x = inputs[port.tensor, e].movedim(-1, 0)
                        own = order[e : e + 1] if port.copy_axis is not None else order
                        alone = replace(s, copies=len(own))
                        flat = replace(port, axis=0, copy_axis=None)
                        inputs[port.tensor, e] = _moved(x, flat, alone, own).movedim(0, -1)
        if space == "expert":
            at = order[0].tolist()
            gates, routed = {e: self.gates[o] for e, o in enumerate(at)}, self.routed[:, order[0]]
            inputs |= {(t, e): self.inputs[t, at[e]] for t, e in self.inputs if self.matrices[t].experts}
        return replace(self, tensors=tensors, grads=grads, inputs=inputs, gates=gates, routed=routed)


def seeded(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1000 + sum(map(ord, name)))


def _moved(tensor: Tensor, port: Port, space: Space, order: Tensor) -> Tensor:
    out = tensor.clone()
    units = torch.arange(space.size)
    for copy in range(space.copies):
        to, come = port.entries(units, copy), port.entries(order[copy], copy)
        if port.copy_axis is None:
            out.index_copy_(port.axis, to, tensor.index_select(port.axis, come))
        else:
            axis = port.axis - int(port.copy_axis < port.axis)
            part = tensor.select(port.copy_axis, copy)
            out.select(port.copy_axis, copy).index_copy_(axis, to, part.index_select(axis, come))
    return out


def _layer(matrices: list[Matrix], spaces: list[Space], extra: Mapping[str, tuple[int, ...]], seed: int) -> Layer:
    g = torch.Generator().manual_seed(seed)
    tensors, inputs = {}, {}
    for m in matrices:
        shape = m.shape[::-1] if m.transposed else m.shape
        tensors[m.tensor] = torch.randn((m.experts, *shape) if m.experts else shape, generator=g)
        for e in range(max(m.experts, 1)):
            inputs[m.tensor, e] = torch.randn(WINDOWS, LENGTH, m.shape[1], generator=g)
    grads = {t: torch.randn(w.shape, generator=g) for t, w in tensors.items()}
    tensors |= {t: torch.randn(shape, generator=g) for t, shape in extra.items()}
    experts = max((m.experts for m in matrices), default=0)
    gates = {e: torch.rand(WINDOWS * LENGTH, generator=g) for e in range(experts)}
    return Layer(
        matrices={m.tensor: m for m in matrices},
        spaces={s.name: s for s in spaces},
        tensors=tensors,
        grads=grads,
        inputs=inputs,
        gates=gates,
        routed=torch.rand(WINDOWS * LENGTH, max(experts, 1), generator=g),
        before=torch.randn(WINDOWS * LENGTH, HIDDEN, generator=g),
        after=torch.randn(WINDOWS * LENGTH, HIDDEN, generator=g),
    )


def llama(seed: int = 0) -> Layer:
    """Grouped-query attention (2 groups of 2 heads of 3) and a gated feed-forward part of 10 neurons."""
    matrices = [
        Matrix("q.weight", "q", (12, HIDDEN), component="attention"),
        Matrix("k.weight", "k", (6, HIDDEN), component="attention"),
        Matrix("v.weight", "v", (6, HIDDEN), component="attention"),
        Matrix("o.weight", "o", (HIDDEN, 12), component="attention"),
        Matrix("gate.weight", "gate", (10, HIDDEN), component="ffn"),
        Matrix("up.weight", "up", (10, HIDDEN), component="ffn"),
        Matrix("down.weight", "down", (HIDDEN, 10), component="ffn"),
    ]
    ffn = Space(
        "ffn", 10, (Port("gate.weight", 0, "write"), Port("up.weight", 0, "write"), Port("down.weight", 1, "read"))
    )
    group = Space(
        "kv_group",
        2,
        (
            Port("q.weight", 0, "write", width=6),
            Port("k.weight", 0, "write", width=3),
            Port("v.weight", 0, "write", width=3),
            Port("o.weight", 1, "read", width=6),
        ),
    )
    head = Space(
        "head",
        2,
        (Port("q.weight", 0, "write", width=3, copy_stride=6), Port("o.weight", 1, "read", width=3, copy_stride=6)),
        copies=2,
    )
    return _layer(matrices, [ffn, group, head], {}, seed)


def gpt2(seed: int = 0) -> Layer:
    """Fused, transposed attention (4 heads of 3) and a plain feed-forward part of 10 neurons with a bias."""
    matrices = [
        Matrix("attn.weight", "attn", (36, HIDDEN), True, component="attention"),
        Matrix("proj.weight", "proj", (HIDDEN, 12), True, component="attention"),
        Matrix("fc.weight", "fc", (10, HIDDEN), True, component="ffn"),
        Matrix("out.weight", "out", (HIDDEN, 10), True, component="ffn"),
    ]
    ffn = Space("ffn", 10, (Port("fc.weight", 1, "write"), Port("fc.bias", 0, "write"), Port("out.weight", 0, "read")))
    ports = tuple(Port("attn.weight", 1, "write", width=3, start=s) for s in (0, 12, 24))
    head = Space("head", 4, (*ports, Port("proj.weight", 0, "read", width=3)))
    return _layer(matrices, [ffn, head], {"fc.bias": (10,)}, seed)


def mixtral(seed: int = 0) -> Layer:
    """Four experts of 6 gated neurons in 3-D stacks, and a router."""
    matrices = [
        Matrix("experts.gate_up_proj", "experts", (12, HIDDEN), experts=4, component="ffn"),
        Matrix("experts.down_proj", "experts", (HIDDEN, 6), experts=4, component="ffn"),
    ]
    ffn = Space(
        "ffn",
        6,
        (
            Port("experts.gate_up_proj", 1, "write", copy_axis=0),
            Port("experts.gate_up_proj", 1, "write", start=6, copy_axis=0),
            Port("experts.down_proj", 2, "read", copy_axis=0),
        ),
        copies=4,
    )
    ports = ("router.weight", "experts.gate_up_proj", "experts.down_proj")
    expert = Space("expert", 4, tuple(Port(t, 0, "write") for t in ports), silence="router", minimum=2)
    return _layer(matrices, [ffn, expert], {"router.weight": (4, HIDDEN)}, seed)


LAYERS = {"llama": llama, "gpt2": gpt2, "mixtral": mixtral}
