"""What a checkpoint's files claim to hold, read strictly and before anything is built from them.

A safetensors file is eight bytes of header length (little endian), that many bytes of JSON (name to dtype, shape
and byte range, plus an optional ``__metadata__``), then the tensors without gaps or overlap
(https://github.com/huggingface/safetensors#format). Whatever contradicts that is refused here, in one sentence,
so that later code can trust names, shapes and offsets.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.errors import SecateurError

LONGEST_HEADER = 100_000_000  # bytes; the reference implementation has the same limit
WIDEST = 2**40  # entries along one axis, and in one tensor: far beyond any real model
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PACKED = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4")
PACKED_NAMES = (
    ".qweight", ".qzeros", ".g_idx", "weight_scale_inv", "_blocks", "_scales", ".weight_packed", ".absmax",
    ".quant_state", ".SCB", ".weight_scale",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Entry:
    """One tensor on disk: where its bytes are, and what they mean."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # byte offset in the file
    end: int


@dataclass(frozen=True)
class Header:
    """The tensors of one safetensors file, by name, in the order of their bytes; and its metadata."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        SecateurError: the file is not a complete and consistent safetensors file, or holds quantised tensors.
    """
    works = "fetch or convert the file again"
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= size - 8 or length > LONGEST_HEADER:
                raise SecateurError(
                    f"{path.name} is truncated or not a safetensors file: its header claims {length} bytes",
                    received=f"a file of {size} bytes",
                    works=works,
                )
            raw = file.read(length)
    except OSError as error:
        raise SecateurError(
            f"cannot read {path}", received=error.strerror or str(error), works="give a file you may read"
        ) from None
    try:
        table = strict_json(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SecateurError(f"the header of {path.name} is not valid JSON", received=str(error), works=works) from None
    if not isinstance(table, dict):
        raise SecateurError(
            f"the header of {path.name} is not a table of tensors",
            received=type(table).__name__,
            works="fetch or convert the file again",
        )
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SecateurError(
            f"the metadata in the header of {path.name} must map words to words",
            received=metadata,
            works="fetch or convert the file again",
        )
    entries = [(name, _entry(path, name, row, 8 + length)) for name, row in table.items()]
    entries.sort(key=lambda item: (item[1].begin, item[1].end))
    at = 8 + length
    for name, entry in entries:
        if entry.begin != at:
            kind = "overlaps another tensor" if entry.begin < at else "leaves a gap before it"
            raise SecateurError(f"tensor {name!r} in {path.name} {kind}", received=f"byte {entry.begin}", works=works)
        at = entry.end
    if at != size:
        raise SecateurError(
            f"{path.name} is {'truncated' if at > size else 'longer than its header says'}",
            received=f"{size} bytes where the header describes {at}",
            works=works,
        )
    return Header(dict(entries), metadata)


def read_headers(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint directory, from its single file or its shards, by name on disk.

    Raises:
        SecateurError: no safetensors weights (pickles are never opened), a missing shard, a shard outside the
            directory, a tensor that is not in the shard the index names, or any faulty header.
    """
    index = folder / INDEX
    if index.is_file():
        return read_index(index)[0]
    if (folder / SINGLE).is_file():
        return dict(read_header(folder / SINGLE).tensors)
    names = sorted(p.name for p in folder.iterdir())
    pickles = [n for n in names if n.endswith(PICKLES)]
    if pickles:
        raise SecateurError(
            "the weights are pickles, which can run code when opened",
            received=pickles[0],
            works="convert them where you trust them: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder) writes safetensors",
        )
    if any(n.endswith(".safetensors") for n in names):
        raise SecateurError(
            f"{folder} has neither {SINGLE} nor {INDEX}",
            received=", ".join(n for n in names if n.endswith(".safetensors")),
            works="add the index that came with the shards",
        )
    raise SecateurError(f"no weights in {folder}", received=", ".join(names[:8]) or "an empty directory",
                        works=f"it needs {SINGLE}, or shards with {INDEX}")  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one sentence about why not (duplicate keys included).

    Infinity passes, JSON or not: configs of state-space models have it as a time step's upper bound.
    """
    try:
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise SecateurError(
            f"cannot read {path}", received=error.strerror or str(error), works="give a file you may read"
        ) from None
    except (ValueError, RecursionError) as error:
        raise SecateurError(f"{path.name} is not valid JSON", received=str(error), works="fetch it again") from None
    if not isinstance(value, dict):
        raise SecateurError(
            f"{path.name} must hold a JSON object",
            received=type(value).__name__,
            works="fetch or convert the file again",
        )
    return value


def strict_json(text: str) -> Any:
    """JSON without repeated keys, NaN and infinities.

    Raises:
        ValueError, RecursionError: it is not.
    """
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def refuse_quantised(names: Iterable[str]) -> None:
    """Refuse tensors that only a quantised checkpoint has (GPTQ, AWQ, FP8, MXFP4, bitsandbytes)."""
    for name in names:
        if name.endswith(PACKED_NAMES):
            raise SecateurError(
                "the checkpoint is already quantised, and packed weights cannot be pruned",
                received=f"tensor {name}",
                works="give the unquantised checkpoint (fp32, bf16 or fp16) and quantise after pruning",
            )


def read_index(index: Path) -> tuple[dict[str, Entry], dict[str, Header]]:
    """Every tensor that an index lists, by name, and the headers of its shards, by file name.

    Raises:
        SecateurError: a missing shard, one outside the directory, or one that holds something else than listed.
    """
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise SecateurError(
            f"{index.name} has no weight_map from tensor names to file names",
            received=table,
            works="fetch or convert the file again",
        )
    headers: dict[str, Header] = {}
    for shard in sorted(set(table.values())):
        if not shard.endswith(".safetensors") or shard != os.path.basename(shard) or shard.startswith("."):
            raise SecateurError(
                f"{index.name} names a shard that is not a safetensors file beside it",
                received=shard,
                works="fetch or convert the file again",
            )
        path = index.parent / shard
        if not path.is_file():
            raise SecateurError(
                f"shard {shard} is missing", received=f"{index.name} lists it", works="fetch the checkpoint again"
            )
        headers[shard] = read_header(path)
    found: dict[str, Entry] = {}
    for shard, header in headers.items():
        for name, entry in header.tensors.items():
            if table.get(name) != shard:
                raise SecateurError(
                    f"tensor {name!r} is in {shard}, but {index.name} says otherwise",
                    received=str(table.get(name)),
                    works="fetch or convert the file again",
                )
            found[name] = entry
    for name, shard in table.items():
        if name not in found:
            raise SecateurError(
                f"{index.name} promises tensor {name!r} in {shard}, which does not hold it",
                works="fetch or convert the file again",
            )
    return found, headers


def _entry(path: Path, name: str, row: Any, start: int) -> Entry:
    where = f"tensor {name!r} in {path.name}"
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise SecateurError(
            f"{where} needs exactly dtype, shape and data_offsets",
            received=row,
            works="fetch or convert the file again",
        )
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if dtype in PACKED:
        raise SecateurError(
            f"{where} is already quantised, and packed weights cannot be pruned",
            received=dtype,
            works="give the unquantised checkpoint (fp32, bf16 or fp16) and quantise after pruning",
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SecateurError(f"{where} has an unknown dtype", received=dtype, works=f"known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_count(n) and n <= WIDEST for n in shape) or math.prod(shape) > WIDEST:
        raise SecateurError(f"{where} has an impossible shape", received=shape, works="fetch or convert the file again")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_count(n) for n in offsets):
        raise SecateurError(
            f"{where} has impossible offsets", received=offsets, works="fetch or convert the file again"
        )
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise SecateurError(
            f"{where} needs {needed} bytes for its shape",
            received=f"{end - begin} bytes",
            works="fetch or convert the file again",
        )
    return Entry(path, DTYPES[dtype], tuple(shape), start + begin, start + end)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice")
    return table


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")
