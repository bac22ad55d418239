"""Store: a model's weights, read when they are needed: block by block from shards, or from memory.

One class for both sources. Shards are read with plain reads into fresh memory (64-byte aligned, as torch allots
it), never through a memory map: results are then bit-reproducible and a file's pages do not count as ours.
Opening reads config and headers only, and finds every contradiction between them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.headers import Entry, read_headers, read_json, refuse_quantised
from secateur.engine.host import convert
from secateur.engine.host.build import describe_skeleton, skeleton_model, text_config
from secateur.engine.host.carry import merged_config
from secateur.engine.host.origin import Origin, built, candidates, load_gguf, plain_config, raw_config, read_config
from secateur.engine.packed_files import PackedEntry, is_packed, read_packed
from secateur.engine.ragged import cut_to_sizes, read_sizes
from secateur.engine.reading import Reader, check_finite
from secateur.errors import SecateurError

RECORD = "secateur.json"


class Store:
    """Weights of one model, and the skeleton they fit.

    Attributes:
        origin: where it came from; None for a model in memory.
        config: Transformers' config (dense, where blocks have their own sizes).
        raw: the config as JSON data, as it was on disk.
        blocks_path: module path of the list of blocks.
        sizes: units per block and space, where blocks have their own (a ragged checkpoint of ours).
        left_out: tensors on disk that this architecture does not use.
        packed: whether it is a packed checkpoint; tensors are unpacked as they are loaded.
        dtype: what float tensors are loaded as; None: as stored.
        added: parameters that no file holds and that begin as zeros, with the dtype they will be written in.
    """

    def __init__(self, model: nn.Module, origin: Origin | None, dtype: torch.dtype | None) -> None:
        """Use `Store.open` or `Store.of_model`; this only sets what both have in common."""
        self.origin, self.dtype = origin, dtype
        self.config: Any = model.config
        self.raw: dict[str, Any] = {}
        self.sizes: dict[str, dict[str, int]] = {}
        self.left_out: tuple[str, ...] = ()
        self.packed = False
        self.blocks_path = describe_skeleton(model).path
        self.blocks = sum(1 for _ in model.get_submodule(self.blocks_path).children())
        self._model = model  # on the meta device, or the model in memory
        self._entries: dict[str, Entry] = {}
        self._groups: dict[int | None, list[convert.Group]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self.added: dict[str, torch.dtype] = {}
        self._absent: set[str] = set()
        self._added_prefix = False
        self._memory: dict[str, Tensor] | None = None
        self._copy = True

    @classmethod
    def open(cls, origin: Origin, dtype: torch.dtype | None = torch.float32) -> Store:
        """Open a checkpoint: config and headers of shards, all of a GGUF file.

        Raises:
            SecateurError: anything wrong with config or headers, before a weight is read.
        """
        if origin.kind == "gguf":
            store = cls.of_model(load_gguf(origin), dtype)
            store.origin, store._copy = origin, False
            return store
        config = read_config(origin)
        raw = raw_config(origin)
        packed = is_packed(origin.path, raw)
        entries = read_packed(origin.path, raw) if packed else read_headers(origin.path)
        refuse_quantised(entries)
        layers = getattr(text_config(config), "num_hidden_layers", None)
        if isinstance(layers, int) and layers > len(entries):
            raise SecateurError(
                f"config.json gives {layers} layers, but the weights are {len(entries)} tensors in all",
                received=origin.given,
                works="use the config.json that came with these weights",
            )
        record = origin.path / RECORD
        sizes = read_sizes(read_json(record)) if record.is_file() else {}
        if "per_layer_config" in raw and not sizes:
            raise SecateurError(
                "config.json has sizes per layer, but there is no secateur.json with them",
                received=origin.given,
                works="use a checkpoint as Secateur wrote it",
            )
        names = list(candidates(config)) if not raw.get("architectures") else config.architectures
        faults: list[SecateurError] = []
        for name in names or [None]:
            config.architectures = [name] if name else None
            try:
                return cls._match(origin, config, raw, entries, sizes, dtype)
            except SecateurError as error:
                faults.append(error)
        raise faults[0]

    @classmethod
    def of_model(cls, model: nn.Module, dtype: torch.dtype | None = None) -> Store:
        """A store of a model in memory. Blocks are copied when they are loaded; the model stays as it is."""
        store = cls(model, None, dtype)
        store.raw = plain_config(store.config)
        tied = convert.tied_names(model)
        state = model.state_dict()
        store._memory = {
            name: value
            for name, value in state.items()
            if name not in tied or state[tied[name]].data_ptr() != value.data_ptr()
        }
        store._absent = set(state) - set(store._memory)
        return store

    @classmethod
    def _match(
        cls,
        origin: Origin,
        config: Any,
        raw: dict[str, Any],
        entries: dict[str, Entry],
        sizes: dict[str, dict[str, int]],
        dtype: torch.dtype | None,
    ) -> Store:
        if dtype is not None:
            config.dtype = dtype
        model = built(origin, lambda: skeleton_model(config))
        cut_to_sizes(model, sizes)
        store = built(origin, lambda: cls(model, origin, dtype))
        store.raw, store.sizes, store._entries = raw, sizes, entries
        store.packed = is_packed(origin.path, raw)
        found = convert.correspond(model, {name: (e.dtype, e.shape) for name, e in entries.items()})
        store._absent, store._added_prefix = found.absent, found.added_prefix
        store.left_out = tuple(sorted(found.unexpected))
        store._check(found)
        for group in found.groups:
            store._groups.setdefault(store.block_of(group.first), []).append(group)
            store._dtypes.update(dict.fromkeys(group.shapes, entries[group.sources[0][0]].dtype))
        return store

    def widened(self, model: nn.Module, fields: Mapping[str, Any]) -> Store:
        """The same weights for a skeleton that has more parameters, and the config fields that say so; the new
        parameters begin as zeros and are written in the dtype of the weight beside them."""
        other = copy.copy(self)
        memory = model.state_dict()
        new = sorted(memory.keys() - self._model.state_dict().keys())
        other.added = {n: self.dtype_of(f"{n.rpartition('.')[0]}.weight") for n in new} | self.added
        if self._memory is not None:
            other._memory = self._memory | {n: torch.zeros(memory[n].shape, dtype=other.added[n]) for n in new}
            for name, value in self._model.named_buffers():  # a model in memory knows its buffers' values
                convert.set_tensor(model, name, value)
        other._model, other.config = model, model.config
        other.raw = merged_config(self.raw, self.config, fields, {})
        return other

    @property
    def parameters(self) -> int:
        """Number of parameters, those that are shared once."""
        return sum(p.numel() for p in self._model.parameters())

    def skeleton(self) -> nn.Module:
        """A fresh model on the meta device, at the checkpoint's own sizes."""
        memo: dict[int, Any] = {}
        for value in [*self._model.parameters(), *self._model.buffers()]:
            ghost = torch.empty_like(value, device="meta")
            memo[id(value)] = nn.Parameter(ghost, value.requires_grad) if isinstance(value, nn.Parameter) else ghost
        model: Any = copy.deepcopy(self._model, memo)
        model._weight_conversions = getattr(self._model, "_weight_conversions", None)
        return model.eval()

    def load_rest(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        """Load everything outside the blocks, give buffers their values, tie what is tied."""
        self._load(model, None, torch.device(device))
        if self._memory is not None:
            for name, value in self._model.named_buffers():
                if name not in self._memory:
                    convert.set_tensor(model, name, value.detach().clone().to(device))
        else:
            convert.initialise_buffers(model, torch.device(device))
        convert.tie(model, self._absent)

    def load_block(
        self, model: nn.Module, index: int, device: torch.device | str = "cpu", without: Collection[str] = ()
    ) -> None:
        """Load one block's parameters (and persistent buffers) into fresh memory.

        Args:
            model: of `skeleton`.
            index: the block.
            device: where to.
            without: tensors (by name in memory, all that are converted together) that are left where they are.

        Raises:
            SecateurError: a weight is not finite, or the file cannot be read.
        """
        self._load(model, index, torch.device(device), without)

    def release_block(self, model: nn.Module, index: int) -> None:
        """Let a block's weights go: back to the meta device, at the sizes it has now."""
        block = model.get_submodule(f"{self.blocks_path}.{index}")
        for name, value in block.state_dict().items():
            convert.set_tensor(block, name, torch.empty_like(value, device="meta"))

    def release_rest(self, model: nn.Module) -> None:
        """Let the parameters outside the blocks go; `load_rest` brings them back. Buffers stay."""
        for name, value in list(model.named_parameters(remove_duplicate=False)):
            if self.block_of(name) is None:
                convert.set_tensor(model, name, torch.empty_like(value, device="meta"))

    def load_whole(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        """Load everything."""
        for index in range(self.blocks):
            self.load_block(model, index, device)
        self.load_rest(model, device)

    def names(self, index: int | None) -> list[str]:
        """Names in memory of a block's stored tensors (None: of everything outside the blocks)."""
        if self._memory is not None:
            return [name for name in self._memory if self.block_of(name) == index]
        stored = [name for group in self._groups.get(index, []) for name in group.shapes]
        return stored + [name for name in self.added if self.block_of(name) == index]

    def block_of(self, name: str) -> int | None:
        """The block a name in memory belongs to, or None."""
        if not name.startswith(self.blocks_path + "."):
            return None
        word = name[len(self.blocks_path) + 1 :].split(".")[0]
        return int(word) if word.isdigit() else None

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype a tensor (by name in memory) came in. What a GGUF file held comes out as fp32."""
        if self._memory is not None:
            return self._memory[name].dtype
        return self._dtypes[name] if name in self._dtypes else self.added[name]

    def entry(self, name: str) -> Entry | None:
        """Where a tensor (by name in memory) is on disk; None if it is made of something else there, or in memory."""
        for group in self._groups.get(self.block_of(name), []):
            if group.first == name and group.converter is None:
                return self._entries[group.sources[0][0]]
        return None

    def is_packed(self, name: str) -> bool:
        """Whether all that a tensor (by name in memory) is made of is packed on disk."""
        groups = [group for group in self._groups.get(self.block_of(name), []) if name in group.shapes]
        sources = [self._entries[source] for group in groups for source, _ in group.sources]
        return bool(sources) and all(isinstance(entry, PackedEntry) for entry in sources)

    def read_as_stored(self, name: str) -> Tensor:
        """One tensor, by its name in memory, from disk and in the dtype it has there (unpacked, if it is packed)."""
        group = next(g for g in self._groups[self.block_of(name)] if name in g.shapes)
        with Reader(self._entries) as read:
            return group.convert(self._model, read)[name]

    def companions(self, index: int, names: Collection[str]) -> list[str]:
        """These tensors of a block and all that must be converted with them: whole groups, for `to_disk`."""
        groups = self._groups.get(index, [])
        together = [name for group in groups if not group.shapes.keys().isdisjoint(names) for name in group.shapes]
        return list(dict.fromkeys([*together, *names]))

    def bytes_of_block(self, index: int | None) -> int:
        """Bytes of a block (None: of the rest) as stored."""
        if self._memory is not None:
            return sum(self._memory[n].nbytes for n in self.names(index))
        sources = (self._entries[name] for group in self._groups.get(index, []) for name, _ in group.sources)
        return sum(entry.end - entry.begin for entry in sources)

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name in memory, whole groups of them, as tensors by name on disk (as they came)."""
        out: dict[str, Tensor] = {}
        rest = dict(tensors)
        for block in {self.block_of(name) for name in tensors}:
            for group in self._groups.get(block, []):
                if group.converter is None and group.first in rest:
                    out[group.sources[0][0]] = rest.pop(group.first)
        if rest:
            out |= convert.to_disk(self._model, rest, self._added_prefix)
        return out

    def renumbered(self, name: str, index: int, position: int) -> str:
        """A name on disk of block ``index``, as block ``position`` would have it (layers before it were dropped)."""
        words = name.split(".")
        if self._place is None or words[self._place] != str(index):
            raise SecateurError(
                "this checkpoint's names do not say which layer they belong to",
                received=name,
                works="keep all layers, or convert the checkpoint with save_pretrained first",
            )
        return ".".join([*words[: self._place], str(position), *words[self._place + 1 :]])

    @cached_property
    def _place(self) -> int | None:
        """Which dotted word of every block's names on disk is the block's index."""
        found: set[int] | None = None
        for index in range(self.blocks):
            if self._memory is not None:
                ghosts = {n: torch.empty_like(self._memory[n], device="meta") for n in self.names(index)}
                names = list(self.to_disk(ghosts))
            else:
                names = [name for group in self._groups.get(index, []) for name, _ in group.sources]
            for name in names:
                places = {i for i, word in enumerate(name.split(".")) if word == str(index)}
                found = places if found is None else found & places
        return min(found) if found else None

    def _load(self, model: nn.Module, index: int | None, device: torch.device, without: Collection[str] = ()) -> None:
        if self._memory is not None:
            for name in self.names(index):
                value = self._memory[name]
                check_finite(name, value)
                kept = value if index is None and not self._copy else value.clone()
                convert.set_tensor(model, name, kept.to(device=device, dtype=self._target(name, value.dtype)))
            return
        groups = [group for group in self._groups.get(index, []) if not group.shapes.keys() <= set(without)]
        self._fill(model, groups, self._entries, device)
        for name in (n for n in self.added if self.block_of(n) == index and n not in without):
            shape, dtype = self._model.get_parameter(name).shape, self._target(name, self.added[name])
            convert.set_tensor(model, name, torch.zeros(shape, dtype=dtype, device=device))

    def _fill(
        self, model: nn.Module, groups: Sequence[convert.Group], entries: Mapping[str, Entry], device: torch.device
    ) -> None:
        with Reader(entries) as read:
            for group in groups:
                for name, value in group.convert(self._model, read).items():
                    convert.set_tensor(model, name, value.to(device, self._target(name, value.dtype)).contiguous())

    def _target(self, name: str, dtype: torch.dtype) -> torch.dtype:
        if self.dtype is None or not dtype.is_floating_point:
            return dtype
        return torch.float32 if self._kept_wide(name) else self.dtype

    @cached_property
    def _kept_wide(self) -> Callable[[str], bool]:
        return convert.kept_wide(self._model, self.dtype or torch.float32)

    def usual_dtype(self) -> torch.dtype:
        """What Transformers loads this model as when it is not told: the config's dtype, else most weights' own."""
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        stored = self._dtypes.values() if self._memory is None else (v.dtype for v in self._memory.values())
        floats = Counter(dtype for dtype in stored if dtype.is_floating_point)
        return floats.most_common(1)[0][0] if floats else torch.float32

    def _check(self, found: convert.Correspondence) -> None:
        """Config against headers: shapes, kinds, missing tensors, and tensors of layers the config does not have."""
        works = "use the config.json that came with these weights, or fetch the checkpoint again"
        memory = self._model.state_dict()
        for group in found.groups:
            owners = {self.block_of(name) for name in group.shapes}
            if len(owners) > 1:
                raise SecateurError(
                    "one tensor on disk holds several layers",
                    received=group.sources[0][0],
                    works="convert the checkpoint with save_pretrained first",
                )
            for name, shape in group.shapes.items():
                expected = memory.get(name)
                if expected is None or tuple(expected.shape) != shape:
                    raise SecateurError(
                        f"tensor {group.sources[0][0]!r} contradicts config.json: {name} should be "
                        f"{list(expected.shape) if expected is not None else 'absent'}",
                        received=list(shape),
                        works=works,
                    )
                stored = self._entries[group.sources[0][0]].dtype
                if expected.is_floating_point() and not stored.is_floating_point:
                    raise SecateurError(
                        f"tensor {group.sources[0][0]!r} holds integers where weights belong; packed weights "
                        "cannot be pruned",
                        received=stored,
                        works="give the unquantised checkpoint (fp32, bf16 or fp16) and quantise after pruning",
                    )
        if found.missing:
            raise SecateurError(
                f"{len(found.missing)} tensors are missing from the weights",
                received=", ".join(sorted(found.missing)[:3]),
                works=works,
            )
        parts = self.blocks_path.split(".")[-1]
        for name in self.left_out:
            if f"{parts}." in name and name.split(f"{parts}.")[-1].split(".")[0].isdigit():
                raise SecateurError(
                    f"the weights hold {name!r}, which the model that config.json describes does not have",
                    received=f"{self.blocks} layers of {type(self._model).__name__}",
                    works=works,
                )
