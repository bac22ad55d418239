"""Toy copies: a few narrow layers of any config, all parameters random, to prove an anatomy on.

Sizes are chosen so that different axes do not coincide by accident, ratios that the code looks at stay
(query heads per KV group, experts per token, a window shorter than the text), and of layers of several
kinds some of each are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from secateur.anatomy.ffn import CORRECTIONS
from secateur.engine.host.build import CONFIG_ERRORS, build_model, skeleton_model, text_config
from secateur.errors import SecateurError

LAYERS, MOST_LAYERS = 4, 8
LARGEST = 6_000_000
VOCABULARY, POSITIONS, WINDOW = 61, 64, 4

# what each field becomes, if the config has it as a positive integer
FIXED: Mapping[str, int] = {
    "vocab_size": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "pronunciation_vocab_size": VOCABULARY,
    "shape_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "n_positions": POSITIONS,
    "n_ctx": POSITIONS,
    "max_seq_len": POSITIONS,
    "original_max_position_embeddings": POSITIONS // 2,
    "sliding_window": WINDOW,
    "attention_chunk_size": 2 * WINDOW,
    "window_size": WINDOW,
    "intermediate_size": 53,
    "ffn_dim": 53,
    "n_inner": 53,
    "ffn_hidden_size": 53,
    "decoder_ffn_dim": 53,
    "encoder_ffn_dim": 59,
    "intermediate_size_mlp": 47,
    "moe_intermediate_size": 37,
    "expert_ffn_hidden_size": 37,
    "shared_expert_intermediate_size": 29,
    "shared_intermediate_size": 29,
    "moe_shared_expert_intermediate_size": 29,
    "q_lora_rank": 22,
    "kv_lora_rank": 26,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 22,
    "v_head_dim": 12,
    "hidden_size_per_layer_input": 18,
    "embedding_size": 24,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "rotary_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "type_vocab_size": 2,
    "index_head_dim": 16,
    "index_n_heads": 3,
    "index_topk": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
}
# what a family needs beyond that
PER_FAMILY: Mapping[str, Mapping[str, Any]] = {
    "codegen": {"n_head": 4, "n_embd": 96},
    "diffllama": {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128},
    "dots1": {"n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "moshi": {"ffn_dim": 54},
    "prophetnet": {"num_encoder_attention_heads": 5, "num_decoder_attention_heads": 5, "num_decoder_layers": 4},
    "xglm": {"attention_heads": 5},
    "xlm": {"emb_dim": 120},
    "xlnet": {"d_head": 24, "d_inner": 53},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "mamba2": {"num_heads": 8, "head_dim": 30},
    "recurrent_gemma": {"lru_width": 120},
    "rwkv": {"attention_hidden_size": 120},
    "falcon_h1": {"mamba_d_ssm": 192, "mamba_d_head": 24, "mamba_n_heads": 8},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [40, 80],
        "axial_pos_shape": [8, 8],
        "feed_forward_size": 53,
    },
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 6, "ssm_state_size": 8, "n_groups": 2},
    "cpmant": {"dim_head": 16, "dim_ff": 53},
    "ctrl": {"dff": 53},
    "xlstm": {"num_heads": 4},
}
LAYER_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
QUERY_FIELDS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
    "num_heads",
)
KV_FIELDS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
HIDDEN_FIELDS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_FIELDS = ("num_experts_per_tok", "moe_top_k", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts")
PERIODS = ("interval", "period", "step", "every", "pattern", "freq", "stride")


def toy_config(config: PreTrainedConfig, *, own_head_dim: bool = True) -> PreTrainedConfig:
    """A small config of the same structure (the text part of a nested one).

    Args:
        config: any; not changed.
        own_head_dim: a head size other than hidden // heads, where the config has a word for it. Some
            families have the word and cannot do it.

    Raises:
        SecateurError: if the family's config does not take the smaller sizes.
    """
    text = text_config(config)
    words = copy.deepcopy(text.to_dict())
    for name in ("architectures", "quantization_config", "dtype", "torch_dtype", "transformers_version"):
        words.pop(name, None)
    words = _narrow(words, own_head_dim)
    words = _shorten(words)
    try:
        toy = type(text).from_dict(words)
    except CONFIG_ERRORS as error:
        reason = error.__cause__ or error
        first = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        raise SecateurError(
            f"no toy copy of this config can be made: {first}",
            received=text.model_type,
            works="a family whose anatomy can be proved (docs/architectures.md)",
        ) from error
    toy.architectures = None
    return toy


def _positive(words: Mapping[str, Any], name: str) -> int:
    value = words.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _narrow(words: dict[str, Any], own_head_dim: bool) -> dict[str, Any]:
    queries = next((_positive(words, n) for n in QUERY_FIELDS if _positive(words, n)), 0)
    groups = next((_positive(words, n) for n in KV_FIELDS if _positive(words, n)), queries)
    new_groups = 1 if groups == 1 and queries > 1 else 3 if queries > groups else 5
    new_queries = 5 if new_groups == 5 else 6
    rope_dims = words.get("head_dim") == words.get("qk_rope_head_dim")
    for name, value in FIXED.items():
        if _positive(words, name):
            words[name] = value
    for name in QUERY_FIELDS:
        if _positive(words, name):
            words[name] = new_queries
    for name in KV_FIELDS:
        if name in words:
            words[name] = new_groups
    for name in HIDDEN_FIELDS:
        if _positive(words, name):
            words[name] = 96 if new_queries == 6 else 120  # both divisible by fewer heads, too
    if _positive(words, "qk_rope_head_dim") and rope_dims:
        words["head_dim"] = FIXED["qk_rope_head_dim"]
    elif "head_dim" in words:  # null, too: some families do not fill it in
        words["head_dim"] = 24 if (new_queries == 6) == own_head_dim else 16  # hidden // heads is the other
    for name in EXPERT_FIELDS:
        if _positive(words, name) or words.get(name, 1) is None:
            words[name] = 8 if (_positive(words, "n_group") or 1) > 1 else 7
    if _positive(words, "n_group") > 1:
        words |= {"n_group": 4, "topk_group": 2}
    for name in TOP_FIELDS:
        if name in words and any(_positive(words, n) for n in EXPERT_FIELDS):
            words[name] = min(words[name] or 2, 2)
    if _positive(words, "mamba_n_heads") or "mamba_d_head" in words:
        inner = int((words.get("mamba_expand") or 2) * next(words[n] for n in HIDDEN_FIELDS if n in words))
        words |= {"mamba_n_heads": 8, "mamba_d_head": inner // 8}
    words |= {k: v for k, v in PER_FAMILY.get(words.get("model_type", ""), {}).items() if k in words}
    for name in list(words):
        if name.endswith("_token_id"):
            value = words[name]
            words[name] = [1] if isinstance(value, list) else None if value is None else min(abs(int(value)), 2)
    return words


def _shorten(words: dict[str, Any]) -> dict[str, Any]:
    """Fewer layers, some of each kind; per-layer lists follow."""
    count = next((_positive(words, n) for n in LAYER_FIELDS if _positive(words, n)), 0)
    lists = {n: v for n, v in words.items() if isinstance(v, Sequence) and not isinstance(v, str) and len(v) == count}
    period = max(
        [v for n, v in words.items() if isinstance(v, int) and any(p in n for p in PERIODS) and 1 < v <= MOST_LAYERS],
        default=0,
    )
    kinds: dict[str, int] = {}
    for index in range(count):
        kinds.setdefault(repr([v[index] for v in lists.values()]), index)
    chosen = set(list(kinds.values())[:MOST_LAYERS]) if lists else set()
    target = min(max(LAYERS, period + 1, len(chosen)), max(count, 2), MOST_LAYERS)
    chosen |= set([i for i in range(max(count, target)) if i not in chosen][: target - len(chosen)])
    for name in LAYER_FIELDS:
        if _positive(words, name):
            words[name] = len(chosen)
    for name, value in lists.items():
        words[name] = [value[i] for i in sorted(chosen)]
    layers = words.get("per_layer_config")
    if isinstance(layers, Mapping):
        words["per_layer_config"] = {
            new: layers[key] for new, i in enumerate(sorted(chosen)) for key in (i, str(i)) if key in layers
        }
    return words


def toy_model(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    """A model of this config with every parameter random: biases, norm weights and router corrections too.

    Default initialisation leaves biases 0 and norm weights 1, which would hide a forgotten port.

    Args:
        config: best a `toy_config`; the model is built at its size, in fp32.
        seed: of the parameters.
    """
    config = copy.deepcopy(config)
    size = sum(p.numel() for p in skeleton_model(config).parameters())
    if size > LARGEST:
        raise SecateurError(
            "the toy copy of this config is not small: it has sizes of its own that no common word changes",
            received=f"{size:,} parameters",
            works=f"at most {LARGEST:,}",
        )
    model = build_model(config, attention="eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random(parameter, name, generator))
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and name.rpartition(".")[2] in CORRECTIONS:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    return model.float().eval()


def _random(parameter: torch.Tensor, name: str, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() > 1:
        fan = parameter[0].numel() if parameter.dim() == 2 else max(parameter.shape[1:])
        return noise * (1.5 / max(fan, 1) ** 0.5 if "embed" not in name else 1.0)
    return 1 + noise * 0.3 if name.endswith("weight") else noise * 0.3
