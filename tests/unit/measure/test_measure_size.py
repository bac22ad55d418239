"""Parameters, MACs and cache counted by hand, and by torch's flop counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from measure_toys import VOCABULARY, bert, gpt2, llama, mixtral
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from secateur import pack
from secateur.measure.size import observe, size, stored_bytes

# hidden 32, four heads of 8, two KV heads, two layers
LLAMA_LAYER = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48
HEAD = VOCABULARY * 32


def test_llama_by_hand() -> None:
    got = size(llama(), context=100)
    assert got.parameters == HEAD + 2 * (LLAMA_LAYER + 2 * 32) + 32  # tied: the head is the embedding
    assert got.nonzero == got.parameters
    assert got.bytes == 4 * got.parameters
    assert got.macs_per_token == 2 * (LLAMA_LAYER + 4 * (8 + 8) * 100) + HEAD
    assert got.kv_bytes_per_token == 2 * 2 * 16 * 4
    assert (got.context, got.dtype) == (100, "float32")


def test_an_untied_head_is_parameters_but_no_more_macs() -> None:
    tied, untied = size(llama()), size(llama(tie_word_embeddings=False))
    assert untied.parameters == tied.parameters + HEAD
    assert untied.macs_per_token == tied.macs_per_token


def test_gpt2_and_bert_by_hand() -> None:
    layer = 32 * 96 + 32 * 32 + 2 * 32 * 128
    assert size(gpt2(), context=10).macs_per_token == 2 * (layer + 4 * 16 * 10) + HEAD
    assert size(gpt2()).kv_bytes_per_token == 2 * 2 * 32 * 4
    encoder = 4 * 32 * 32 + 2 * 32 * 48
    got = size(bert(), context=10)
    assert got.macs_per_token == 2 * (encoder + 4 * 16 * 10) + 32 * 32 + HEAD
    assert got.kv_bytes_per_token == 0


def test_a_token_meets_only_the_chosen_experts() -> None:
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 4 * 32 + 2 * 3 * 32 * 48  # router of 4, two experts
    assert size(mixtral(), context=10).macs_per_token == 2 * (layer + 4 * 16 * 10) + HEAD


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_the_flop_counter_agrees(make: type, implementation: str) -> None:
    model = make()
    model.set_attn_implementation("eager")  # its products are visible to the counter
    length = 20
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, length, dtype=torch.long))
    model.set_attn_implementation(implementation)
    assert 2 * length * size(model, context=length).macs_per_token == counter.get_total_flops()


def test_a_layer_that_was_cut_is_counted_as_it_is() -> None:
    model = llama()
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    attention.q_proj, attention.o_proj = nn.Linear(32, 16, bias=False), nn.Linear(16, 32, bias=False)  # 1 KV group
    attention.k_proj, attention.v_proj = nn.Linear(32, 8, bias=False), nn.Linear(32, 8, bias=False)
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
        nn.Linear(32, 20, bias=False),
        nn.Linear(32, 20, bias=False),
        nn.Linear(20, 32, bias=False),
    )
    got = size(model, context=100)
    second = 2 * 32 * 16 + 2 * 32 * 8 + 3 * 32 * 20
    assert got.macs_per_token == LLAMA_LAYER + 4 * 16 * 100 + second + 2 * 16 * 100 + HEAD
    assert got.kv_bytes_per_token == (2 * 16 + 2 * 8) * 4


@pytest.mark.parametrize("window", [4, 16])
def test_a_sliding_window_bounds_attention_and_not_the_bytes_of_a_token(window: int) -> None:
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )
    model = MistralForCausalLM(config).eval()
    at = {c: size(model, context=c).macs_per_token for c in (window // 2, window, 500)}
    assert at[window] - at[window // 2] == 2 * 4 * 16 * (window // 2)
    assert at[500] == at[window]
    assert size(model).kv_bytes_per_token == 2 * 2 * 16 * 4


def test_zeros_of_either_sign_are_zeros() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:3] = 0.0
        model.model.layers[1].mlp.up_proj.weight[:5] = -0.0
    got = size(model)
    assert got.parameters - got.nonzero == 8 * 32


def test_half_precision_halves_bytes_and_cache() -> None:
    whole, half = size(llama()), size(llama().bfloat16())
    assert (half.bytes * 2, half.kv_bytes_per_token * 2) == (whole.bytes, whole.kv_bytes_per_token)
    assert half.dtype == "bfloat16"


def test_a_skeleton_without_weights_is_weighed_the_same() -> None:
    for make in (llama, gpt2, mixtral):
        bare = make().to("meta")
        bare.tie_weights()  # moving a parameter unties it
        assert size(bare) == size(make())


def test_a_forward_pass_that_fails_leaves_the_configs_word(monkeypatch: pytest.MonkeyPatch) -> None:
    want = size(llama(), context=100)

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("not here")

    monkeypatch.setattr(LlamaForCausalLM, "forward", refuse)
    assert size(llama(), context=100) == want


def test_attention_in_another_form_is_taken_from_the_config() -> None:
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    got = size(BloomForCausalLM(config), context=10)
    assert got.macs_per_token == 2 * (12 * 32 * 32 + 4 * 16 * 10) + HEAD
    assert got.kv_bytes_per_token == 2 * 2 * 32 * 4


def test_training_mode_is_left_alone() -> None:
    model = llama().train()
    observe(model)
    assert model.training


def test_bytes_are_those_of_the_weight_files(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    (tmp_path / "plan.safetensors").write_bytes(b"1234")
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert stored_bytes(model, tmp_path) == on_disk
    assert 0 < on_disk - stored_bytes(model, None) < 10_000  # the header
    assert stored_bytes(model, tmp_path / "plan.safetensors") == 4
    (tmp_path / "empty").mkdir()
    assert stored_bytes(model, tmp_path / "empty") == stored_bytes(model, None)


def test_the_same_weights_in_another_format_do_not_count(tmp_path: Path) -> None:
    model = llama()
    for folder, most in (("one", "1GB"), ("shards", "40KB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=most)
        on_disk = sum(f.stat().st_size for f in (tmp_path / folder).glob("*.safetensors"))
        for name in ("consolidated.safetensors", "pytorch_model.bin"):
            (tmp_path / folder / name).write_bytes(b"1234")
        assert stored_bytes(model, tmp_path / folder) == on_disk
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    (tmp_path / "one" / "model.safetensors").unlink()
    assert stored_bytes(model, tmp_path / "one") == 8  # not ours to read: all that look like weights
    pack(tmp_path / "shards", tmp_path / "packed", "fp32")
    on_disk = sum(f.stat().st_size for f in (tmp_path / "packed").glob("*.safetensors"))
    (tmp_path / "packed" / "consolidated.safetensors").write_bytes(b"1234")
    assert stored_bytes(model, tmp_path / "packed") == on_disk
