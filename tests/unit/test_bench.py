"""Timing models side by side: who runs when, what is counted, what is printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur import speed
from secateur.engine.decoders import Decoder
from secateur.engine.running import Opening, Running
from secateur.errors import SecateurError
from secateur.measure.bench import BenchOptions, Residence, bench, residence
from secateur.measure.residence import resident
from secateur.printing import cell
from secateur.speed import BenchRequest
from whole_toys import cli, make, said, write_model


class Clocked(Decoder):
    """Takes the seconds it is told to on a clock of its own: prompt tokens cost ``a`` each, steps ``b``."""

    def __init__(self, name: str, clock: dict[str, float], log: list[str], costs: tuple[float, float]) -> None:
        self.name, self.clock, self.log, self.costs, self.calls = name, clock, log, costs, 0

    def begin(self, ids: Tensor, room: int) -> Tensor:
        self.log.append(self.name)
        self.calls += 1
        self.shape, self.room = tuple(ids.shape), room
        self.clock["now"] += self.costs[0] * ids.shape[1] * (100 if self.calls == 1 else 1)
        return torch.zeros(len(ids), 8)

    def step(self, tokens: Tensor) -> Tensor:
        self.clock["now"] += self.costs[1]
        return torch.zeros(len(tokens), 8)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    now = {"now": 0.0}
    monkeypatch.setattr("secateur.measure.bench.time.perf_counter", lambda: now["now"])
    return now


def test_models_take_turns_and_every_other_round_goes_backwards(clock: dict[str, float]) -> None:
    log: list[str] = []
    models = [Clocked("a", clock, log, (2.0, 1.0)), Clocked("b", clock, log, (3.0, 0.5))]
    shares: list[float] = []
    options = BenchOptions(batches=(2, 1), prompts=(5, 7), new_tokens=4, rounds=3)
    got = bench(models, 8, options, shares.append)
    assert [(s.batch, s.prompt_tokens) for s in got[0]] == [(1, 5), (1, 7), (2, 5), (2, 7)]
    assert "".join(log) == "baabbaab" * 4
    assert shares[-1] == 1 and len(shares) == len(log)
    for shapes, (prompt, step) in zip(got, [(2.0, 1.0), (3.0, 0.5)], strict=True):
        for shape in shapes:  # the first call, a hundred times as slow, is not counted
            assert shape.prefill.median == shape.prefill.high == prompt * shape.prompt_tokens
            assert shape.first_token.median == prompt * shape.prompt_tokens
            assert shape.decode_per_token.median == step
            assert shape.prefill.repeats == 3
            assert shape.decode_rate == shape.batch / step
            assert shape.prefill_rate == shape.batch / prompt
    assert (models[0].shape, models[0].room) == ((2, 7), 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"new_tokens": 1}, "new_tokens is too small.*at least 2"),
        ({"rounds": 0}, "rounds is too small"),
        ({"batches": (0,)}, "batches is too small"),
        ({"prompts": ()}, "needs a batch size and a prompt length"),
    ],
)
def test_options_that_time_nothing(words: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        BenchOptions(**words)


def test_rows_are_in_the_order_given_and_ratios_are_exact(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {("a", False): (4.0, 0.06), ("b", False): (2.0, 0.02), ("a", True): (8.0, 0.03)}
    seen: list[tuple[str, str | None, bool]] = []

    def opened(how: Opening) -> Running:
        seen.append((how.model, how.dtype, how.own_kernel))
        decoder = Clocked(how.model, clock, [], costs[how.model, how.own_kernel])
        return Running(make("llama"), decoder, "bf16", packed=how.model == "b")

    def memory(order: dict[str, Any], options: BenchOptions) -> Residence:
        return Residence(100 + order["own_kernel"], 200, 50)

    monkeypatch.setattr(speed, "opened", opened)
    monkeypatch.setattr(speed, "residence", memory)
    options = BenchOptions((1, 2), (10,), 4, 2)
    found = speed.bench(BenchRequest(("b", "a"), options, dtype="bf16", own_kernel=True))["models"]
    assert seen == [("b", "bf16", False), ("a", "bf16", False), ("a", "bf16", True)]
    assert [m["model"] for m in found] == ["b", "a", "a (own dense kernel)"]
    assert [m["decode_ms_per_token"] for m in found] == pytest.approx([20, 60, 30])
    assert [m["prefill_ms"] for m in found] == [20_000, 40_000, 80_000]
    assert [m["first_token_ms"] for m in found] == [20_000, 40_000, 80_000]
    assert [m["decode_ratio"] for m in found] == pytest.approx([1, 1 / 3, 2 / 3])
    assert [m["prefill_ratio"] for m in found] == [1, 0.5, 0.25]
    assert [m["decode_ratio_to_own_kernel"] for m in found] == pytest.approx([1.5, 0.5, 1])
    assert [m["rss_bytes"] for m in found] == [100, 100, 101]
    assert all(m["batch"] == 1 and m["prompt_tokens"] == 10 for m in found)
    for m in found:
        assert [s["batch"] for s in m["shapes"]] == [1, 2]
        assert m["shapes"][1]["decode_tokens_per_second"] == pytest.approx(2 * m["decode_tokens_per_second"])
        assert m["shapes"][0]["decode_ms_per_token"]["rounds"] == 2


def test_own_kernel_needs_a_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        speed, "opened", lambda how: Running(make("llama"), Clocked("p", {"now": 0.0}, [], (1, 1)), "bf16", packed=True)
    )
    with pytest.raises(SecateurError, match=r"every model given is packed.*give the dense model as well"):
        speed.bench(BenchRequest(("p",), own_kernel=True, memory=False))


def test_the_verb(tmp_path: Path, capsys: Any) -> None:
    a, b = write_model(tmp_path / "a"), write_model(tmp_path / "b", "gpt2")
    words = ["bench", a, b, "--own-kernel", "--batch", "1,2", "--prompt-tokens", "6,9", "--new-tokens", "3"]
    words += ["--rounds", "1", "--threads", "1", "--no-memory"]
    assert cli(*words, "--json") == 0
    found = said(capsys)["models"]
    assert [m["model"] for m in found] == [str(a), str(b), f"{a} (own dense kernel)"]
    assert [m["runs_on"].split(",")[0] for m in found[:2]] == ["Transformers", "Transformers"]
    assert all(m["threads"] == 1 and m["dtype"] == "fp32" for m in found)
    assert all(m["decode_ms_per_token"] > 0 < m["prefill_ms"] for m in found)
    assert all(len(m["shapes"]) == 4 for m in found)
    assert cli(*words) == 0
    out = capsys.readouterr().out
    assert "decode ms per token" in out and "every shape: median (quartiles)" in out
    assert cell(found[0]["shapes"][0]["decode_ms_per_token"] | {"median": 2.0, "low": 1.5, "high": 3.25}) == (
        "2 (1.5 to 3.25)"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--prompt-tokens", "60", "--new-tokens", "5"],
            "reads at most 64 tokens.*new tokens of 65",
        ),
        (["--batch", "1,x"], "not a list of whole numbers.*'1,x'"),
        (["--threads", "0"], "threads is not an integer of at least 1"),
        (["--dtype", "fp61"], "unknown dtype"),
    ],
)
def test_the_verb_refuses_in_one_sentence(tmp_path: Path, words: list[str], message: str, capsys: Any) -> None:
    path = write_model(tmp_path / "a")
    capsys.readouterr()
    assert cli("bench", path, "--no-memory", *words) == 2
    caught = capsys.readouterr()
    assert not caught.out
    assert re.search(message, caught.err)
    assert len(caught.err.strip().splitlines()) == 1


def test_memory_is_that_of_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.ones(200 * 2**20)  # 0.8 GB here must not be counted there
    path = write_model(tmp_path / "a")
    order = {"model": str(path), "dtype": None, "own_kernel": False}
    options = BenchOptions((1,), (8,), 2, 1)
    found = residence(order, options)
    assert 50 * 2**20 < found.bare <= found.rss <= found.peak < resident() - 200 * 2**20
    assert held[0] == 1
    large = write_model(tmp_path / "large", vocab_size=200_000)  # 26 MB, tied: held once
    more = residence({"model": str(large)}, options)
    assert 24 * 2**20 < (more.rss - more.bare) - (found.rss - found.bare) < 60 * 2**20
    with pytest.raises(SecateurError, match=r"process that measures memory failed.*no such model"):
        residence({"model": str(tmp_path / "none")}, options)
