"""A search that is killed goes on where it was: the same generations, the same bytes as one that nobody disturbed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import at_rename, run
from whole_toys import weights_of, write_model, write_text

RECIPE = """
model: ../model
text: {source: ../text.txt, samples: 5, length: 10, seed: 3}
batch_size: 2
threads: 1
measure: false
steps:
  - {space: weight, method: sparsegpt, sparsity: 0.5,
     budget: "evopress:generations=5,offspring=4,survivors=2/1,tokens=20/40,levels=1,step=0.2"}
"""
GO = ["prune", "--recipe", "../recipe.yaml", "-o", "result", "--json"]
WORK = ".result.secateur-work"
LAYERS = 2


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("search")
    write_model(place / "model", "llama", torch.bfloat16, num_hidden_layers=LAYERS)
    write_text(place / "text.txt")
    (place / "recipe.yaml").write_text(RECIPE)
    (place / "calm").mkdir()
    ended = run(place / "calm", GO)
    assert (ended.code, ended.err) == (0, "")
    assert not (place / "calm" / WORK).exists()
    return place


def search_of(place: Path) -> dict[str, Any]:
    return json.loads((place / "result/report.json").read_text())["steps"][0]["search"]  # type: ignore[no-any-return]


# A run's files in order: run.json, the dense answers, two blocks of levels, search.json after each of five generations
# and at the end, then blocks and their plans.
@pytest.mark.parametrize("moments", [(1, 1), (3,), (4,), (6, 1), (9,), (10, 2)], ids=str)
def test_killed_anywhere_it_ends_as_if_undisturbed(ground: Path, moments: tuple[int, ...]) -> None:
    place = ground / f"killed-{'-'.join(map(str, moments))}"
    place.mkdir()
    stages = []
    for moment in moments:
        ended = run(place, [*GO, "--resume"], at_rename(moment))
        assert ended.code == -signal.SIGKILL, ended.err
        work = place / WORK / "step-0"
        state = json.loads((work / "search.json").read_text()) if (work / "search.json").is_file() else {"history": []}
        stages.append((len(list(work.glob("search-*.safetensors"))), len(state["history"])))
    assert stages[0] == {1: (0, 0), 3: (2, 0), 4: (3, 0), 6: (3, 2), 9: (3, 5), 10: (0, 5)}[moments[0]]
    assert stages == sorted(stages, key=lambda s: s[1])  # no generation is made twice
    if moments[0] == 3:
        ended = run(place, GO)
        assert ended.code == 2 and "--resume" in ended.err
    kept = {p: p.stat().st_mtime_ns for p in (place / WORK / "step-0").glob("search-levels-*")}
    assert run(place, [*GO, "--resume"]).code == 0
    assert weights_of(place / "result") == weights_of(ground / "calm/result")
    assert search_of(place) == search_of(ground / "calm")
    assert len(search_of(place)["generations"]) == 5
    assert not (place / WORK).exists() and len(kept) <= LAYERS
