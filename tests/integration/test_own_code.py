"""Models that bring their own code: like any other with --trust-remote-code, and never run without it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

import secateur
from secateur.anatomy import anatomy_of
from secateur.engine.apply import mask
from secateur.engine.checkpoint import load
from secateur.engine.host.build import describe_skeleton
from secateur.engine.plan import Plan, keeps_of
from secateur.errors import SecateurError
from whole_toys import cli, read_all, said, tokens, write_model, write_text

TRUST = "--trust-remote-code"
CONFIG = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

    def __init__(self, stretch=1.0, **kwargs):
        self.stretch = stretch
        super().__init__(**kwargs)
"""
MODEL = """
import os
from pathlib import Path

import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP, LlamaModel, LlamaPreTrainedModel
{imports}

Path(os.environ["OWN_CODE_MARK"]).touch()  # what it does to be seen: any code could stand here
print("own code was imported")

class OwnMLP(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.stretch = getattr(config, "stretch", 2.0)

    def forward(self, x):
        return super().forward(self.stretch * x)

class OwnModel(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = OwnMLP(config)

class {name}(LlamaForCausalLM):
    {words}

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()
"""
WHOLE = {
    "imports": "from .configuration_own import OwnConfig",
    "name": "OwnTalker",
    "words": "config_class = OwnConfig",
}
BORROWED = {"imports": "", "name": "OwnForCausalLM", "words": "pass"}


@pytest.fixture(autouse=True)
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that the model's code makes when it is imported; Transformers' copies of the code go elsewhere."""
    place = tmp_path / "imported"
    monkeypatch.setenv("OWN_CODE_MARK", str(place))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield place
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def own(path: Path, kind: dict[str, str] = WHOLE, **changes: Any) -> Path:
    """A Llama whose FFN is fed twice its input, in code of its own beside the weights."""
    write_model(path, **changes)
    (path / "modeling_own.py").write_text(MODEL.format(**kind))
    words = json.loads((path / "config.json").read_text())
    words |= {"architectures": [kind["name"]], "auto_map": {"AutoModelForCausalLM": f"modeling_own.{kind['name']}"}}
    if kind is WHOLE:
        (path / "configuration_own.py").write_text(CONFIG)
        words |= {"model_type": "own_llama", "stretch": 2.0}
        words["auto_map"]["AutoConfig"] = "configuration_own.OwnConfig"
    (path / "config.json").write_text(json.dumps(words))
    return path


def told_once(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """One message on standard error that says these words, and nothing else anywhere."""
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert all(word in told.err for word in words)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=tokens()).logits


def test_without_the_flag_it_never_runs(tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = own(tmp_path / "model"), write_text(tmp_path / "text.txt")
    step = ["--space", "ffn", "--score", "magnitude", "--keep", 0.5]
    capsys.readouterr()  # Transformers' progress bars
    for words in (
        ["inspect", model],
        ["inspect", model, "--check"],
        ["prune", model, "-o", tmp_path / "out", *step],
        ["prune", model, "-o", tmp_path / "out", *step, "--dry-run"],
        ["plan", model, "-o", tmp_path / "out", *step],
        ["measure", model, "--text", text],
        ["pack", model, "-o", tmp_path / "out"],
        ["run", model, "--prompt", "w5"],
        ["bench", model],
    ):
        assert cli(*words) == 2, words
        told_once(capsys, TRUST)
    with pytest.raises(SecateurError, match=TRUST):
        secateur.load(model)
    assert not mark.exists() and not (tmp_path / "out").exists()
    assert cli("inspect", model, TRUST, "--json") == 0 and mark.exists()  # it would have shown


@pytest.mark.parametrize("kind", [WHOLE, BORROWED], ids=["own config", "Llama's config"])
def test_its_anatomy_is_proved(kind: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("inspect", own(tmp_path / "model", kind), TRUST, "--check", "--json") == 0
    told = said(capsys)  # and what the module prints is not in the way
    assert told["class"] == kind["name"]
    assert told["anatomy"] == ("derived" if kind is WHOLE else "declared")
    assert all(told["proved"].values()) and {"weight", "ffn", "kv_group", "layer"} <= told["proved"].keys()


@pytest.mark.parametrize("kind", [WHOLE, BORROWED], ids=["own config", "Llama's config"])
def test_units_that_are_none_are_refused(
    kind: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An FFN that divides by the mean over its neurons: fewer of them are another function than zeros among them."""
    model = own(tmp_path / "model", kind)
    code, plain = model / "modeling_own.py", "return super().forward(self.stretch * x)"
    normed = "h = self.up_proj(x); return self.down_proj(h / h.abs().mean(-1, keepdim=True))"
    assert plain in code.read_text()
    code.write_text(code.read_text().replace(plain, normed))
    words = ["prune", model, "-o", tmp_path / "out", TRUST, "--score", "magnitude", "--keep", 0.5, "--no-measure"]
    before = sorted(tmp_path.iterdir())
    for more in ([], ["--dry-run"], ["--apply", "mask"]):
        capsys.readouterr()
        assert cli(*words, "--space", "ffn", *more) == 2
        told_once(capsys, "not proved", "masked and cut logits differ", "--check")
        assert set(tmp_path.iterdir()) <= {*before, tmp_path / "imported", tmp_path / "modules"}
    assert cli(*words, "--space", "kv_group") == 0


@pytest.mark.parametrize("kind", [WHOLE, BORROWED], ids=["own config", "Llama's config"])
@pytest.mark.parametrize("space", ["ffn", "kv_group", "layer"])
def test_cut_is_masked_is_reloaded(kind: dict[str, str], space: str, tmp_path: Path) -> None:
    model, out, text = own(tmp_path / "model", kind), tmp_path / "out", write_text(tmp_path / "text.txt")
    score = "block_influence" if space == "layer" else "wanda"
    words = ["--score", score, "--keep", 2 if space == "layer" else 0.5, "--text", text, "--no-measure"]
    words += ["--samples", 4, "--length", 12, "--batch-size", 2]
    assert cli("prune", model, "-o", out, TRUST, "--space", space, *words) == 0
    for name in ("modeling_own.py", *(["configuration_own.py"] if kind is WHOLE else [])):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    dense = load(model, trust_remote_code=True)
    assert type(dense).__name__ == kind["name"]
    whole, plan = logits(dense), Plan.open(out / "plan.safetensors")
    mask(dense, anatomy_of(describe_skeleton(dense)), keeps_of(plan))
    masked = logits(dense)
    assert (whole - masked).abs().max() > 1e-2 * masked.abs().max()
    for again in (
        load(out, trust_remote_code=True),
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval(),
    ):
        assert type(again).__name__ == kind["name"]
        assert (logits(again) - masked).abs().max() < 1e-5 * masked.abs().max()


def test_the_whole_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps, measured, reported, measured again, packed and run; sizes that differ from layer to layer."""
    model, out = own(tmp_path / "model", max_position_embeddings=256), tmp_path / "out"
    text = write_text(tmp_path / "text.txt")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {model}\ntrust_remote_code: true\ntext: {{source: {text}, samples: 4, length: 12}}\nsteps:\n"
        "  - {space: ffn, score: wanda, keep: 0.5, budget: pooled}\n  - {space: weight, score: wanda, sparsity: 0.5}\n"
    )
    assert cli("prune", "--recipe", tmp_path / "recipe.yaml", "-o", out, "--json") == 0
    done = said(capsys)
    assert done["perplexity"] if "perplexity" in done else done["models"]
    assert "trust_remote_code=True" in (out / "report.html").read_text()
    words = ["--text", text, "--windows", 2, "--length", 16, "--json"]
    assert cli("measure", model, out, TRUST, *words) == 0
    first, second = said(capsys)["models"]
    assert second["parameters"] < first["parameters"] and second["nonzero"] < second["parameters"]
    assert cli("measure", out, *words) == 2 and TRUST in capsys.readouterr().err
    assert cli("pack", out, "-o", tmp_path / "packed", "--dtype", "fp32", TRUST, "--json") == 0
    capsys.readouterr()
    texts = []
    for place in (out, tmp_path / "packed"):
        assert cli("run", place, "--prompt", "w5 w9 w20", "--max-new-tokens", 6, TRUST, "--json") == 0
        texts.append(said(capsys)["text"])
    assert texts[0] == texts[1]


def test_code_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (change, word) in enumerate(
        [
            (lambda p: (p / "modeling_own.py").write_text("def broken(:\n"), "imported"),
            (lambda p: (p / "modeling_own.py").write_text("1 / 0"), "imported"),
            (lambda p: (p / "modeling_own.py").write_text("import no_such_library"), "no_such_library"),
            (lambda p: (p / "modeling_own.py").unlink(), "modeling_own"),
            (lambda p: (p / "configuration_own.py").unlink(), "configuration_own"),
        ]
    ):
        model = own(tmp_path / f"model{number}")
        change(model)
        before = read_all(model)
        capsys.readouterr()
        assert cli("inspect", model, TRUST) == 2
        told_once(capsys, word)
        assert read_all(model) == before
