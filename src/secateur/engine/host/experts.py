"""Listening inside a stack of experts: Transformers keeps them in 3-D parameters, with no module per expert.

For the time of a forward the experts module's ``forward`` is replaced on the instance by the same computation
expert by expert, which reports each matrix's input and the router's weight of every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError

Heard = Callable[[str, int, Tensor, Tensor, Tensor | None], None]
"""(parameter name, expert, input [tokens, in], router weight [tokens], the other stream's input of these tokens)."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a stack of experts that can be listened to."""
    return hasattr(module, "_apply_gate") and hasattr(module, "down_proj") and hasattr(module, "num_experts")


@contextmanager
def listening(
    module: nn.Module,
    heard: Heard,
    routed: Callable[[Tensor], None] | None = None,
    beside: Callable[[], Tensor | None] = lambda: None,
) -> Iterator[None]:
    """Report every expert matrix's input while the context is open.

    Args:
        module: the experts module (``gate_up_proj`` or ``up_proj``, and ``down_proj``, each [experts, ., .]).
        heard: called once per expert that got tokens and matrix.
        routed: called with the router's weights [tokens, experts], zero where not routed.
        beside: asked at every forward for what another stream has in the place of this one's hidden states. An
            expert's tokens then pass through it twice, whether or not the other stream's router chose it for them.
    """
    if not is_experts(module):
        raise SecateurError(
            f"experts of class {type(module).__name__} cannot be listened to",
            works="use a score that needs no activations (magnitude, random) on this family",
        )
    first = _first(module)

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        shape = hidden_states.shape
        hidden = hidden_states.reshape(-1, shape[-1])
        index, gates = top_k_index.reshape(len(hidden), -1), top_k_weights.reshape(len(hidden), -1)
        if routed is not None:
            mass = torch.zeros(len(hidden), self.num_experts, dtype=torch.float32, device=hidden.device)
            routed(mass.scatter_add_(1, index.clamp_max(self.num_experts - 1), gates.float()))
        other = beside()
        other = None if other is None else other.reshape(hidden.shape)
        out = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, slot = torch.where(index == expert)
            if len(token) == 0:
                continue
            x, gate, z = hidden[token], gates[token, slot], None if other is None else other[token]
            heard(first, expert, x, gate, z)
            h, z = _between(self, expert, x), None if z is None else _between(self, expert, z)
            heard("down_proj", expert, h, gate, z)
            y = _multiply(self, "down_proj", expert, h)
            if getattr(self, "has_post_expert_norm", False):
                y = self.post_expert_norm(y)
            out.index_add_(0, token, (y * gate.unsqueeze(-1)).to(out.dtype))
        return out.reshape(shape)

    module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        del module.__dict__["forward"]


def _first(module: nn.Module) -> str:
    return "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"


def _between(module: Any, expert: int, x: Tensor) -> Tensor:
    """What an expert's second matrix reads when its first reads x."""
    h = _multiply(module, _first(module), expert, x)
    return module._apply_gate(h) if getattr(module, "has_gate", True) else module.act_fn(h)


def _multiply(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    y = x @ (weight if getattr(module, "is_transposed", False) else weight.T)
    bias = getattr(module, f"{name}_bias", None)
    return y if bias is None else y + bias[expert]
