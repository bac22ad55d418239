"""One pass over test windows for all models together: losses, and the distance from the first model.

Memory: one batch's logits per model (in the model's own dtype) plus fp32 copies of a few positions at a
time; a batch is as many windows as keep the logits of one model under 128 MB, at least one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.decode import accepted
from secateur.engine.text import check_ids

LOGIT_BYTES = 128 * 2**20
CHUNK_BYTES = 4 * 2**20  # of fp32 logits; small enough for the cache, which halves the time


@dataclass
class Losses:
    """Per window, of one model.

    Attributes:
        nll: mean nats per scored token; inf where the logits were not finite.
        kl: mean KL(first || this) in nats per scored token, or None for the first model and for models with
            another vocabulary.
        top1: share of scored positions where the most likely token is the first model's; None likewise.
    """

    nll: list[float]
    kl: list[float] | None
    top1: list[float] | None


def scored(windows: int, length: int, stride: int | None) -> list[int]:
    """Positions scored per window: all but the first token's, and with a stride only those that are new."""
    step = stride or length
    return [length - 1] + [min(step, length - 1)] * (windows - 1)


@torch.inference_mode()
def losses(
    models: Sequence[nn.Module],
    windows: Tensor,
    *,
    stride: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[Losses]:
    """Negative log-likelihood of the windows under every model, and distances from the first one.

    Args:
        models: causal language models (called with ``input_ids``, returning ``logits``), in eval mode.
        windows: int64 [windows, length].
        stride: tokens between the windows' starts; None if they do not overlap.
        batch_size: windows per batch; None chooses by memory.
        progress: told the share done after every batch.

    Raises:
        SecateurError: a token id beyond a model's vocabulary.
    """
    count, length = windows.shape
    counts = scored(count, length, stride)
    sums = [torch.zeros(3, count, dtype=torch.float64) for _ in models]
    comparable = [False] * len(models)
    widest = max(_vocabulary(m, windows) for m in models)
    batch_size = batch_size or max(1, LOGIT_BYTES // (length * widest * 4))
    for start in range(0, count, batch_size):
        batch = windows[start : start + batch_size]
        dense: Tensor | None = None
        for number, model in enumerate(models):
            logits = logits_of(model, batch)[:, :-1]
            if dense is None:
                dense = logits
            comparable[number] = number > 0 and logits.shape == dense.shape
            for row in range(len(batch)):
                at = start + row
                new = slice(length - 1 - counts[at], None)
                sums[number][:, at] = _window(
                    logits[row, new], batch[row, 1:][new], dense[row, new] if comparable[number] else None
                )
        if progress is not None:
            progress(min(1.0, (start + len(batch)) / count))
    out = []
    for number, s in enumerate(sums):
        nll, kl, top1 = ((s / torch.tensor(counts)).tolist()) if count else ([], [], [])
        nll = [x if math.isfinite(x) else math.inf for x in nll]
        kl = [x if math.isfinite(x) else math.inf for x in kl]
        out.append(Losses(nll, kl, top1) if comparable[number] else Losses(nll, None, None))
    return out


def logits_of(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [batch, length, vocabulary] of one forward pass without cache, on the model's device."""
    device = next(model.parameters()).device
    extra = {} if mask is None else {"attention_mask": mask.to(device)}
    return model(input_ids=ids.to(device), **accepted(model, {"use_cache": False}), **extra).logits


@torch.inference_mode()
def is_causal(model: nn.Module) -> bool:
    """Whether a model predicts next tokens: it has logits over a vocabulary, and changing the last token of a
    sequence changes none of the logits before it (an encoder's head fails this whatever its class is called)."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        return False
    ids = torch.ones(2, 6, dtype=torch.long)
    ids[1, -1] = 0
    logits = logits_of(model, ids)[:, :-1].float()
    return bool(((logits[0] - logits[1]).abs() <= 1e-3 * (1 + logits[0].abs())).all() or not logits.isfinite().all())


def positions(model: nn.Module) -> int | None:
    """The longest text the config allows, or None where it sets no bound."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _window(logits: Tensor, targets: Tensor, dense: Tensor | None) -> Tensor:
    """Sums over positions of (nll, KL(dense || model), top-1 agreement): fp64 [3]."""
    total = torch.zeros(3, dtype=torch.float64)
    step = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    for start in range(0, len(targets), step):
        at = slice(start, start + step)
        q = logits[at].float().log_softmax(-1)
        total[0] -= q.gather(-1, targets[at, None].to(q.device)).double().sum().cpu()
        if dense is None:
            continue
        p = dense[at].float().log_softmax(-1)
        # A host may set impossible tokens to -inf; 0 * (-inf - -inf) counts as nothing.
        gap = torch.where(p > -math.inf, p.exp() * (p - q), p.new_zeros(()))
        total[1] += gap.double().sum().clamp_min(0).cpu()
        total[2] += (dense[at].argmax(-1) == logits[at].argmax(-1)).sum().cpu()
    return total


def _vocabulary(model: nn.Module, windows: Tensor) -> int:
    """Output width of a model, after checking that the windows' ids have embeddings."""
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    check_ids(windows, table.shape[0])
    head = model.get_output_embeddings()  # type: ignore[operator]
    return int(head.weight.shape[0]) if head is not None and head.weight.dim() == 2 else int(table.shape[0])
