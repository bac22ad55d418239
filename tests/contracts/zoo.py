"""Tiny configs of many families, as a table: what runs over every architecture runs over this.

Each is the family's default config made small by `toy_config`, with the switches on that give it its
peculiar tensors (biases, norms of queries and keys, shared experts, groups).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import AutoConfig

from secateur.engine.host.toy import toy_config

SWITCHES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"num_key_value_heads": 8, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {},
    "ministral3": {},
    "qwen2": {"num_key_value_heads": 8},
    "qwen3": {"num_key_value_heads": 8, "attention_bias": True},
    "smollm3": {},
    "granite": {"num_key_value_heads": 8},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "olmo2": {"num_key_value_heads": 8},
    "phi3": {"num_key_value_heads": 8},
    "phi": {},
    "glm4": {},
    "cohere": {"use_qk_norm": True, "num_key_value_heads": 8},
    "starcoder2": {},
    "gpt2": {},
    "gpt_neox": {},
    "gptj": {},
    "bloom": {},
    "opt": {},
    "falcon": {},
    "gpt_bigcode": {},
    "bert": {},
    "gpt_oss": {},
    "mixtral": {},
    "qwen3_moe": {},
    "qwen2_moe": {},
    "olmoe": {},
    "deepseek_v3": {},
    "glm4_moe": {},
    # what a switch changes so much that spaces come or go
    "gpt_bigcode, many KV heads": {"multi_query": False},
    "stablelm, a norm per head": {"qk_layernorm": True, "num_key_value_heads": 8},
    "opt, norms after the sum": {"do_layer_norm_before": False},
    "bloom, sums of norms": {"apply_residual_connection_post_layernorm": True},
}


def _maker(name: str) -> Callable[[], Any]:
    family = name.partition(",")[0]
    return lambda: toy_config(AutoConfig.for_model(family, **SWITCHES[name]))


ZOO: Mapping[str, Callable[[], Any]] = {name: _maker(name) for name in SWITCHES}
