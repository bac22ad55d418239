"""Checkpoints whose blocks have their own sizes: the ``sizes`` of secateur.json, and a skeleton cut to them.

    "sizes": {"model.layers.3": {"ffn": 1152, "kv_group": 2}, ...}      units per copy that the block has

What the file says is checked against the dense config here and against the headers when the store is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from secateur.anatomy import anatomy_of
from secateur.engine.apply import cut_block
from secateur.engine.host.build import describe_skeleton
from secateur.errors import SecateurError

ORDER = ("expert", "kv_group", "head", "ffn")  # outer spaces first: copies of the inner ones go with them


def read_sizes(record: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The sizes in a secateur.json.

    Raises:
        SecateurError: they are not positive counts by block and space.
    """
    sizes = record.get("sizes", {})
    if not isinstance(sizes, Mapping):
        raise SecateurError(
            "secateur.json must map blocks to sizes",
            received=type(sizes).__name__,
            works="use secateur.json and config.json as they were written together",
        )
    for block, spaces in sizes.items():
        if not isinstance(spaces, Mapping) or not spaces:
            raise SecateurError(
                f"secateur.json gives no sizes for {block!r}",
                received=spaces,
                works="use secateur.json and config.json as they were written together",
            )
        for space, size in spaces.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise SecateurError(
                    f"secateur.json gives {block} an impossible size of {space}",
                    received=size,
                    works="use secateur.json and config.json as they were written together",
                )
    return {str(block): dict(spaces) for block, spaces in sizes.items()}


def cut_to_sizes(model: nn.Module, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Cut a dense skeleton (on the meta device) in place to the sizes of a ragged checkpoint.

    Raises:
        SecateurError: a block or space the model does not have, or more units than it has.
    """
    spaces = {space for given in sizes.values() for space in given}
    for name in [s for s in ORDER if s in spaces] + sorted(spaces - set(ORDER)):
        anatomy = anatomy_of(describe_skeleton(model))
        blocks = {block.name: block for block in anatomy.blocks}
        for where, given in sizes.items():
            if where not in blocks:
                raise SecateurError(
                    "secateur.json gives sizes for a block the model does not have",
                    received=where,
                    works="use secateur.json and config.json as they were written together",
                )
            if name not in given:
                continue
            block = blocks[where]
            space = block.spaces.get(name)
            if space is None:
                raise SecateurError(
                    f"secateur.json sizes a space that {where} does not have",
                    received=name,
                    works="use secateur.json and config.json as they were written together",
                )
            count = given[name]
            if count > space.size:
                raise SecateurError(
                    f"secateur.json gives {where} more of {name} than the config has",
                    received=count,
                    works=f"at most {space.size}",
                )
            if count < space.size:
                keep = torch.zeros(space.shape, dtype=torch.bool)
                keep[..., :count] = True
                cut_block(model.get_submodule(where), block, {name: keep})
