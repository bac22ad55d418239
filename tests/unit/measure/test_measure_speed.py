"""Generations, latency, peak memory: who runs when, and what is counted."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from measure_toys import Fixed, gpt2, llama

from secateur.errors import SecateurError
from secateur.measure.generation import PROMPTS, generate
from secateur.measure.latency import LatencyOptions, latency, peak_rss, timing
from secateur.measure.rss import peak_bytes


def test_generations_are_the_hosts_own(tokenizer: Any) -> None:
    model = llama()
    got = generate(model, tokenizer, PROMPTS[:2], new_tokens=16)
    assert "The capital of France is" in PROMPTS
    for prompt, made in zip(PROMPTS, got, strict=False):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, pad_token_id=0
        )
        new = [t for t in out[0, ids.shape[1] :].tolist() if t != tokenizer.eos_token_id]
        assert made.prompt == prompt
        assert made.text == tokenizer.decode(new, skip_special_tokens=True)
        assert made.new_tokens == len(new)


def test_generation_stops_at_the_end_and_at_the_last_position(tokenizer: Any) -> None:
    ending = llama()
    with torch.no_grad():
        ending.model.norm.weight.zero_()  # all logits 0: the first token, which is made an end
    ending.generation_config.eos_token_id = [0, 5]
    assert generate(ending, tokenizer, ["the"], 9)[0].new_tokens == 0
    model = gpt2()
    prompt = "the river " * 10
    length = len(tokenizer(prompt)["input_ids"])
    assert generate(model, tokenizer, [prompt], 100)[0].new_tokens <= 64 - length
    assert generate(model, tokenizer, [prompt * 9], 100)[0].text == ""


def test_models_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []

    class Named(Fixed):
        def __init__(self, name: str) -> None:
            super().__init__(torch.zeros(4))
            self.name = name

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **rest: object) -> object:
            order.append(self.name)
            return super().forward(input_ids, use_cache)

    a, b = Named("a"), Named("b")
    options = LatencyOptions(prompt_tokens=6, new_tokens=3, batch=2, repeats=4, rss=False)
    shares: list[float] = []
    got = latency([a, b], options, shares.append)
    assert "".join(order) == ("aaa" + "bbb") * 5
    assert a.calls[:3] == [(2, 6), (2, 7), (2, 8)]  # no cache: fed everything again
    assert shares[-1] == 1
    for each in got:
        assert each.prefill.repeats == each.decode_per_token.repeats == 4
        assert 0 < each.prefill.low <= each.prefill.median <= each.prefill.high
        assert (each.prompt_tokens, each.new_tokens, each.batch) == (6, 3, 2)
        assert (each.device, each.dtype, each.peak_rss) == ("cpu", "float32", None)


def test_time_is_split_at_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr("secateur.measure.latency.time.perf_counter", lambda: clock["now"])

    class Slow(Fixed):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **rest: object) -> object:
            clock["now"] += input_ids.shape[1]
            return super().forward(input_ids, use_cache)

    (got,) = latency([Slow(torch.zeros(4))], LatencyOptions(10, 4, 1, 3, rss=False))
    assert got.prefill.median == 10
    assert got.decode_per_token.median == (11 + 12 + 13) / 3


def test_quartiles() -> None:
    seconds = [0.4, 0.1, 0.9, 0.3, 0.2]
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    got = timing(seconds)
    assert (got.low, got.median, got.high) == (pytest.approx(low), pytest.approx(median), pytest.approx(high))
    assert got.repeats == 5


def test_options_that_time_nothing() -> None:
    with pytest.raises(SecateurError, match=r"new_tokens is too small.*received: 1"):
        LatencyOptions(new_tokens=1)


def test_the_peak_grows_with_what_is_held() -> None:
    before = peak_bytes()
    held = torch.ones(40 * 2**20)  # 160 MB
    assert peak_bytes() >= before + 100 * 2**20 or held.sum() == 0


def test_peak_memory_of_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.ones(200 * 2**20)  # 0.8 GB here must not be counted there
    llama().save_pretrained(tmp_path)
    peak = peak_rss(tmp_path, LatencyOptions(8, 2, 1, 1), "float32")
    assert 50 * 2**20 < peak < peak_bytes() - 200 * 2**20
    assert held[0] == 1
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(SecateurError, match="the process that measures memory failed: exit code 1"):
        peak_rss(tmp_path, LatencyOptions(8, 2, 1, 1), "float32")
