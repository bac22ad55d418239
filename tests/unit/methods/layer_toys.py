"""One random layer whose inputs are correlated and of very different size, as a method sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.engine.probes import Evidence, Gram, InputMoments, InputNorm
from secateur.methods.base import MatrixSite


def case(rows: int, columns: int, seed: int = 0, tokens: int = 4) -> tuple[Tensor, Tensor]:
    """Weights [rows, columns] and inputs [tokens * columns, columns]."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) @ torch.diag(torch.logspace(0, -1.5, columns))
    x = torch.randn(tokens * columns, columns, generator=g) @ mix.T + 0.5 * torch.randn(columns, generator=g)
    return torch.randn(rows, columns, generator=g), x


def site(weight: Tensor, name: str = "w") -> MatrixSite:
    return MatrixSite(name, weight, "ffn", 0, 1, torch.Generator())


def heard(x: Tensor) -> Evidence:
    """All statistics that these methods read."""
    probes = {Gram: Gram(), InputNorm: InputNorm(), InputMoments: InputMoments()}
    for probe in probes.values():
        probe.update(x)
    return Evidence("w", probes)


def error(weight: Tensor, new: Tensor, x: Tensor) -> float:
    """|X (w - w')|^2 over all rows, in fp64."""
    return float(((new.double() - weight.double()) @ x.double().T).square().sum())
