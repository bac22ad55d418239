"""From what a run did to the report's records: sites, steps, predictions, provenance."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from secateur.measure.types import Measurement
from secateur.methods.base import SiteInfo
from secateur.methods.composed import Composed
from secateur.parts import Parts
from secateur.predict.forecast import Forecast
from secateur.recipe import Recipe
from secateur.report.model import Prediction as Predicted
from secateur.report.model import Provenance, SiteRecord, StepRecord
from secateur.stage import Outcome
from secateur.step import Step


@dataclass
class Clock:
    """Wall seconds by phase, in the order they ran."""

    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - begin


def site_records(outcome: Outcome, space: str) -> tuple[SiteRecord, ...]:
    """What stayed, site by site: one record per tensor (experts together), block or layer."""
    infos: dict[str, list[SiteInfo]] = {}
    for info in outcome.infos.values():
        infos.setdefault(info.name.split("[")[0], []).append(info)
    records = []
    for key in outcome.plan:
        _, _, site = key.split("/", 2)
        if space == "layer":
            records += _layers(outcome.plan[key], outcome.infos["model"])
            continue
        if site not in infos:
            continue
        first = infos[site][0]
        total = outcome.plan.total(key)
        records.append(
            SiteRecord(
                site=site,
                block=first.block,
                component=first.component,
                kept=outcome.plan.kept(key),
                total=total,
                parameters=round(sum(i.units * i.cost for i in infos[site])),
                kind=first.kind.removesuffix(".weight"),
            )
        )
    return tuple(sorted(records, key=lambda r: (r.block, r.kind)))


def _layers(keep: Tensor, info: SiteInfo) -> list[SiteRecord]:
    return [
        SiteRecord(f"layer {i}", i, "other", int(k), 1, round(info.cost), "layer") for i, k in enumerate(keep.tolist())
    ]


def step_record(step: Step, parts: Parts, outcome: Outcome, seconds: float, only_plan: bool = False) -> StepRecord:
    """A step as it was carried out (or, with ``only_plan``, decided)."""
    amount = step.keep if step.keep is not None else step.target or step.at_most_worse or step.grain
    chain = {"grain": str(parts.grain), "budget": step.budget or ""}
    if isinstance(parts.method, Composed):
        chain = {"score": step.score or "", **chain}
    else:
        chain = {"method": step.method or "", **chain}
    chain |= {"effort": step.effort} if step.effort is not None else {}
    chain |= {"repair": step.repair} if step.repair is not None else {}
    chain |= {"fitted on": step.fit_on or ""} if parts.repair is not None or parts.joint else {}
    said = ", ".join(f"{k} {v}" for k, v in step.to_words().items())
    apply: Literal["mask", "cut", "plan"] = "plan" if only_plan else step.apply or "mask"
    name = step.score or step.method or "plan"
    return StepRecord(step.space, name, str(amount), apply, said, chain, site_records(outcome, step.space), seconds)


def provenance(
    recipe: Recipe, clock: Clock, hashes: Mapping[str, str], command: Sequence[str] | None = None
) -> Provenance:
    """Where the numbers come from: versions, seed, device, threads, hashes, durations."""
    versions = {"python": platform.python_version()}
    for name in ("secateur", "torch", "transformers", "safetensors", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    argv = sys.argv if command is None else list(command)
    line = shlex.join([Path(argv[0]).name, *argv[1:]]) if argv and argv[0] else ""
    return Provenance(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=line,
        seed=recipe.seed,
        device=recipe.device,
        threads=torch.get_num_threads(),
        cpu=cpu_name(),
        versions=versions,
        hashes=dict(hashes),
        phases={k: round(v, 3) for k, v in clock.phases.items()},
        peak_rss=peak_rss(),
    )


def peak_rss() -> int:
    """Largest resident memory of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            for line in f:
                if line.startswith("model name"):
                    return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return platform.processor() or platform.machine()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def tensor_hash(ids: Tensor) -> str:
    """SHA-256 of token ids (int64, little endian)."""
    return hashlib.sha256(ids.contiguous().to(torch.int64).numpy().tobytes()).hexdigest()


def predictions(said: Forecast, found: Sequence[Measurement], seconds: float) -> tuple[Predicted, ...]:
    """What the dry run would have said, beside what happened."""
    size = found[-1].size if found else None
    return (
        Predicted("peak memory", "bytes", said.peak_ram, peak_rss()),
        Predicted("parameters", "parameters", said.parameters[1], size.parameters if size else None),
        Predicted("non-zero parameters", "parameters", said.nonzero[1], size.nonzero if size else None),
        Predicted("weights on disk", "bytes", said.bytes[1], size.bytes if size else None),
        Predicted(
            "multiply-accumulates per token", "macs", said.macs_per_token[1], size.macs_per_token if size else None
        ),
        Predicted("KV cache per token", "bytes", said.kv_bytes_per_token[1], size.kv_bytes_per_token if size else None),
        Predicted("wall time", "seconds", said.seconds, seconds),
    )
