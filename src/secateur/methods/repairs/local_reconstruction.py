"""Local reconstruction: the survivors of one sub-layer are fitted by gradient to what the dense one answered.

    minimise over the kept weights    mean over tokens of  |f(x; W') - f(x; W)|^2 / (|f(x; W)|^2 + median)
    f a whole attention or a whole FFN, the median that of |f(x; W)|^2 in the window

on calibration text, without labels, by Adam, a step per window, with a cosine decay, until steps are a hundredth of the
first (of four passes over 64 windows, 240 steps of 256); the step length of each matrix is a share of its survivors'
root mean square. Zeros stay zero. Attention first, then the FFN on what the mended attention
gives it. An attention or FFN that has no module of its own (OPT's FFN) is fitted through its whole layer.

Source: arXiv 2510.14444 (local reconstruction of attention and MLP separately is where retraining after pruning is
cheapest for its quality). Deviations: steps are bounded, one for every window of a pass; errors are relative to each
token's answer, so that a few tokens with huge activations do not decide alone; products may be taken in bf16; the
result is kept only if the error over up to eight windows of the text fell.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, takewhile
from math import cos, pi
from typing import Any

import torch
from torch import Tensor

from secateur.engine.walk import multiplies_bf16, products_in
from secateur.errors import SecateurError
from secateur.methods.base import Part, PartRepair

SHORTEST = 0.01  # share of the first step's length below which no step is taken: all of them come to 1 in 2,000
WITNESSES = 8  # windows that the error is measured on, before and after
PRODUCTS = ("auto", "bf16", "walk")
FUSED = ("cpu", "cuda")  # devices whose Adam steps all weights at once


@dataclass(frozen=True)
class LocalReconstruction(PartRepair):
    """Adam on the survivors of each attention and each FFN, towards the dense one's outputs.

    Attributes:
        passes: over the calibration text; each costs about three forward passes of the layers (half in bf16).
        rate: length of Adam's first steps, as a share of the root mean square of a matrix's survivors.
        products: precision of the matrix products while fitting: ``bf16``, ``walk`` (that of the forward passes,
            ``--dtype``) or ``auto``, which is bf16 where the device has instructions for it; sums stay fp32.
    """

    spaces = ("weight", "ffn", "kv_group", "head", "expert")
    passes: int = 4
    rate: float = 0.02
    products: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.passes, bool) or not isinstance(self.passes, int) or not 1 <= self.passes <= 1000:
            raise SecateurError("passes is not a count from 1 to 1000", received=self.passes, works="passes=4")
        if not 0 < self.rate <= 1:
            raise SecateurError("rate is not a share of (0, 1]", received=self.rate, works="rate=0.02")
        if self.products not in PRODUCTS:
            raise SecateurError("unknown products", received=self.products, works=", ".join(PRODUCTS))

    def dtype(self, device: torch.device) -> torch.dtype | None:
        """Precision of the products while fitting; None is that of the walk."""
        narrow = self.products == "bf16" or (self.products == "auto" and multiplies_bf16(device))
        return torch.bfloat16 if narrow else None

    def fit(self, part: Part) -> tuple[float, float]:
        """Change the part's weights in place; returns the mean of `relative` over the witnesses before and after."""
        before = error(part)
        kept = {name: w.detach().clone() for name, w in part.weights.items()}
        self._descend(part)
        after = error(part)
        if after < before:  # never so for NaN
            return before, after
        with torch.no_grad():
            for name, w in part.weights.items():
                w.copy_(kept[name])
        return before, before

    def _descend(self, part: Part) -> None:
        groups: list[dict[str, Any]] = []
        masks, rates = [], []
        for name, w in part.weights.items():
            mask = part.keeps[name].expand(w.shape).to(w.device)
            size = w.detach()[mask].double().square().mean().sqrt() if bool(mask.any()) else torch.tensor(0.0)
            groups.append({"params": [w]})
            rates.append(self.rate * float(size))
            masks.append(mask)
        steps = self.passes * part.examples
        device = next(iter(part.weights.values())).device
        fused = device.type in FUSED  # all of a step in one pass over the weights: a fifth of the time of a small block
        adam = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=fused)
        dtype = self.dtype(device) or torch.float32
        for w in part.weights.values():
            w.requires_grad_(True)
        passes = (torch.randperm(part.examples, generator=part.generator).tolist() for _ in range(self.passes))
        try:
            for pace, i in zip(paces(steps), chain.from_iterable(passes), strict=False):
                for group, first in zip(adam.param_groups, rates, strict=True):
                    group["lr"] = first * pace
                adam.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    with products_in(dtype, device):
                        answer = part.output(i)
                    relative(answer, part.target(i)).backward()
                for w, mask in zip(part.weights.values(), masks, strict=True):
                    if w.grad is not None:
                        w.grad.mul_(mask)  # what was removed has no slope, so Adam leaves it at +0.0
                adam.step()
        finally:
            for w in part.weights.values():
                w.requires_grad_(False)
                w.grad = None


def paces(steps: int) -> list[float]:
    """Lengths of the steps that are taken of `steps`, as shares of the first: a cosine decay without its end."""
    decay = (0.5 * (1 + cos(pi * done / steps)) for done in range(steps))
    return list(takewhile(lambda pace: pace >= SHORTEST, decay))


def relative(answer: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |answer - target|^2 / (|target|^2 + its median over the tokens); both [..., hidden]."""
    size = target.float().square().sum(-1)
    off = (answer.float() - target).square().sum(-1)
    return (off / (size + size.median()).clamp_min(1e-30)).mean()


@torch.no_grad()
def error(part: Part) -> float:
    """The mean of `relative` over at most `WITNESSES` examples, evenly spaced."""
    chosen = range(0, part.examples, -(-part.examples // WITNESSES))
    return sum(float(relative(part.output(i), part.target(i))) for i in chosen) / len(chosen)
