"""Tensors from files into fresh memory: plain reads (never a memory map), packed tensors unpacked on the way."""

from __future__ import annotations

from collections.abc import Mapping
from io import BufferedReader, FileIO
from pathlib import Path

import torch
from torch import Tensor

from secateur.engine.headers import Entry
from secateur.engine.packed_files import PackedEntry
from secateur.errors import SecateurError


class Reader:
    """Reads tensors by name on disk into fresh memory, keeping files open over a block."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        self._files: dict[Path, FileIO] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *problem: object) -> None:
        for file in self._files.values():
            file.close()

    def __call__(self, name: str) -> Tensor:
        """One tensor, checked to be finite; a packed one is unpacked."""
        entry = self.entries[name]
        if isinstance(entry, PackedEntry):
            return entry.dense(self.read)
        value = self.read(entry)
        check_finite(name, value)
        return value

    def read(self, entry: Entry) -> Tensor:
        """The tensor of an entry, as it is."""
        try:
            if entry.file not in self._files:
                self._files[entry.file] = FileIO(entry.file)
            return read_entry(self._files[entry.file], entry)
        except OSError as error:
            raise SecateurError(
                f"cannot read a tensor from {entry.file}",
                received=error.strerror or str(error),
                works="fetch the checkpoint again",
            ) from error


def read_entry(file: FileIO | BufferedReader, entry: Entry) -> Tensor:
    """One tensor's bytes into memory of its own."""
    out = torch.empty(entry.shape, dtype=entry.dtype)
    if out.numel():
        view = out.reshape(-1).view(torch.uint8).numpy().data
        file.seek(entry.begin)
        while view:
            count = file.readinto(view)
            if not count:
                raise OSError(f"{entry.file.name} ended early")
            view = view[count:]
    return out


def check_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinities."""
    if value.is_floating_point() and value.numel():
        low, high = torch.aminmax(value)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise SecateurError(
                f"tensor {name!r} holds NaN or infinite weights",
                received=f"{int((~torch.isfinite(value)).sum())} of {value.numel()} entries",
                works="repair or fetch the checkpoint again",
            )
