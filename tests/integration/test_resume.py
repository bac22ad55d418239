"""Killed, interrupted, resumed: the same bytes as a run that nobody disturbed, and nothing lost on the way."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from forked import Ended, at_removal, at_rename, run, start
from whole_toys import read_all, weights_of, write_model, write_text

RECIPE = """
model: ../model
text: {source: ../text.txt, samples: 6, length: 12, seed: 3}
batch_size: 2
threads: 1
measure: false
steps:
  - {space: ffn, score: wanda, keep: 0.75}
  - {space: weight, method: sparsegpt, sparsity: 0.5}
"""
GO = ["prune", "--recipe", "../recipe.yaml", "-o", "result", "--json"]
WORK = ".result.secateur-work"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded bf16 model, a text, a recipe, and what an undisturbed run makes of them."""
    place = tmp_path_factory.mktemp("resume")
    write_model(place / "model", "llama", torch.bfloat16, num_hidden_layers=5, max_shard_size="30KB")
    write_text(place / "text.txt")
    (place / "recipe.yaml").write_text(RECIPE)
    (place / "calm").mkdir()
    ended = run(place / "calm", GO)
    assert (ended.code, ended.err) == (0, "")
    assert [p.name for p in (place / "calm").iterdir() if not p.name.startswith((".out", ".err"))] == ["result"]
    return place


@pytest.fixture
def place(ground: Path, request: pytest.FixtureRequest) -> Path:
    """A fresh directory beside the model."""
    path = ground / "".join(c if c.isalnum() else "-" for c in request.node.name)
    path.mkdir()
    return path


def same(ground: Path, place: Path) -> None:
    """The result is the undisturbed run's, the input is untouched, and no working file is left."""
    want, got = weights_of(ground / "calm/result"), weights_of(place / "result")
    assert want.keys() == got.keys() == {"model.safetensors", "plan.safetensors"}
    assert want == got
    for name in ("config.json", "secateur.json"):
        assert (place / "result" / name).read_bytes() == (ground / "calm/result" / name).read_bytes()
    assert not (place / WORK).exists()


def resumed(place: Path) -> Ended:
    """Go on until done; an output that is not finished is never taken for one."""
    assert not (place / "result").exists() or (place / "result/plan.safetensors").is_file()
    return run(place, [*GO, "--resume"])


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_file_resumes_to_the_same_bytes(ground: Path, place: Path, seed: int) -> None:
    """SIGKILL just before one of the files a run writes gets its name; then again, in the resumed run."""
    for moment in random.Random(seed).sample(range(26), 2):
        ended = run(place, [*GO, "--resume"], at_rename(moment))
        assert ended.code in (-signal.SIGKILL, 0), ended.err
    assert resumed(place).code == 0
    same(ground, place)


def test_a_run_that_is_killed_again_and_again_gets_there(ground: Path, place: Path) -> None:
    """Never more than seven files at a time: a step's end writes six."""
    for _ in range(12):
        ended = run(place, [*GO, "--resume"], at_rename(7))
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.err
    else:
        pytest.fail("resuming makes no progress")
    same(ground, place)


def test_finished_blocks_are_not_made_again(ground: Path, place: Path) -> None:
    assert run(place, GO, at_rename(7)).code == -signal.SIGKILL
    blocks = sorted((place / WORK).glob("step-0/block-*.safetensors"))
    stamps = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in blocks}
    assert blocks
    assert run(place, [*GO, "--resume"], at_rename(6)).code == -signal.SIGKILL
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in blocks} == stamps
    assert len(list((place / WORK).glob("step-0/block-*.safetensors"))) > len(blocks)
    assert resumed(place).code == 0
    same(ground, place)


def test_nothing_to_resume_starts_afresh(ground: Path, place: Path) -> None:
    assert resumed(place).code == 0
    same(ground, place)


def test_a_finished_result_is_left_alone(ground: Path) -> None:
    calm = ground / "calm"

    def stamps() -> dict[str, tuple[int, int]]:
        files = [calm / "result", *(calm / "result").rglob("*"), *(ground / "model").iterdir()]
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in files}

    before, bytes_before = stamps(), read_all(calm / "result")
    ended = run(calm, [*GO, "--resume"])
    assert ended.code == 0 and "finished" in ended.out and ended.err == ""
    assert stamps() == before and read_all(calm / "result") == bytes_before
    assert not (calm / WORK).exists()


def test_a_changed_recipe_is_refused_and_the_word_named(ground: Path, place: Path) -> None:
    assert run(place, GO, at_rename(9)).code == -signal.SIGKILL
    before = read_all(place / WORK)
    for words, name in ((["--samples", 5], "samples"), (["--seed", 4], "seed"), (["--batch-size", 3], "batch_size")):
        ended = run(place, [*GO, "--resume", *words])
        assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
        assert name in ended.err and "recipe" in ended.err
    assert read_all(place / WORK) == before
    ended = run(ground / "calm", [*GO, "--resume", "--seed", 4])  # the same for a finished result
    assert ended.code == 2 and "seed" in ended.err
    assert resumed(place).code == 0
    same(ground, place)


def test_work_that_is_left_is_not_thrown_away_unasked(ground: Path, place: Path) -> None:
    assert run(place, GO, at_rename(9)).code == -signal.SIGKILL
    before = read_all(place / WORK)
    ended = run(place, GO)
    assert ended.code == 2 and "--resume" in ended.err and "--overwrite" in ended.err and ended.err.count("\n") == 1
    assert read_all(place / WORK) == before
    assert run(place, [*GO, "--overwrite"]).code == 0
    same(ground, place)


def test_overwrite_replaces_only_what_secateur_wrote_and_last_of_all(ground: Path, place: Path) -> None:
    foreign = place / "result"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for words in (GO, [*GO, "--overwrite"], [*GO, "--resume"], [*GO, "--resume", "--overwrite"]):
        ended = run(place, words)
        assert ended.code == 2 and "result" in ended.err
        assert read_all(foreign) == {"thesis.txt": b"mine"}
    shutil.rmtree(foreign)
    shutil.copytree(ground / "calm/result", foreign)
    (foreign / "old").write_text("old")
    record = foreign / "secateur.json"
    record.write_text(record.read_text().replace("0.75", "0.5"))
    before = read_all(foreign)
    assert run(place, GO).code == 2
    assert run(place, [*GO, "--overwrite"], at_rename(20)).code == -signal.SIGKILL
    assert read_all(foreign) == before  # the old result stays until the new one is complete
    assert "another recipe" in run(place, [*GO, "--resume"]).err
    assert run(place, [*GO, "--overwrite", "--resume"]).code == 0
    assert not (foreign / "old").exists()
    same(ground, place)


def test_killed_between_publishing_and_cleaning_up(ground: Path, place: Path) -> None:
    assert run(place, GO, at_removal(0)).code == -signal.SIGKILL
    assert (place / WORK).is_dir() and (place / "result/plan.safetensors").is_file()
    ended = resumed(place)
    assert ended.code == 0 and "finished" in ended.out
    same(ground, place)


def test_the_input_is_never_replaced(ground: Path, place: Path) -> None:
    shutil.copytree(ground / "calm/result", place / "result")  # ours, so --overwrite would be allowed
    before = read_all(place / "result")
    step = ["--space", "weight", "--score", "magnitude", "--sparsity", 0.9, "--no-measure"]
    (place / "link").symlink_to(place / "result")
    for model in ("result", "link", "./result/../result"):
        for out in ("result", "link", ".", "../" + place.name):
            ended = run(place, ["prune", model, "-o", out, "--overwrite", *step])
            assert ended.code == 2, (model, out)
    assert read_all(place / "result") == before


def test_a_plan_alone_is_no_result(ground: Path, place: Path) -> None:
    assert run(place, ["plan", *GO[1:]]).code == 0
    assert set(weights_of(place / "result")) == {"plan.safetensors"}
    assert "finished" in run(place, ["plan", *GO[1:], "--resume"]).out
    ended = run(place, [*GO, "--resume"])
    assert ended.code == 2 and "not empty" in ended.err
    assert run(place, [*GO, "--overwrite"]).code == 0
    same(ground, place)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_says_how_to_resume(ground: Path, place: Path, number: int) -> None:
    def arm() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        at_rename(8, number)()

    ended = run(place, GO, arm)
    assert (ended.code, ended.out) == (130, "")
    assert ended.err.count("\n") == 1 and "secateur prune" in ended.err and "--resume" in ended.err
    assert not (place / "result").exists()
    assert not list(place.rglob("*.part"))
    command = ended.err.split("secateur ", 1)[1]
    assert run(place, command[command.index("prune") :].split()).code == 0
    same(ground, place)


def test_two_runs_at_once_are_refused(ground: Path, place: Path) -> None:
    (place / WORK).mkdir()
    with open(place / WORK / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for words in (GO, [*GO, "--resume"], [*GO, "--overwrite"]):
            ended = run(place, words)
            assert ended.code == 2 and "another run" in ended.err
    assert run(place, GO).code == 0
    same(ground, place)


def test_a_lock_goes_with_its_process(ground: Path, place: Path) -> None:
    """A paused run holds its place; a killed one leaves it."""
    child = start(place, GO, at_rename(9, signal.SIGSTOP))
    os.waitpid(child.pid, os.WUNTRACED)
    assert "another run" in run(place, [*GO, "--resume"]).err
    assert child.kill_after(0).code == -signal.SIGKILL
    assert resumed(place).code == 0
    same(ground, place)


def test_a_truncated_working_file_is_made_again_or_refused(ground: Path, place: Path) -> None:
    """What the system did not write under its final name is not there; what it did is complete."""
    assert run(place, GO, at_rename(9)).code == -signal.SIGKILL
    (place / WORK / "step-0" / "block-00004.safetensors.part").write_bytes(b"half")
    assert resumed(place).code == 0
    same(ground, place)
