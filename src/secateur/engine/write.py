"""A checkpoint on its way out: one file per block, then the final layout, then one rename into place.

Every file is written under a temporary name, synced, and renamed, so a file that is there is complete; a finished
block's file is the point from which a killed run resumes. Headers carry no time, path or host: the same inputs
give the same bytes. Nothing appears at the output's place before all of it is ready.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor, nn

from secateur.engine.headers import DTYPES, INDEX, SINGLE, Entry, read_header
from secateur.engine.host.carry import carry_along, merged_config
from secateur.engine.outcome import Outcome as Outcome
from secateur.engine.store import RECORD, Store
from secateur.errors import SecateurError

LARGEST_SINGLE = 5 * 10**9  # bytes; larger checkpoints keep one file per block
CHUNK = 16 * 2**20
MOUNTS = Path("/proc/self/mountinfo")  # Linux; elsewhere there is none
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StepWriter:
    """Writes one step's result into a working directory, block by block.

    Args:
        work: directory of this step; made if missing. What is there already is taken up again.
        store: where the model came from: its names and dtypes on disk are kept.
    """

    def __init__(self, work: Path, store: Store) -> None:
        self.work, self.store = work, store
        with writing(work):
            work.mkdir(parents=True, exist_ok=True)

    def done(self, index: int) -> bool:
        """Whether a block's file is complete."""
        return self.block_file(index).is_file()

    def write_block(self, index: int, module: nn.Module) -> None:
        """Write one block in the dtype it came in, and leave it holding exactly the values that were written.

        So what runs on it next sees what a resumed run will read.

        Args:
            index: the block's place in the model it came from.
            module: the block, in any float dtype and at any size.
        """
        path = f"{self.store.blocks_path}.{index}."
        self._write(self.block_file(index), path, module.state_dict(), self.store.names(index))

    def write_rest(self, model: nn.Module) -> None:
        """Write everything outside the blocks, tied tensors once."""
        self._write(self.work / "rest.safetensors", "", model.state_dict(), self.store.names(None))

    def finish(self, outcome: Outcome, blocks: Sequence[int] | None = None) -> Path:
        """Put the final checkpoint together.

        Args:
            outcome: what it says about itself.
            blocks: the layers that stay, by their numbers so far; they are numbered anew. None: all.

        Returns:
            The complete directory, inside ``work``; `publish` moves it into place.
        """
        ready = self.work / "ready"
        stay = tuple(range(self.store.blocks)) if blocks is None else tuple(blocks)
        parts = [self._part(index, position) for position, index in enumerate(stay)]
        parts.append(read_header(self.work / "rest.safetensors").tensors)
        with writing(ready):
            if ready.exists():
                shutil.rmtree(ready)
            ready.mkdir()
            if sum(entry.end - entry.begin for part in parts for entry in part.values()) < LARGEST_SINGLE:
                _join({name: entry for part in parts for name, entry in part.items()}, ready / SINGLE)
            else:
                _shards(parts, ready)
            carry_along(self.store.origin, self.store.config, ready)
            config = merged_config(self.store.raw, self.store.config, outcome.fields, outcome.per_layer)
            write_json(ready / "config.json", config)
            write_json(ready / RECORD, {**outcome.record, "sizes": {k: dict(v) for k, v in outcome.sizes.items()}})
            for name, content in outcome.files.items():
                if isinstance(content, Path):
                    shutil.copyfile(content, ready / name)
                else:
                    (ready / name).write_bytes(content)
        return ready

    def block_file(self, index: int) -> Path:
        """Where a block's tensors lie when it is done."""
        return self.work / f"block-{index:05d}.safetensors"

    def _part(self, index: int, position: int) -> Mapping[str, Entry]:
        entries = read_header(self.block_file(index)).tensors
        if index == position:
            return entries
        return {self.store.renumbered(name, index, position): entry for name, entry in entries.items()}

    def _write(self, target: Path, path: str, state: Mapping[str, Tensor], names: Sequence[str]) -> None:
        tensors = {name: state[name.removeprefix(path)].detach() for name in names}
        ghosts: dict[str, Tensor] = {}
        for name, value in tensors.items():
            stored = self.store.dtype_of(name)
            if stored != value.dtype:
                value.copy_(value.to(stored))
            ghosts[name] = torch.empty(value.shape, dtype=stored, device="meta")
        dtypes = {name: ghost.dtype for name, ghost in self.store.to_disk(ghosts).items()}
        write_tensors(target, self.store.to_disk(tensors), dtypes)


def work_dir(out: Path) -> Path:
    """Where everything is made before it is moved to ``out``: a hidden directory beside it."""
    return out.parent / f".{out.name}.secateur-work"


def claimed(work: Path, out: Path) -> IO[str]:
    """The open lock file of a working directory, made if missing; it is this process's until it is closed.

    Raises:
        SecateurError: another run that is alive holds it.
    """
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w")  # noqa: SIM115 (held as long as the run lives)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = not os.fstat(lock.fileno()).st_nlink  # its run removed it just now: the next one makes another
    except OSError:
        taken = True
    if taken:
        lock.close()
        raise SecateurError(
            "another run is writing this output", received=str(out), works="wait for it, or give another output"
        )
    return lock


def check_out(out: Path, source: Path | None, overwrite: bool) -> None:
    """Refuse an output that cannot or must not be written, before any work.

    Args:
        out: the output directory.
        source: the input's directory or file, which is never written to.
        overwrite: replace a directory that Secateur wrote.
    """
    if source is not None and (out.resolve() == source.resolve() or out.resolve() in source.resolve().parents):
        raise SecateurError("the output would replace the input", received=str(out), works="give another directory")
    if source is not None and source.resolve() in out.resolve().parents:
        raise SecateurError("the output would lie inside the input", received=str(out), works="give another directory")
    if out.is_file() or (out.is_symlink() and not out.exists()):
        raise SecateurError("the output is not a directory", received=str(out), works="give another name")
    if out.is_symlink() or _mounted(out) or out.name in ("", ".."):
        raise SecateurError(
            "the result cannot be moved to a link, a mount point or a place without a name of its own",
            received=str(out),
            works="give the name of a new directory",
        )
    if out.is_dir() and any(out.iterdir()):
        ours = (out / RECORD).is_file()
        if not overwrite:
            raise SecateurError(
                "the output directory is not empty",
                received=str(out),
                works="give another, or --overwrite" if ours else "give another directory",
            )
        if not ours:
            raise SecateurError(
                "--overwrite replaces only a directory that Secateur wrote (it has no secateur.json)",
                received=str(out),
                works="give another directory",
            )
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.parent / f".{out.name}.secateur-probe"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process of the same run may have been faster


def _mounted(path: Path) -> bool:
    """Whether something is mounted on a path. Of a bind mount on the same device only Linux's own table knows."""
    if os.path.ismount(path):
        return True
    try:
        lines = os.fsdecode(MOUNTS.read_bytes()).split("\n")
    except OSError:
        return False
    points = {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines if line}
    return str(path.resolve()) in points


def publish(ready: Path, out: Path, overwrite: bool = False) -> None:
    """Move a complete checkpoint into place; the one it replaces goes last.

    Raises:
        SecateurError: ``out`` is not empty and may not be replaced, or the system refuses.
    """
    check_out(out, None, overwrite)
    old = out.parent / f".{out.name}.secateur-old"
    with writing(out):
        _sync_directory(ready)
        if old.exists():
            shutil.rmtree(old)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(ready, out)
        except OSError:
            if old.exists():
                os.rename(old, out)
            raise
        _sync_directory(out.parent)
        if old.exists():
            shutil.rmtree(old)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON in one piece, keys as they come."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with _replacing(path) as file:
        file.write(text.encode())


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, deterministic to the byte; one tensor at a time is cast and copied.

    Args:
        path: the file.
        tensors: by name, anywhere and in any dtype.
        dtypes: what each is written as; None: as it is.
        metadata: further words of the header.
    """
    kinds = {name: value.dtype for name, value in tensors.items()} if dtypes is None else dtypes
    table = {name: (kinds[name], tuple(value.shape)) for name, value in tensors.items()}
    stream_tensors(path, table, tensors.__getitem__, metadata)


def stream_tensors(
    path: Path,
    table: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """The same with tensors that are made when their turn comes: no two need be in memory together.

    Args:
        path: the file.
        table: dtype and shape by name.
        tensor: gives the tensor of a name, in any dtype.
        metadata: further words of the header.
    """
    order = sorted(table, key=lambda name: (-table[name][0].itemsize, natural(name)))
    with _replacing(path) as file:
        file.write(_header([(name, *table[name]) for name in order], metadata))
        for name in order:
            dtype, shape = table[name]
            value = tensor(name)
            assert tuple(value.shape) == shape, name
            flat = value.to("cpu", dtype).contiguous().reshape(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)
            del value, flat  # before the next one is made


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(w), "") if w.isdecimal() else (1, 0, w) for w in re.split(r"(\d+)", name)]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence what the system has against writing to ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SecateurError(
                "the disk is full", received=str(path), works="free some space, then run again with --resume"
            ) from error
        raise SecateurError(
            f"cannot write: {error.strerror or error}", received=str(path), works="give a directory you may write to"
        ) from error


def _header(
    table: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    rows: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for name, dtype, shape in table:
        end = at + int(torch.Size(shape).numel()) * dtype.itemsize
        rows[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _join(entries: Mapping[str, Entry], path: Path) -> None:
    """One file from parts of others, copied in chunks: memory does not grow with the model."""
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, natural(name)))
    with _replacing(path) as file:
        file.write(_header([(name, entries[name].dtype, entries[name].shape) for name in order]))
        source: BinaryIO | None = None
        try:
            for name in order:
                entry = entries[name]
                if source is None or source.name != str(entry.file):
                    if source is not None:
                        source.close()
                    source = open(entry.file, "rb", buffering=0)  # noqa: SIM115 (kept open over neighbours)
                source.seek(entry.begin)
                left = entry.end - entry.begin
                while left:
                    chunk = source.read(min(CHUNK, left))
                    if not chunk:
                        raise OSError(errno.EIO, f"{entry.file.name} ended early")
                    file.write(chunk)
                    left -= len(chunk)
        finally:
            if source is not None:
                source.close()


def _shards(parts: Sequence[Mapping[str, Entry]], ready: Path) -> None:
    """A shard for each block and one for the rest, and their index.

    A file whose names stay is given a second name where the system can do that, instead of a copy.
    """
    table: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, 1):
        shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        for name, entry in part.items():
            table[name] = shard
            total += entry.end - entry.begin
        file = next(iter(part.values())).file
        if read_header(file).tensors.keys() == part.keys():
            try:
                os.link(file, ready / shard)
                continue
            except OSError:
                pass  # no second names on this file system
        _join(part, ready / shard)
    weight_map = {name: table[name] for name in sorted(table, key=natural)}
    write_json(ready / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Write under a temporary name, sync, rename: the name is there only when the bytes are."""
    temporary = path.with_name(path.name + ".part")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_directory(path.parent)
        finally:  # gone already unless something failed, or somebody pressed Ctrl-C
            temporary.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
