"""What a run holds of the blocks that it has finished."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur import run
from secateur.engine.headers import Entry
from secateur.stage import Outcome
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
