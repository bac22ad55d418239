"""Check the anatomy of every causal family of the installed Transformers, and write docs/architectures.md.

Each family's default config is made into a toy copy and checked in a process of its own, with a limit on
time and memory, so that one which crashes or swells is a line in the table and not the end of the run.

    python benchmarks/architectures.py [FAMILY ...]        with names: only those, to standard output
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

from secateur.anatomy import FAMILIES
from secateur.engine.check import check
from secateur.engine.host.build import causal_families, default_config
from secateur.errors import SecateurError

OUT = Path(__file__).parents[1] / "docs" / "architectures.md"
SECONDS, BYTES = 120, 8 * 2**30
SPACES = ("weight", "ffn", "expert", "kv_group", "head", "layer")


@dataclass(frozen=True)
class Row:
    """What came of one family."""

    family: str
    passed: bool = False
    origin: str = ""
    proved: dict[str, bool] = field(default_factory=dict)
    plain: dict[str, bool] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    error: str = ""
    crashed: bool = False
    seconds: float = 0.0


def _child(family: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    start = time.perf_counter()
    try:
        r = check(default_config(family))
        seconds = time.perf_counter() - start
        pipe.send(Row(family, r.passed, r.origin, dict(r.proved), dict(r.plain), dict(r.reasons), seconds=seconds))
    except SecateurError as error:
        pipe.send(Row(family, error=error.wrong))


def examine(family: str) -> Row:
    """Check one family in a child process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(family, theirs))
    child.start()
    theirs.close()
    try:
        row: Row = ours.recv() if ours.poll(SECONDS) else Row(family, error=f"no answer in {SECONDS} s", crashed=True)
    except EOFError:
        row = Row(family, error="the check itself failed", crashed=True)
    child.kill()
    child.join()
    return row


def table(rows: Sequence[Row]) -> str:
    """The page: a summary, the proved families, and the others with the reason."""
    passed = [r for r in rows if r.passed]
    declared = sum(r.origin == "declared" for r in passed)
    refuted = [r for r in rows if not r.passed and not r.error]
    slowest = max(passed, key=lambda r: r.seconds)
    lines = [
        "# Architectures",
        "",
        f"Every causal family of Transformers {transformers.__version__}, its default config made small and all",
        "parameters random: masked, cut, and reloaded give the same logits (within 1e-4 of the largest; a cut changes",
        "them by at least a thousand times the error), with a size per layer and with one size, with the KV cache",
        "where the family's own cache agrees with no cache. Made by `python benchmarks/architectures.py`; for a config",
        "of your own run `secateur inspect MODEL --check`.",
        "",
        (
            f"**{len(passed)} of {len(rows)} proved** ({declared} declared, {len(passed) - declared} derived), "
            f"{len(refuted)} refuted, {sum(bool(r.error) for r in rows)} refused before a proof, "
            f"{sum(r.crashed for r in rows)} crashed. Slowest check: {slowest.seconds:.1f} s ({slowest.family})."
        ),
        "",
        "`yes`: proved, and a uniform cut loads with plain `AutoModel.from_pretrained`. `own`: proved, and loads with",
        "`secateur.load` (the config has no word for the size, or says another model with it). `-`: not offered. In a",
        "mixture of experts `ffn` means the neurons of each routed expert; those of shared experts stay, and a count",
        "that is no multiple of 16 bytes loads with `secateur.load` only. `weight` is masked, never cut. Of a family",
        "with several parts (vision, audio) the text part is meant. Layers are cut where the config says what stays.",
        "",
        f"| family | anatomy | {' | '.join(SPACES)} |",
        f"|---|---|{'---|' * len(SPACES)}",
    ]
    for r in passed:
        cells = ["-" if s not in r.proved else "yes" if r.plain.get(s) else "own" for s in SPACES]
        lines.append(f"| {r.family} | {r.origin} | {' | '.join(cells)} |")
    lines += ["", "## Not offered, and why", "", "| family | space | why |", "|---|---|---|"]
    for r in passed:
        lines += [f"| {r.family} | {s} | {_cell(w)} |" for s, w in r.reasons.items() if s not in r.proved]
    lines += ["", "## Refused", "", "| family | why |", "|---|---|"]
    for r in rows:
        if not r.passed:
            failed = "; ".join(f"{s}: {r.reasons.get(s, '')}" for s, ok in r.proved.items() if not ok)
            lines.append(f"| {r.family} | {_cell(r.error or failed or 'neither ffn nor expert is offered')} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").strip()[:200]


def main(families: Sequence[str]) -> int:
    rows = []
    for family in families or causal_families():
        rows.append(examine(family))
        r = rows[-1]
        word = "proved " if r.passed else "crashed" if r.crashed else "refused"
        sys.stderr.write(f"{word} {family} {r.seconds:.1f} s {r.error}\n")
    if families:
        sys.stdout.write(table(rows))
    else:
        OUT.write_text(table(rows), encoding="utf-8")
    wrong = [f for f in FAMILIES if any(r.family == f and not r.passed and not r.error for r in rows)]
    sys.stderr.write(f"{sum(r.passed for r in rows)} of {len(rows)} proved\n")
    return 1 if wrong or any(r.crashed for r in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
