"""Gradients of the language-model loss with respect to every prunable matrix: the whole model, one backward a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from secateur.anatomy.types import Anatomy
from secateur.engine.distribute import World
from secateur.engine.ear import site_name
from secateur.engine.probes import Gradient, Probe
from secateur.engine.store import Store
from secateur.errors import SecateurError


def gradients(
    store: Store,
    anatomy: Anatomy,
    batches: Sequence[Tensor],
    world: World,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Probe]:
    """Sum over batches of d loss / d W for each matrix, by site name.

    The model is loaded whole in fp32 and let go again; one window at a time goes through it, and of a block only
    its input is kept for the way back. The loss is the mean next-token cross-entropy of a window.

    Raises:
        SecateurError: the model has no language-model loss (a plain encoder).
    """
    model: Any = store.skeleton()
    store.load_whole(model)
    model.requires_grad_(False)
    for block in model.get_submodule(anatomy.path):
        # not the host's own checkpointing: it asks for training mode, and then some blocks drop out
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    weights = {}
    for block in anatomy.blocks:
        for m in block.matrices:
            weights[block.index, m] = model.get_submodule(block.name).get_parameter(m.tensor).requires_grad_(True)
    windows = [w for batch in world.mine(batches) for w in batch]
    for done, window in enumerate(windows, 1):
        ids = window.unsqueeze(0)
        out = model(input_ids=ids, use_cache=False)
        if getattr(out, "logits", None) is None:
            raise SecateurError(
                f"{type(model).__name__} has no language-model loss to differentiate",
                works="use a score that needs no gradient (wanda, magnitude)",
            )
        shift = int(getattr(model.config, "is_decoder", True) is not False)
        logits = out.logits[0, : ids.shape[1] - shift].float()
        torch.nn.functional.cross_entropy(logits, ids[0, shift:]).backward()
        tick(done, len(windows))
    probes: dict[str, Probe] = {}
    for (index, m), weight in weights.items():
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        for e in range(m.experts) if m.experts else [None]:
            probe = Gradient()
            probe.sums = {
                "gradient": m.view(grad, e or 0).contiguous(),
                "batches": torch.tensor(float(len(windows)), dtype=torch.float64),
            }
            probes[site_name(anatomy.blocks[index], m.tensor, e)] = probe
        weight.requires_grad_(False)
        weight.grad = None
    world.add_up(probes[name] for name in sorted(probes))
    return probes
