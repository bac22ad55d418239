"""Blocks on a second device: nothing is mixed up, and what comes out is what the CPU gives.

The device is a pretended one (`elsewhere`), so this runs everywhere; what only a GPU's own kernels can get wrong (its
memory, autocast, rounding) it does not show.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_repair import carried_out
from torch import Tensor

import secateur.engine.whole as whole
import secateur.methods.repairs.local_reconstruction as fits
import secateur.run as run
from elsewhere import DEVICE, Elsewhere, Mixed, elsewhere
from whole_toys import cli, make, said, write_model, write_text

WEIGHT: dict[str, Any] = {"space": "weight", "keep": 0.5}
STEPS: tuple[dict[str, Any], ...] = (
    *(WEIGHT | {"score": s} for s in ("random", "magnitude", "wanda", "ria", "contribution", "taylor", "fisher")),
    *(WEIGHT | {"score": s, "grain": "tile:4x4"} for s in ("output_error", "taylor_block")),
    *(WEIGHT | {"method": m} for m in ("sparsegpt", "obs", "admm", "alps", "sparseswaps", "dsnot")),
    *(WEIGHT | {"score": "wanda", "budget": b} for b in ("owl", "pooled", "rate_distortion", "class_distribution")),
    *(WEIGHT | {"method": m, "fit_on": "mix"} for m in ("sparsegpt", "alps")),
    {"space": "weight", "score": "wanda", "grain": "2:4", "fit_on": "dense", "repair": "least_squares"},
    {"space": "weight", "method": "alps", "grain": "2:4"},
    *({"space": "ffn", "score": s, "keep": 0.5} for s in ("wanda", "taylor_vector", "activation_norm")),
    {"space": "ffn", "score": "wanda", "keep": 0.5, "apply": "mask", "repair": "least_squares"},
    {"space": "kv_group", "score": "wanda", "keep": 0.5, "repair": "least_squares"},
    {"space": "head", "score": "activation_norm", "keep": 0.5},
    {"space": "layer", "score": "block_influence", "keep": 1},
)
FITS: tuple[dict[str, Any], ...] = (  # backward adds up in another order there
    WEIGHT | {"score": "wanda", "repair": "local_reconstruction"},
    WEIGHT | {"score": "wanda", "fit_on": "mix", "repair": "local_reconstruction"},
    {"space": "ffn", "score": "wanda", "keep": 0.5, "repair": "block_reconstruction"},
)
EXPERTS = tuple({"space": "expert", "score": s, "keep": 0.75} for s in ("wanda", "router_mass", "taylor"))


@pytest.fixture(autouse=True)
def same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 on both devices: no bf16 where only the CPU has instructions for it."""
    for module in (whole, fits):
        monkeypatch.setattr(module, "multiplies_bf16", lambda device: False)


def filled(x: Tensor) -> Tensor:
    x.view(-1)[2:5].fill_(7.0)  # in place, through two views
    return x


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    with elsewhere():
        here, index = torch.arange(12.0).reshape(3, 4), torch.tensor([2, 0])
        there = here.to(DEVICE)
        assert there.device == DEVICE and isinstance(there[0], Elsewhere) and type(there.cpu()) is Tensor
        wrong: list[Callable[[], Any]] = [
            lambda: there + here,
            lambda: here @ there.T,
            lambda: torch.cat([there, here]),
            lambda: here.add_(there),
            lambda: there.index_select(0, index),
            lambda: torch.nn.functional.embedding(index, there),
            lambda: torch.where(there > 3, there, here),
            lambda: there.multinomial(1, generator=torch.Generator()),
            lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
        ]
        for each in wrong:
            with pytest.raises(Mixed):
                each()
            with pytest.raises(Mixed), torch.inference_mode():
                each()
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        allowed: list[tuple[Tensor, Tensor]] = [
            (there * torch.tensor(2.0), here * 2),
            (there[index], here[index]),
            (there[here > 3], here[here > 3]),
            (torch.zeros(3, 4).copy_(there), here),
            (torch.zeros(3, 4, device=DEVICE).copy_(here), here),
            (filled(there.clone()), filled(here.clone())),
            (torch.tensor([1, 2], device=DEVICE), torch.tensor([1, 2])),
        ]
        for got, wanted in allowed:
            assert torch.equal(got.cpu(), wanted)
        assert there.tolist() == here.tolist() and float(there.sum()) == 66


def outcome(family: str, words: dict[str, Any], **at: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = make(family, num_hidden_layers=2)
    model.set_attn_implementation("eager")  # the same kernels on both
    plan, tensors, _ = carried_out(model, words, **at)
    return dict(plan.items()), {name: value.cpu() for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("family", "words"),
    [
        *(("llama", s) for s in STEPS),
        # every third and fourth is enough for the others: what differs is how experts and Conv1D are reached
        *(("mixtral", s) for s in (*STEPS[:24:3], STEPS[14], *EXPERTS)),
        *(("gpt2", s) for s in STEPS[2:28:4]),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(map(str, v.values())),
)
def test_a_step_comes_out_as_on_the_cpu(family: str, words: dict[str, Any]) -> None:
    plan, tensors = outcome(family, words)
    with elsewhere() as device:
        same_plan, same_tensors = outcome(family, words, device=device)
    assert plan.keys() == same_plan.keys() and tensors.keys() == same_tensors.keys()
    assert all(torch.equal(plan[name], same_plan[name]) for name in plan)
    for name, value in tensors.items():
        torch.testing.assert_close(same_tensors[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("words", FITS, ids=lambda v: " ".join(map(str, v.values())))
def test_a_fit_comes_out_nearly_as_on_the_cpu(words: dict[str, Any]) -> None:
    plan, tensors = outcome("llama", words)
    with elsewhere() as device:
        same_plan, same_tensors = outcome("llama", words, device=device)
    assert all(torch.equal(plan[name], same_plan[name]) for name in plan)
    for name, value in tensors.items():
        torch.testing.assert_close(same_tensors[name], value, rtol=0, atol=1e-4)


PRUNE = {
    "curve, gradients of the text": "--space ffn --score taylor --keep 0.5 --curve",
    "curve, information of the answers": "--space weight --score fisher --sparsity 0.5 --curve",
    "bound": "--space ffn --score wanda --at-most-worse 50%",
    "effort": "--space weight --sparsity 0.5 --effort balanced",
    "search": "--space weight --score wanda --sparsity 0.5 --budget evopress:generations=1,survivors=1,tokens=16",
    "own text": "--space ffn --score wanda --keep 0.5 --text self",
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    path = tmp_path_factory.mktemp("elsewhere")
    write_model(path / "model", num_hidden_layers=2)
    write_text(path / "text.txt")
    return path


@pytest.mark.parametrize("words", PRUNE.values(), ids=PRUNE.keys())
def test_the_whole_path_of_pruning(
    words: str, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Curves, bounds and searches hold the whole model there; a curve has the points it has on the CPU."""
    more = [] if "--text" in words else ["--text", ground / "text.txt"]
    more += ["--samples", 4, "--length", 16, "--no-measure", "--json"]
    with elsewhere(), monkeypatch.context() as patched:
        patched.setattr(run, "_device", lambda word: DEVICE)
        assert cli("prune", ground / "model", "-o", tmp_path / "out", *words.split(), *more) == 0
    told = json.loads((tmp_path / "out/report.json").read_text())
    assert (len(told["curves"]) > 0) == ("curve" in words or "worse" in words)
    if "--curve" in words:
        assert cli("prune", ground / "model", "-o", tmp_path / "here", *words.split(), *more) == 0
        (here,) = json.loads((tmp_path / "here/report.json").read_text())["curves"]
        points = [p["perplexity"] for p in told["curves"][0]["points"]]
        assert points == pytest.approx([p["perplexity"] for p in here["points"]], rel=0.01)
    capsys.readouterr()
    ends = ("--text", ground / "text.txt", "--windows", 2, "--length", 16, "--json")
    assert cli("measure", ground / "model", tmp_path / "out", *ends) == 0
    dense, pruned = said(capsys)["models"]
    assert 1 < dense["perplexity"] < 100 and 1 < pruned["perplexity"] < 100


def test_measuring(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = tmp_path / "choices.jsonl"
    choices.write_text(json.dumps({"goal": "w5 w6", "sol1": "w7", "sol2": "w8 w9", "label": 1}) + "\n")
    words = ["measure", ground / "model", "--text", ground / "text.txt", "--windows", 2, "--length", 16, "--json"]
    assert cli(*words, "--choices", choices) == 0
    here = said(capsys)["models"][0]
    monkeypatch.setattr(run, "_device", lambda word: DEVICE)
    with elsewhere():
        assert cli(*words, "--choices", choices) == 0
    there = said(capsys)["models"][0]
    assert there["perplexity"] == pytest.approx(here["perplexity"], rel=1e-5)
    assert all(there[word] == here[word] for word in ("accuracy", "accuracy_norm", "generations"))
