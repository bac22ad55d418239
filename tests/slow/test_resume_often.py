"""kill -9 at random moments of a run, twenty times over, then resumed: identical bytes."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from forked import run, start
from whole_toys import weights_of, write_model, write_text

RECIPE = """
model: ../model
text: {source: ../text.txt, samples: 32, length: 64, seed: 3}
batch_size: 4
threads: 1
measure: false
steps:
  - {space: ffn, score: wanda, keep: 0.75}
  - {space: weight, method: sparsegpt, sparsity: 0.5}
"""
GO = ["prune", "--recipe", "../recipe.yaml", "-o", "result", "--resume"]


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    sizes = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=8)
    write_model(tmp_path / "model", "llama", torch.bfloat16, max_shard_size="300KB", **sizes)
    write_text(tmp_path / "text.txt", 8000)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "calm").mkdir()
    begin = time.perf_counter()
    assert run(tmp_path / "calm", GO).code == 0
    whole = time.perf_counter() - begin
    want = weights_of(tmp_path / "calm/result")
    rng, killed = random.Random(0), 0
    for number in range(20):
        place = tmp_path / str(number)
        place.mkdir()
        ended = start(place, GO).kill_after(rng.uniform(0.02, 0.98) * whole)
        killed += ended.code == -signal.SIGKILL
        ended = run(place, GO)
        assert ended.code == 0, ended.err
        assert weights_of(place / "result") == want, number
        assert not (place / ".result.secateur-work").exists()
    assert killed >= 15
