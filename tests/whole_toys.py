"""Tiny random models, a tokenizer and a text, all made here: what the tests of the whole path run on."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    EuroBertConfig,
    EuroBertForMaskedLM,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from secateur.anatomy import anatomy_of
from secateur.cli import main
from secateur.engine.apply import Keeps, cut, updated_config
from secateur.engine.host.build import describe_skeleton
from secateur.engine.outcome import outcome_of
from secateur.engine.store import Store
from secateur.engine.write import StepWriter, publish, work_dir

VOCABULARY = 64
COMMON: dict[str, Any] = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0)
ROPE: dict[str, Any] = COMMON | dict(
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**ROPE, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "qwen2": lambda: Qwen2Config(**ROPE),
    "gemma2": lambda: Gemma2Config(**ROPE, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "falcon": lambda: FalconConfig(**COMMON, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
    "mixtral": lambda: MixtralConfig(**ROPE | {"intermediate_size": 24}, num_local_experts=4, num_experts_per_tok=2),
    "opt": lambda: OPTConfig(
        **COMMON, hidden_size=32, ffn_dim=40, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "bert": lambda: BertConfig(
        **{k: v for k, v in ROPE.items() if k != "num_key_value_heads"}, attn_implementation="eager"
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in ROPE.items() if k != "num_key_value_heads"}),
    "eurobert": lambda: EuroBertConfig(**ROPE, mask_token_id=3),
}
MASKED = {"bert": BertForMaskedLM, "eurobert": EuroBertForMaskedLM}  # see both sides of a token


def make(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A model whose parameters are all random: no bias is 0 and no norm weight 1."""
    config = CONFIGS[family]()
    for word, value in changes.items():
        setattr(config, word, value)
    torch.manual_seed(seed)
    model = MASKED[family](config) if family in MASKED else AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def tokens(samples: int = 5, length: int = 12, seed: int = 1) -> Tensor:
    """Token ids [samples, length]."""
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token: <pad>, <bos>, <eos>, w3 ... w63."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
    )


def write_text(path: Path, words: int = 3000, seed: int = 0) -> Path:
    """A text of random words."""
    rng = random.Random(seed)
    path.write_text(" ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(words)))
    return path


def write_model(path: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A checkpoint with a tokenizer."""
    seed = changes.pop("seed", 0)
    shard = changes.pop("max_shard_size", "5GB")
    make(family, dtype, seed, **changes).save_pretrained(path, max_shard_size=shard)
    tokenizer().save_pretrained(path)
    return path


def read_all(folder: Path) -> dict[str, bytes]:
    """Every file of a directory, by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def weights_of(folder: Path) -> dict[str, bytes]:
    """The safetensors files of a directory."""
    return {name: data for name, data in read_all(folder).items() if name.endswith(".safetensors")}


def written(model: Any, out: Path, keeps: Mapping[str, Keeps], store: Store | None = None) -> Path:
    """Cut a model in memory and write it, as a step of a run does.

    Args:
        model: cut in place.
        out: the directory.
        keeps: what stays, by block and space.
        store: where the model was loaded from; None: nowhere.
    """
    store, anatomy = store or Store.of_model(model), anatomy_of(describe_skeleton(model))
    outcome = outcome_of(anatomy, updated_config(store.config, anatomy, keeps), store.sizes)
    cut(model, anatomy, keeps)
    writer = StepWriter(work_dir(out), store)
    for index in range(store.blocks):
        writer.write_block(index, model.get_submodule(f"{store.blocks_path}.{index}"))
    writer.write_rest(model)
    publish(writer.finish(outcome), out)
    shutil.rmtree(work_dir(out))
    return out


def cli(*words: Any) -> int:
    """The command line in this process."""
    return main([str(w) for w in words])


def said(capsys: Any) -> dict[str, Any]:
    """What a verb printed with --json."""
    return json.loads(capsys.readouterr().out)
