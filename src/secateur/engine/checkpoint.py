"""load: checkpoints of ours for people, ragged ones included.

A ragged checkpoint (a size per layer) is built as its config says, dense, on the meta device, cut there to the
sizes in secateur.json, and filled. No generated code, no pickles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from secateur.engine.host.origin import UNBUILDABLE, Origin, quiet, resolve
from secateur.engine.packed_model import load_packed
from secateur.engine.store import Store
from secateur.errors import SecateurError


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a model: any checkpoint Secateur wrote, ragged, packed or neither, and whatever else it reads.

    Args:
        path: a directory, a ``.gguf`` file, ``smollm2`` or a hub id.
        dtype: of float weights; None: what the config says, as in Transformers. Packed matrices keep theirs, and take
            and give activations of this one.
        device: where the weights go. Packed matrices stay packed on the CPU and are unpacked elsewhere.
        trust_remote_code: run the code that comes with a model.

    Raises:
        SecateurError: anything wrong with the files; see `Store.open`.
    """
    store = Store.open(resolve(path, trust_remote_code=trust_remote_code), dtype)
    store.dtype = dtype or store.usual_dtype()
    generation = read_generation(store.origin)
    model: Any = store.skeleton()
    if store.packed and torch.device(device).type == "cpu":
        load_packed(store, model)
    else:
        store.load_whole(model, device)
    if generation is not None:
        model.generation_config = generation
    return model.eval()


def read_generation(origin: Origin | None) -> GenerationConfig | None:
    """How a model's files say that it writes text, or None where they say nothing.

    Raises:
        SecateurError: generation_config.json is there and cannot be used.
    """
    if origin is None or not (origin.path / "generation_config.json").is_file():
        return None
    try:
        with quiet():
            return GenerationConfig.from_pretrained(origin.path)
    except UNBUILDABLE as error:
        raise SecateurError(
            f"generation_config.json cannot be used: {' '.join(str(error).split())[:200]}",
            received=str(origin.path),
            works="fetch the file again, or remove it",
        ) from error
