"""A finished block's file back into a model, through the same conversions as any checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.engine.headers import read_header
from secateur.engine.host import convert
from secateur.engine.reading import read_entry
from secateur.engine.store import Store


def restore_block(store: Store, model: nn.Module, path: Path) -> None:
    """Load the tensors of a block's file (by names on disk) into the model, at the sizes they have there.

    Args:
        store: where the model came from; its dtype is what float tensors become.
        model: its block may be on the meta device; modules already have the sizes of the file.
        path: a file that `StepWriter.write_block` wrote.
    """
    entries = read_header(path).tensors
    found = convert.correspond(store.skeleton(), {name: (e.dtype, e.shape) for name, e in entries.items()})
    with open(path, "rb", buffering=0) as file:

        def read(name: str) -> Tensor:
            return read_entry(file, entries[name])

        for group in found.groups:
            for name, value in group.convert(model, read).items():
                dtype = store.dtype if store.dtype is not None and value.is_floating_point() else value.dtype
                device = torch.device("cpu")
                old = model.get_parameter(name) if name in dict(model.named_parameters()) else value
                convert.set_tensor(model, name, value.to(old.device if not old.is_meta else device, dtype).contiguous())
