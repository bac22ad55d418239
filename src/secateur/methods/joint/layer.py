"""What methods share that solve one layer's problem from X^T X: matrices of one input, side by side, made safe.

minimise over masks and weights:   sum over rows |X w - X w0|^2  =  (w - w0)^T (X^T X) (w - w0)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from secateur.engine.probes import Evidence, Fisher, Gram, Probe
from secateur.errors import SecateurError, unknown
from secateur.methods.base import Keep, MatrixSite, Method
from secateur.methods.grains import Grain
from secateur.methods.least_squares import damped, refit


@dataclass
class Layer:
    """Matrices that read the same input.

    Attributes:
        weights: per matrix, fp32 [out, in], not to be changed; columns of inputs that never fire are 0.
        gram: X^T X, fp32 [in, in].
        counts: grain units that stay, per matrix.
        evidence: per matrix, as it was given.
        sites: per matrix, with ``weights`` in place of the original weights.
        silent: no token was seen at all (an expert that was never chosen): nothing is known, ``weights`` are whole.
    """

    weights: list[Tensor]
    gram: Tensor
    counts: list[int]
    evidence: list[Evidence]
    sites: list[MatrixSite]
    silent: bool

    @staticmethod
    def of(sites: Sequence[MatrixSite], evidence: Sequence[Evidence], counts: Sequence[int]) -> Layer:
        """Sites with the same statistics as one layer.

        Raises:
            SecateurError: weights or statistics that are not finite.
        """
        name = ", ".join(site.name for site in sites)
        gram = evidence[0][Gram].gram.to(sites[0].weight.device)
        if not torch.isfinite(gram.sum()):
            raise SecateurError(
                f"{name}: the inputs' statistics are not finite",
                works="check weights and text for NaN and Inf, or run the forward passes with --dtype fp32",
            )
        dead = gram.diagonal() <= 0
        silent = bool(dead.all())
        if silent:
            dead = torch.zeros_like(dead)
        weights, own = [], []
        for site in sites:
            weight = site.weight.float()
            if not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
                raise SecateurError(f"{site.name}: weights are not finite", works="a checkpoint without NaN and Inf")
            weights.append(weight.masked_fill(dead, 0) if bool(dead.any()) else weight)
            own.append(MatrixSite(site.name, weights[-1], site.component, site.block, site.blocks, site.generator))
        return Layer(weights, gram, list(counts), list(evidence), own, silent)

    def scaled(self, before: float = 0.0, after: float = 0.0) -> tuple[Tensor, Tensor]:
        """The Gram matrix with inputs of norm one, and the norms [in] that weights are multiplied by.

        Args:
            before: damping of X^T X, as a share of its mean diagonal, before it is scaled.
            after: damping added to the unit diagonal afterwards.
        """
        h, _ = damped(self.gram, before)
        norm = torch.where(h.diagonal() > 0, h.diagonal(), 1.0).sqrt()
        h.div_(norm).div_(norm.unsqueeze(1))
        h.diagonal().fill_(1.0 + after)
        return h, norm


class LayerMethod(Method):
    """A method that decides about each matrix from its layer's X^T X; matrices of one input come together."""

    needs = (Gram,)
    blind: ClassVar[bool] = False  # whether `solve` knows what to do where no token was seen
    grain: Grain
    damping: float
    rows: str = "even"  # how errors of a matrix's rows count where rows compete: a word of `ROWS`

    @abstractmethod
    def solve(self, layer: Layer) -> Sequence[tuple[Tensor, Tensor | None]]:
        """Per matrix: booleans [out, in], and the survivors' new values (None: as they were)."""

    def prune(self, site: MatrixSite, evidence: Evidence, count: int) -> Keep:
        return self.prune_many([site], [evidence], [count])[0]

    def prune_many(
        self, sites: Sequence[MatrixSite], evidence: Sequence[Evidence], counts: Sequence[int]
    ) -> list[Keep]:
        """Matrices whose evidence is the same Gram matrix share what is computed from it."""
        answers: dict[int, Keep] = {}
        open_: list[int] = []
        for at, (site, count) in enumerate(zip(sites, counts, strict=True)):
            shape = tuple(site.weight.shape)
            if count == self.grain.units(shape):
                answers[at] = Keep(torch.ones_like(site.weight, dtype=torch.bool), site.weight)
            else:
                self.grain.check(shape)
                check_count(self.grain, shape, count)
                open_.append(at)
        for members in together(sites, evidence, open_):
            scales = [row_scale(evidence[at], self.rows) if ROWS[self.rows] else None for at in members]
            weighed = [_times(sites[at], scale) for at, scale in zip(members, scales, strict=True)]
            layer = Layer.of(weighed, [evidence[at] for at in members], [counts[at] for at in members])
            solved = self._largest(layer) if layer.silent and not self.blind else self.solve(layer)
            for at, scale, (mask, weight) in zip(members, scales, solved, strict=True):
                if weight is not None:
                    weight = weight.masked_fill_(~mask, 0)
                    weight = weight if scale is None else weight.div_(scale.to(weight.device))
                answers[at] = Keep(mask, weight)
        return [answers[at] for at in range(len(sites))]

    def _largest(self, layer: Layer) -> list[tuple[Tensor, Tensor | None]]:
        pairs = zip(layer.weights, layer.counts, strict=True)
        return [(self.grain.select(w.square(), count), w.clone()) for w, count in pairs]

    def reweigh(self, site: MatrixSite, evidence: Evidence, mask: Tensor) -> Tensor | None:
        """Least squares on survivors that were decided elsewhere. ADMM and ALPS end in iterations of their own, so
        their replays are solved exactly instead and have other values than the run."""
        return self.refitted(site, evidence, mask, min(self.damping, 0.01))

    def refitted(self, site: MatrixSite, evidence: Evidence, mask: Tensor, damping: float) -> Tensor:
        """The survivors' best values with this damping."""
        if bool(mask.all()):
            return site.weight
        layer = Layer.of([site], [evidence], [0])
        if layer.silent:
            return site.weight.masked_fill(~mask.to(site.weight.device), 0)
        return refit(layer.gram, layer.weights[0], mask.to(site.weight.device), damping)


def together(sites: Sequence[MatrixSite], evidence: Sequence[Evidence], members: Sequence[int]) -> list[list[int]]:
    """These matrices, those that read the same input in one list."""
    shared: dict[tuple[int, int], list[int]] = {}
    for at in members:
        shared.setdefault((id(evidence[at][Gram]), sites[at].weight.shape[1]), []).append(at)
    return list(shared.values())


ROWS: Mapping[str, float] = MappingProxyType({"even": 0.0, "root": 0.5, "fisher": 1.0})  # power of the information
FAINTEST = 1e-4  # least information of a row, as a share of the mean over rows


def row_scale(evidence: Evidence, rows: str) -> Tensor:
    """What a matrix's rows are multiplied by so that squared errors count as the model's answers feel them: [out, 1].

        (F_r / mean of F) ^ (power / 2),    F_r a row's Fisher information; power 1 for ``fisher``, 1/2 for ``root``

    The Fisher information tells of small errors. The queries of a head that rests on one token have hardly any, since
    their softmax is saturated; when all of them go the head looks everywhere, and the layers behind it fail. The root,
    half way to rows that count alike, keeps such a head, and is better where nothing fails, too (docs/decisions.md).
    """
    information = evidence[Fisher].rows
    mean = float(information.mean())
    if not (isfinite(mean) and mean > 0):  # nothing reaches the loss (an expert that was never chosen)
        return torch.ones(len(information), 1)
    return (information / mean).clamp_min_(FAINTEST).pow_(ROWS[rows] / 2).unsqueeze(1)


def _times(site: MatrixSite, scale: Tensor | None) -> MatrixSite:
    return site if scale is None else replace(site, weight=site.weight.float() * scale.to(site.weight.device))


def needs_of(rows: str) -> tuple[type[Probe], ...]:
    """The statistics of a method whose rows count so.

    Raises:
        SecateurError: an unknown way.
    """
    if rows not in ROWS:
        raise unknown("way to count rows", rows, ROWS)
    return (Gram, Fisher) if ROWS[rows] else (Gram,)


def check_count(grain: Grain, shape: tuple[int, ...], count: int) -> None:
    """Refuse a count that this grain cannot keep, before anything heavy."""
    fixed = getattr(grain, "n", None)
    if fixed is not None and count != grain.groups(shape) * fixed:
        raise SecateurError(f"{grain} fixes how many stay", received=count, works="leave keep out")
    if not 0 <= count <= grain.units(shape):
        raise SecateurError(
            f"cannot keep {count} of {grain.units(shape)}",
            received=count,
            works=f"a count from 0 to {grain.units(shape)}",
        )


def check_damping(damping: float, least: float = 0.0) -> None:
    """Refuse a damping that makes no sense."""
    if not least <= damping < 1e6:
        raise SecateurError(
            "damping must not be negative" if least == 0 else f"damping must be at least {least:g}",
            received=damping,
            works="damping: 0.01",
        )


def check_steps(name: str, value: int, least: int = 0) -> None:
    """Refuse a number of rounds that is too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SecateurError(f"{name} is a whole number from {least}", received=value, works=f"{name}: {max(least, 10)}")
