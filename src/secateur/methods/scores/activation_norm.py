"""Activation norm: a neuron, head, expert or layer matters by how loud it is.

    neuron, head     S_u = mean over positions of sqrt(sum over windows and the unit's channels of h^2)
    expert           S_e = sqrt(sum over tokens and neurons of (g h)^2)     g the router's weight of the token
    layer            S_l = mean over tokens of ||x_out - x_in||_2

h is the input of the matrix that reads the units (``down_proj``, ``o_proj``). Source: Muralidharan et al. 2024
(Minitron), arXiv 2407.14679, importance of the width axes, L2 over the batch and mean over the sequence. Experts
and layers are not in the paper; their form here is a design choice in the same spirit. Routing loses positions, so
inside an expert (for its neurons too) the norm is over all tokens that come to it, router-weighted.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from secateur.anatomy.types import Port
from secateur.engine.probes import BlockOutput, PositionSquares
from secateur.errors import SecateurError
from secateur.methods.base import MatrixSite, UnitScore, UnitSite


@dataclass(frozen=True)
class ActivationNorm(UnitScore):
    """L2 norm of a unit's activations over windows, mean over positions."""

    needs = (PositionSquares, BlockOutput)
    needs_in = MappingProxyType(
        {"layer": (BlockOutput,), **dict.fromkeys(("ffn", "kv_group", "head", "expert"), (PositionSquares,))}
    )

    def units(self, site: UnitSite) -> Tensor:
        if site.space.name == "layer":
            return torch.tensor([site.block_evidence[BlockOutput].mean_norm])
        if site.space.name == "expert":
            return self._experts(site)
        ports = [p for p in site.space.ports if p.role == "read" and p.tensor in site.matrices]
        if not ports:
            raise SecateurError(
                f"no matrix reads the units of {site.space.name!r}", works="--score magnitude or another score"
            )
        return torch.stack([self._read(site, port) for port in ports]).sum(0)

    def _read(self, site: UnitSite, port: Port) -> Tensor:
        """Norms of the units as one port reads them, in the space's shape."""
        space, rows = site.space, []
        matrices = site.matrices[port.tensor]
        stacked = port.copy_axis is not None
        for copy in range(space.copies):
            square = self._square(site, matrices[copy if stacked else 0])
            at = port.entries(torch.arange(space.size), copy)
            of_units = square[:, at].reshape(len(square), space.size, port.width).sum(-1)
            rows.append(of_units.sqrt().mean(0))
        return torch.stack(rows).reshape(space.shape)

    def _experts(self, site: UnitSite) -> Tensor:
        """Norm of what each expert's last matrix reads."""
        down = next((m for t, m in site.matrices.items() if t.rpartition(".")[2].startswith("down")), None)
        if down is None:
            raise SecateurError(
                "these experts have no down_proj to listen to",
                received=", ".join(site.matrices),
                works="--score magnitude or router_mass",
            )
        return torch.stack([self._square(site, m).double().sum().sqrt() for m in down]).float()

    def _square(self, site: UnitSite, matrix: MatrixSite) -> Tensor:
        return site.evidence[matrix.name][PositionSquares].square.cpu()  # [positions, in]
