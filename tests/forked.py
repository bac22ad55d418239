"""The command line in a forked child: a process of its own that can be killed, without a fresh interpreter's start.

Nothing that differentiates may run in a child (autograd's threads do not survive a fork).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.cli import main


@dataclass
class Ended:
    """How a child ended: its exit code (minus the signal's number if it was killed) and what it said."""

    code: int
    out: str
    err: str


@dataclass
class Child:
    pid: int
    place: Path

    def wait(self) -> Ended:
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, *((self.place / f".{name}").read_text() for name in ("out", "err")))

    def kill_after(self, seconds: float, number: int = signal.SIGKILL) -> Ended:
        time.sleep(seconds)
        os.kill(self.pid, number)  # a child that ended is a zombie until it is waited for: never somebody else
        return self.wait()


def start(place: Path, words: Sequence[object], first: Callable[[], Any] = lambda: None) -> Child:
    """Run ``secateur WORDS`` in directory ``place``; ``first`` is called in the child before it."""
    pid = os.fork()
    if pid:
        return Child(pid, place)
    code = 1
    try:
        os.chdir(place)
        for name, number in ((".out", 1), (".err", 2)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        first()
        code = main([str(w) for w in words])
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(place: Path, words: Sequence[object], first: Callable[[], Any] = lambda: None) -> Ended:
    return start(place, words, first).wait()


def at_rename(count: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """Send this process a signal just before the ``count``-th file gets its final name (from 0)."""
    return _at(os, "replace", count, number)


def at_removal(count: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """Send this process a signal just before the ``count``-th directory is removed (from 0)."""
    return _at(shutil, "rmtree", count, number)


def _at(module: Any, name: str, count: int, number: int) -> Callable[[], None]:
    def arm() -> None:
        real, seen = getattr(module, name), [0]

        def counted(*args: Any, **kwargs: Any) -> None:
            if seen[0] == count:
                os.kill(os.getpid(), number)
            seen[0] += 1
            real(*args, **kwargs)

        setattr(module, name, counted)

    return arm
