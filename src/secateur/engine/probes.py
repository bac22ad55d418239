"""What accumulates into evidence: statistics gathered while calibration text passes through one block.

Every statistic is a sum over tokens: per-batch results are added in fp64, so that the text can
be split over processes and all-reduced, and two processes see what one would up to rounding.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from secateur.errors import SecateurError

Kind = Literal["input", "weighted", "paired", "positions", "block", "router", "gradient", "local"]


class Probe(ABC):
    """One statistic. ``kind`` says what it listens to:

    - ``input``: the input x [tokens, in] of a matrix (``update(x, gate)``; ``gate`` [tokens] is the router's
      weight of each token for experts' matrices, None elsewhere);
    - ``weighted``: the same, and the matrix itself is handed over (``update(x, gate, weight)``);
    - ``paired``: the same, and what the dense model has at the same place for the same tokens (``update(x, gate,
      dense)``); only walks that carry both streams gather it;
    - ``positions``: the input with its positions, x [batch, length, in] (experts: [1, tokens, in]);
    - ``block``: the hidden states before and after the block (``update(before, after)`` [tokens, hidden]);
    - ``router``: router weights [tokens, experts], zero where not routed;
    - ``gradient``: the gradient of the whole model's loss on one window (``update(grad, weight)``, [out, in]);
    - ``local``: the same of what the block alone gives, on one batch.
    """

    kind: ClassVar[Kind]
    beside: ClassVar[type[Probe] | None] = None  # the paired statistic that fits use with this one
    sums: dict[str, Tensor]

    def __init__(self) -> None:
        self.sums = {}

    update: Callable[..., None]  # add one batch; what it is given depends on ``kind``

    def add(self, name: str, value: Tensor) -> None:
        """Add a batch's sum, in fp64."""
        value = value.double()
        if name not in self.sums:
            self.sums[name] = value.clone()
        else:
            self.sums[name] += value

    @classmethod
    def bytes(cls, rows: int, columns: int, length: int) -> int:
        """Memory of the statistic for one [rows, columns] matrix and windows of ``length`` (for the dry run)."""
        return 8 * columns


P = TypeVar("P", bound=Probe)


class Evidence(Mapping[type[Probe], Probe]):
    """The statistics of one site, by probe class."""

    def __init__(self, site: str, probes: Mapping[type[Probe], Probe] | None = None) -> None:
        self.site, self._probes = site, dict(probes or {})

    def __getitem__(self, probe: type[P]) -> P:
        if probe not in self._probes:
            raise SecateurError(
                f"no {probe.__name__} evidence was gathered at {self.site}",
                works=f"list {probe.__name__} in the method's `needs`",
            )
        return self._probes[probe]  # type: ignore[return-value]

    def __contains__(self, probe: object) -> bool:
        return probe in self._probes

    def __iter__(self) -> Iterator[type[Probe]]:
        return iter(self._probes)

    def __len__(self) -> int:
        return len(self._probes)


class InputNorm(Probe):
    """Root of the sum of squares of each input channel: ``norm`` [in]; router-weighted where a gate is given."""

    kind = "input"

    def update(self, x: Tensor, gate: Tensor | None = None) -> None:
        x = x.float()
        if gate is not None:
            x = x * gate.float().unsqueeze(-1)
        self.add("square", (x * x).sum(0))

    @property
    def norm(self) -> Tensor:
        """sqrt(sum over tokens of x^2), fp32 [in]."""
        return self.sums["square"].sqrt().float()


class DenseMean(Probe):
    """Mean of the dense model's input at a matrix (or of what lies a share of the way to it, see `WalkSettings.aim`),
    over the tokens that reach the matrix in the pruned one."""

    kind = "paired"

    def update(self, x: Tensor, gate: Tensor | None, dense: Tensor) -> None:
        self.add("count", torch.tensor(float(len(dense)), device=dense.device))
        self.add("sum", dense.double().sum(0))

    @property
    def mean(self) -> Tensor:
        """fp32 [in]."""
        return (self.sums["sum"] / self.sums["count"].clamp_min(1)).float()


class InputMoments(Probe):
    """Mean and variance of each input channel."""

    kind = "input"
    beside = DenseMean

    def update(self, x: Tensor, gate: Tensor | None = None) -> None:
        x = x.double()
        self.add("count", torch.tensor(float(len(x)), device=x.device))
        self.add("sum", x.sum(0))
        self.add("square", (x * x).sum(0))

    @property
    def mean(self) -> Tensor:
        """fp32 [in]."""
        return (self.sums["sum"] / self.sums["count"].clamp_min(1)).float()

    @property
    def variance(self) -> Tensor:
        """Population variance, fp32 [in]."""
        n = self.sums["count"].clamp_min(1)
        return (self.sums["square"] / n - (self.sums["sum"] / n) ** 2).clamp_min(0).float()


class CrossGram(Probe):
    """X^T X_dense: the pruned model's inputs against the dense model's (or what lies a share of the way to these, see
    `WalkSettings.aim`), ``cross`` [in, in]."""

    kind = "paired"

    def update(self, x: Tensor, gate: Tensor | None, dense: Tensor) -> None:
        self.add("cross", x.float().T @ dense.float())

    @property
    def cross(self) -> Tensor:
        """Sum over tokens of x x_dense^T, fp32 [in, in]; not symmetric."""
        return self.sums["cross"].float()

    @classmethod
    def bytes(cls, rows: int, columns: int, length: int) -> int:
        return 8 * columns * columns


class Gram(Probe):
    """X^T X of the inputs: ``gram`` [in, in]. Only the upper block triangle is multiplied out."""

    kind = "input"
    beside = CrossGram
    tile: ClassVar[int] = 384

    def update(self, x: Tensor, gate: Tensor | None = None) -> None:
        x = x.float()
        n = x.shape[-1]
        if "gram" not in self.sums:
            self.sums["gram"] = torch.zeros(n, n, dtype=torch.float64, device=x.device)
            self.sums["count"] = torch.zeros((), dtype=torch.float64, device=x.device)
        total = self.sums["gram"]
        for at in range(0, n, self.tile):
            end = min(at + self.tile, n)
            total[at:end, at:] += x[:, at:end].T @ x[:, at:]
        self.sums["count"] += len(x)

    @property
    def gram(self) -> Tensor:
        """Sum over tokens of x x^T, fp32 [in, in], symmetric."""
        gram = self.sums["gram"].float().triu_()
        return gram.add_(gram.triu(1).T)

    @classmethod
    def bytes(cls, rows: int, columns: int, length: int) -> int:
        return 8 * columns * columns


class Contribution(Probe):
    """Mean share of |x_j w_ij| in its output's sum of contributions: ``share`` [out, in] (M14)."""

    kind = "weighted"

    def update(self, x: Tensor, gate: Tensor | None, weight: Tensor) -> None:
        a, w = x.float().abs(), weight.float().abs()
        total = a @ w.T  # [tokens, out]
        inverse = torch.where(total > 0, 1 / total, torch.zeros_like(total))
        self.add("share", w * (inverse.T @ a))
        self.add("count", torch.tensor(float(len(x)), device=x.device))

    @property
    def share(self) -> Tensor:
        return (self.sums["share"] / self.sums["count"].clamp_min(1)).float()

    @classmethod
    def bytes(cls, rows: int, columns: int, length: int) -> int:
        return 8 * rows * columns


class PositionSquares(Probe):
    """Sum over windows of x^2 at each position: ``square`` [length, in] (Minitron's L2 over the batch)."""

    kind = "positions"

    def update(self, x: Tensor) -> None:
        x = x.float()
        self.add("square", (x * x).sum(0))

    @property
    def square(self) -> Tensor:
        return self.sums["square"].float()

    @classmethod
    def bytes(cls, rows: int, columns: int, length: int) -> int:
        return 8 * columns * length


class Cosine(Probe):
    """Mean cosine of a block's input and output hidden states (block influence is 1 - that)."""

    kind = "block"

    def update(self, before: Tensor, after: Tensor) -> None:
        cos = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        self.add("cosine", cos.double().sum())
        self.add("count", torch.tensor(float(cos.numel()), device=cos.device))

    @property
    def cosine(self) -> float:
        return float(self.sums["cosine"] / self.sums["count"])

    @classmethod
    def bytes(cls, rows: int, columns: int, length: int) -> int:
        return 16


class BlockOutput(Probe):
    """Norm of what a block adds to the residual stream at a token, summed over tokens; ``mean_norm`` is their mean."""

    kind = "block"

    def update(self, before: Tensor, after: Tensor) -> None:
        self.add("norm", (after.float() - before.float()).norm(dim=-1).double().sum())
        self.add("count", torch.tensor(float(before[..., 0].numel()), device=before.device))

    @property
    def mean_norm(self) -> float:
        return float(self.sums["norm"] / self.sums["count"])


class RouterMass(Probe):
    """Sum of the router's weights given to each expert: ``mass`` [experts]."""

    kind = "router"

    def update(self, weights: Tensor) -> None:
        self.add("mass", weights.float().sum(0))

    @property
    def mass(self) -> Tensor:
        return self.sums["mass"].float()


class Gradient(Probe):
    """Gradient of the language-model loss, summed over windows: ``gradient`` [out, in]. Needs the whole model
    (`engine.gradients`); ``update`` is for what is summed by batches, as `LocalGradient`."""

    kind: ClassVar[Kind] = "gradient"

    def update(self, grad: Tensor, weight: Tensor) -> None:
        self.add("gradient", grad)
        self.add("batches", torch.tensor(1.0, device=grad.device))

    @property
    def gradient(self) -> Tensor:
        """Mean over what was summed (windows, or batches), fp32 [out, in]."""
        return (self.sums["gradient"] / self.sums["batches"]).float()

    @classmethod
    def bytes(cls, rows: int, columns: int, length: int) -> int:
        return 8 * rows * columns


class LocalGradient(Gradient):
    """Gradient of the L2 norm of the block's own output, so that nothing but the block is needed (the regional
    gradient of Wanda++, arXiv 2503.04992, section 3.2; from the abstract and our reading, not their code)."""

    kind = "local"


class Fisher(Probe):
    """Diagonal of the Fisher information per token, by its margins: ``rows`` [out] and ``columns`` [in].

    The diagonal is what squared gradients of log p(token) come to on average, with tokens drawn from the model's
    own answer; half of it times w^2 is, to second order, what dropping w adds to the KL divergence, in nats per token.
    As a product of its margins it takes out + in numbers a matrix, and averages over many weights what few windows
    tell of each. Needs the whole model (`engine.fisher`). ``update(grad, weight)``: the gradient of one window's summed
    loss; ``tokens`` counts them.
    """

    kind = "gradient"

    def update(self, grad: Tensor, weight: Tensor, tokens: int = 1) -> None:
        square = grad.float().square()
        self.add("rows", square.sum(1))
        self.add("columns", square.sum(0))
        self.add("tokens", torch.tensor(float(tokens), device=grad.device))

    @property
    def rows(self) -> Tensor:
        """Sum of the diagonal over each row, fp32 [out]."""
        return (self.sums["rows"] / self.sums["tokens"].clamp_min(1)).float()

    @property
    def diagonal(self) -> Tensor:
        """rows x columns / total, fp32 [out, in]."""
        rows, columns = self.sums["rows"], self.sums["columns"]
        total = rows.sum() * self.sums["tokens"].clamp_min(1)
        return (rows.unsqueeze(1) * columns / total.clamp_min(torch.finfo(torch.float64).tiny)).float()

    @classmethod
    def bytes(cls, rows: int, columns: int, length: int) -> int:
        return 8 * (rows + columns)


def walked(needs: Iterable[type[Probe]]) -> tuple[type[Probe], ...]:
    """Those that are gathered while blocks are walked; the others need the whole model."""
    return tuple(p for p in needs if p.kind != "gradient")


def paired(needs: Iterable[type[Probe]]) -> tuple[type[Probe], ...]:
    """These probes, and the paired statistic of each that has one."""
    return tuple(dict.fromkeys(q for p in needs for q in (p, p.beside) if q is not None))
