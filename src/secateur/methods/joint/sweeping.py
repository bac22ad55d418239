"""What methods share that go over the columns once: the factor they read, replays, and a polish at the end.

    H^-1 = U^T U,  U upper triangular,  H = X^T X + damping

A sweep never comes back to a column, so a survivor knows nothing of what goes after it. A few steps of conjugate
gradients on the survivors at the end (`polish`) make up for most of that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.engine.probes import Evidence
from secateur.errors import SecateurError
from secateur.methods.base import MatrixSite
from secateur.methods.joint.layer import Layer, LayerMethod, together
from secateur.methods.least_squares import conjugate_gradients, damped

TRIES = 6  # how often damping is raised tenfold


class Sweeping(LayerMethod):
    """A sweep over the columns, and ``polish`` steps of conjugate gradients on the survivors after it."""

    polish: int

    @abstractmethod
    def values(self, layer: Layer, stays: Tensor) -> Tensor:
        """What the sweep makes of all matrices side by side [in, rows], for booleans [in, rows] decided elsewhere."""

    def prepared(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """The matrices side by side, transposed [in, all rows], and U of the inputs they share."""
        weight = torch.cat([w.T for w in layer.weights], dim=1)
        return weight, inverse_factor(layer.gram, self.damping, ", ".join(site.name for site in layer.sites))

    def polished(self, layer: Layer, keep: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each matrix's booleans and values [out, in], polished, from those of all side by side [in, rows]."""
        rows = [len(w) for w in layer.weights]
        parts = zip(keep.split(rows, dim=1), weight.split(rows, dim=1), strict=True)
        found = [(k.T.contiguous(), w.T.contiguous()) for k, w in parts]
        if not self.polish or layer.silent:
            return found
        h, _ = damped(layer.gram, self.damping)
        return [
            (mask, conjugate_gradients(h, original @ h, mask, value, self.polish))
            for original, (mask, value) in zip(layer.weights, found, strict=True)
        ]

    def reweigh(self, site: MatrixSite, evidence: Evidence, mask: Tensor) -> Tensor | None:
        return self.reweigh_many([site], [evidence], [mask])[0]

    def reweigh_many(
        self, sites: Sequence[MatrixSite], evidence: Sequence[Evidence], masks: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The survivors' values for booleans [out, in] that were decided elsewhere."""
        out: list[Tensor | None] = [site.weight for site in sites]
        for members in together(sites, evidence, [at for at, mask in enumerate(masks) if not bool(mask.all())]):
            layer = Layer.of([sites[at] for at in members], [evidence[at] for at in members], [0] * len(members))
            stays = torch.cat([masks[at].T.to(layer.gram.device) for at in members], dim=1)
            if layer.silent and not self.blind:
                weight = torch.cat([w.T for w in layer.weights], dim=1).masked_fill_(~stays, 0)
            else:
                weight = self.values(layer, stays)
            for at, (_, value) in zip(members, self.polished(layer, stays, weight), strict=True):
                out[at] = value
        return out


def inverse_factor(gram: Tensor, damping: float, name: str) -> Tensor:
    """U [in, in], upper triangular with H^-1 = U^T U, for H = gram + damping * mean(diagonal) * I.

    Raises:
        SecateurError: the statistics are not finite, or H is not positive definite however damped.
    """
    diagonal = gram.diagonal().clone()
    if not torch.isfinite(gram.sum()):
        raise SecateurError(
            f"{name}: the inputs' statistics are not finite",
            works="check weights and text for NaN and Inf, or run the forward passes with --dtype fp32",
        )
    live = diagonal > 0
    mean = float(diagonal[live].double().mean()) if bool(live.any()) else 1.0
    h = gram.flip(0, 1)  # backwards: its lower factor, turned around, is an upper factor of H
    base = torch.where(live, diagonal, mean).flip(0)
    for attempt in range(TRIES + 1):
        h.diagonal().copy_(base + max(damping, 1e-8 if attempt else 0.0) * 10.0**attempt * mean)
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            upper = lower.flip(0, 1)
            del h, lower
            eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            return torch.linalg.solve_triangular(upper, eye, upper=True)
    raise SecateurError(
        f"{name}: X^T X is not positive definite",
        received=f"damping {damping:g}, raised tenfold {TRIES} times",
        works="more calibration text or a larger damping",
    )
