"""Tiny random models, and one with logits of our choice."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from secateur.measure.divergence import summarise
from secateur.measure.passes import losses
from secateur.measure.types import Divergence

VOCABULARY = 300


def divergence(dense: nn.Module, model: nn.Module, windows: Tensor) -> Divergence:
    """How far one model is from another, alone."""
    found = summarise(losses([dense, model], windows)[1], windows, None)
    assert found is not None
    return found


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters random, so that no bias is 0 and no norm weight 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.eval()


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    words = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return randomised(LlamaForCausalLM(LlamaConfig(**{**words, **changes})), seed)


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    return randomised(GPT2LMHeadModel(config))


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        sliding_window=None,
    )
    return randomised(MixtralForCausalLM(config))


def bert() -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return randomised(BertForMaskedLM(config))


class Fixed(nn.Module):
    """A "language model" with the same logits everywhere: closed forms hold exactly."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.table = nn.Embedding(len(logits), 1)
        self.config = type("Config", (), {})()
        self.calls: list[tuple[int, ...]] = []

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def get_output_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: Tensor, use_cache: bool = False, **_: object) -> object:
        self.calls.append(tuple(input_ids.shape))
        return type("Out", (), {"logits": self.logits.expand(*input_ids.shape, -1)})()
