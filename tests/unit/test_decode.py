"""The decoding loop against the host's own, and text a model writes itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from secateur.engine.decode import decode, sampler, self_text
from secateur.engine.text import TextSource
from secateur.errors import SecateurError

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


def toy(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        model: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_head=2, n_layer=2, n_positions=64))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24))
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_is_what_the_host_generates(kind: str) -> None:
    model = toy(kind)
    model.generation_config.eos_token_id = None
    ids = torch.randint(2, 50, (3, 5), generator=torch.Generator().manual_seed(1))
    want = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0)[
        :, 5:
    ]
    assert torch.equal(torch.stack(list(decode(model, ids, 12)), 1), want)


def test_a_model_without_cache_says_the_same() -> None:
    class Forgetful(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor, past_key_values: object, use_cache: bool) -> object:
            assert past_key_values is None
            return type("Out", (), {"logits": self.inner(input_ids=input_ids, use_cache=False).logits})()

    model, ids = toy("llama"), torch.tensor([[3, 4, 5]])
    assert [int(t) for t in decode(Forgetful(model), ids, 8)] == [int(t) for t in decode(model, ids, 8)]


def test_samples_follow_the_softmax() -> None:
    logits = torch.tensor([0.5, 2.0, -1.0]).expand(20_000, 3)
    for temperature in (1.0, 2.0):
        drawn = sampler(torch.Generator().manual_seed(0), temperature)(logits)
        shares = torch.bincount(drawn, minlength=3) / 20_000
        assert torch.allclose(shares, torch.softmax(logits[0] / temperature, 0), atol=0.015)


def test_self_text_is_seeded_and_begins_with_bos() -> None:
    model = toy("llama").train()
    tokenizer = type("T", (), {"bos_token_id": 7})()
    text = TextSource("self", samples=5, length=9, seed=3)
    got = self_text(model, tokenizer, text, batch_size=2)
    assert got.shape == (5, 9)
    assert set(got[:, 0].tolist()) == {7}
    assert torch.equal(got, self_text(model, tokenizer, text, batch_size=2))
    assert not torch.equal(got, self_text(model, tokenizer, TextSource("self", 5, 9, seed=4), batch_size=2))
    assert len(set(self_text(model, None, text)[:, 0].tolist())) > 1
    assert model.training


def test_only_a_causal_model_writes() -> None:
    with pytest.raises(SecateurError, match="LlamaModel"):
        self_text(LlamaModel(LlamaConfig(**SIZES, intermediate_size=24)), None, TextSource("self", 1, 8))
