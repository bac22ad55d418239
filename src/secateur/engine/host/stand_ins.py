"""Modules put in the place of a host's own: which may be replaced, and a stack of experts made of single matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.engine.host.experts import is_experts

LINEAR = ("FalconLinear",)  # subclasses of nn.Linear that compute the same


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b and nothing else."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ in LINEAR


def takes_single_matrices(module: nn.Module) -> bool:
    """Whether a stack of experts can run as `SingleExperts`."""
    return is_experts(module)


class SingleExperts(nn.Module):
    """A host's stack of experts whose matrices are modules, one per expert.

    Args:
        host: the stack; it keeps its gate, biases and norms and gives up the parameters that ``matrices`` replaces.
        matrices: by parameter name, a module for each expert that maps [tokens, in] to [tokens, out].
    """

    def __init__(self, host: nn.Module, matrices: Mapping[str, Sequence[nn.Module]]) -> None:
        super().__init__()
        for name in matrices:
            del host._parameters[name]
        self.host: Any = host
        self.matrices = nn.ModuleDict({name: nn.ModuleList(modules) for name, modules in matrices.items()})
        self.num_experts = len(next(iter(matrices.values())))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the host's own forward gives: each token through its experts, weighted by the router."""
        host, shape = self.host, hidden_states.shape
        hidden = hidden_states.reshape(-1, shape[-1])
        index, gates = top_k_index.reshape(len(hidden), -1), top_k_weights.reshape(len(hidden), -1)
        out = torch.zeros_like(hidden)
        first = next(name for name in self.matrices if name != "down_proj")
        for expert in index.unique().tolist():
            if expert >= self.num_experts:  # how a router says that no expert is meant
                continue
            token, slot = torch.where(index == expert)
            h = self._product(first, expert, hidden[token])
            h = host._apply_gate(h) if getattr(host, "has_gate", True) else host.act_fn(h)
            y = self._product("down_proj", expert, h)
            if getattr(host, "has_post_expert_norm", False):
                y = host.post_expert_norm(y)
            out.index_add_(0, token, (y * gates[token, slot].unsqueeze(-1)).to(out.dtype))
        return out.reshape(shape)

    def _product(self, name: str, expert: int, x: Tensor) -> Tensor:
        matrix: Any = self.matrices[name]
        y: Tensor = matrix[expert](x)
        bias = getattr(self.host, f"{name}_bias", None)
        return y if bias is None else y + bias[expert]
