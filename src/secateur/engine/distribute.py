"""Calibration text over several processes (``torchrun``, gloo): split batches, add the sums up."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.engine.probes import Probe
from secateur.errors import SecateurError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among those that share the calibration text."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """True for the process that writes files and talks."""
        return self.rank == 0

    def mine(self, batches: Sequence[T]) -> list[T]:
        """This process's batches. Batches are never re-composed, so their sums are those of one process."""
        return list(batches[self.rank :: self.size])

    def add_up(self, probes: Iterable[Probe]) -> None:
        """All-reduce the statistics in place. Every process must pass the same probes in the same order."""
        if self.size == 1:
            return
        for probe in probes:
            for name in sorted(probe.sums):
                value = probe.sums[name].contiguous()
                dist.all_reduce(value)
                probe.sums[name] = value

    def add(self, sums: Iterable[Tensor]) -> None:
        """All-reduce these tensors in place, in the same order in every process."""
        for value in sums if self.size > 1 else ():
            dist.all_reduce(value)

    def wait(self) -> None:
        """Wait until every process is here (the first one has written its files)."""
        if self.size > 1:
            dist.barrier()

    def agree(self, problem: SecateurError | None) -> None:
        """Wait for the first process; if it met a problem, every process stops with it.

        Raises:
            SecateurError: the first process's problem (what the others pass is not looked at).
        """
        if self.size > 1:
            told = [None if problem is None else (problem.wrong, problem.received, problem.works)]
            dist.broadcast_object_list(told, 0)
            if told[0] is not None and not self.first:
                wrong, received, works = told[0]
                raise SecateurError(wrong, received=received, works=works)
        if problem is not None:
            raise problem


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that ``torchrun`` started; alone without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    owner = not dist.is_initialized()
    if owner:
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        if owner:
            dist.destroy_process_group()


def seeded(seed: int, *words: str) -> torch.Generator:
    """A generator that depends on the seed and the words only, on any machine and any number of processes."""
    import hashlib

    digest = hashlib.sha256("\0".join((str(seed), *words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
