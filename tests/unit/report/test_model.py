"""A report survives its JSON, and refuses what is not one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.measure.types import Perplexity
from secateur.report import Report, read, redraw, write


def changed(report: Report, *path: str | int, value: object) -> str:
    """The report's JSON with one value replaced."""
    tree = json.loads(report.to_json())
    at = tree
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(tree)


def test_round_trip_is_exact(masked: Report, cut: Report) -> None:
    for report in (masked, cut, Report("model", "out")):
        again = Report.from_json(report.to_json())
        assert again == report
        assert again.to_json() == report.to_json()


def test_infinity_is_strict_json_and_comes_back(masked: Report) -> None:
    last = masked.measurements[-1]
    broken = dataclasses.replace(last, perplexity=Perplexity(math.inf, (800.0,), 1, 8, 8, 7, "float16", "text"))
    report = dataclasses.replace(masked, measurements=(masked.measurements[0], broken))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads(report.to_json(), parse_constant=refuse)
    assert Report.from_json(report.to_json()) == report


def test_odd_text_comes_back(tmp_path: Path) -> None:
    report = Report("a\u2028b\ud800c\x00é", "out", notes=("line\nline",))
    write(report, tmp_path)
    assert read(tmp_path) == report


def test_optional_parts_may_be_missing(masked: Report) -> None:
    assert Report.from_json('{"schema": 1, "model": "m", "out": "o"}') == Report("m", "o")
    tree = json.loads(masked.to_json())
    for step in tree["steps"]:
        del step["chain"], step["seconds"]
    read_back = Report.from_json(json.dumps(tree))
    assert read_back.steps[0].chain == {}
    assert read_back.steps[0].sites == masked.steps[0].sites


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("schema",), 2, "schema"),
        (("schema",), True, "schema"),
        (("model",), 3, "report.model must be a text"),
        (("steps",), {}, "report.steps must be a list"),
        (("steps", 0, "apply"), "melt", "'mask', 'cut', 'plan'"),
        (("steps", 0, "sites", 1, "kept"), "many", r"report.steps\[0\].sites\[1\].kept must be a whole number"),
        (("steps", 0, "sites", 1, "kept"), True, "whole number"),
        (("steps", 0, "sites", 1, "kept"), 1.5, "whole number"),
        (("measurements", 1, "size", "bytes"), None, "size.bytes must be a whole number"),
        (("measurements", 0, "perplexity", "value"), "large", "must be a number"),
        (("measurements", 0, "tasks"), [], "tasks must be an object"),
        (("provenance", "sede"), 0, "did you mean 'seed'"),
        (("comparison",), [1], "comparison must be an object"),
    ],
)
def test_wrong_shapes_are_refused(masked: Report, path: tuple[str | int, ...], value: object, says: str) -> None:
    with pytest.raises(SecateurError, match=says):
        Report.from_json(changed(masked, *path, value=value))


def test_required_fields_are_required() -> None:
    with pytest.raises(SecateurError, match=r"report\.out is missing"):
        Report.from_json('{"schema": 1, "model": "m"}')


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"schema": 1, "model": NaN, "out": "o"}', "[" * 100_000])
def test_text_that_is_no_report(text: str) -> None:
    with pytest.raises(SecateurError):
        Report.from_json(text)


def test_redraw_gives_the_same_page_and_leaves_the_json(masked: Report, tmp_path: Path) -> None:
    masked.write(tmp_path)
    page, truth = (tmp_path / "report.html").read_bytes(), (tmp_path / "report.json").read_bytes()
    (tmp_path / "report.html").unlink()
    for _ in range(2):
        assert redraw(tmp_path) == tmp_path / "report.html"
        assert (tmp_path / "report.html").read_bytes() == page
    assert (tmp_path / "report.json").read_bytes() == truth
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_failed_write_leaves_the_old_page(
    masked: Report, cut: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked.write(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SecateurError, match="No space left"):
        cut.write(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_nothing_to_redraw(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="finished `secateur prune`"):
        redraw(tmp_path)
    (tmp_path / "report.json").write_bytes(b"\xff\xfe")
    with pytest.raises(SecateurError, match="UTF-8"):
        redraw(tmp_path)
