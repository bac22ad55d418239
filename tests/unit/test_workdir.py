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
from whole_toys import cli, write_model, write_text


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


def stopped(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """A run that somebody stops just before its result gets its place."""

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "publish", stop)
        assert cli(*words) == 130


def last_bit(path: Path) -> None:
    """Another weight, somewhere behind the first 64 KiB."""
    raw = bytearray(path.read_bytes())
    assert len(raw) > 1 << 16
    raw[-4] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("changed", ["model", "plan", "text"])
def test_files_that_changed_since_are_not_mixed_with_what_was_made_of_them(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither by a run that is taken up again, nor where the result is finished."""
    model, out = write_model(tmp_path / "model", num_hidden_layers=4), tmp_path / "out"
    text = write_text(tmp_path / "text.txt")
    wanda = ["--score", "wanda", "--space", "weight", "--text", text, "--samples", 2, "--length", 8, "--no-measure"]
    for name, sparsity in (("plan", 0.5), ("other", 0.6)):
        assert cli("plan", model, "-o", tmp_path / name, *wanda, "--sparsity", sparsity) == 0
    plan = tmp_path / "plan/plan.safetensors"
    replay = ["--plan", plan, "--no-measure"]
    words = ["prune", model, "-o", out, *(replay if changed == "plan" else [*wanda, "--sparsity", 0.5])]
    file = {"model": model / "model.safetensors", "plan": plan, "text": text}[changed]
    before = file.read_bytes()

    def change() -> None:
        if changed == "model":
            last_bit(file)
        elif changed == "plan":
            shutil.copy(tmp_path / "other/plan.safetensors", plan)
        else:
            write_text(text, seed=1)

    stopped(monkeypatch, *words)
    for since in ("interrupted run", "result"):
        change()
        capsys.readouterr()
        assert cli(*words, "--resume") == 2
        said = capsys.readouterr().err
        assert changed in said and f"changed since the {since}" in said and "--overwrite" in said
        file.write_bytes(before)
        assert cli(*words, "--resume") == 0
    assert not work_dir(out).exists()
    change()
    capsys.readouterr()
    assert cli(*words, "--resume", "--overwrite") == 0
    assert "finished" not in capsys.readouterr().out


def test_a_text_that_is_named_only_when_a_replay_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first blocks would be plain masks, the others weighed anew."""
    model, plan = write_model(tmp_path / "model"), tmp_path / "plan"
    words = ["--space", "weight", "--method", "sparsegpt", "--sparsity", 0.5, "--samples", 2, "--length", 8]
    assert cli("plan", model, "-o", plan, *words) == 0
    words = ["prune", model, "-o", tmp_path / "out", *words, "--plan", plan / "plan.safetensors", "--no-measure"]
    stopped(monkeypatch, *words)
    capsys.readouterr()
    assert cli(*words, "--resume", "--text", "builtin") == 2
    assert "--text" in capsys.readouterr().err
    assert cli(*words, "--resume") == 0
