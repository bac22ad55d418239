"""How far a model has moved from the dense one, on the same windows.

    KL(dense || model) = sum over the vocabulary  p_dense (log p_dense - log p_model),  nats per predicted token
    top-1 agreement    = share of positions with the same most likely next token

Both say what perplexity hides: a model may score the text's own tokens as well and everything else differently.
"""

from __future__ import annotations

from torch import Tensor

from secateur.measure.bootstrap import interval
from secateur.measure.passes import Losses, scored
from secateur.measure.types import Divergence


def summarise(result: Losses, windows: Tensor, stride: int | None, seed: int = 0) -> Divergence | None:
    """The divergence of one pass over ``windows`` [windows, length]; None if there was nothing to compare with."""
    if result.kl is None or result.top1 is None:
        return None
    weights = scored(windows.shape[0], windows.shape[1], stride)
    kl, top1 = interval(result.kl, weights, seed=seed), interval(result.top1, weights, seed=seed)
    return Divergence(kl.value, top1.value, kl, top1)
