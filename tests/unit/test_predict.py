"""The dry run against what is really there: statistics counted in a walk, and seconds worked out by hand."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from secateur.anatomy import anatomy_of
from secateur.cliff import CURVE_WINDOWS, FINEST, LENGTH, LEVELS, WINDOWS
from secateur.engine.host.build import describe_skeleton
from secateur.engine.probes import Gram, InputNorm, PositionSquares
from secateur.engine.walk import Activations, WalkSettings, batches_of, walk
from secateur.measure.options import MeasureOptions
from secateur.predict import time as predict_time
from secateur.predict.memory import ALLOCATOR, BEHIND, WAY_BACK, WIDEST, WIDTHS, statistics
from secateur.predict.time import CALL, OVERHEAD, TRIED, Speed
from whole_toys import cli, make, said, tokens, write_model, write_text

SMALL = ["--samples", 4, "--length", 10, "--batch-size", 2, "--dry-run", "--json"]
TOKENS, BATCHES, LAYERS = 40, 2, 3
BLOCK = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 40  # q and o, k and v, gate, up and down
HEAD = 64 * 32
ATTENTION = 2 * 32  # multiply-accumulates per token, cached token and layer: four heads of 8, keys and values


class Nothing:
    """A model in memory needs nothing loaded."""

    def load_block(self, model: Any, index: int, device: torch.device) -> None:
        return None

    def release_block(self, model: Any, index: int) -> None:
        return None


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "opt", "bert", "mixtral"])
def test_bytes_of_statistics_are_those_a_walk_gathers(family: str) -> None:
    """Matrices that read the same input share one Gram matrix, and the dry run knows which do."""
    model, needs = make(family), (Gram, InputNorm, PositionSquares)
    anatomy = anatomy_of(describe_skeleton(model))
    batches = batches_of(tokens(4, 12), 2)
    for visit in walk(model, anatomy, Nothing(), batches, WalkSettings(needs=needs)):
        probes = {id(p): p for evidence in visit.evidence.values() for p in evidence.values()}.values()
        sums = [v for p in probes for v in p.sums.values() if v.dim()]  # scalars beside them count nothing
        told = statistics(set(needs), visit.block, 12)
        if family == "mixtral":  # an expert's positions are its own tokens', fewer than a window's
            sums = [v for p in probes if not isinstance(p, PositionSquares) for v in p.sums.values() if v.dim()]
            told -= statistics({PositionSquares}, visit.block, 12)
        found = sum(v.nbytes for v in sums)
        if family == "falcon":  # what attention and FFN read together is counted for each
            assert found < told < 1.1 * found
        else:
            assert told == found


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A command to which a space is added, on a machine that multiplies in 1 ns and does all else in no time."""
    speed = Speed(product=1e-9, measured=1e-9, vector=0.0, score=0.0, logit=0.0, hashed=0.0, fitted=1e-9)
    monkeypatch.setattr(predict_time, "speed_of", lambda run, first: speed)
    monkeypatch.setattr(predict_time, "DISK", float("inf"))
    monkeypatch.setattr(MeasureOptions, "short", classmethod(lambda cls: cls(windows=2, length=16, prompts=())))
    write_text(tmp_path / "text.txt", words=9000)
    write_model(tmp_path / "model", max_position_embeddings=1024)
    return ["prune", tmp_path / "model", "-o", tmp_path / "out", "--text", tmp_path / "text.txt", *SMALL]


def ns(count: float) -> float:
    """Seconds that so many multiply-accumulates of a forward pass take."""
    return count * 1e-9 * OVERHEAD


def test_seconds_of_every_phase(ground: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--space", "ffn", "--score", "wanda", "--keep", "1.0", "--curve"]
    assert cli(*ground, *words) == 0
    told = said(capsys)["dry_run"]
    phases = told["phases"]
    assert told["seconds"] == pytest.approx(sum(phases.values()), abs=0.01)
    own = LAYERS * (BLOCK + ATTENTION * 10)  # per token, in windows of ten
    down = 32 * 40 / BLOCK
    passes = 2 - 1 / LAYERS - down  # the last block is not run again; the first pass stops before down_proj
    walked = ns(TOKENS * own * passes) + passes * LAYERS * BATCHES * CALL
    assert phases["step 1"] == pytest.approx(walked, abs=1e-3)
    dense = ns(TOKENS * own) + LAYERS * BATCHES * CALL
    points = len(LEVELS) * ns(CURVE_WINDOWS * LENGTH * (own + HEAD))
    assert phases["curve"] == pytest.approx(dense + points, abs=1e-3)
    measured = 2 * ns(2 * 16 * (LAYERS * (BLOCK + ATTENTION * 10) + HEAD))
    assert phases["measurement"] == pytest.approx(measured, abs=1e-3)


WALKED = 4 * (BLOCK + 2 * 32)  # a block in fp32, with its norms
SEEN = 8 * (32 + 32 + 32 + 40)  # sums of squares of what q, k and v read together, o, gate with up, and down
CHOSEN = BLOCK + 2 * 4 * 32 * 40  # booleans of a block, and scores of a matrix and their order
TEXT = 4 * TOKENS * 32  # hidden states


def passing(count: int) -> int:
    """Bytes while so many tokens pass through a block."""
    return 4 * count * (WIDEST * 40 + (WIDTHS + BEHIND) * 32)


NEEDED = {
    "text passes": (
        ["--score", "wanda"],
        {"one block": WALKED, "activations": TEXT, "statistics": SEEN, "one batch": passing(20)},
    ),
    "a fit": (  # inputs, and what is heard and wanted; the dense block, gradients, two moments, the values before
        ["--score", "wanda", "--repair", "local_reconstruction:passes=1"],
        {
            "one block": WALKED,
            "activations": 3 * TEXT,
            "statistics": SEEN,
            "scores and masks": CHOSEN,
            "fit of a part": 5 * WALKED + passing(10),
        },
    ),
    "the way back": (  # in windows; what goes into three blocks and comes out of the last
        ["--score", "fisher"],
        {
            "outside the blocks": 4 * (HEAD + 32),
            "what went into the blocks": 4 * TEXT,
            "a block, its gradients, both in bf16": 3 * WALKED,
            "what its way back needs": 4 * 10 * (WAY_BACK * 40 + WIDTHS * 32),
        },
    ),
    "deciding": (["--score", "magnitude"], {"one block": WALKED, "scores and masks": CHOSEN, "fit of a part": 0}),
}


@pytest.mark.parametrize("name", NEEDED)
def test_memory_of_the_largest_phase(
    ground: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words, parts = NEEDED[name]
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0)))
    assert cli(*ground, "--space", "weight", "--sparsity", "0.5", "--no-measure", *words) == 0
    told = said(capsys)["dry_run"]
    steady = {"libraries and tokenizer": 0, "model in memory": 0}
    assert told["ram"] == steady | {part: round(size * ALLOCATOR) for part, size in parts.items()}
    assert told["peak_ram"] == sum(told["ram"].values())


SPILLED = {
    "one stream": ["--score", "wanda"],
    "both streams": ["--score", "wanda", "--repair", "block_reconstruction:passes=1"],
    "the way back": ["--score", "fisher"],
    "the way back, and gradients": ["--score", "taylor"],
    "a fit of sub-layers, beside gradients": ["--score", "taylor", "--repair", "local_reconstruction:passes=1"],
    "nothing": ["--score", "magnitude"],
}


@pytest.mark.parametrize("name", SPILLED)
def test_disk_counts_what_is_spilled(
    ground: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Where memory is short, what lies in files meanwhile is told before: here all of them are counted."""
    words = [*ground, "--space", "weight", "--sparsity", "0.5", "--no-measure", *SPILLED[name]]
    place, files, rooms = tmp_path / ".out.secateur-work", [0], [0]
    real_put, real_room = Activations.__setitem__, os.posix_fallocate

    def put(self: Activations, i: int, x: Tensor) -> None:
        real_put(self, i, x)
        files.append(sum(p.stat().st_size for p in place.rglob("activations-*.bin")))

    def room(fd: int, offset: int, count: int) -> None:
        real_room(fd, offset, count)
        rooms.append(count)

    monkeypatch.setattr(Activations, "__setitem__", put)
    monkeypatch.setattr(os, "posix_fallocate", room)
    told = []
    for free in (1 << 40, 1 << 10):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert cli(*words) == 0
        told.append(said(capsys)["dry_run"]["disk"])
    assert cli(*[w for w in words if w != "--dry-run"]) == 0
    assert (max(files) + sum(rooms) > 0) == (name != "nothing")
    assert told[1] - told[0] == max(files) + sum(rooms)


def test_disk_counts_the_packed_copy_too(ground: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    words, told = [*ground, "--space", "weight", "--score", "magnitude", "--sparsity", "0.5", "--no-measure"], []
    for more in ([], ["--pack", "bf16"]):
        assert cli(*words, *more) == 0
        told.append(said(capsys)["dry_run"])
    assert told[1]["disk"] - told[0]["disk"] == told[1]["bytes"][1] < told[0]["bytes"][1]


@pytest.mark.parametrize(("repair", "noted"), [("local_reconstruction", 3), ("block_reconstruction", 1)])
def test_a_fit_by_gradient_takes_its_passes(
    ground: list[Any], capsys: pytest.CaptureFixture[str], repair: str, noted: int
) -> None:
    """Three forward passes' work each, two looks at the error, and the inputs and targets or the dense stream."""
    words, seconds = ["--space", "weight", "--score", "wanda", "--keep", "0.5", "--no-measure"], []
    for more in ([], ["--repair", f"{repair}:passes=2"], ["--repair", f"{repair}:passes=5"]):
        assert cli(*ground, *words, *more) == 0
        seconds.append(said(capsys)["dry_run"]["phases"]["step 1"])
    once = ns(TOKENS * LAYERS * (BLOCK + ATTENTION * 10))
    assert seconds[1] - seconds[0] == pytest.approx((noted + 2 + 2 * 3) * once, abs=1e-3)
    assert seconds[2] - seconds[1] == pytest.approx(3 * (19 - 8) / 4 * once, abs=1e-3)  # 20 less the last


def test_a_search_and_what_is_not_asked_for(ground: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--space", "ffn", "--score", "wanda", "--no-measure"]
    assert cli(*ground, *words, "--at-most-worse", "5%") == 0
    phases = said(capsys)["dry_run"]["phases"]
    once = ns(WINDOWS * LENGTH * (LAYERS * (BLOCK + ATTENTION * 10) + HEAD))
    bisections = 7  # of 128ths
    assert 2**bisections == FINEST
    least = (1 + bisections + TRIED) * once
    assert phases["search of step 1"] > least
    assert phases["search of step 1"] < least + 4 * (phases["step 1"] + 0.01)
    assert "measurement" not in phases and "curve" not in phases
    assert cli(*ground, "--space", "ffn", "--score", "magnitude", "--keep", "0.5", "--no-measure") == 0
    assert said(capsys)["dry_run"]["phases"]["step 1"] == 0.0  # no text is read


def test_a_real_trial_gives_plausible_speeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Speed] = []
    real = predict_time.speed_of

    def spy(run: Any, first: Any) -> Speed:
        seen.append(real(run, first))
        return seen[-1]

    monkeypatch.setattr(predict_time, "speed_of", spy)
    write_text(tmp_path / "text.txt")
    words = ["prune", write_model(tmp_path / "model"), "-o", tmp_path / "out", "--text", tmp_path / "text.txt", *SMALL]
    for more in (
        ["weight", "--method", "sparsegpt", "--sparsity", "0.5"],
        ["weight", "--score", "wanda", "--grain", "2:4"],
    ):
        assert cli(*words, "--no-measure", "--space", *more) == 0
        assert said(capsys)["dry_run"]["seconds"] > 0
    for speed in seen:
        assert all(1e-13 < value < 1e-3 for value in vars(speed).values())
