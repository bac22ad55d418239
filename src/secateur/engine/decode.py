"""Token after token with the host's own cache: one loop for greedy text, timing and text a model writes itself.

Self-made calibration text: Williams et al., "Self-calibration for Language Model Quantization and Pruning"
(arXiv 2410.17170): sampled from the model itself, starting at the beginning-of-sequence token. Deviation:
temperature 1 throughout (theirs is scheduled), and a window goes on after end-of-sequence, so that all windows
have equal length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.text import TextSource, check_room
from secateur.errors import SecateurError

Pick = Callable[[Tensor], Tensor]
SELF_BATCH = 16  # windows written together


def greedy(logits: Tensor) -> Tensor:
    """The most likely token: [batch, vocabulary] to [batch]."""
    return logits.argmax(-1)


def sampler(generator: torch.Generator, temperature: float = 1.0) -> Pick:
    """A picker that samples with a seeded CPU generator (the same tokens on every device, up to rounding)."""

    def pick(logits: Tensor) -> Tensor:
        p = (logits.float() / temperature).softmax(-1).cpu()
        return torch.multinomial(p, 1, generator=generator)[:, 0]

    return pick


@torch.inference_mode()
def decode(model: nn.Module, ids: Tensor, steps: int, pick: Pick = greedy) -> Iterator[Tensor]:
    """Continue prompts of equal length, yielding the new tokens [batch] of every step.

    Args:
        model: a causal language model in eval mode. One that keeps no cache is fed everything again.
        ids: int64 [batch, length].
        steps: tokens to add. The first costs the prefill, each other one decoding step.
        pick: chooses tokens [batch] from logits [batch, vocabulary].
    """
    device = next(model.parameters()).device
    ids = ids.to(device)
    cache, feed = None, ids
    for _ in range(steps):
        out = model(
            input_ids=feed, **accepted(model, {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1})
        )
        new = pick(out.logits[:, -1]).to(device)
        yield new
        cache = getattr(out, "past_key_values", None)
        ids = torch.cat([ids, new[:, None]], 1)
        feed = ids if cache is None else new[:, None]


def accepted(model: nn.Module, words: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the model's forward pass has by name (state-space models have no
    ``past_key_values``, encoders no ``logits_to_keep``)."""
    known = inspect.signature(model.forward).parameters
    return {word: value for word, value in words.items() if word in known}


def self_text(model: nn.Module, tokenizer: Any, text: TextSource, batch_size: int = SELF_BATCH) -> Tensor:
    """Calibration windows the model writes itself, sampled at temperature 1: int64 [samples, length].

    Args:
        model: whole, in memory.
        tokenizer: gives the beginning-of-sequence token; None, or one without it: windows start with a
            random token instead.
        text: samples, length and seed.
        batch_size: windows written together; results depend on it only through rounding and the order of draws.

    Raises:
        SecateurError: the model is not a causal language model, or more windows than fit into memory.
    """
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise SecateurError(
            "only a causal language model can write its own calibration text",
            received=type(model).__name__,
            works="give a text file or `builtin`",
        )
    check_room(text.samples, text.length)
    generator = torch.Generator().manual_seed(text.seed)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    begin = getattr(tokenizer, "bos_token_id", None)
    pick = sampler(generator)
    out = []
    training = model.training
    model.eval()
    try:
        for start in range(0, text.samples, batch_size):
            n = min(batch_size, text.samples - start)
            if begin is None:
                first = torch.randint(0, vocabulary, (n, 1), generator=generator)
            else:
                first = torch.full((n, 1), begin)
            steps = [t.cpu()[:, None] for t in decode(model, first, text.length - 1, pick)]
            out.append(torch.cat([first, *steps], 1))
    finally:
        model.train(training)
    return torch.cat(out)
