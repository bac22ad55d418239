"""The verbs `pack` and `unpack`, what `inspect` tells of a packed checkpoint, and `--pack` of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from secateur.anatomy import anatomy_of
from secateur.engine.host.build import describe_skeleton
from secateur.engine.host.origin import Origin, raw_config, resolve
from secateur.engine.packed import check_dtype, pack_checkpoint, unpack_checkpoint, write_packed
from secateur.engine.packed_files import PackedEntry, is_packed, packed_dtype, part_prefix, read_packed
from secateur.engine.reading import Reader
from secateur.engine.store import Store
from secateur.engine.write import writing
from secateur.measure.size import file_bytes
from secateur.progress import Progress, Silent
from secateur.sparse.formats import CSR_FROM, DTYPES
from secateur.sparse.layout import COLUMNS, ROWS, up


def pack(
    model: str | Path | Origin,
    out: str | Path,
    dtype: str = "bf16",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack a model: its zeros are left out of the files, and skipped when `load` runs it.

    Args:
        model: a directory, a hub id, a ``.gguf`` file, ``smollm2``, or what `resolve` made of one.
        out: the directory to write.
        dtype: of what is written: fp32, bf16, fp16, or int8 (matrices as codes and a scale per row, the rest bf16).
        overwrite: replace a directory that Secateur wrote.
        progress: told of blocks done.

    Returns:
        plain data: where it lies, what was packed, and the bytes of the tensors packed and not.

    Raises:
        SecateurError: a model that cannot be read, is packed already or does not fit into the dtype; an output that
            may not be written.
    """
    check_dtype(dtype)
    origin = model if isinstance(model, Origin) else resolve(model)
    weighed = pack_checkpoint(origin, Path(out), dtype, overwrite, _ticks(progress, "pack"))
    return {
        "out": str(out),
        "dtype": weighed.dtype,
        "matrices": weighed.matrices,
        "weights": weighed.weights,
        "nonzero": weighed.nonzero,
        "plain_bytes": weighed.plain_bytes,
        "bytes": weighed.bytes,
    }


def unpack(
    model: str | Path | Origin, out: str | Path, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Unpack a packed directory into a plain checkpoint, exactly: what was packed, in the dtype it was packed in.

    Raises:
        SecateurError: it is not packed, or broken; an output that may not be written.
    """
    origin = model if isinstance(model, Origin) else resolve(model)
    total = unpack_checkpoint(origin, Path(out), overwrite, _ticks(progress, "unpack"))
    return {"out": str(out), "bytes": total}


def packed_facts(origin: Origin) -> dict[str, Any]:
    """What `inspect` says of a packed checkpoint beside its anatomy; nothing of a plain one.

    Non-zeros are counted in the headers where the format keeps no zeros, else in the values.
    """
    if origin.kind != "directory" or not is_packed(origin.path, raw := raw_config(origin)):
        return {}
    entries = [e for e in read_packed(origin.path, raw).values() if isinstance(e, PackedEntry)]
    kinds: dict[str, int] = {}
    weights = nonzero = 0
    with Reader({}) as reader:
        for entry in entries:
            for number, header in enumerate(entry.headers):
                kinds[header["kind"]] = kinds.get(header["kind"], 0) + 1
                weights += header["shape"][0] * header["shape"][1]
                values = entry.parts[f"{part_prefix(entry.name, number if entry.stacked else None)}.values"]
                zeros = header["kind"] in ("dense", "tile")
                nonzero += int(reader.read(values).count_nonzero()) if zeros else values.shape[0]
    facts = {
        "dtype": packed_dtype(raw),
        "matrices": ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
        "weights": weights,
        "nonzero": nonzero,
        "bytes": file_bytes(origin.path),
    }
    return {"packed": facts}


def packed_in_place(ready: Path, origin: Origin, dtype: str) -> None:
    """Replace a finished checkpoint by its packed self; one that is packed already is left alone.

    Args:
        ready: the checkpoint's directory.
        origin: where the model came from at first (for trust in its code).
        dtype: of the matrices.
    """
    here = Origin(str(ready), "directory", ready, None, origin.trust_remote_code)
    if is_packed(ready, raw_config(here)):
        return
    made, plain = ready.with_name("packed"), ready.with_name("plain")
    with writing(ready):
        for place in (made, plain):  # what a killed process left
            shutil.rmtree(place, ignore_errors=True)
    write_packed(Store.open(here, None), made, dtype)
    with writing(ready):
        ready.rename(plain)
        made.rename(ready)


def packed_bytes(model: nn.Module, zeros: int, dtype: str) -> int:
    """What a model's files will take packed, its zeros spread evenly over the matrices (bitmask, csr or dense).

    Args:
        model: at its final sizes; on the meta device will do.
        zeros: in its matrices.
        dtype: of the matrices: fp32, bf16, fp16 or int8.
    """
    width = DTYPES[dtype].itemsize
    matrices = [m for block in anatomy_of(describe_skeleton(model)).blocks for m in block.matrices]
    weights = sum(m.numel for m in matrices)
    total = (sum(p.numel() for p in model.parameters()) - weights) * max(width, 2)
    share = min(zeros / max(weights, 1), 1.0)
    for m in matrices:
        (out, ins), count = m.shape, max(m.experts, 1)
        kept = round(out * ins * (1 - share))
        index = 2 if ins <= 1 << 15 else 4
        bitmask = 8 * up(out, ROWS) * up(ins, COLUMNS) + 8 * (up(out, ROWS) + 1) + width * kept
        csr = 8 * (out + 1) + (index + width) * kept
        found = min(bitmask, width * out * ins, *([csr] if share >= CSR_FROM else []))
        total += count * (found + (4 * out if dtype == "int8" else 0))
    return total


def _ticks(progress: Progress | None, phase: str) -> Any:
    watching, state = progress or Silent(), {"done": 0}

    def tick(done: int, total: int) -> None:
        if not state["done"]:
            watching.phase(phase, total)
        watching.advance(done - state["done"])
        state["done"] = done

    return tick
