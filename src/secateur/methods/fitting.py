"""What a layer is fitted on: its own inputs in the dense model, in the pruned one, or both.

    dense     X = X_d     the output of every layer on the dense model's activations is kept
    pruned    X = X_p     ... on the activations that reach it after everything before it was pruned (SparseGPT's way)
    mix       the pruned model's inputs, the dense model's outputs:   minimise |X_p W'^T - X_d W^T|^2

``dense`` and ``pruned`` are a choice of stream: methods see other evidence and nothing else changes. ``mix`` also
lets a layer make up for what went wrong before it. All that needs is another weight to aim at. With

    W* = argmin |X_p V^T - X_d W^T|^2 + shift |V - W|^2,     (G + shift I) W*^T = (X_p^T X_d + shift I) W^T,

and G = X_p^T X_p, the error of any W' is |X_p (W' - W*)^T|^2 plus what no W' can change. So a method that fits to W on
G fits to the mix when it is handed W* instead of W; masked least squares with the same shift is exact then.

Source: the asymmetric calibration of GPTAQ (arXiv 2504.02692: a quantised layer's inputs against the full-precision
model's outputs), written as a change of target; the normal equations are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from secateur.engine.probes import CrossGram, Evidence, Gram
from secateur.errors import SecateurError
from secateur.methods.base import MatrixSite
from secateur.methods.least_squares import damped

FITS = ("dense", "pruned", "mix")
DAMPING = 0.01  # pull towards the weights as they are, as a share of the mean diagonal of X^T X


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
