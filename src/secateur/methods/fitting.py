"""What a layer is fitted on: its own inputs in the dense model, in the pruned one, or both.

    dense     X = X_d     the output of every layer on the dense model's activations is kept
    pruned    X = X_p     ... on the activations that reach it after everything before it was pruned (SparseGPT's way)
    mix       the pruned model's inputs, outputs a share of the way to the dense model's:
              minimise |X_p W'^T - X_a W^T|^2,     X_a = X_p + share (X_d - X_p),     share = 0.25

``dense`` and ``pruned`` are a choice of stream: methods see other evidence and nothing else changes. ``mix`` also
lets a layer make up for what went wrong before it. All that needs is another weight to aim at. With

    W* = argmin |X_p V^T - X_a W^T|^2 + shift |V - W|^2,     (G + shift I) W*^T = (X_p^T X_a + shift I) W^T,

and G = X_p^T X_p, the error of any W' is |X_p (W' - W*)^T|^2 plus what no W' can change. So a method that fits to W on
G fits to the mix when it is handed W* instead of W; masked least squares with the same shift is exact then.

All of the way (``mix:share=1``) breaks a model that has lost much; probably because every layer of a block makes up for
the same inherited error, and least squares from inputs that carry noise shrinks its answers, layer after layer.

Source: the asymmetric calibration of GPTAQ (arXiv 2504.02692: a quantised layer's inputs against the full-precision
model's outputs), written as a change of target; the normal equations are ours. A quarter of the way is the default of
GPTQModel, which scales the correction (``alpha``); on SmolLM2 it is the best share we know, for pruning, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from secateur.engine.probes import CrossGram, Evidence, Gram
from secateur.errors import SecateurError
from secateur.methods.base import MatrixSite
from secateur.methods.least_squares import damped

DAMPING = 0.01  # pull towards the weights as they are, as a share of the mean diagonal of X^T X


@dataclass(frozen=True)
class FitOn:
    """Whose activations layers are fitted on.

    Attributes:
        name: the recipe's word.
        aim: the share of the way from a layer's own inputs to the dense model's at which paired statistics aim.
    """

    name: ClassVar[str]

    @property
    def aim(self) -> float:
        return 1.0


class Dense(FitOn):
    """What a layer reads in the dense model."""

    name = "dense"


class Pruned(FitOn):
    """What reaches a layer after everything before it was pruned."""

    name = "pruned"


@dataclass(frozen=True)
class Mix(FitOn):
    """The pruned model's inputs, and outputs that lie between its own and the dense model's.

    Attributes:
        share: how much of the way to the dense model's outputs, in (0, 1].
    """

    name = "mix"
    share: float = 0.25

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise SecateurError("share is not in (0, 1]", received=self.share, works="mix:share=0.25")

    @property
    def aim(self) -> float:
        return float(self.share)


FITS: dict[str, type[FitOn]] = {cls.name: cls for cls in (Dense, Pruned, Mix)}


def fitted(sites: Sequence[MatrixSite], evidence: Sequence[Evidence], damping: float = DAMPING) -> list[MatrixSite]:
    """The sites with the weights to aim at; those without paired statistics as they are.

    Matrices that read the same input are solved together. Inputs that never fire keep their weights.
    """
    out = list(sites)
    shared: dict[int, list[int]] = {}
    for at, seen in enumerate(evidence):
        if Gram in seen and CrossGram in seen:
            shared.setdefault(id(seen[CrossGram]), []).append(at)
    for members in shared.values():
        seen = evidence[members[0]]
        weights = [sites[at].weight.float() for at in members]
        aim = _aim(seen, torch.cat(weights), damping, ", ".join(sites[at].name for at in members))
        for at, new in zip(members, aim.split([len(w) for w in weights]), strict=True):
            out[at] = replace(sites[at], weight=new.contiguous())
    return out


def _aim(seen: Evidence, weight: Tensor, damping: float, name: str) -> Tensor:
    """W* [out, in]."""
    gram, cross = seen[Gram].gram.to(weight.device), seen[CrossGram].cross.to(weight.device)
    if not torch.isfinite(gram.sum() + cross.sum()):
        raise SecateurError(
            f"{name}: the inputs' statistics are not finite",
            works="check weights and text for NaN and Inf, or run the forward passes with --dtype fp32",
        )
    h, _ = damped(gram, max(damping, 1e-6))
    moved = (cross - gram) @ weight.T  # what the dense stream asks for beyond the weights as they are
    scale = h.diagonal().clamp_min(torch.finfo(h.dtype).tiny).rsqrt().unsqueeze(1)
    h.mul_(scale).mul_(scale.T)
    factor, info = torch.linalg.cholesky_ex(h)
    if int(info):
        factor = torch.linalg.cholesky(h.double() + 1e-9 * torch.eye(len(h), dtype=torch.float64, device=h.device))
    found = torch.cholesky_solve((moved * scale).to(factor.dtype), factor) * scale
    return weight + found.T.to(weight.dtype)
