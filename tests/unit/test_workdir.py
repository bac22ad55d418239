"""What a run holds of the blocks that it has finished."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest

from secateur import run
from secateur.engine.headers import Entry
from secateur.stage import Outcome
from secateur.workdir import work_dir
from whole_toys import cli, write_model


@pytest.mark.parametrize("words", [["weight", "--sparsity", 0.5], ["ffn", "--keep", 0.5], ["ffn", "--keep", "1.0"]])
def test_finished_blocks_leave_nothing_but_where_their_plan_lies(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of a large model has a gigabyte of bits: none of them is in memory when its steps end."""
    outcomes: list[Outcome] = []
    real = run.step_record

    def spy(step, parts, outcome, *rest):  # type: ignore[no-untyped-def]
        outcomes.append(outcome)
        return real(step, parts, outcome, *rest)

    monkeypatch.setattr(run, "step_record", spy)
    model = write_model(tmp_path / "model", num_hidden_layers=4)
    assert cli("prune", model, "-o", tmp_path / "a", "--score", "magnitude", "--space", *words, "--no-measure") == 0
    replay = ["--plan", tmp_path / "a/plan.safetensors"]
    assert cli("prune", model, "-o", tmp_path / "b", *replay, "--no-measure") == 0
    for outcome in outcomes:
        held = [outcome.plan.bits(key).held for key in outcome.plan]
        assert len(held) >= 4 and all(isinstance(h, Entry) for h in held)
    assert (tmp_path / "a/plan.safetensors").read_bytes() == (tmp_path / "b/plan.safetensors").read_bytes()


@pytest.mark.parametrize("gone", [("run.json",), ("run.json", "step-0/finished.json"), ("run.json", "lock", "step-0")])
def test_what_a_kill_left_of_a_directory_that_was_being_removed_goes(gone: tuple[str, ...], tmp_path: Path) -> None:
    """The result is in its place; killed while the working directory was being removed, in any order but the first."""
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    words = ["prune", model, "-o", out, "--space", "weight", "--score", "magnitude", "--sparsity", 0.5, "--no-measure"]
    assert cli(*words) == 0
    work = work_dir(out)
    (work / "step-0").mkdir(parents=True)
    for name in ("run.json", "lock", "step-0/finished.json", "step-0/plan-00000.safetensors"):
        (work / name).write_text("{}")
    for name in gone:
        path = work / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    if (work / "lock").exists():
        with open(work / "lock") as lock:  # another run is alive there, and has not written what it is yet
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert cli(*words, "--resume") == 0 and work.exists()
    assert cli(*words, "--resume") == 0 and not work.exists()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
