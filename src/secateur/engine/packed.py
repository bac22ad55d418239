"""Checkpoints packed and unpacked, block by block: memory holds one block, whatever the model's size.

Packed is every prunable matrix of the blocks (the ``weight`` space; experts one by one); embeddings, head, norms,
routers and biases stay plain, in the same dtype (bf16 where matrices are int8). Tensors keep their names on disk, so
unpacking needs no knowledge of the architecture and gives back, bit for bit, the checkpoint cast to that dtype
(-0.0 in a matrix becomes +0.0; int8 gives its codes times their scales, in fp32).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.anatomy import anatomy_of
from secateur.anatomy.types import Block
from secateur.engine import write
from secateur.engine.headers import INDEX as PLAIN_INDEX
from secateur.engine.headers import Entry, read_json
from secateur.engine.host.build import describe_skeleton
from secateur.engine.host.carry import carry_along, merged_config
from secateur.engine.host.origin import Origin, raw_config
from secateur.engine.packed_files import (
    INDEX,
    METHOD,
    VERSION,
    described,
    is_packed,
    metadata,
    packed_dtype,
    part_prefix,
    read_packed,
    without_packing,
)
from secateur.engine.reading import Reader
from secateur.engine.store import RECORD, Store
from secateur.errors import SecateurError, unknown
from secateur.sparse.formats import DTYPES, Packed, pack
from secateur.sparse.verify import header, to_tensors

Tile = tuple[int, int]
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Weighed:
    """What packing came to.

    Attributes:
        dtype: of the matrices: fp32, bf16, fp16 or int8.
        matrices: how many were packed.
        weights, nonzero: entries of them, and how many are not zero.
        bytes: of all tensors in the packed files.
        plain_bytes: of the same tensors, in the same dtypes, not packed.
    """

    dtype: str
    matrices: int = 0
    weights: int = 0
    nonzero: int = 0
    bytes: int = 0
    plain_bytes: int = 0


def pack_checkpoint(
    origin: Origin, out: Path, dtype: str = "bf16", overwrite: bool = False, tick: Tick | None = None
) -> Weighed:
    """Pack a model into a directory that `secateur.load` runs packed.

    Args:
        origin: the model; not packed already.
        out: the directory; it must be empty, or one that Secateur wrote and ``overwrite`` given.
        dtype: of the matrices: fp32, bf16, fp16 or int8.
        overwrite: replace a directory that Secateur wrote.
        tick: told shards done and shards in all.

    Raises:
        SecateurError: a model that cannot be read or is packed, an output that may not be written, weights that do
            not fit into the dtype.
    """
    check_dtype(dtype)
    with _made(origin, out, overwrite) as ready:
        refuse_packed(origin, "it is packed already", f"secateur unpack {origin.given} -o OUT, then pack OUT")
        weighed = write_packed(Store.open(origin, None), ready, dtype, tick)
    return weighed


def unpack_checkpoint(origin: Origin, out: Path, overwrite: bool = False, tick: Tick | None = None) -> int:
    """Unpack a packed directory into a plain checkpoint, as `pack_checkpoint` takes it.

    Returns:
        bytes of all tensors in the plain files.

    Raises:
        SecateurError: it is not packed or is broken, or an output that may not be written.
    """
    with _made(origin, out, overwrite) as ready:
        if origin.kind != "directory" or not is_packed(origin.path, raw := raw_config(origin)):
            raise SecateurError("this model is not packed", received=origin.given, works="a directory that pack wrote")
        Store.open(origin, None)  # headers against config.json, before anything is written
        entries, word = read_packed(origin.path, raw), packed_dtype(raw)
        with write.writing(ready):
            ready.mkdir(parents=True)
        parts = _grouped(entries)
        total = sum(_plain_bytes(e) for e in entries.values())
        if total < write.LARGEST_SINGLE:
            parts = [dict(entries)]
        tables = [{name: (e.dtype, e.shape) for name, e in part.items()} for part in parts]
        weight_map: dict[str, str] = {}
        with Reader(entries) as read:
            for number, table in enumerate(tables, 1):
                shard = f"model-{number:05d}-of-{len(tables):05d}.safetensors" if len(tables) > 1 else write.SINGLE
                write.stream_tensors(ready / shard, table, read)
                weight_map |= dict.fromkeys(table, shard)
                if tick is not None:
                    tick(number, len(tables))
        if len(tables) > 1:
            _index(ready / PLAIN_INDEX, weight_map, total)
        config = _in_dtype(without_packing(raw), "fp32" if word == "int8" else word)
        record = {key: value for key, value in _record(origin).items() if key != "packed"}
        _finish(ready, origin, config, record)
    return total


def write_packed(store: Store, ready: Path, dtype: str, tick: Tick | None = None) -> Weighed:
    """Write a complete packed checkpoint.

    Args:
        store: the model, opened with dtype None (as stored).
        ready: the directory, which must not exist yet.
        dtype: of the matrices: fp32, bf16, fp16 or int8.
        tick: told shards done and shards in all.
    """
    assert store.origin is not None and store.dtype is None
    with write.writing(ready):
        ready.mkdir(parents=True)
    model: Any = store.skeleton()
    anatomy = anatomy_of(describe_skeleton(model))
    record = _record(store.origin)
    job = _Packing(DTYPES[dtype], _tile_of(record))
    count = store.blocks + 1
    weight_map: dict[str, str] = {}
    for number, index in enumerate([*range(store.blocks), None]):
        shard = f"model-packed-{number + 1:05d}-of-{count:05d}.safetensors"
        if index is None:
            store.load_rest(model)
        else:
            store.load_block(model, index)
        state = model.state_dict()
        tensors = {name: state[name] for name in store.names(index)}
        packed: dict[str, dict[str, Any]] = {}
        if index is None:
            out = job.plain(store, tensors)
        else:
            out = job.block(store, tensors, anatomy.blocks[index], packed)
        write.write_tensors(ready / shard, out, metadata=metadata(packed))
        weight_map |= dict.fromkeys(out, shard)
        if index is not None:
            store.release_block(model, index)
        if tick is not None:
            tick(number + 1, count)
    weighed = Weighed(dtype, job.matrices, job.weights, job.nonzero, job.bytes, job.plain_bytes)
    _index(ready / INDEX, weight_map, weighed.bytes)
    config = _in_dtype(merged_config(store.raw, store.config, {}, {}), "bf16" if dtype == "int8" else dtype)
    config["quantization_config"] = {"quant_method": METHOD, "format_version": VERSION, "dtype": dtype}
    _finish(ready, store.origin, config, {**record, "packed": {"format_version": VERSION, "dtype": dtype}})
    return weighed


def check_dtype(dtype: object) -> None:
    """Refuse a word that is no dtype of packed matrices."""
    if dtype not in DTYPES:
        raise unknown("packed dtype", dtype, DTYPES)


def refuse_packed(origin: Origin, wrong: str, works: str) -> None:
    """Refuse a packed checkpoint where only a plain one will do."""
    if origin.kind == "directory" and is_packed(origin.path, raw_config(origin)):
        raise SecateurError(wrong, received=origin.given, works=works)


class _Packing:
    """Packs tensors and counts."""

    def __init__(self, dtype: torch.dtype, tile: Tile | None) -> None:
        self.dtype, self.tile = dtype, tile
        self.rest = dtype if dtype.is_floating_point else torch.bfloat16
        self.matrices = self.weights = self.nonzero = self.bytes = self.plain_bytes = 0

    def block(
        self, store: Store, tensors: Mapping[str, Tensor], block: Block, packed: dict[str, dict[str, Any]]
    ) -> dict[str, Tensor]:
        """A block's tensors by name on disk, matrices as their parts; ``packed`` is told what the header says."""
        matrices = {f"{block.name}.{m.tensor}": m for m in block.matrices}
        together = store.companions(block.index, matrices)
        out = self.plain(store, {name: value for name, value in tensors.items() if name not in together})
        made = store.to_disk({name: tensors[name] for name in together})
        for name, value in made.items():
            if value.dim() not in (2, 3) or not value.is_floating_point() or 0 in value.shape:
                out |= self._plain({name: value})
                continue
            # A tensor that is converted on loading is stored as a plain linear layer's, [out, in].
            same = next((m for n, m in matrices.items() if value is tensors[n] or _same(value, tensors[n])), None)
            turned = same.transposed if same is not None else False
            slices = [s.T if turned else s for s in (value if value.dim() == 3 else value[None])]
            headers = []
            for number, matrix in enumerate(slices):
                one = self._pack(name, matrix)
                headers.append(header(one))
                out |= to_tensors(one, part_prefix(name, number if value.dim() == 3 else None))
                self._count(one)
            packed[name] = described(turned, value.dim() == 3, headers)
        return out

    def plain(self, store: Store, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name on disk that are not packed, floats cast."""
        return self._plain(store.to_disk(tensors))

    def _plain(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, value in tensors.items():
            new = value.to(self.rest) if value.is_floating_point() else value
            if new.dtype == torch.float16 and not bool(new.isfinite().all()):
                raise SecateurError(
                    f"tensor {name!r} does not fit into fp16", received=f"{float(value.abs().max()):g}", works="bf16"
                )
            out[name] = new
            self.bytes += new.nbytes
            self.plain_bytes += new.nbytes
        return out

    def _pack(self, name: str, matrix: Tensor) -> Packed:
        try:
            return pack(matrix, self.dtype, tile=self.tile)
        except SecateurError as error:
            raise SecateurError(f"tensor {name!r}: {error.wrong}", received=error.received, works=error.works) from None

    def _count(self, packed: Packed) -> None:
        weights = packed.shape[0] * packed.shape[1]
        self.matrices += 1
        self.weights += weights
        self.nonzero += packed.nonzeros
        self.bytes += packed.bytes
        self.plain_bytes += weights * packed.dtype.itemsize


def _same(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one piece of memory, seen alike."""
    return value.shape == other.shape and value.data_ptr() == other.data_ptr() and value.stride() == other.stride()


def _tile_of(record: Mapping[str, Any]) -> Tile | None:
    """The tile of a checkpoint whose last step pruned weights by tiles, from its recipe."""
    recipe = record.get("recipe")
    steps = recipe.get("steps") if isinstance(recipe, Mapping) else None
    last = steps[-1] if isinstance(steps, list) and steps and isinstance(steps[-1], Mapping) else {}
    kind, _, sides = str(last.get("grain", "")).partition(":")
    rows, _, columns = sides.partition("x")
    if last.get("space") != "weight" or kind != "tile" or not (rows.isdecimal() and columns.isdecimal()):
        return None
    tile = (int(rows), int(columns))
    return tile if min(tile) >= 1 and max(tile) <= 1 << 16 else None


def _in_dtype(config: Mapping[str, Any], word: str) -> dict[str, Any]:
    """A config.json that says in which dtype the weights are."""
    name = str(DTYPES[word]).removeprefix("torch.")
    out = {key: value for key, value in config.items() if key != "torch_dtype"}
    for key, value in out.items():
        if key.endswith("_config") and isinstance(value, Mapping) and ("dtype" in value or "torch_dtype" in value):
            out[key] = {k: v for k, v in value.items() if k != "torch_dtype"} | {"dtype": name}
    return out | {"dtype": name}


def _record(origin: Origin) -> dict[str, Any]:
    path = origin.path / RECORD
    return read_json(path) if origin.kind == "directory" and path.is_file() else {"sizes": {}}


def _grouped(entries: Mapping[str, Entry]) -> list[dict[str, Entry]]:
    """Tensors by the shard they are in, in order."""
    found: dict[Path, dict[str, Entry]] = {}
    for name, entry in entries.items():
        found.setdefault(entry.file, {})[name] = entry
    return [found[file] for file in sorted(found)]


def _plain_bytes(entry: Entry) -> int:
    return int(torch.Size(entry.shape).numel()) * entry.dtype.itemsize


def _index(path: Path, weight_map: Mapping[str, str], total: int) -> None:
    names = sorted(weight_map, key=write.natural)
    write.write_json(path, {"metadata": {"total_size": total}, "weight_map": {n: weight_map[n] for n in names}})


def _finish(ready: Path, origin: Origin, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    with write.writing(ready):
        carry_along(origin, None, ready)
        write.write_json(ready / "config.json", config)
        write.write_json(ready / RECORD, record)


@contextmanager
def _made(origin: Origin, out: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to be made beside the output, which it becomes when all went well."""
    source = origin.path / origin.gguf_file if origin.gguf_file else origin.path
    write.check_out(out, source, overwrite)
    work = out.parent / f".{out.name}.secateur-packing"
    ready = work / "ready"
    with write.claimed(work, out):
        try:
            with write.writing(ready):
                if ready.exists():  # what a killed process left
                    shutil.rmtree(ready)
            yield ready
            write.publish(ready, out, overwrite)
        finally:
            shutil.rmtree(ready, ignore_errors=True)  # before the lock that keeps others away
            shutil.rmtree(work, ignore_errors=True)
