"""Tiny random models on disk, for the checkpoint tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3MoeConfig,
)

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MHA = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=8),
    "neox": lambda: GPTNeoXConfig(**MHA),
    "opt": lambda: OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "bert": lambda: BertConfig(**MHA),
}
IDS = torch.arange(1, 13)[None]


def make(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model whose parameters are all random (biases and norms too)."""
    config = CONFIGS[family]()
    torch.manual_seed(seed)
    model = BertForMaskedLM(config) if family == "bert" else AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def reference(path: Path, family: str, dtype: torch.dtype | str = torch.float32) -> Any:
    """What Transformers itself makes of a directory."""
    auto = BertForMaskedLM if family == "bert" else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=dtype).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits
