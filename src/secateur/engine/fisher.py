"""The Fisher information of every prunable matrix, block by block: what errors in it cost the model's answers.

    F_ij = mean over tokens of  E over y ~ p of  (d log p(y) / d w_ij)^2,      p the model's own answer

Half of F_ij w_ij^2 is, to second order and each weight alone, the KL divergence to the model as it is that dropping
w_ij brings. One token is drawn per position; draws are independent, so the squared gradient of a window's summed loss
has that mean, too, and a window takes one backward pass. A few windows are enough: `Fisher` keeps margins only.

Gradients go through the model backwards as text goes through it forwards, one block in memory at a time: the hidden
states in front of every block are kept on the way there.

Source: Theis et al. 2018, arXiv 1801.05787 (Fisher pruning). Deviations: tokens are drawn from the model, not read from
the text (the empirical Fisher, which measures gradients' noise where the model is wrong).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.anatomy.types import Anatomy, Block
from secateur.engine.distribute import seeded
from secateur.engine.ear import site_name
from secateur.engine.host.capture import capture, finish, hidden_of, move_call, run_block
from secateur.engine.probes import Fisher, Probe
from secateur.engine.walk import Activations, Source, WalkSettings, multiplies_bf16, products_in
from secateur.errors import SecateurError

FISHER_WINDOWS = 8  # of the calibration text, evenly spaced


def fisher(
    model: Any, anatomy: Anatomy, source: Source, batches: Sequence[Tensor], how: WalkSettings, seed: int = 0
) -> dict[str, Probe]:
    """`Fisher` of each matrix, by site name, from `FISHER_WINDOWS` windows of the text.

    Args:
        model: a skeleton whose embedding, norms and head are real; blocks are loaded by ``source`` one at a time.
        anatomy: of this model.
        batches: all processes' token ids [batch, length].
        how: device, spill, world and tick count, as for a walk; tick is told of blocks, passed there and back.
        seed: the recipe's; tokens are drawn by it and the window's number.

    Raises:
        SecateurError: the model gives no probabilities of tokens (a plain encoder).
    """
    device, spill = how.device, how.spill
    dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32  # it only weighs errors
    every = [window for batch in batches for window in batch]
    mine = how.world.mine(
        [(at, every[at].unsqueeze(0)) for at in range(0, len(every), -(-len(every) // FISHER_WINDOWS))]
    )
    model.requires_grad_(False)
    captured = capture(model, anatomy.path, [ids for _, ids in mine])
    blocks = model.get_submodule(anatomy.path)
    fronts = [Activations(spill and spill / f"front-{i:05d}") for i in range(len(anatomy.blocks))]
    ends: list[Tensor] = captured.inputs

    def run(index: int, b: int, x: Tensor) -> Tensor:
        with products_in(dtype, device):
            return hidden_of(run_block(blocks[index], x, move_call(captured.calls[b][index], device)))

    try:
        for i, front in enumerate(fronts):
            source.load_block(model, i, device)
            with torch.no_grad():
                for b, x in enumerate(ends):
                    front.append(x)
                    ends[b] = run(i, b, x.to(device)).cpu()
            source.release_block(model, i)
            how.tick(1)
        slopes = [
            _slope(model, anatomy.path, ids, x, seeded(seed, "fisher", str(at)))
            for (at, ids), x in zip(mine, ends, strict=True)
        ]
        ends.clear()
        probes: dict[str, Probe] = {}
        for i in reversed(range(len(fronts))):
            source.load_block(model, i, device)
            blocks[i].requires_grad_(False)
            own = _start(anatomy.blocks[i], probes)
            weights = [blocks[i].get_parameter(m.tensor).requires_grad_(True) for m in anatomy.blocks[i].matrices]
            for b in range(len(mine)):
                x = fronts[i][b].to(device).requires_grad_(True)
                with torch.enable_grad():
                    grads = torch.autograd.grad(run(i, b, x), [x, *weights], slopes[b].to(device), allow_unused=True)
                slopes[b] = grads[0].cpu()
                _update(anatomy.blocks[i], own, weights, grads[1:], x.shape[1])
            for weight in weights:
                weight.requires_grad_(False)
            source.release_block(model, i)
            fronts[i].clear()
            how.tick(1)
    finally:
        for front in fronts:
            front.clear()
    how.world.add_up(probes[name] for name in sorted(probes))
    return probes


def _slope(model: Any, path: str, ids: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of a window's summed loss with respect to what leaves the last block, on tokens that are drawn."""
    hidden = hidden.requires_grad_(True)
    with torch.enable_grad():
        logits = getattr(finish(model, path, ids, hidden), "logits", None)
        if logits is None:
            raise SecateurError(
                f"{type(model).__name__} gives no probabilities of tokens, so it has no Fisher information",
                works="what needs none: score wanda or magnitude, method alps, budget atp or uniform",
            )
        logits = logits[0].float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, drawn, reduction="sum"), hidden)
    return slope


def _start(block: Block, probes: dict[str, Probe]) -> dict[str, Fisher]:
    """Probes of a block's matrices, all zero: an expert that no token reaches has sums, too."""
    own: dict[str, Fisher] = {}
    for m in block.matrices:
        for e in range(m.experts) if m.experts else [None]:
            probe = own[site_name(block, m.tensor, e)] = Fisher()
            probe.update(torch.zeros(m.shape), torch.empty(0), 0)
    probes |= own
    return own


def _update(
    block: Block, own: dict[str, Fisher], weights: Sequence[Tensor], grads: Sequence[Tensor | None], tokens: int
) -> None:
    for m, weight, grad in zip(block.matrices, weights, grads, strict=True):
        grad = torch.zeros_like(weight) if grad is None else grad
        for e in range(m.experts) if m.experts else [None]:
            own[site_name(block, m.tensor, e)].update(m.view(grad, e or 0).cpu(), weight, tokens)
