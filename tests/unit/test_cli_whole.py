"""The command line on real work: a tiny random model from directory to directory, in one process."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import secateur
from secateur import cli
from secateur.engine.text import documents
from whole_toys import VOCABULARY, write_model, write_text

Run = Callable[..., tuple[int, Any, str]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers without a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "toy"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command with --json; returns exit code, the object (or what was printed), standard error."""

    def call(*argv: object) -> tuple[int, Any, str]:
        code = cli.main([*map(str, argv), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else out, err

    return call


def prune(toy: Path, out: Path, *more: object) -> list[object]:
    return ["prune", toy, "-o", out, "--score", "magnitude", "--no-measure", *more]


def test_a_cut_from_directory_to_directory(toy: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "cut"
    code, said, err = run(*prune(toy, out, "--space", "ffn", "--keep", "75%"))
    assert (code, err) == (0, "")
    assert said["out"] == str(out) and Path(said["report"]).is_file()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.intermediate_size == 36
    # the same choice by hand: a neuron's importance is the sum of its |w| in gate, up and down
    dense, cut = load_file(toy / "model.safetensors"), load_file(out / "model.safetensors")
    for layer in range(3):
        mlp = f"model.layers.{layer}.mlp."
        rows = [dense[f"{mlp}{n}_proj.weight"].double().abs() for n in ("gate", "up")]
        importance = rows[0].sum(1) + rows[1].sum(1) + dense[f"{mlp}down_proj.weight"].double().abs().sum(0)
        best = importance.topk(36).indices.sort().values
        assert torch.equal(cut[f"{mlp}gate_proj.weight"], dense[f"{mlp}gate_proj.weight"][best])
        assert torch.equal(cut[f"{mlp}down_proj.weight"], dense[f"{mlp}down_proj.weight"][:, best])
    assert sum(p.numel() for p in secateur.load(out).parameters()) == sum(p.numel() for p in model.parameters())


def test_a_mask_keeps_exactly_what_was_asked(toy: Path, tmp_path: Path, run: Run) -> None:
    code, _, _ = run(*prune(toy, tmp_path / "m", "--space", "weight", "--grain", "matrix", "--sparsity", "0.55"))
    assert code == 0
    for name, w in load_file(tmp_path / "m" / "model.safetensors").items():
        zeros = int((w == 0).sum())
        assert zeros == (w.numel() - int(w.numel() * 0.45 + 0.5) if "proj" in name else 0), name


def test_outputs_are_not_overwritten_by_accident(toy: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "o"
    argv = prune(toy, out, "--space", "ffn", "--keep", "0.75")
    assert run(*argv)[0] == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    code, said, err = run(*argv)
    assert (code, said) == (2, "") and "not empty" in err
    code, said, err = run(*argv, "--resume")
    assert code == 0 and "finished" in json.dumps(said)
    code, said, err = run(*argv[:-1], "0.5", "--resume")
    assert code == 2 and "0.75 -> 0.5" in err
    code, said, err = run(*prune(toy, toy, "--space", "ffn", "--keep", "0.75", "--overwrite"))
    assert code == 2 and (toy / "model.safetensors").is_file()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert run(*argv[:-1], "0.5", "--overwrite")[0] == 0
    assert AutoModelForCausalLM.from_pretrained(out).config.intermediate_size == 24


def test_plan_then_replay_gives_the_same_bytes(toy: Path, tmp_path: Path, run: Run) -> None:
    words = ("--space", "kv_group", "--keep", "1")
    assert run("plan", *prune(toy, tmp_path / "plan", *words)[1:])[0] == 0
    assert not (tmp_path / "plan" / "model.safetensors").exists()
    assert run(*prune(toy, tmp_path / "direct", *words))[0] == 0
    plan = tmp_path / "plan" / "plan.safetensors"
    code, _, err = run("prune", toy, "-o", tmp_path / "replayed", "--plan", plan, "--no-measure")
    assert code == 0, err
    assert (tmp_path / "direct" / "model.safetensors").read_bytes() == (
        tmp_path / "replayed" / "model.safetensors"
    ).read_bytes()


def test_two_steps_from_a_recipe_and_measure_and_report(toy: Path, tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "two.yaml"
    recipe.write_text(
        f"model: {toy}\nmeasure: false\nsteps:\n"
        "- {space: layer, score: magnitude, keep: 2}\n- {space: weight, score: magnitude, grain: 2:4}\n"
    )
    out = tmp_path / "two"
    code, _, err = run("prune", "--recipe", recipe, "-o", out)
    assert code == 0, err
    weights = load_file(out / "model.safetensors")
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 2
    for name, w in weights.items():
        if "proj" in name:
            assert ((w.reshape(-1, 4) != 0).sum(1) == 2).all(), name
    code, said, _ = run("measure", toy, out)
    dense, pruned = said["models"]
    assert code == 0 and [dense["model"], pruned["model"]] == [str(toy), str(out)]
    assert dense["parameters"] == sum(w.numel() for w in load_file(toy / "model.safetensors").values())
    assert pruned["nonzero"] == sum(int((w != 0).sum()) for w in weights.values())
    page = out / "report.html"
    page.unlink()
    assert run("report", out)[0] == 0 and page.is_file()


def test_a_dry_run_writes_nothing(toy: Path, tmp_path: Path, run: Run) -> None:
    code, said, _ = run(*prune(toy, tmp_path / "dry", "--space", "ffn", "--keep", "0.5", "--dry-run"))
    assert code == 0 and "parameters" in json.dumps(said)
    assert list(tmp_path.iterdir()) == []


def test_inspect(toy: Path, run: Run) -> None:
    code, said, _ = run("inspect", toy)
    assert code == 0 and said["family"] == "llama"
    assert {"weight", "ffn", "kv_group", "layer"} <= {row["space"] for row in said["spaces"]}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--space", "ffn", "--score", "wandaa", "--keep", "0.5"], "did you mean 'wanda'"),
        (["--space", "ffn", "--score", "magnitude:q=1", "--keep", "0.5"], "option"),
        (["--space", "ffn", "--score", "magnitude:p=3", "--keep", "0.5"], "L1 and the L2"),
        (["--space", "ffn", "--score", "wanda", "--keep", "0.5"], "tokenizer"),
        (["--space", "ffn", "--score", "magnitude", "--keep", "49"], "49"),
        (["--space", "expert", "--score", "magnitude", "--keep", "0.5"], "expert"),
        (["--space", "weight", "--score", "magnitude", "--grain", "3:5"], "3:5"),
        (["--space", "weight", "--score", "magnitude", "--grain", "tile:7x7", "--keep", "0.5"], "tile:7x7"),
        (["--space", "weight", "--score", "magnitude", "--keep", "0.5", "--include", "nothing*"], "nothing*"),
        (["--space", "weight", "--score", "no.such:Score", "--keep", "0.5"], "no.such"),
        (["--space", "weight", "--score", "os:system", "--keep", "0.5"], "os:system"),
        (["--space", "weight", "--score", "magnitude", "--keep", "0.5", "--budget", "fair"], "budget"),
        (["--space", "layer", "--score", "magnitude", "--keep", "4"], "4"),
        (["--plan", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_refusals(toy: Path, tmp_path: Path, run: Run, argv: list[str], says: str) -> None:
    code, out, err = run("prune", toy, "-o", tmp_path / "o", *argv)
    assert (code, out) == (2, "")
    assert says in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("measure", "m", "--text", "text.txt", "--length", 10),
        ("prune", "m", "-o", "o", "--space", "weight", "--score", "wanda", "--sparsity", 0.5, "--text", "text.txt",
         "--samples", 2, "--length", 10, "--no-measure"),
        ("prune", "m", "-o", "o", "--space", "weight", "--score", "magnitude", "--sparsity", 0.5),  # measured on text
        ("run", "m", "--prompt", "the"),
    ],
)  # fmt: skip
def test_a_tokenizer_with_more_ids_than_the_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Run,
    words: tuple[object, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    vocabulary = write_model(tmp_path / "m", vocab_size=VOCABULARY // 2) / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"w60"', '"the"'))  # the builtin text has it
    write_text(tmp_path / "text.txt")
    capsys.readouterr()  # of saving the model
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{VOCABULARY // 2} embeddings" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "text.txt"]


def test_calibration_text_that_is_test_text_is_refused_where_it_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    """Characters are tokens here, so that other text is other tokens."""
    model = write_model(tmp_path / "m")
    letters = dict.fromkeys(["<pad>", "<bos>", "<eos>", *string.ascii_letters, " ", ".", ",", "'"])
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, [], unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>").save_pretrained(model)
    for name, half in (("test", "test"), ("other", "calibration")):
        (tmp_path / f"{name}.txt").write_text("\n".join(documents("builtin", half))[:2000])
    capsys.readouterr()  # of saving the model
    words = ["--space", "weight", "--score", "wanda", "--sparsity", 0.5, "--samples", 8, "--length", 64]

    def call(verb: str, text: str, *more: object) -> tuple[int, Any, str]:
        return run(verb, model, "-o", tmp_path / "o", *words, "--text", tmp_path / text, *more)

    code, out, err = call("prune", "test.txt")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "are calibration text too" in err and "test.txt and the builtin test text" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "other.txt", "test.txt"]
    assert call("prune", "test.txt", "--no-measure")[0] == 0
    assert call("plan", "test.txt", "--overwrite")[0] == 2  # checked as for a run
    assert call("plan", "other.txt", "--overwrite")[0] == 0


@pytest.mark.parametrize("content", ["def", "raise RuntimeError('at home')", "1 / 0", "class Mine(int, str): pass"])
def test_a_module_of_ones_own_that_is_broken(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, content: str
) -> None:
    (tmp_path / "broken_at_home.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--space", "weight", "--score", "broken_at_home:Mine", "--keep", "0.5"]
    code, out, err = run("prune", toy, "-o", tmp_path / "o", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "cannot be imported" in err and "broken_at_home:Mine" in err
