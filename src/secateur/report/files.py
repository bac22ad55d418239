"""Reading and writing a report's two files: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from secateur.errors import SecateurError
from secateur.report.model import JSON_NAME, PAGE_NAME, WORKS, Report
from secateur.report.page import page


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the new one, never half of it."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as err:
        raise SecateurError(
            f"cannot write {path}", received=err.strerror, works="a directory that can be written"
        ) from err
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp keeps it to the owner; a report is meant to be shown
        os.replace(name, path)
    except OSError as err:
        Path(name).unlink(missing_ok=True)
        raise SecateurError(
            f"cannot write {path}", received=err.strerror, works="free some space, then run again with --resume"
        ) from err


def write(report: Report, directory: Path) -> None:
    """Write ``report.json`` and ``report.html`` into an existing directory, each whole or not at all."""
    write_text(directory / JSON_NAME, report.to_json())
    write_text(directory / PAGE_NAME, page(report))


def read(directory: Path) -> Report:
    """The report of a finished run.

    Raises:
        SecateurError: there is no ``report.json``, or it cannot be read.
    """
    path = directory / JSON_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        raise SecateurError(
            f"no report can be read at {path}",
            received=err.strerror,
            works="the output directory of a finished `secateur prune`",
        ) from err
    except UnicodeDecodeError as err:
        raise SecateurError(f"{path} is not UTF-8 text", received=err.reason, works=WORKS) from err
    return Report.from_json(text)


def redraw(directory: Path) -> Path:
    """Draw ``report.html`` again from ``report.json``; returns the page's path."""
    report = read(directory)
    write_text(directory / PAGE_NAME, page(report))
    return directory / PAGE_NAME
