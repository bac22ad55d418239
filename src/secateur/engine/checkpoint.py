"""load and save: checkpoints of ours for people, ragged ones included.

A ragged checkpoint (a size per layer) is built as its config says, dense, on the meta device, cut there to the
sizes in secateur.json, and filled. No generated code, no pickles.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from secateur.anatomy import anatomy_of
from secateur.anatomy.types import Block
from secateur.engine.apply import cut, updated_config
from secateur.engine.host.build import describe_skeleton, skeleton_model
from secateur.engine.host.origin import Origin, quiet, resolve
from secateur.engine.host.own_code import code_files
from secateur.engine.outcome import Outcome, outcome_of
from secateur.engine.packed_model import load_packed
from secateur.engine.ragged import ORDER
from secateur.engine.store import Store
from secateur.engine.write import StepWriter, check_out, publish, work_dir, writing
from secateur.errors import SecateurError
from secateur.sparse.linear import PackedLinear


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
    model: Any = store.skeleton()
    if store.packed and torch.device(device).type == "cpu":
        load_packed(store, model)
    else:
        store.load_whole(model, device)
    if isinstance(store.origin, Origin) and (store.origin.path / "generation_config.json").is_file():
        with quiet():
            model.generation_config = GenerationConfig.from_pretrained(store.origin.path)
    return model.eval()


def save(model: nn.Module, out: str | Path, tokenizer: Any = None, overwrite: bool = False) -> Path:
    """Save a model in memory, cut or not, as a directory that `load` reads.

    Where the config can say every size it is a plain Transformers checkpoint; otherwise the sizes go to
    secateur.json and (per layer) to ``per_layer_config``, and plain loading is refused by Transformers.

    Args:
        model: a Transformers model.
        out: the directory; it must be empty, or one that Secateur wrote and ``overwrite`` given.
        tokenizer: saved along, if given.
        overwrite: replace a directory that Secateur wrote.
    """
    target = Path(out)
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise SecateurError(
            "a model that runs packed is not saved from memory",
            received=type(model).__name__,
            works="secateur unpack DIR -o OUT, of the directory it was loaded from",
        )
    check_out(target, None, overwrite)
    work = work_dir(target)
    store = Store.of_model(model)
    outcome = _outcome(model, store)
    with writing(work):
        if work.exists():
            shutil.rmtree(work)
    writer = StepWriter(work, store)
    try:
        for index in range(store.blocks):
            writer.write_block(index, model.get_submodule(f"{store.blocks_path}.{index}"))
        writer.write_rest(model)
        ready = writer.finish(outcome)
        with writing(ready):
            for path in code_files(model):
                shutil.copyfile(path, ready / path.name)
            generation = getattr(model, "generation_config", None)
            if generation is not None:
                generation.save_pretrained(ready)
            if tokenizer is not None:
                tokenizer.save_pretrained(ready)
        publish(ready, target, overwrite)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _outcome(model: Any, store: Store) -> Outcome:
    """What must be written of a model's sizes, found by cutting the model its config describes, space by space."""
    config = type(store.config).from_dict(store.config.to_dict())
    config.architectures = [type(model).__name__]
    target, sketch = _shapes(model), skeleton_model(config)
    fields: dict[str, Any] = {}
    outcome = Outcome()
    for name in ORDER:
        if _shapes(sketch) == target:
            break
        before, after = anatomy_of(describe_skeleton(sketch)), anatomy_of(describe_skeleton(model))
        if len(before.blocks) != len(after.blocks):
            raise SecateurError(
                "the model's config does not say which layers were dropped",
                received=f"{len(after.blocks)} layers, {len(before.blocks)} in the config",
                works="drop layers with cut_layers, which keeps the config true",
            )
        keeps = {
            old.name: {name: keep}
            for old, new in zip(before.blocks, after.blocks, strict=True)
            if (keep := _difference(old, new, name)) is not None
        }
        if not keeps:
            continue
        change = updated_config(config, before, keeps)
        outcome = outcome_of(before, change, outcome.sizes)
        fields |= change.fields
        for word, value in change.fields.items():
            setattr(config.get_text_config(), word, value)
        cut(sketch, before, keeps)
    if _shapes(sketch) != target:
        raise SecateurError(
            "the model's tensors have sizes that no cut of its config gives",
            received=next(n for n in target if _shapes(sketch).get(n) != target[n]),
            works="save a model that was cut along secateur's spaces",
        )
    return replace(outcome, fields=fields)


def _difference(old: Block, new: Block, name: str) -> torch.Tensor | None:
    """Booleans that cut a block's space to the size it has in another block, or None where they agree."""
    if name not in old.spaces:
        return None
    space, now = old.spaces[name], new.spaces.get(name)
    count = max(now.copies * now.size // space.copies, 1) if now is not None else 1  # a single unit is no space
    if count >= space.size:
        return None
    keep = torch.zeros(space.shape, dtype=torch.bool)
    keep[..., :count] = True
    return keep


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}
