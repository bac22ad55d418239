"""Every verb of the command line is a function of `secateur.run`, and the command line calls it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur import cli, run
from secateur.measure.latency import LatencyOptions
from secateur.measure.options import MeasureOptions, Subject
from secateur.recipe import MeasureRequest
from whole_toys import write_model, write_text

WORDS: dict[str, list[str]] = {
    "inspect": ["m"],
    "prune": ["m", "-o", "out", "--space", "ffn", "--score", "magnitude", "--keep", "0.5"],
    "plan": ["m", "-o", "out", "--space", "ffn", "--score", "magnitude", "--keep", "0.5"],
    "measure": ["m"],
    "run": ["m", "--prompt", "once"],
    "bench": ["m"],
    "pack": ["m", "-o", "out"],
    "unpack": ["m", "-o", "out"],
    "report": ["out"],
}


class Called(Exception):
    """The verb was reached."""


def verbs() -> list[str]:
    groups = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return [verb for group in groups for verb in group.choices]


def test_the_words_here_are_all_of_them() -> None:
    assert set(WORDS) == set(verbs())


@pytest.mark.parametrize("verb", WORDS)
def test_a_verb_is_a_function_that_the_command_line_calls(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = getattr(run, verb)
    assert callable(function) and (function.__doc__ or "").strip()
    if verb in secateur.__all__:
        assert getattr(secateur, verb) is function
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)

    def reached(*args: Any, **kwargs: Any) -> None:
        raise Called

    monkeypatch.setattr(run, "prune" if verb == "plan" else verb, reached)
    with pytest.raises(Called):
        cli.main([verb, *WORDS[verb]])


def test_the_words_of_measure_become_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[list[str], MeasureOptions]] = []

    def measured(subjects: list[Subject], options: MeasureOptions, *_: Any) -> tuple[list[Any], list[Any]]:
        got.append(([s.name for s in subjects], options))
        return [], []

    monkeypatch.setattr(run, "measure_subjects", measured)
    model, text = str(write_model(tmp_path / "m")), str(write_text(tmp_path / "t.txt"))
    said = MeasureRequest(
        (model, model), text, windows=3, length=7, dtype="bf16", choices=tmp_path / "c.jsonl", tasks=("piqa",),
        latency=True, batch_size=5, device="cpu",
    )  # fmt: skip
    run.measure(said)
    run.measure(MeasureRequest((model,), length=9, dtype="fp16", device="cpu"))
    both = MeasureOptions(text, 3, 7, None, 5, "bf16", tmp_path / "c.jsonl", ("piqa",), latency=LatencyOptions())
    alone = MeasureOptions("builtin", 64, 9, None, 4, "fp16", latency=None)
    assert got == [([model, model], both), ([model], alone)]
