"""Ear: the probes attached to one block while calibration batches pass through it.

Matrices that read the same input share one statistic of it. The first batch tells in which order the matrices are
reached; later batches may stop inside the block as soon as the last of them has been heard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Block
from secateur.engine.host.experts import Heard, listening
from secateur.engine.probes import Evidence, LocalGradient, Probe


def site_name(block: Block, tensor: str, expert: int | None = None) -> str:
    """Full name of a matrix site (``model.layers.0.mlp.up_proj.weight``, ``[e]`` appended for an expert)."""
    return f"{block.name}.{tensor}" + ("" if expert is None else f"[{expert}]")


class Enough(BaseException):
    """Every statistic of this batch is gathered: the rest of the block need not run."""


class Ear:
    """Listens to one block, batch by batch:

        for x in batches:
            with ear.listening():
                ear.begin(x, stop=True)     # may then raise `Enough` out of the block's forward
                ...                         # run the block on x

    Args:
        block, module: what is listened to; nothing of it is changed.
        needs: probe classes to fill; ``block`` and ``gradient`` kinds are fed by the caller (`block_probes`,
            `gradients`), all others by hooks.
        aim: how far from the inputs to the dense stream's lies what paired statistics hold the inputs against.

    Attributes:
        evidence: filled while listening, by site name (see `site_name`).
        block_evidence: of the block as a whole and of its router.
    """

    def __init__(self, block: Block, module: nn.Module, needs: Sequence[type[Probe]], aim: float = 1.0) -> None:
        self.block, self.module, self.aim = block, module, aim
        kinds = {p: p.kind for p in needs}
        self.input = [p for p, k in kinds.items() if k == "input"]
        self.positions = [p for p, k in kinds.items() if k == "positions"]
        self.weighted = [p for p, k in kinds.items() if k == "weighted"]
        self.paired = [p for p, k in kinds.items() if k == "paired"]
        self.local = [p for p in kinds if issubclass(p, LocalGradient)]
        self.block_probes: dict[type[Probe], Probe] = {p: p() for p, k in kinds.items() if k == "block"}
        self.router: dict[type[Probe], Probe] = {p: p() for p, k in kinds.items() if k == "router"}
        self.evidence: dict[str, Evidence] = {}
        self.block_evidence = Evidence(block.name, self.block_probes | self.router)
        self.modules: dict[str, list[Any]] = {}
        for m in block.matrices:
            self.modules.setdefault(m.module, []).append(m)
        self.beside: dict[str, Tensor] = {}  # module -> what the dense stream has there; see `overhearing`
        self.leader: dict[str, str] = {}  # module -> the earlier one that reads the very same input
        self.heard: list[tuple[str, Tensor, int]] = []  # module, its input, the input's version then
        self.order: list[str] = []
        self.stop_at: str | None = None
        self.stop = False

    def probes(self) -> list[Probe]:
        """Every distinct statistic, in an order that all processes share."""
        seen: dict[int, Probe] = {id(p): p for p in (self.block_probes | self.router).values()}
        for name in sorted(self.evidence):
            seen |= {id(p): p for p in self.evidence[name].values()}
        return list(seen.values())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Attach; on exit nothing is left behind but the statistics, which the next time adds to."""
        if not (self.input or self.positions or self.weighted or self.paired or self.router or self.local):
            yield
            return
        with ExitStack() as stack:
            for name, matrices in self.modules.items():
                part = self.module.get_submodule(name)
                new = site_name(self.block, matrices[0].tensor, 0 if matrices[0].experts else None) not in self.evidence
                if matrices[0].experts:
                    if new:
                        self._start_experts(matrices)
                    hook, other = self._expert_hook(matrices), partial(self.beside.get, name)
                    stack.enter_context(listening(part, hook, self._routed, other))
                else:
                    if new:
                        self._start(matrices)
                    handle = part.register_forward_pre_hook(self._hook(name, matrices))
                    stack.callback(handle.remove)
            yield

    @contextmanager
    def overhearing(self) -> Iterator[None]:
        """Note every matrix's input in the forward of this context: what paired statistics hold the next one's
        inputs against. It must be of the same tokens."""
        self.beside.clear()
        noted: list[tuple[Tensor, int, Tensor]] = []  # an input, its version then, its copy: the block may change it
        with ExitStack() as stack:
            for name in self.modules if self.paired else ():

                def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                    x = (args[0] if args else next(iter(kwargs.values()))).detach()
                    copy = next((c for h, version, c in noted if _same(h, x) and version == x._version), None)
                    if copy is None:
                        copy = x.clone()
                        noted.append((x, x._version, copy))
                    self.beside[name] = copy

                part = self.module.get_submodule(name)
                stack.callback(part.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def begin(self, x: Tensor, stop: bool) -> None:
        """A new batch is about to enter the block."""
        if self.order and self.stop_at is None:
            self.stop_at = self.order[-1]
        self.batch_shape = x.shape
        self.stop = stop and self.stop_at is not None and not self.modules[self.stop_at][0].experts
        self.first = self.stop_at is None
        self.heard.clear()

    def _start(self, matrices: list[Any]) -> None:
        for m in matrices:
            kinds = (*self.input, *self.positions, *self.paired, *self.weighted)
            own: dict[type[Probe], Probe] = {p: p() for p in kinds}
            name = site_name(self.block, m.tensor)
            own |= {p: p() for p in self.local}
            self.evidence[name] = Evidence(name, own)

    def _start_experts(self, matrices: list[Any]) -> None:
        for m in matrices:
            weight = self.module.get_parameter(m.tensor)
            empty = torch.zeros(0, m.shape[1], device=weight.device)
            for e in range(m.experts):
                own: dict[type[Probe], Probe] = {}
                for p in self.input:  # an expert that no token reaches has sums too: zero
                    own[p] = p()
                    own[p].update(empty, None)
                for p in self.positions:
                    own[p] = p()
                    own[p].update(empty.unsqueeze(1))
                for p in self.paired:
                    own[p] = p()
                    own[p].update(empty, None, empty)
                for p in self.weighted:
                    own[p] = p()
                    own[p].update(empty, None, m.view(weight, e))
                own |= {p: p() for p in self.local}
                name = site_name(self.block, m.tensor, e)
                self.evidence[name] = Evidence(name, own)

    def _hook(self, name: str, matrices: list[Any]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(part: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            if self.first:
                self.order.append(name)
                leader = next((n for n, h, version in self.heard if _same(h, x) and version == x._version), None)
                self.heard.append((name, x, x._version))
                if leader is not None:
                    self.leader[name] = leader
            if name in self.leader:
                self._follow(self.leader[name], matrices)
            with _in_full(x):
                self._update(matrices, x, self.beside.get(name), shared=name in self.leader)
            if self.stop and name == self.stop_at:
                raise Enough

        return hook

    def _follow(self, leader: str, matrices: list[Any]) -> None:
        """Point the input statistics of these matrices at the leader's."""
        first = self.evidence[site_name(self.block, self.modules[leader][0].tensor)]
        for m in matrices:
            name = site_name(self.block, m.tensor)
            mine = self.evidence[name]
            shared = (*self.input, *self.positions, *self.paired)
            if all(mine[p] is first[p] for p in shared):
                continue
            common = {p: first[p] for p in shared}
            self.evidence[name] = Evidence(name, {**dict(mine.items()), **common})

    def _update(self, matrices: list[Any], x: Tensor, dense: Tensor | None, shared: bool) -> None:
        flat = x.reshape(-1, x.shape[-1])
        for at, m in enumerate(matrices):
            evidence = self.evidence[site_name(self.block, m.tensor)]
            if not shared and at == 0:
                for p in self.input:
                    evidence[p].update(flat, None)
                for p in self.positions:
                    evidence[p].update(flat.reshape(*self.batch_shape[:-1], -1))
                for p in self.paired:
                    evidence[p].update(flat, None, self._aimed(flat, dense))
            for p in self.weighted:
                weight = m.view(self.module.get_parameter(m.tensor))
                evidence[p].update(flat, None, weight)

    def _aimed(self, x: Tensor, dense: Tensor | None) -> Tensor:
        assert dense is not None, "paired statistics need both streams"
        dense = dense.detach().reshape(x.shape)
        return dense if self.aim == 1 else torch.lerp(x, dense, self.aim)

    def _expert_hook(self, matrices: list[Any]) -> Heard:
        by_name = {m.tensor.rsplit(".", 1)[-1]: m for m in matrices}
        where = matrices[0].module

        def heard(name: str, expert: int, x: Tensor, gate: Tensor, dense: Tensor | None) -> None:
            if self.first and (not self.order or self.order[-1] != where):
                self.order.append(where)
            m = by_name[name]
            evidence = self.evidence[site_name(self.block, m.tensor, expert)]
            x, gate = x.detach(), gate.detach()
            with _in_full(x):
                for p in self.input:
                    evidence[p].update(x, gate)
                for p in self.positions:
                    evidence[p].update((x * gate.unsqueeze(-1)).unsqueeze(1))
                for p in self.paired:
                    evidence[p].update(x, gate, self._aimed(x, dense))
                for p in self.weighted:
                    evidence[p].update(x, gate, m.view(self.module.get_parameter(m.tensor), expert))

        return heard

    def _routed(self, weights: Tensor) -> None:
        for probe in self.router.values():
            probe.update(weights)

    def gradients(self, output: Tensor) -> None:
        """Add the gradient of the norm of the block's output to every matrix's evidence."""
        params = [(m, self.module.get_parameter(m.tensor)) for m in self.block.matrices]
        grads = torch.autograd.grad(output.float().norm(), [p for _, p in params], allow_unused=True)
        for (m, weight), grad in zip(params, grads, strict=True):
            grad = torch.zeros_like(weight) if grad is None else grad
            for e in range(max(m.experts, 1)):
                evidence = self.evidence[site_name(self.block, m.tensor, e if m.experts else None)]
                for p in self.local:
                    evidence[p].update(m.view(grad, e), m.view(weight.detach(), e))


def _in_full(x: Tensor) -> AbstractContextManager[Any]:
    """Statistics are summed in fp32 or better, whatever the passes' products are made in."""
    return torch.autocast(x.device.type, enabled=False)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two inputs are the same memory (both are still held, so pointers identify)."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
