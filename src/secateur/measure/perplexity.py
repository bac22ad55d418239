"""Perplexity: exp of the mean negative log-likelihood per predicted token.

    ppl = exp( -1/N  sum over windows, positions  log p(x_t | x_<t in the same window) )

Windows do not overlap unless a stride is given; then each window scores only the tokens the one before has not.
Every window's first token is unscored, no special tokens are added, log-softmax is fp32, sums are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from secateur.measure.passes import Losses, losses, scored
from secateur.measure.types import Perplexity


def perplexity(
    model: nn.Module,
    windows: Tensor,
    *,
    stride: int | None = None,
    batch_size: int | None = None,
    text: str = "text",
) -> Perplexity:
    """Perplexity of a causal language model on windows of tokens.

    Args:
        model: returns ``logits`` for ``input_ids``; put it in eval mode first.
        windows: int64 [windows, length], from `secateur.engine.text.test_windows`.
        stride: as given to `test_windows`.
        batch_size: windows per forward pass; None chooses by memory.
        text: the text's name, recorded in the result.
    """
    (result,) = losses([model], windows, stride=stride, batch_size=batch_size)
    return summarise(result, windows, stride, str(next(model.parameters()).dtype), text)


def summarise(result: Losses, windows: Tensor, stride: int | None, dtype: str, text: str) -> Perplexity:
    """The perplexity of one pass over ``windows`` [windows, length]."""
    count, length = windows.shape
    weights = scored(count, length, stride)
    return Perplexity(
        value=exp_mean(result.nll, weights),
        window_nll=tuple(result.nll),
        windows=count,
        length=length,
        stride=stride or length,
        tokens=sum(weights),
        dtype=dtype.removeprefix("torch."),
        text=text,
    )


def exp_mean(nll: Sequence[float], weights: Sequence[int]) -> float:
    """exp of a weighted mean; inf where it overflows."""
    mean = sum(x * w for x, w in zip(nll, weights, strict=True)) / sum(weights)
    return math.exp(mean) if mean < 709 else math.inf
