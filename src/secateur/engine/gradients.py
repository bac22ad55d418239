"""Gradients of the language-model loss with respect to every prunable matrix, summed over the calibration text."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from secateur.engine.backward import Backward
from secateur.engine.distribute import World
from secateur.engine.ear import site_name
from secateur.engine.host.build import describe_skeleton
from secateur.engine.probes import Gradient, Probe
from secateur.errors import SecateurError


def gradients(back: Backward, batches: Sequence[Tensor], world: World) -> dict[str, Probe]:
    """Sum over windows of d loss / d W for each matrix, by site name; the loss is a window's mean cross-entropy of the
    next token (of the token itself in a model that sees both sides).

    The sums, in fp32, are as large as the matrices; where hidden states are spilled they lie in a file, too, which
    the system reads and drops as it needs memory.

    Args:
        back: the way back through the model.
        batches: all processes' token ids [batch, length].
        world: this process among those that share the text.

    Raises:
        SecateurError: the model has no language-model loss (a plain encoder), or the disk is full.
    """
    windows = [window.unsqueeze(0) for batch in world.mine(batches) for window in batch]
    shift = int(describe_skeleton(back.model).causal)  # the config's is_decoder does not tell: GPT-NeoX's is False

    def loss(number: int, logits: Tensor) -> Tensor:
        ids = windows[number][0]
        return torch.nn.functional.cross_entropy(logits[: len(ids) - shift], ids[shift:])

    sums: dict[tuple[int, str], Tensor] = {}
    for block in back.anatomy.blocks:
        module = back.model.get_submodule(block.name)
        for m in block.matrices:
            sums[block.index, m.tensor] = room(module.get_parameter(m.tensor).shape, back.spill)
    for turn in back.turns(windows, loss):
        for m, grad in zip(turn.block.matrices, turn.grads, strict=True):
            sums[turn.block.index, m.tensor] += grad.cpu()
    count = torch.tensor(float(len(windows)), dtype=torch.float64)
    world.add([count, *sums.values()])
    probes: dict[str, Probe] = {}
    for block in back.anatomy.blocks:
        for m in block.matrices:
            for e in range(m.experts) if m.experts else [None]:
                probe = probes[site_name(block, m.tensor, e)] = Gradient()
                probe.sums = {"gradient": m.view(sums[block.index, m.tensor], e or 0), "batches": count}
    return probes


def room(shape: torch.Size, directory: Path | None) -> Tensor:
    """Zeros, fp32: in memory, or in a file without a name in that directory, which goes when the tensor does.

    Raises:
        SecateurError: the disk is full.
    """
    if directory is None or not shape.numel():
        return torch.zeros(shape)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, 4 * shape.numel())  # now, not in the middle of a sum
            held = mmap.mmap(file.fileno(), 4 * shape.numel())
    except OSError as e:
        raise SecateurError(
            f"gradients could not be spilled: {e.strerror}",
            received=str(directory),
            works="free some space beside the output, or use a score that needs no gradient (wanda, magnitude)",
        ) from e
    return torch.frombuffer(held, dtype=torch.float32).reshape(shape)
