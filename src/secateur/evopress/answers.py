"""What the dense model answers at every position of a text, kept in a file, and how far other models' answers are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.headers import read_header
from secateur.engine.reading import Reader
from secateur.engine.walk import products_in
from secateur.engine.write import stream_tensors
from secateur.errors import SecateurError
from secateur.measure.passes import LOGIT_BYTES, is_causal, logits_of
from secateur.search.evolve import Piece
from secateur.search.likely import TOP, Likely
from secateur.stage import Stage


class Answers:
    """The dense model's likeliest answers on every window, in a file."""

    def __init__(self, path: Path) -> None:
        self.entries = read_header(path).tensors

    @torch.inference_mode()
    def divergence(self, model: nn.Module, windows: Tensor, pieces: Sequence[Piece], dtype: torch.dtype) -> float:
        """Mean KL(dense || model) over the pieces' tokens, nats; predictions after the last token count, too."""
        total, positions = 0.0, 0
        with Reader(self.entries) as reader:
            for group in grouped(pieces, batch_of(model, windows)):
                ids = torch.stack([windows[at, :tokens] for at, tokens in group])
                with products_in(dtype, next(model.parameters()).device):
                    logits = logits_of(model, ids)
                for row, (at, tokens) in enumerate(group):
                    parts = {name: reader.read(self.entries[f"{at}/{name}"]) for name in ("tokens", "log", "rest")}
                    total += float(Likely(**parts).divergence(logits[row]).sum())
                    positions += tokens
        return total / positions if math.isfinite(total) else math.inf


def note_answers(stage: Stage, windows: Tensor, path: Path) -> None:
    """Run the dense model over the text once, and keep what it answers."""
    model: Any = stage.store.skeleton()
    stage.store.load_whole(model, stage.at.device)
    if not is_causal(model):
        raise SecateurError(
            "a search compares predictions of next tokens, and this model makes none",
            received=type(model).__name__,
            works="a causal language model, or --budget owl or pooled",
        )
    size, (count, length) = batch_of(model, windows), windows.shape
    held: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:  # asked for window by window
        if name not in held:
            start = int(name.split("/")[0])
            held.clear()
            with torch.inference_mode(), products_in(stage.at.dtype, stage.at.device):
                logits = logits_of(model, windows[start : start + size])
                for row, own in enumerate(logits):
                    held.update({f"{start + row}/{k}": v for k, v in Likely.of(own).tensors().items()})
            stage.at.tick(f"step {stage.number + 1}, dense answers", min(start + size, count), count)
        return held[name]

    listed = min(TOP, vocabulary_of(model))
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "tokens": (torch.int32, (length, listed)),
        "log": (torch.float32, (length, listed)),
        "rest": (torch.float32, (length,)),
    }
    stream_tensors(path, {f"{at}/{name}": kind for at in range(count) for name, kind in kinds.items()}, tensor)


def batch_of(model: Any, windows: Tensor) -> int:
    """Windows whose logits take 128 MB in fp32, at least one."""
    return max(1, LOGIT_BYTES // (windows.shape[1] * vocabulary_of(model) * 4))


def vocabulary_of(model: Any) -> int:
    """Width of the output head."""
    return int(model.get_output_embeddings().weight.shape[0])


def grouped(pieces: Sequence[Piece], size: int) -> list[list[Piece]]:
    """Pieces of equal length together, at most ``size``."""
    out: list[list[Piece]] = []
    for piece in pieces:
        if out and len(out[-1]) < size and out[-1][0][1] == piece[1]:
            out[-1].append(piece)
        else:
            out.append([piece])
    return out
