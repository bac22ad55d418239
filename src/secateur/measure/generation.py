"""Greedy continuations of a few prompts, to read side by side: perplexity alone misranks pruned models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from secateur.engine.decode import decode
from secateur.measure.passes import positions
from secateur.measure.types import Generation

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "To make a simple vegetable soup, first",
    "Once upon a time, in a small village by the sea,",
)


def generate(model: nn.Module, tokenizer: Any, prompts: Sequence[str], new_tokens: int = 48) -> tuple[Generation, ...]:
    """The most likely continuation of each prompt, up to the model's end-of-sequence token.

    Prompts run one by one, so nothing is padded, and are tokenised as the tokenizer does by default
    (with a beginning-of-sequence token where the model wants one).

    Args:
        model: a causal language model in eval mode.
        tokenizer: of Transformers' kind.
        prompts: plain text; no chat template is applied.
        new_tokens: at most this many, and never beyond the longest text the model allows.

    Returns:
        Per prompt the new text only.
    """
    stop = stops(model, tokenizer)
    out = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long)
        new: list[int] = []
        room = max(0, (positions(model) or ids.shape[1] + new_tokens) - ids.shape[1])
        for token in decode(model, ids, min(new_tokens, room)):
            if int(token) in stop:
                break
            new.append(int(token))
        out.append(Generation(prompt, tokenizer.decode(new, skip_special_tokens=True), len(new)))
    return tuple(out)


def stops(model: nn.Module, tokenizer: Any) -> set[int]:
    """End-of-sequence ids of the generation config, the config and the tokenizer."""
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, list | tuple) else {ids} if isinstance(ids, int) else set()
    return found
