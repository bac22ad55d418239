"""Several models side by side: the parts agree with what each gives alone, and nobody's model is changed."""

from __future__ import annotations

import copy
import gc
import json
import math
import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from measure_toys import bert, divergence, llama
from torch import nn

from secateur import Recipe, Step, prune
from secateur.engine.text import documents, pack, test_windows
from secateur.errors import SecateurError
from secateur.measure import LatencyOptions, MeasureOptions, Subject, measure
from secateur.measure.perplexity import perplexity
from secateur.measure.tasks import flatten, tasks

OPTIONS = MeasureOptions(
    windows=4, length=32, prompts=("the river",), new_tokens=4, latency=LatencyOptions(8, 3, 1, 2, rss=False)
)


def halved(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.model.layers:
            w = layer.mlp.down_proj.weight
            w[w.abs() < w.abs().median()] = 0
    return model


def test_the_parts_are_those_of_each_model_alone(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"context": "the", "choices": ["river", "thread"], "label": 0}\n' * 3)
    dense, pruned = llama(), halved(llama())
    options = MeasureOptions(**{**OPTIONS.__dict__, "choices": tmp_path / "c.jsonl"})
    (a, b), (compared,) = measure([Subject("dense", dense, tokenizer), Subject("pruned", pruned, tokenizer)], options)
    w = test_windows(pack(tokenizer, documents("builtin", "test")), 4, 32)
    assert a.perplexity == perplexity(dense, w, text="builtin")
    assert b.perplexity == perplexity(pruned, w, text="builtin")
    assert a.divergence is None
    assert b.divergence == divergence(dense, pruned, w)
    assert compared.perplexity_ratio is not None
    assert compared.perplexity_ratio.value == pytest.approx(b.perplexity.value / a.perplexity.value)
    assert compared.perplexity_ratio.low < compared.perplexity_ratio.value < compared.perplexity_ratio.high
    assert a.size.nonzero - b.size.nonzero == pytest.approx(32 * 48, abs=2)
    assert a.choices is not None
    assert a.choices.items == 3
    assert compared.choices_difference is not None
    assert compared.choices_difference.value == pytest.approx(b.choices.accuracy_norm - a.choices.accuracy_norm)
    assert a.latency is not None
    assert compared.prefill_speedup == a.latency.prefill.median / b.latency.prefill.median
    assert compared.decode_speedup == a.latency.decode_per_token.median / b.latency.decode_per_token.median
    assert [len(m.generations) for m in (a, b)] == [1, 1]
    assert (a.model, b.model, a.notes, b.notes) == ("dense", "pruned", (), ())


@pytest.mark.parametrize("free", [10**6, 10**9])
def test_loaders_are_called_once_and_give_the_same(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    memory = type("Memory", (), {"available": free})
    monkeypatch.setattr("secateur.measure.compare.psutil.virtual_memory", lambda: memory)
    models = [llama(), halved(llama()), llama(3)]
    loaded: list[int] = []
    alive: list[Any] = []
    together: list[int] = []

    def loader(i: int) -> Any:
        def load() -> nn.Module:
            model = copy.deepcopy(models[i])
            loaded.append(i)
            alive.append(weakref.ref(model))
            gc.collect()
            together.append(sum(r() is not None for r in alive))
            return model

        return load

    names = ("dense", "half", "other")
    for name, model in zip(names, models, strict=True):
        model.save_pretrained(tmp_path / name)  # three times 100 kB
    lazy = [Subject(n, loader(i), tokenizer, tmp_path / n) for i, n in enumerate(names)]
    eager = [Subject(n, models[i], tokenizer, tmp_path / n) for i, n in enumerate(names)]
    options = MeasureOptions(**{**OPTIONS.__dict__, "latency": None})
    assert measure(lazy, options) == measure(eager, options)
    assert loaded == [0, 1, 2]
    assert max(together) == (3 if free == 10**9 else 2)


def test_the_callers_model_stays_as_it_was(tokenizer: Any) -> None:
    model = llama().train()
    before = copy.deepcopy(model.state_dict())
    options = MeasureOptions(windows=1, length=16, dtype="bf16", prompts=())
    (got,), none = measure([Subject("m", model, tokenizer)], options)
    assert none == []
    assert got.size.dtype == got.perplexity.dtype == "bfloat16"
    assert got.size.bytes == 2 * got.size.parameters
    assert model.training
    assert all(torch.equal(t, before[k]) and t.dtype == before[k].dtype for k, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_pruned_is_no_difference(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of what a run measures at its end are loaded alike, rotary tables included."""
    monkeypatch.setattr(MeasureOptions, "short", lambda: MeasureOptions(windows=2, length=64, prompts=()))
    llama().bfloat16().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    step = Step("ffn", score="magnitude", keep="1.0")
    prune(Recipe(str(tmp_path / "dense"), steps=(step,)), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["measurements"][1]["size"]["dtype"] == "bfloat16"
    assert found["measurements"][1]["divergence"]["kl"] == 0
    assert found["comparison"]["perplexity_ratio"]["value"] == 1


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_runs_on_the_cpu_and_is_near(tokenizer: Any, dtype: Any) -> None:
    whole, half = (
        measure([Subject("m", llama(), tokenizer)], MeasureOptions(windows=2, length=16, dtype=d, prompts=()))[0][0]
        for d in ("fp32", dtype)
    )
    assert math.log(half.perplexity.value) == pytest.approx(math.log(whole.perplexity.value), rel=0.02)


def test_what_a_model_cannot_do_becomes_a_note(tokenizer: Any) -> None:
    (a, b, c), _ = measure(
        [Subject("dense", llama(), tokenizer), Subject("mute", llama(), None), Subject("bert", bert(), tokenizer)],
        OPTIONS,
    )
    assert a.notes == ()
    assert b.notes == ("no tokenizer: nothing was measured on text",)
    assert b.perplexity is None
    assert b.latency is not None
    assert len(c.notes) == 1
    assert "not a causal language model" in c.notes[0]
    assert c.perplexity is None
    assert c.latency is None
    assert c.size.parameters > 0


def test_short_texts_and_short_models_are_noted(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("the water of the river and the thread in the forest " * 20)
    options = MeasureOptions(
        text=str(path), windows=500, length=64, prompts=(), latency=LatencyOptions(90, 9, rss=False)
    )
    (got,), _ = measure([Subject("m", llama(max_position_embeddings=24), tokenizer)], options)
    assert got.perplexity.length == 24
    assert got.perplexity.windows == len(pack(tokenizer, [path.read_text()])) // 24
    assert got.latency.prompt_tokens + got.latency.new_tokens == 24
    assert [n.split(":")[0].split(" (")[0] for n in got.notes] == [
        "windows of 24 tokens",
        f"the text has {got.perplexity.windows} windows of 24 tokens",
        "timed with a prompt of 15 tokens, as long as the models allow",
    ]
    with pytest.raises(SecateurError, match="too short for one window of 5000 tokens"):
        measure([Subject("m", llama(max_position_embeddings=9000), tokenizer)], MeasureOptions(str(path), length=5000))


def test_models_of_another_vocabulary_or_broken(tokenizer: Any) -> None:
    wide, broken = llama(vocab_size=310), llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    (a, b, c), (first, second) = measure(
        [Subject("a", llama(), tokenizer), Subject("b", wide, tokenizer), Subject("c", broken, tokenizer)],
        MeasureOptions(windows=2, length=16, prompts=()),
    )
    assert a.perplexity.windows == 2
    assert b.divergence is None
    assert "another vocabulary" in b.notes[0]
    assert first.perplexity_ratio is not None
    assert c.perplexity.value == math.inf == second.perplexity_ratio.value
    assert "not finite in 2 of 2" in c.notes[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"dtype": "fp8"}, r"unknown dtype.*bf16, fp16, fp32"),
        ({"windows": 0}, r"windows is too small.*received: 0"),
        ({"length": 1}, "length is too small"),
        ({"length": 8, "stride": 9}, "leaves text out"),
    ],
)
def test_bad_options(words: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        MeasureOptions(**words)


def test_the_harness_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SecateurError, match=r"received: 'piqa'\).*pip install 'secateur\[tasks\]'"):
        tasks(llama(), None, ["piqa"])
    raw = {"piqa": {"alias": "piqa", "acc,none": 0.5, "acc_norm,none": 1, "em,strict": 0.25, "sample_len": 3}}
    assert flatten(raw) == {"piqa/acc": 0.5, "piqa/acc_norm": 1.0, "piqa/em@strict": 0.25}


def test_the_harness_gets_the_model_and_the_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: dict[str, Any] = {}

    class Manager:
        all_tasks = ("piqa", "boolq")

    class Host:
        def __init__(self, **words: Any) -> None:
            told["host"] = words

    def evaluate(**words: Any) -> dict[str, Any]:
        told["run"] = words
        sys.stdout.write("what the harness says")
        return {"results": {"piqa": {"alias": "piqa", "acc,none": 0.5}}}

    for name, parts in {
        "lm_eval": {"simple_evaluate": evaluate},
        "lm_eval.tasks": {"TaskManager": Manager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": Host},
    }.items():
        module = ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    model, tokenizer = nn.Linear(1, 1), object()
    assert tasks(model, tokenizer, ("piqa",), limit=5, batch_size=3) == {"piqa/acc": 0.5}
    assert told["host"] == {"pretrained": model, "tokenizer": tokenizer, "batch_size": 3}
    assert isinstance(told["run"].pop("model"), Host) and isinstance(told["run"].pop("task_manager"), Manager)
    assert told["run"] == {"tasks": ["piqa"], "limit": 5}
    assert capsys.readouterr().out == ""
    with pytest.raises(SecateurError, match=r"no such lm-eval task.*received: 'nosuch'"):
        tasks(model, tokenizer, ("piqa", "nosuch"))
