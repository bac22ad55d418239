"""Method, Score, UnitScore, Repair, Budget: the base classes of everything that decides what stays, and mends it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.anatomy.types import EMPTY, Component, Reduce, Role, Space
from secateur.engine.probes import Evidence, Probe


@dataclass(frozen=True)
class Amount:
    """How much stays: a share (exact decimal, 0 to 1) or a count per site. Exactly one is set."""

    share: Decimal | None = None
    count: int | None = None

    def of(self, n: int) -> int:
        """Units kept of ``n``: the count, or ``n * share`` rounded half up in exact decimal arithmetic."""
        if self.count is not None:
            return self.count
        assert self.share is not None
        return int((n * self.share).to_integral_value(rounding=ROUND_HALF_UP))


@dataclass
class MatrixSite:
    """One matrix as a method sees it.

    Attributes:
        name: full tensor name in memory, ``[e]`` appended for expert e.
        weight: fp32 [out, in], a view of the module's own: not to be written to; a joint method returns a new one.
        component: ``attention`` or ``ffn``.
        block, blocks: its block's index, and how many there are.
        generator: seeded from the recipe's seed and the site's name (for ``random``).
    """

    name: str
    weight: Tensor
    component: Component
    block: int
    blocks: int
    generator: torch.Generator


@dataclass
class UnitSite:
    """One space of one block as a method sees it.

    Attributes:
        name: the block's name (``model.layers.3``).
        space: the space (for ``layer``: a space of size 1 whose ports are empty).
        tensors: those the ports touch (for ``layer``: every matrix), fp32, stored shape; views, not to be written to.
        matrices: per 2-D/3-D tensor, its matrix sites (several for a stack of experts), in order.
        evidence: per matrix-site name, what probes gathered.
        block_evidence: what probes of the whole block gathered (cosine, router mass).
        transposed: tensors stored [in, out].
    """

    name: str
    space: Space
    tensors: Mapping[str, Tensor]
    matrices: Mapping[str, Sequence[MatrixSite]]
    evidence: Mapping[str, Evidence]
    block_evidence: Evidence
    transposed: frozenset[str]
    block: int
    blocks: int
    generator: torch.Generator


class Score(ABC):
    """Elementwise importance; higher means keep. Nine papers in ten need only this.

    Attributes:
        needs: probes whose statistics ``score`` reads.
        reduce, roles: how the score folds onto units (activation-made scores over ``read`` ports only).
    """

    needs: ClassVar[tuple[type[Probe], ...]] = ()
    reduce: ClassVar[Reduce] = "sum"
    roles: ClassVar[tuple[Role, ...]] = ("write", "read")

    @abstractmethod
    def score(self, site: MatrixSite, evidence: Evidence) -> Tensor:
        """Importance of every weight: fp32 [out, in]."""

    def units(self, site: UnitSite) -> Tensor:
        """Importance of every unit of a space (``site.space.shape``), by folding the elementwise scores.

        Where no port has one of the score's roles (a whole expert reads and writes), all ports count; a layer
        (no ports) is the sum of everything in it.
        """
        ports = [p for p in site.space.ports if p.tensor in site.matrices]
        roles = self.roles if any(p.role in self.roles for p in ports) else ("write", "read")
        touched = {p.tensor for p in ports if p.role in roles} if site.space.ports else set(site.matrices)
        folded: dict[str, Tensor] = {}
        for tensor, matrices in site.matrices.items():
            if tensor in touched:
                parts = [self.score(m, site.evidence[m.name]) for m in matrices]
                if tensor in site.transposed:
                    parts = [p.T for p in parts]
                folded[tensor] = torch.stack(parts) if site.tensors[tensor].dim() == 3 else parts[0]
        if not site.space.ports:
            total = torch.stack([s.double().sum() for s in folded.values()]).sum()
            return (total.abs() if self.reduce == "abs_sum" else total).reshape(1).float()
        return site.space.fold(folded, self.reduce, roles)


class UnitScore(ABC):
    """Importance of whole units, ranked directly (block influence, activation norm)."""

    needs: ClassVar[tuple[type[Probe], ...]] = ()
    needs_in: ClassVar[Mapping[str, tuple[type[Probe], ...]]] = EMPTY  # by space, where not all of these
    spaces: ClassVar[tuple[str, ...]] = ()  # empty: any space

    @abstractmethod
    def units(self, site: UnitSite) -> Tensor:
        """Importance of every unit: fp32 of ``site.space.shape``; higher means keep."""


@dataclass
class Keep:
    """A decision for one site: booleans (True is kept) and, from joint methods, the survivors' new values."""

    mask: Tensor
    weight: Tensor | None = None


class Method(ABC):
    """Chooses and may change weights in one sweep over a matrix."""

    needs: ClassVar[tuple[type[Probe], ...]] = ()

    @abstractmethod
    def prune(self, site: MatrixSite, evidence: Evidence, count: int) -> Keep:
        """Keep exactly ``count`` grain units of the matrix (elements, tiles; n:m fixes its own count)."""

    def prune_many(
        self, sites: Sequence[MatrixSite], evidence: Sequence[Evidence], counts: Sequence[int]
    ) -> list[Keep]:
        """`prune` for all matrices of a block; a method may share work between those that read the same input."""
        return [self.prune(s, e, n) for s, e, n in zip(sites, evidence, counts, strict=True)]

    def reweigh(self, site: MatrixSite, evidence: Evidence, mask: Tensor) -> Tensor | None:
        """The survivors' values [out, in] for a mask that was decided elsewhere (a plan that is replayed);
        None from methods that leave weights as they are."""
        return None

    def reweigh_many(
        self, sites: Sequence[MatrixSite], evidence: Sequence[Evidence], masks: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """`reweigh` for all matrices of a block: sweeps and swaps by the same arithmetic as `prune_many`, so that the
        run's values come again; survivors of ADMM and ALPS are solved exactly, not as in the run."""
        return [self.reweigh(s, e, m) for s, e, m in zip(sites, evidence, masks, strict=True)]


@dataclass
class Mended:
    """A repair's answer for one matrix; None leaves as it is.

    Attributes:
        weight: the survivors' values [out, in], zero where they are not kept.
        bias: what is added to the bias [out].
    """

    weight: Tensor | None = None
    bias: Tensor | None = None


class Repair(ABC):  # noqa: B024 - what it is handed depends on which of the two it is
    """Mends what stays, after any choice of what that is. Sites that keep everything are never handed to it.

    A repair is a `MatrixRepair` (one matrix at a time, from sums) or a `PartRepair` (a sub-layer at a time, from the
    activations themselves).

    Attributes:
        needs: probes whose statistics it reads.
        biases: it writes biases, so the matrices must have some.
        spaces: where it has a meaning.
    """

    needs: ClassVar[tuple[type[Probe], ...]] = ()
    biases: ClassVar[bool] = False
    spaces: ClassVar[tuple[str, ...]] = ("weight", "ffn", "kv_group", "head")


class MatrixRepair(Repair):
    """Mends matrices one by one: those that were pruned, or the ones that read a space of units."""

    @abstractmethod
    def mend(self, site: MatrixSite, evidence: Evidence, keep: Keep) -> Mended:
        """The repair of one matrix.

        Args:
            site: the matrix before anything was pruned.
            evidence: what ``needs`` gathered at it, with the paired statistics where both streams were walked.
            keep: what stays [out, in], and the survivors' values where a joint method changed them already.
        """

    def mend_many(
        self, sites: Sequence[MatrixSite], evidence: Sequence[Evidence], keeps: Sequence[Keep]
    ) -> list[Mended]:
        """`mend` for several matrices of a block; a repair may share work between those that read the same input."""
        return [self.mend(s, e, k) for s, e, k in zip(sites, evidence, keeps, strict=True)]


@dataclass
class Part:
    """A sub-layer (or a whole block) that was pruned, as a repair by its activations sees it.

    Attributes:
        name: the block's name and the sub-layer's (``model.layers.3.self_attn``).
        weights: the tensors that may change, in place and only where the booleans say that something stays.
        keeps: per tensor, booleans of its shape.
        examples: how many inputs there are, one window each; ``output(i)`` runs the sub-layer on one of them as it is
            now (with gradients if they are on) and ``target(i)`` is what it should answer, both [1, length, hidden].
        generator: seeded from the recipe's seed and the name.
    """

    name: str
    weights: Mapping[str, Tensor]
    keeps: Mapping[str, Tensor]
    examples: int
    output: Callable[[int], Tensor]
    target: Callable[[int], Tensor]
    generator: torch.Generator


class PartRepair(Repair):
    """Mends a sub-layer at a time so that it answers as the dense one did, or a whole block.

    Attributes:
        whole: the parts are whole blocks, and should answer as the dense model's do on its own activations.
    """

    whole: ClassVar[bool] = False

    @abstractmethod
    def fit(self, part: Part) -> tuple[float, float]:
        """Change the part's weights in place; returns the error before and after."""


@dataclass(frozen=True)
class SiteInfo:
    """What a budget knows of a site before weights are read.

    Attributes:
        name, kind: full name; the name without block index (its class in M4's sense is the site itself).
        component: ``attention`` | ``ffn`` | ``other``.
        units: number of grain units that compete (elements, tiles, space units over all copies).
        cost: parameters per unit.
        groups: counts must be a multiple of this (rows for the row grain, copies for a copied space).
    """

    name: str
    kind: str
    component: Component
    block: int
    blocks: int
    units: int
    cost: float = 1.0
    groups: int = 1
    minimum: int = 0


class Budget(ABC):
    """How many units stay at each site.

    A budget that ``surveys`` sees every site's scores on the dense model first (`observe` returns a small
    summary, never the scores), and then allots counts that add up to the same total as uniform would. One that
    ``searches`` says where the search begins.
    """

    surveys: ClassVar[bool] = False
    searches: ClassVar[bool] = False  # counts are found by trying out whole models
    ranking: ClassVar[type[Score] | None] = None  # score to survey by; None: the step's own

    def observe(self, site: SiteInfo, scores: Tensor) -> Any:
        """A small summary of one site's scores."""
        return None

    @abstractmethod
    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        """Grain units kept per site name; totals are exact."""
