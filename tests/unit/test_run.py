"""Running models: our decoding step against Transformers' own, what is refused, and the verb run."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import secateur
from secateur.engine import fast
from secateur.engine.decoders import CompiledDecoder, HostDecoder, continued
from secateur.engine.fast import FastDecoder, NotFast
from secateur.engine.host.build import default_config
from secateur.engine.host.origin import resolve
from secateur.engine.host.toy import toy_config, toy_model
from secateur.engine.packed import pack_checkpoint
from secateur.engine.running import decoder_of, is_packed
from secateur.errors import SecateurError
from secateur.sparse.kernels import available
from whole_toys import cli, make, said, write_model

IDS = torch.tensor([[5, 9, 2, 40, 33, 7], [1, 60, 3, 3, 12, 8]])


def toy(family: str, **changes: Any) -> Any:
    config = toy_config(default_config(family))
    for word, value in changes.items():
        setattr(config, word, value)
    return toy_model(config)


def hosts(model: Any, ids: Tensor, new: int) -> Tensor:
    """What Transformers itself writes, greedily and without stopping."""
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0)
    return out[:, ids.shape[1] :]


def written(decoder: Any, ids: Tensor, new: int) -> Tensor:
    return torch.stack(list(continued(decoder, ids, new)), 1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", sorted(fast.FAMILIES))
def test_the_step_writes_what_transformers_writes(family: str, batch: int) -> None:
    model = toy(family, **({"sliding_window": None} if family == "mistral" else {}))
    wanted = hosts(copy.deepcopy(model), IDS[:batch], 20)
    decoder = FastDecoder(model)
    for _ in range(2):  # a second text starts from nothing
        assert torch.equal(written(decoder, IDS[:batch], 20), wanted)
    assert torch.equal(hosts(model, IDS[:batch], 20), wanted)  # the model still runs by itself
    assert torch.equal(written(HostDecoder(model), IDS[:batch], 20), wanted)


@pytest.mark.parametrize("changes", [
    {"attention_bias": True, "mlp_bias": True},
    {"hidden_act": "gelu"},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                         "original_max_position_embeddings": 16}},
    {"tie_word_embeddings": True},
])  # fmt: skip
def test_variants_of_a_family(changes: dict[str, Any]) -> None:
    model = toy("llama", **changes)
    wanted = hosts(copy.deepcopy(model), IDS, 20)
    assert torch.equal(written(FastDecoder(model), IDS, 20), wanted)


def test_layers_of_different_size(tmp_path: Path) -> None:
    """A ragged checkpoint: heads and neurons differ from layer to layer."""
    write_model(tmp_path / "dense")
    plan = ["prune", tmp_path / "dense", "-o", tmp_path / "cut", "--space", "ffn", "--score", "magnitude"]
    assert cli(*plan, "--keep", "0.6", "--budget", "pooled", "--no-measure", "--json") == 0
    model = secateur.load(tmp_path / "cut")
    assert len({layer.mlp.up_proj.out_features for layer in model.model.layers}) > 1
    wanted = written(HostDecoder(copy.deepcopy(model)), IDS, 20)
    assert torch.equal(written(FastDecoder(model), IDS, 20), wanted)


def test_without_kernels_the_host_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "ready", lambda: False)
    with pytest.raises(NotFast, match=r"needs our kernels: .*install secateur again"):
        FastDecoder(toy("llama"))


def test_what_the_step_cannot_do_is_refused_with_the_reason() -> None:
    with pytest.raises(NotFast, match=r"no decoding step of our own for this family.*gpt2"):
        FastDecoder(make("gpt2"))
    with pytest.raises(NotFast, match=r"rotary embedding.*dynamic"):
        FastDecoder(toy("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))
    window = FastDecoder(toy("mistral", sliding_window=9))
    assert torch.equal(written(window, IDS, 3), written(HostDecoder(window.model), IDS, 3))
    with pytest.raises(SecateurError, match=r"window of tokens.*received: '10 tokens'"):
        written(window, IDS, 4)


@pytest.mark.parametrize("family", ["gemma", "granite", "olmo2"])
def test_a_family_that_is_not_what_it_is_taken_for_is_found_out(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norms, Granite's multipliers and OLMo 2's places of norms: the same module names, other arithmetic."""
    monkeypatch.setattr(fast, "FAMILIES", fast.FAMILIES | {family})
    with pytest.raises((NotFast, AttributeError)) as caught:
        FastDecoder(toy(family, **({"residual_multiplier": 0.5} if family == "granite" else {})))
    if caught.type is NotFast:
        assert "disagree" in str(caught.value)


def bytes_held(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_nothing_is_held_twice() -> None:
    model = toy("llama", tie_word_embeddings=True)
    before = bytes_held(model)
    decoder = FastDecoder(model)
    assert bytes_held(model) == before
    attention = model.model.layers[0].self_attn
    q, k = attention.q_proj.packed.parts["values"], attention.k_proj.packed.parts["values"]
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert model.lm_head.packed.parts["values"].data_ptr() == decoder.model.get_input_embeddings().weight.data_ptr()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pruned Llama and a pruned GPT-2, plain and packed in fp32."""
    folder = tmp_path_factory.mktemp("packed")
    out = {}
    for family in ("llama", "gpt2"):
        write_model(folder / family, family)
        words = ["prune", folder / family, "-o", folder / f"{family}-half", "--space", "weight", "--sparsity", "0.5"]
        assert cli(*words, "--score", "magnitude", "--no-measure", "--json") == 0
        pack_checkpoint(resolve(folder / f"{family}-half"), folder / f"{family}-packed", "fp32")
        out |= {f"{family}-half": folder / f"{family}-half", f"{family}-packed": folder / f"{family}-packed"}
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_writes_what_its_dense_twin_writes(packed: dict[str, Path], family: str) -> None:
    model = secateur.load(packed[f"{family}-packed"])
    assert is_packed(model)
    decoder = decoder_of(model)
    assert isinstance(decoder, FastDecoder if family == "llama" else HostDecoder)
    twin = AutoModelForCausalLM.from_pretrained(packed[f"{family}-half"])
    assert torch.equal(written(decoder, IDS, 24), hosts(twin, IDS, 24))
    if family == "gpt2":
        assert "no decoding step of our own" in decoder.notes[0]
        assert decoder.how.endswith(" kernels" if available() else "through torch")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_own_kernel_computes_the_dense_model(family: str) -> None:
    model = make(family)
    wanted = hosts(copy.deepcopy(model), IDS, 20)
    assert torch.equal(written(decoder_of(model, own_kernel=True), IDS, 20), wanted)


@pytest.mark.parametrize("which", ["plain llama", "packed gpt2"])
def test_compiled_writes_the_same(packed: dict[str, Path], which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's graph capture with its plain backend: what is captured and how the static cache is used."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    kind, family = which.split()
    twin = AutoModelForCausalLM.from_pretrained(packed[f"{family}-half"])
    decoder = decoder_of(secateur.load(packed[f"{family}-packed"]) if kind == "packed" else twin, compiled=True)
    assert "static cache" in decoder.how
    for _ in range(2):
        assert torch.equal(written(decoder, IDS, 10), hosts(twin, IDS, 10))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, inside inductor
def test_compiled_by_inductor_writes_the_same() -> None:
    model = make("llama")
    assert torch.equal(written(decoder_of(model, compiled=True), IDS, 10), hosts(model, IDS, 10))


def test_what_cannot_be_compiled_is_refused() -> None:
    class Odd(nn.Module):
        pass

    with pytest.raises(SecateurError, match=r"does not compile this family.*Odd.*without --compile"):
        CompiledDecoder(Odd())


def test_run_prints_the_text_and_what_it_took(packed: dict[str, Path], capsys: Any) -> None:
    words = ["run", packed["llama-packed"], "--prompt", "w5 w9 w30 w40", "--max-new-tokens", "12", "--json"]
    assert cli(*words) == 0
    got = said(capsys)
    twin = AutoModelForCausalLM.from_pretrained(packed["llama-half"])
    new = []
    for token in hosts(twin, torch.tensor([[5, 9, 30, 40]]), 12)[0].tolist():
        if token == 2:
            break
        new.append(token)
    assert got["text"].split() == [f"w{t}" if t > 2 else "" for t in new if t > 2]
    assert got["prompt_tokens"] == 4
    assert got["new_tokens"] == len(new)
    assert got["first_token_ms"] > 0 and got["rss_bytes"] > 10**7
    assert "own step" in got["runs_on"]
    assert cli(*words[:-1]) == 0
    assert "runs on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "w5", "--max-new-tokens", "0"], "max_new_tokens is not an integer of at least 1"),
        (["--prompt", " ".join(["w5"] * 64)], "longest text the model reads"),
        (["--prompt", "w5", "--dtype", "bf61"], "unknown dtype.*did you mean 'bf16'"),
        (["--prompt", "w5", "--own-kernel"], "packed model runs on our kernels already"),
        (["--prompt", "w5", "--threads", "0"], "threads is not an integer of at least 1"),
    ],
)
def test_run_refuses_in_one_sentence(packed: dict[str, Path], words: list[str], message: str, capsys: Any) -> None:
    import re

    assert cli("run", packed["llama-packed"], *words) == 2
    caught = capsys.readouterr()
    assert not caught.out
    assert re.search(message, caught.err)
    assert len(caught.err.strip().splitlines()) == 1


def test_an_encoder_does_not_write(tmp_path: Path, capsys: Any) -> None:
    write_model(tmp_path / "bert", "bert")
    assert cli("run", tmp_path / "bert", "--prompt", "w5") == 2
    assert "causal language model" in capsys.readouterr().err
