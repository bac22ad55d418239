"""Where a repair meets a block: which matrices it is handed, and where what it answers goes.

Weights are mended where single weights were chosen. Of a space of units, the matrices that read the units are mended
(``down_proj`` of an FFN, ``o_proj`` of heads) over the columns that stay, before the units are masked or cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Block, Matrix, Space
from secateur.engine.apply import get_tensor, port_mask
from secateur.engine.distribute import seeded
from secateur.engine.host.capture import Call
from secateur.engine.probes import Evidence
from secateur.engine.walk import Activations, Stream, Visit
from secateur.errors import SecateurError
from secateur.methods.base import Keep, MatrixRepair, MatrixSite, Part, PartRepair
from secateur.methods.sites import matrix_sites, stored

Sites = Mapping[Matrix, Sequence[MatrixSite]]


def bias_of(matrix: Matrix) -> str:
    """The bias beside a matrix, by its name in the block."""
    return f"{matrix.tensor}_bias" if matrix.experts else matrix.tensor.removesuffix("weight") + "bias"


def read_matrices(block: Block, space: Space) -> list[Matrix]:
    """The matrices that read a space's units."""
    reads = {port.tensor for port in space.ports if port.role == "read"}
    return [m for m in block.matrices if m.tensor in reads]


def mend_weights(repair: MatrixRepair, visit: Visit, sites: Sites, kept: Mapping[str, Keep]) -> dict[str, Keep]:
    """The decisions with mended values; biases are changed in the block at once.

    Args:
        sites: per matrix, its sites (several for experts); their weights are those before anything was pruned.
        kept: decisions by site name.
    """
    places = [(m, e, s) for m, own in sites.items() for e, s in enumerate(own) if not bool(kept[s.name].mask.all())]
    parts = [s for _, _, s in places]
    evidence = [visit.evidence.get(s.name, Evidence(s.name)) for s in parts]
    out = dict(kept)
    answers = repair.mend_many(parts, evidence, [kept[s.name] for s in parts])
    for (m, e, s), mended in zip(places, answers, strict=True):
        if mended.weight is not None:
            out[s.name] = replace(kept[s.name], weight=mended.weight)
        if mended.bias is not None:
            bias = get_tensor(visit.module, bias_of(m)).data
            (bias[e] if m.experts else bias).add_(mended.bias.to(bias.dtype))
    return out


def mend_readers(repair: MatrixRepair, visit: Visit, space: Space, keep: Tensor, seed: int = 0) -> None:
    """Mend the matrices that read a space's units, for the units that stay; the block's other tensors are not touched.

    Args:
        keep: booleans of ``space.shape``.

    Raises:
        SecateurError: no matrix reads these units.
    """
    if bool(keep.all()):
        return
    if not read_matrices(visit.block, space):
        raise SecateurError(
            f"no matrix of {visit.block.name} reads {space.name} units, so none can be mended",
            received=type(repair).__name__,
            works="--repair local_reconstruction, or none",
        )
    sites: dict[Matrix, list[MatrixSite]] = {}
    kept: dict[str, Keep] = {}
    for m in read_matrices(visit.block, space):
        shape = visit.module.get_parameter(m.tensor).shape
        mask = torch.ones(shape, dtype=torch.bool)
        for port in space.ports:
            if port.tensor == m.tensor and port.role == "read":
                mask &= port_mask(port, space, keep, shape)
        sites[m] = list(matrix_sites(visit, [m], 0, seed))
        kept |= {s.name: Keep(m.view(mask, e).to(s.weight.device)) for e, s in enumerate(sites[m])}
    mended = mend_weights(repair, visit, sites, kept)
    for m, own in sites.items():
        new = [mended[s.name].weight for s in own]
        if any(w is not None for w in new):
            values = stored(m, [s.weight if w is None else w for s, w in zip(own, new, strict=True)])
            visit.module.get_parameter(m.tensor).data.copy_(values)


def entries_left(block: Block, module: nn.Module, space: Space, keep: Tensor, cut: bool) -> dict[str, Tensor]:
    """Per matrix that a space's units live in, which of its entries hold something: all of them after a cut.

    Args:
        keep: booleans of ``space.shape``; if all stay, there is nothing to tell.
    """
    ports = [p for p in space.ports if p.tensor in {m.tensor for m in block.matrices} and not bool(keep.all())]
    left: dict[str, Tensor] = {}
    for port in ports:
        shape = module.get_parameter(port.tensor).shape
        mask = left.setdefault(port.tensor, torch.ones(shape, dtype=torch.bool))
        if not cut:
            mask &= port_mask(port, space, keep, shape)
    return left


def sublayer(block: Block, component: str) -> str:
    """The module that holds all of a component's matrices ("" is the block itself), with the router of its experts."""
    names = []
    for m in block.matrices:
        if m.component == component:
            words = m.module.split(".")
            names.append(words[:-1] if m.experts or len(words) > 1 else [])
    common: list[str] = []
    for level in zip(*names, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


@dataclass(frozen=True)
class Fitted:
    """What a fit of one sub-layer or block came to: its relative squared error before and after."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class _Examples:
    """What a part is called with, and what it should answer, window by window."""

    stream: Stream
    inputs: Callable[[int], Tensor]
    call: Callable[[int], Call]
    target: Callable[[int], Tensor]
    clear: Callable[[], None] = lambda: None

    def output(self, part: nn.Module) -> Callable[[int], Tensor]:
        return lambda i: self.stream.run(part, self.inputs(i), self.call(i))


class Fitter:
    """Fits a block's sub-layers, or the block, by their activations. Made before the block is changed.

    Args:
        repair: what fits.
        visit: the block; its walk must keep inputs.
        dense: the sub-layers are fitted on the dense block's own inputs.
        seed: the recipe's.
    """

    def __init__(self, repair: PartRepair, visit: Visit, dense: bool, seed: int) -> None:
        assert visit.stream is not None, "this repair needs a walk that keeps inputs"
        self.repair, self.visit, self.on_dense, self.seed = repair, visit, dense, seed
        self.stream: Stream = visit.stream
        self.teacher = (
            visit.module if repair.whole else copy.deepcopy(visit.module)
        )  # whole ones were heard by the walk

    def fit(self, keeps: Mapping[str, Tensor]) -> list[Fitted]:
        """Fit every part that has pruned matrices, in the order of the block.

        Args:
            keeps: per pruned tensor, booleans of its shape as it is now.
        """
        block, module = self.visit.block, self.visit.module
        found = []
        for name, own in self._parts(keeps):
            examples = self._whole() if self.repair.whole else self._sublayer(name)
            part, full = (module.get_submodule(name) if name else module), f"{block.name}.{name}".rstrip(".")
            weights = {tensor: module.get_parameter(tensor) for tensor in own}
            masks = {tensor: keeps[tensor] for tensor in own}
            problem = Part(
                full, weights, masks, len(self.stream), examples.output(part), examples.target, seeded(self.seed, full)
            )
            try:
                found.append(Fitted(full, *self.repair.fit(problem)))
            finally:
                examples.clear()
        return found

    def _parts(self, keeps: Mapping[str, Tensor]) -> list[tuple[str, list[str]]]:
        """The modules to fit, in order ("" is the block), and the pruned tensors of each."""
        block, parts = self.visit.block, list[tuple[str, list[str]]]()
        if self.repair.whole:
            own = [m.tensor for m in block.matrices if m.tensor in keeps]
            return [("", own)] if own else []
        for component in dict.fromkeys(m.component for m in block.matrices):
            own = [m.tensor for m in block.matrices if m.component == component and m.tensor in keeps]
            if own:
                parts.append((sublayer(block, component), own))
        return parts

    def _whole(self) -> _Examples:
        """The block's own inputs, and what the dense model has behind it."""
        return _Examples(self.stream, self.stream.inputs, self.stream.call, self.stream.answer)

    @torch.no_grad()
    def _sublayer(self, name: str) -> _Examples:
        """What the sub-layer reads (and how it is called), and what it should answer, window by window."""
        stream = self.stream
        spill = stream.spill and stream.spill / "parts"
        inputs, targets = Activations(spill and spill / "in"), Activations(spill and spill / "out")
        calls = []
        source = self.teacher if self.on_dense else self.visit.module
        teacher = self.teacher.get_submodule(name) if name else self.teacher
        for b in range(len(stream)):
            x, call = stream.inputs(b), stream.call(b)
            d = stream.dense(b)
            heard, how = self._heard(source, name, x, call)
            inputs.append(heard)
            calls.append(how)
            if d is not x and not torch.equal(d, x):
                heard, how = self._heard(self.teacher, name, d, call)
            targets.append(stream.run(teacher, heard, how).float())

        def held(i: int, where: Activations) -> Tensor:
            return where[i].to(next(self.visit.module.parameters()).device)

        def clear() -> None:
            inputs.clear()
            targets.clear()

        return _Examples(stream, lambda i: held(i, inputs), calls.__getitem__, lambda i: held(i, targets), clear)

    def _heard(self, module: nn.Module, name: str, x: Tensor, call: Call) -> tuple[Tensor, Call]:
        """The hidden states that a sub-layer is called with when the block is run on x, and the rest of the call."""
        if not name:
            return x, call
        heard: list[tuple[Tensor, Call]] = []

        def hook(part: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            if args and torch.is_tensor(args[0]):
                heard.append((args[0].clone(), Call(args[1:], kwargs, None)))
                return
            word = next(k for k, v in kwargs.items() if torch.is_tensor(v) and v.is_floating_point())
            value = kwargs[word]
            assert torch.is_tensor(value)
            heard.append((value.clone(), Call(args, {k: v for k, v in kwargs.items() if k != word}, word)))

        handle = module.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self.stream.run(module, x, call)
        finally:
            handle.remove()
        if len(heard) != 1:
            raise SecateurError(
                f"{self.visit.block.name}.{name} is not called once in its layer, so it cannot be fitted alone",
                received=f"{len(heard)} calls",
                works="--repair least_squares",
            )
        return heard[0]
