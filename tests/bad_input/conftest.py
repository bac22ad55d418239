"""Tiny random checkpoints, each with a tokenizer of single bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as BytesOut
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

SIZES: dict[str, Any] = dict(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=256,
    eos_token_id=257,
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random checkpoints with a tokenizer of single bytes."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("sweep")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(root / "llama")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(root / "sharded", max_shard_size="30KB")
    MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).save_pretrained(root / "mixtral")
    LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 1})).save_pretrained(root / "mqa")
    gpt2 = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    mha = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    BertForMaskedLM(BertConfig(**mha)).save_pretrained(root / "bert")
    vocabulary = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))} | {"<s>": 256, "</s>": 257}
    words = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), BytesOut()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    for folder in root.iterdir():
        tokenizer.save_pretrained(folder)
    return root
