"""Packed checkpoints on disk: which tensors are packed, and how one is read back. docs/packed-format.md specifies it.

    config.json          as ever, and quantization_config: {"quant_method": "secateur-packed", ...}
    model-packed.safetensors.index.json        weight_map from tensors to shards
    model-packed-00001-of-00031.safetensors    one per block, and one for the rest; the header's metadata holds
        secateur-packed   the version of the format
        matrices          JSON: per packed tensor its ``turned`` and a header per matrix (kind, shape, dtype, ...)

A matrix ``NAME`` lies in tensors ``NAME.packed.PART``, expert e of a stack of them in ``NAME.packed.e.PART``, always as
[out, in]; ``turned`` says that the unpacked tensor is [in, out]. The file names are not those that Transformers looks
for: given such a directory it stops instead of filling in random weights. Names, sizes and versions are checked when
headers are read, the parts themselves when a tensor is (`secateur.sparse.verify`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from secateur.engine.headers import WIDEST, Entry, Header, read_index, strict_json
from secateur.errors import SecateurError
from secateur.sparse.formats import DTYPES, PARTS, Packed, unpack
from secateur.sparse.verify import from_tensors

METHOD = "secateur-packed"
VERSION = 1
INDEX = "model-packed.safetensors.index.json"
VERSION_WORD, MATRICES_WORD = METHOD, "matrices"
AGAIN = "pack the checkpoint again, or fetch it again"


@dataclass(frozen=True)
class PackedEntry(Entry):
    """A packed tensor: dtype and shape are those it has when it is unpacked, ``begin`` to ``end`` counts its bytes.

    Attributes:
        name: the tensor's name on disk when it is unpacked.
        turned: unpacked it is [in, out], or a stack of such.
        stacked: unpacked it is a stack of matrices (experts), even of one.
        headers: what the shard's metadata says of each matrix.
        parts: where their tensors are, by name.
    """

    name: str
    turned: bool
    stacked: bool
    headers: tuple[Mapping[str, Any], ...]
    parts: Mapping[str, Entry]

    def matrices(self, read: Callable[[Entry], Tensor]) -> list[Packed]:
        """The packed matrices [out, in], verified.

        Args:
            read: gives the tensor of an entry.

        Raises:
            SecateurError: parts that contradict the headers or each other, or values that are not finite.
        """
        out = []
        for number, header in enumerate(self.headers):
            prefix = part_prefix(self.name, number if self.stacked else None)
            mine = {n: read(e) for n, e in self.parts.items() if n.rpartition(".")[0] == prefix}
            packed = from_tensors(prefix, mine, header)
            if not all(bool(p.isfinite().all()) for p in packed.parts.values() if p.is_floating_point()):
                raise self._wrong("it holds NaN or infinite weights")
            out.append(packed)
        return out

    def dense(self, read: Callable[[Entry], Tensor]) -> Tensor:
        """The tensor unpacked."""
        needed = math.prod(self.shape) * self.dtype.itemsize
        if needed > psutil.virtual_memory().available:
            raise self._wrong(f"unpacked it takes {needed:,} bytes, more than this machine has free")
        matrices = [unpack(m) for m in self.matrices(read)]
        matrices = [m.T if self.turned else m for m in matrices]
        return (torch.stack(matrices) if self.stacked else matrices[0]).contiguous()

    def _wrong(self, what: str, received: object = None) -> SecateurError:
        return SecateurError(f"packed tensor {self.name!r} in {self.file.name}: {what}", received=received, works=AGAIN)


def is_packed(folder: Path, raw: Mapping[str, Any]) -> bool:
    """Whether a directory is a packed checkpoint, as its config.json says (or, for a lost word, its index)."""
    packed = raw.get("quantization_config")
    return (isinstance(packed, Mapping) and packed.get("quant_method") == METHOD) or (folder / INDEX).is_file()


def without_packing(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A packed checkpoint's config as that of the model it holds."""
    return {word: value for word, value in raw.items() if word != "quantization_config"}


def part_prefix(name: str, expert: int | None) -> str:
    """What the names of a matrix's parts begin with."""
    return f"{name}.packed" if expert is None else f"{name}.packed.{expert}"


def packed_dtype(raw: Mapping[str, Any]) -> str:
    """The word for the dtype of the matrices of a packed checkpoint, from its config.

    Raises:
        SecateurError: the config does not say that it is packed, or says it in another version's words.
    """
    said = raw.get("quantization_config")
    if not isinstance(said, Mapping) or said.get("quant_method") != METHOD:
        raise SecateurError(f"config.json does not say that this is packed, but there is {INDEX}", works=AGAIN)
    if said.get("format_version") != VERSION:
        raise SecateurError(
            "config.json names another version of the packed format than this Secateur reads",
            received=said.get("format_version"),
            works=f"version {VERSION}",
        )
    dtype = said.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SecateurError("config.json names an unknown dtype of packed matrices", received=dtype, works=AGAIN)
    return dtype


def read_packed(folder: Path, raw: Mapping[str, Any]) -> dict[str, Entry]:
    """Every tensor of a packed checkpoint by the name it has when unpacked; packed ones are `PackedEntry`.

    Args:
        folder: the checkpoint.
        raw: its config.json.

    Raises:
        SecateurError: missing or faulty shards, an unknown version, headers and tensors that contradict each other.
    """
    dtype = packed_dtype(raw)
    if not (folder / INDEX).is_file():
        raise SecateurError(f"{folder} says that it is packed, but has no {INDEX}", works=AGAIN)
    _, shards = read_index(folder / INDEX)
    found: dict[str, Entry] = {}
    for shard, header in shards.items():
        for name, entry in _tensors(folder / shard, header).items():
            if name in found:
                raise SecateurError(f"tensor {name!r} is there twice", received=f"again in {shard}", works=AGAIN)
            if isinstance(entry, PackedEntry) and entry.headers[0]["dtype"] != dtype:
                raise SecateurError(
                    f"packed tensor {name!r} in {shard} is not in the dtype that config.json names",
                    received=entry.headers[0]["dtype"],
                    works=dtype,
                )
            found[name] = entry
    return found


def metadata(matrices: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The words of a shard's header; see `described`."""
    text = json.dumps({name: matrices[name] for name in sorted(matrices)}, sort_keys=True, separators=(",", ":"))
    return {VERSION_WORD: str(VERSION), MATRICES_WORD: text}


def described(turned: bool, stacked: bool, headers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the metadata says of one packed tensor."""
    return {"turned": turned, "stacked": stacked, "matrices": [dict(h) for h in headers]}


def _tensors(path: Path, header: Header) -> dict[str, Entry]:
    version = header.metadata.get(VERSION_WORD)
    if version != str(VERSION):
        raise SecateurError(
            f"{path.name} is not in the packed format that this Secateur reads",
            received=f"version {version}",
            works=f"version {VERSION}",
        )
    try:
        table = strict_json(header.metadata.get(MATRICES_WORD, ""))
    except (ValueError, RecursionError) as error:
        raise SecateurError(
            f"the list of packed matrices of {path.name} is not valid JSON", received=str(error), works=AGAIN
        ) from None
    if not isinstance(table, dict):
        raise SecateurError(f"the list of packed matrices of {path.name} is none", received=table, works=AGAIN)
    rest, out = dict(header.tensors), dict[str, Entry]()
    for name, row in table.items():
        out[name] = _entry(path, name, row, rest)
    for name, entry in rest.items():
        if ".packed." in name or name in out:
            raise SecateurError(f"{path.name} does not say what tensor {name!r} is part of", works=AGAIN)
        out[name] = entry
    return out


def _entry(path: Path, name: str, row: Any, rest: dict[str, Entry]) -> PackedEntry:
    """One packed tensor from its row of the metadata; its parts are taken out of ``rest``."""

    def wrong(what: str, received: object) -> SecateurError:
        return SecateurError(f"packed tensor {name!r} in {path.name} {what}", received=received, works=AGAIN)

    if not isinstance(row, dict) or set(row) != {"turned", "stacked", "matrices"}:
        raise wrong("needs exactly turned, stacked and matrices", row)
    turned, stacked, matrices = row["turned"], row["stacked"], row["matrices"]
    if not isinstance(turned, bool) or not isinstance(stacked, bool) or not isinstance(matrices, list) or not matrices:
        raise wrong("is not described as a matrix or a stack of matrices", row)
    if len(matrices) > 1 and not stacked:
        raise wrong("has several matrices, but is no stack", len(matrices))
    for header in matrices:
        if not isinstance(header, dict) or header.get("dtype") not in tuple(DTYPES):
            raise wrong("has a matrix of unknown dtype", header)
        if header.get("kind") not in tuple(PARTS):
            raise wrong("has a matrix of unknown kind", header.get("kind"))
        if not _is_shape(header.get("shape")):
            raise wrong("has a matrix of impossible shape", header.get("shape"))
    first = matrices[0]
    if any(header["shape"] != first["shape"] or header["dtype"] != first["dtype"] for header in matrices):
        raise wrong("stacks matrices of different shape or dtype", f"{len(matrices)} matrices")
    shape: tuple[int, ...] = tuple(reversed(first["shape"])) if turned else tuple(first["shape"])
    if stacked:
        shape = (len(matrices), *shape)
    if math.prod(shape) > WIDEST:
        raise wrong("has an impossible shape", list(shape))
    prefixes = [part_prefix(name, e if stacked else None) for e in range(len(matrices))]
    parts = {n: rest[n] for n in rest if n.startswith(f"{name}.packed.") and n.rpartition(".")[0] in prefixes}
    for part in parts:
        del rest[part]
    scales = ("scales",) if first["dtype"] == "int8" else ()
    each = list(zip(matrices, prefixes, strict=True))
    if parts.keys() != {f"{prefix}.{part}" for h, prefix in each for part in PARTS[h["kind"]] + scales}:
        raise wrong("does not have the parts of its kind", ", ".join(parts) or "none")
    for header, prefix in each:
        if len(parts[f"{prefix}.values"].shape) != (2 if header["kind"] == "dense" else 1):
            raise wrong("has values with the wrong number of axes", list(parts[f"{prefix}.values"].shape))
    stored = DTYPES[first["dtype"]]
    size = sum(e.end - e.begin for e in parts.values())
    dtype = stored if stored.is_floating_point else torch.float32
    return PackedEntry(path, dtype, shape, 0, size, name, turned, stacked, tuple(matrices), parts)


def _is_shape(value: object) -> bool:
    """Whether this is [out, in]."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= WIDEST for n in value)
    )
