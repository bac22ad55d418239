"""Every site of a step at several levels: made once by the step's own method, kept packed, put into a model on demand.

The levels are made on the dense model's activations, block by block. A block's file, beside the output, holds a bit per
weight or unit for each level, and where the method or a repair changes what stays, those values (bf16, zeros left out);
a file that is there is complete. A repair that fits whole sub-layers is left for later: it sees all their matrices at
once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Block
from secateur.engine.apply import get_tensor, mask_block
from secateur.engine.ear import site_name
from secateur.engine.headers import Entry, read_header
from secateur.engine.plan import Bits
from secateur.engine.probes import walked
from secateur.engine.reading import Reader
from secateur.engine.silence import Silence
from secateur.engine.store import Store
from secateur.engine.walk import Visit
from secateur.engine.write import write_tensors
from secateur.methods.base import SiteInfo
from secateur.methods.budgets.protected import Protected
from secateur.methods.mending import bias_of
from secateur.methods.sites import block_matrices
from secateur.search.ladders import Ladder, Rungs, closed, ladders
from secateur.sparse.formats import Packed, pack, unpack
from secateur.stage import Stage

VALUES = torch.bfloat16
PARTS = ("mask", "offsets", "values")


@dataclass(frozen=True)
class Site:
    """One site of the search.

    Attributes:
        units: kept at level 0.
    """

    info: SiteInfo
    ladder: Ladder
    units: int

    def count(self, level: int) -> int:
        """Units kept at a level."""
        return self.units + level * self.ladder.step // round(self.info.cost)


def sites_of(stage: Stage, levels: int, share: float) -> list[Site]:
    """The step's sites with their ladders; what is protected has one level."""
    counts, budget = stage.counts(), stage.parts.budget
    infos = stage.infos
    rungs = [
        Rungs(
            size=i.units * round(i.cost),
            group=max(i.groups, 1) * round(i.cost),
            kept=counts[i.name] * round(i.cost),
            least=i.minimum * round(i.cost),
        )
        for i in infos
    ]
    made = [
        closed(ladder) if isinstance(budget, Protected) and budget.covers(info) else ladder
        for info, ladder in zip(infos, ladders(rungs, levels, share), strict=True)
    ]
    return [Site(i, ladder, counts[i.name]) for i, ladder in zip(infos, made, strict=True)]


@dataclass(frozen=True)
class Value:
    """New values of one tensor, or of one of those stacked in it."""

    tensor: str
    part: int | None
    shape: tuple[int, ...]


class LevelFiles:
    """The levels of every block in a directory.

    Args:
        folder: where the files are.
        sites: all sites, in order.
    """

    def __init__(self, folder: Path, sites: Sequence[Site]) -> None:
        self.folder, self.sites = folder, sites

    def path(self, block: int) -> Path:
        return self.folder / f"search-levels-{block:05d}.safetensors"

    def make(self, stage: Stage) -> None:
        """Make what is not there yet: one walk over the dense model.

        Args:
            stage: of the step, its apply a mask.
        """
        count = len(stage.anatomy.blocks)
        there = {at for at in range(count) if self.path(at).is_file()}
        if len(there) == count:
            return
        stage.store.load_rest(stage.model, "cpu")
        needs = walked(stage.parts.needs_of(choosing=True, fitting=True))
        told = stage.whole.tell(stage.parts.needs)
        phase = f"step {stage.number + 1}, levels"
        for visit in stage.visits(needs, phase, dense=True, told=told, skip=there):
            if not visit.block.index:
                stage.store.release_rest(stage.model)
            if visit.block.index not in there:
                self._write(stage, visit)

    def _write(self, stage: Stage, visit: Visit) -> None:
        own = {s.info.name: (at, s) for at, s in enumerate(self.sites) if s.info.block == visit.block.index}
        dense = {name: value.clone() for name, value in visit.module.state_dict().items()}
        tensors: dict[str, Tensor] = {}
        bits: dict[str, list[int]] = {}
        values: dict[str, list[Any]] = {}
        lows, highs = ([end(s.ladder.levels) for _, s in own.values()] for end in (min, max))
        for level in range(min(lows, default=0), max(highs, default=-1) + 1):
            counts = {n: s.count(min(max(level, s.ladder.low), s.ladder.high)) for n, (_, s) in own.items()}
            plan = stage.prune_block(visit, counts, None)
            for name, mask, changed in _found(stage, visit, plan, dense):
                at, site = own[name]
                if level not in site.ladder.levels:
                    continue
                key = f"{at}/{level}"
                packed = Bits.of(mask)
                tensors[f"{key}/bits"], bits[key] = packed.packed, list(packed.shape)
                for number, (value, new) in enumerate(changed):
                    values[f"{key}/{number}"] = [value.tensor, value.part, list(value.shape)]
                    tensors |= {f"{key}/{number}/{part}": t for part, t in _folded(new).items()}
            _restore(visit.module, dense, stage.silenced)
        said = {"secateur": json.dumps({"levels": 1, "bits": bits, "values": values})}
        write_tensors(self.path(visit.block.index), tensors, metadata=said)

    def remove(self) -> None:
        """Take the files away."""
        for path in self.folder.glob("search-levels-*.safetensors"):
            path.unlink()


Changed = list[tuple[Value, Tensor]]


def _found(
    stage: Stage, visit: Visit, plan: Mapping[str, Tensor], dense: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Changed]]:
    """Per site of a pruned block: its name, what stays (in stored shape), and the tensors that a mask alone does not
    give."""
    step, block, module = stage.step, visit.block, visit.module
    if step.space != "weight":
        for mask in plan.values():
            if stage.parts.repair is None:
                yield block.name, mask, []
                continue
            state = {name: value.clone() for name, value in module.state_dict().items()}
            _restore(module, dense, stage.silenced)
            silenced = mask_block(module, block, {step.space: mask})
            plain = {name: value.clone() for name, value in module.state_dict().items()}
            for handle in silenced:
                handle.remove()
            changed = [
                (Value(name, None, tuple(new.shape)), new)
                for name, new in state.items()
                if name in dict(module.named_parameters()) and not torch.equal(new, plain[name])
            ]
            yield block.name, mask, changed
        return
    for m in block_matrices(block, step.include, step.exclude):
        mask, weight = plan[f"{stage.number}/weight/{block.name}.{m.tensor}"], get_tensor(module, m.tensor)
        for e in range(m.experts) if m.experts else [None]:
            places = [(m.tensor, _part(mask, e).to(weight.device))]
            if bias_of(m) in dense:
                places.append((bias_of(m), torch.ones((), dtype=torch.bool, device=weight.device)))
            changed = []
            for tensor, kept in places:
                new, old = _part(get_tensor(module, tensor), e), _part(dense[tensor], e)
                if not torch.equal(new, old * kept):
                    changed.append((Value(tensor, e, tuple(new.shape)), new.detach()))
            yield site_name(block, m.tensor, e), _part(mask, e), changed


def _part(tensor: Tensor, part: int | None) -> Tensor:
    return tensor if part is None else tensor[part]


def _restore(module: nn.Module, dense: Mapping[str, Tensor], silenced: list[Silence]) -> None:
    for handle in silenced:
        handle.remove()
    silenced.clear()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(dense[name])


def _folded(new: Tensor) -> dict[str, Tensor]:
    """Values as they are kept: vectors plainly, matrices (stacks of them one below the other) without zeros."""
    if new.dim() < 2:
        return {"plain": new.detach().cpu().clone()}  # the module is restored before this is written
    return dict(pack(new.detach().cpu().reshape(-1, new.shape[-1]), VALUES, "bitmask").parts)


class Switchboard:
    """A model whose sites are set to levels; only what differs is written.

    The dense weights of all that changes stay in memory beside it, in the dtype they are stored in.

    Args:
        files: complete.
        stage: of the step; its skeleton is filled here.
    """

    def __init__(self, files: LevelFiles, stage: Stage) -> None:
        self.files, self.stage, self.sites = files, stage, files.sites
        self.model: Any = stage.store.skeleton()
        stage.store.load_whole(self.model, stage.at.device)
        self.blocks: list[Block] = list(stage.anatomy.blocks)
        self.modules = list(self.model.get_submodule(stage.anatomy.path).children())
        self._entries: dict[str, Entry] = {}
        self._bits: dict[str, tuple[int, ...]] = {}
        self._values: dict[str, list[tuple[str, Value]]] = {}
        touched: dict[int, set[str]] = {b.index: set() for b in self.blocks}
        for block in self.blocks:
            header = read_header(files.path(block.index))
            said = json.loads(header.metadata["secateur"])
            self._entries |= header.tensors
            self._bits |= {key: tuple(shape) for key, shape in said["bits"].items()}
            for key, (tensor, part, shape) in said["values"].items():
                self._values.setdefault(key.rpartition("/")[0], []).append((key, Value(tensor, part, tuple(shape))))
                touched[block.index].add(tensor)
            touched[block.index] |= self._masked(block)
        self._dense = [_kept(stage.store, b, self.modules[b.index], touched[b.index]) for b in self.blocks]
        self._silenced: dict[int, list[Silence]] = {}
        self._now: dict[int, int] = {}

    def _masked(self, block: Block) -> set[str]:
        space = self.stage.step.space
        if space == "weight":
            return {m.tensor for m in block_matrices(block, self.stage.step.include, self.stage.step.exclude)}
        return {p.tensor for p in block.spaces[space].ports if p.role != "norm"} if space in block.spaces else set()

    def set(self, levels: Sequence[int]) -> None:
        """Bring every site to its level."""
        with Reader(self._entries) as reader, torch.no_grad():
            for at, level in enumerate(levels):
                if self._now.get(at) != level:
                    self._bring(at, level, reader)
                    self._now[at] = level

    def _bring(self, at: int, level: int, reader: Reader) -> None:
        info, key = self.sites[at].info, f"{at}/{level}"
        module, block, dense = self.modules[info.block], self.blocks[info.block], self._dense[info.block]
        mask = Bits(reader.read(self._entries[f"{key}/bits"]), self._bits[key]).mask()
        if self.stage.step.space == "weight":
            tensor, part = _split(info.name.removeprefix(f"{block.name}."), dense)
            weight = _part(get_tensor(module, tensor), part)
            weight.copy_(_part(dense[tensor], part)).mul_(mask.to(weight.device))
            for name in {v.tensor for k in self._levels(at) for _, v in self._values.get(k, []) if v.tensor != tensor}:
                _part(get_tensor(module, name), part).copy_(_part(dense[name], part))
        else:
            for handle in self._silenced.pop(at, []):
                handle.remove()
            for name, old in dense.items():
                get_tensor(module, name).copy_(old)
            self._silenced[at] = mask_block(module, block, {self.stage.step.space: mask})
        for entry, value in self._values.get(key, []):
            _part(get_tensor(module, value.tensor), value.part).copy_(self._unfolded(entry, value, reader))

    def _levels(self, at: int) -> list[str]:
        return [f"{at}/{level}" for level in self.sites[at].ladder.levels]

    def _unfolded(self, key: str, value: Value, reader: Reader) -> Tensor:
        if len(value.shape) < 2:
            return reader.read(self._entries[f"{key}/plain"])
        parts = {part: reader.read(self._entries[f"{key}/{part}"]) for part in PARTS}
        rows = Bits(torch.empty(0), value.shape).size // value.shape[-1]
        return unpack(Packed("bitmask", (rows, value.shape[-1]), VALUES, parts)).reshape(value.shape)


class Layers:
    """A model whose layers stay (level 0 or 1, by what was kept) or go; see `Switchboard`.

    Args:
        keep: booleans of the layers at level 0.
    """

    def __init__(self, stage: Stage, keep: Tensor) -> None:
        self.keep = keep.tolist()
        self.model: Any = stage.store.skeleton()
        stage.store.load_whole(self.model, stage.at.device)
        self.blocks = list(stage.anatomy.blocks)
        self.modules = list(self.model.get_submodule(stage.anatomy.path).children())
        self._dense = [_kept(stage.store, b, self.modules[b.index], set(b.outputs)) for b in self.blocks]
        self._now: dict[int, int] = {}

    def set(self, levels: Sequence[int]) -> None:
        with torch.no_grad():
            for at, level in enumerate(levels):
                if self._now.get(at) != level:
                    for name, old in self._dense[at].items():
                        get_tensor(self.modules[at], name).copy_(old)
                    mask_block(self.modules[at], self.blocks[at], {"layer": torch.tensor(self.keep[at] + level == 1)})
                    self._now[at] = level


def _kept(store: Store, block: Block, module: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Copies of some of a block's tensors in the dtype they are stored in."""
    out = {}
    for name in sorted(names):
        value = get_tensor(module, name).detach()
        parameter = name in dict(module.named_parameters())
        out[name] = value.to(store.dtype_of(f"{block.name}.{name}"), copy=True) if parameter else value.clone()
    return out


def _split(name: str, dense: Mapping[str, Tensor]) -> tuple[str, int | None]:
    """``experts.up_proj[3]`` as a tensor and a part of it."""
    if name in dense:
        return name, None
    tensor, _, number = name.removesuffix("]").rpartition("[")
    return tensor, int(number)


def as_mask(stage: Stage) -> Stage:
    """The stage with its units masked instead of cut, on a skeleton of its own."""
    step = replace(stage.step, apply="mask")
    return Stage(stage.store, step, stage.number, stage.at)
