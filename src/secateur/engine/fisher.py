"""The Fisher information of every prunable matrix: what errors in it cost the model's answers.

    F_ij = mean over tokens of  E over y ~ p of  (d log p(y) / d w_ij)^2,      p the model's own answer

Half of F_ij w_ij^2 is, to second order and each weight alone, the KL divergence to the model as it is that dropping
w_ij brings. One token is drawn per position; draws are independent, so the squared gradient of a window's summed loss
has that mean, too, and a window takes one backward pass. A few windows are enough: `Fisher` keeps margins only.

Source: Theis et al. 2018, arXiv 1801.05787 (Fisher pruning). Deviations: tokens are drawn from the model, not read from
the text (the empirical Fisher, which measures gradients' noise where the model is wrong).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.engine.backward import Backward
from secateur.engine.distribute import World, seeded
from secateur.engine.ear import site_name
from secateur.engine.probes import Fisher, Probe

FISHER_WINDOWS = 8  # of the calibration text, evenly spaced


def fisher(back: Backward, batches: Sequence[Tensor], world: World, seed: int = 0) -> dict[str, Probe]:
    """`Fisher` of each matrix, by site name, from `FISHER_WINDOWS` windows of the text (all, where it has fewer).

    Args:
        back: the way back through the model.
        batches: all processes' token ids [batch, length].
        world: this process among those that share the text.
        seed: the recipe's; tokens are drawn by it and the window's number.

    Raises:
        SecateurError: the model gives no probabilities of tokens (a plain encoder).
    """
    every = [window for batch in batches for window in batch]
    spread = sorted({i * len(every) // FISHER_WINDOWS for i in range(FISHER_WINDOWS)})
    mine = world.mine([(at, every[at].unsqueeze(0)) for at in spread])

    def loss(number: int, logits: Tensor) -> Tensor:
        generator = seeded(seed, "fisher", str(mine[number][0]))
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        return torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")

    probes: dict[str, Fisher] = {}
    for block in back.anatomy.blocks:  # zeros: an expert that no token reaches has sums, too
        for m in block.matrices:
            for e in range(m.experts) if m.experts else [None]:
                probe = probes[site_name(block, m.tensor, e)] = Fisher()
                probe.update(torch.zeros(m.shape), torch.empty(0), 0)
    for turn in back.turns([ids for _, ids in mine], loss):
        for m, weight, grad in zip(turn.block.matrices, turn.weights, turn.grads, strict=True):
            for e in range(m.experts) if m.experts else [None]:
                probes[site_name(turn.block, m.tensor, e)].update(m.view(grad, e or 0).cpu(), weight, turn.tokens)
    world.add_up(probes[name] for name in sorted(probes))
    return dict(probes)
