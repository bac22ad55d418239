"""Progress as three plain calls. The engine is handed these; only this file knows rich."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress(Protocol):
    """What a long run tells whoever watches."""

    def phase(self, name: str, total: int) -> None:
        """A new part of the work begins; it has ``total`` steps of about equal cost."""

    def advance(self, n: int = 1) -> None:
        """``n`` steps of the current phase are done."""


class Silent:
    """Says nothing. What Python callers and pipes get."""

    def phase(self, name: str, total: int) -> None:
        """Nothing."""

    def advance(self, n: int = 1) -> None:
        """Nothing."""


class Bar:
    """One line on a terminal: phase, bar, steps, time gone and time left. Use as a context manager."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._rich: RichProgress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            redirect_stdout=False,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        self._rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._finish()
        self._rich.stop()

    def phase(self, name: str, total: int) -> None:
        """Close the current line and begin the next."""
        self._finish()
        self._task = self._rich.add_task(name, total=max(total, 1))

    def advance(self, n: int = 1) -> None:
        """Move the current bar."""
        if self._task is not None:
            self._rich.advance(self._task, n)

    def _finish(self) -> None:
        if self._task is not None:
            self._rich.stop_task(self._task)
            self._task = None


def watching() -> bool:
    """Whether somebody looks at standard error."""
    return sys.stderr.isatty()
