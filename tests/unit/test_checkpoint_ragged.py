"""Cut checkpoints: what a run writes, `load` gives back; plain loading agrees or refuses, never differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_toys import CONFIGS, logits, make, reference
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

from secateur.anatomy import anatomy_of
from secateur.engine.apply import cut, updated_config
from secateur.engine.checkpoint import load
from secateur.engine.host.build import describe_skeleton
from secateur.engine.host.origin import resolve
from secateur.engine.outcome import outcome_of
from secateur.engine.store import Store
from secateur.engine.write import StepWriter
from secateur.errors import SecateurError
from whole_toys import written

CASES = [
    ("llama", "ffn"),
    ("llama", "kv_group"),
    ("llama", "head"),
    ("gpt2", "ffn"),
    ("gpt2", "head"),
    ("mixtral", "ffn"),
    ("mixtral", "expert"),
    ("mixtral", "kv_group"),
    ("qwen3_moe", "expert"),
    ("bert", "ffn"),
    ("bert", "head"),
]
NO_WORD = {("gpt2", "head"), ("bert", "head")}  # head size is hidden size / heads there


def keeps_of(model: Any, space: str, ragged: bool, seed: int = 0) -> dict[str, Any]:
    """Half of a space's units at random; with ``ragged`` all but one unit of block 1."""
    rng = torch.Generator().manual_seed(seed)
    keeps = {}
    for block in anatomy_of(describe_skeleton(model)).blocks:
        s = block.spaces[space]
        count = max(s.minimum, s.size // 2)
        if ragged and block.index == 1:
            count = min(count + (8 if space == "ffn" else 1), s.size)
        keep = torch.zeros(s.copies, s.size, dtype=torch.bool)
        for row in keep:
            row[torch.randperm(s.size, generator=rng)[:count]] = True
        keeps[block.name] = {space: keep.reshape(s.shape)}
    return keeps


def pruned(out: Path, family: str, space: str, ragged: bool) -> Any:
    """A model cut in memory, and written."""
    model = make(family)
    written(model, out, keeps_of(model, space, ragged))
    return model


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("family", "space"), CASES)
def test_saved_and_loaded(tmp_path: Path, family: str, space: str, ragged: bool) -> None:
    model = pruned(tmp_path / "out", family, space, ragged)
    again = load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    sizes = json.loads((tmp_path / "out" / "secateur.json").read_text())["sizes"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert bool(sizes) == (ragged or (family, space) in NO_WORD)
    assert ("per_layer_config" in config) == (ragged and (family, space) not in NO_WORD)
    if not sizes:
        assert torch.equal(logits(reference(tmp_path / "out", family)), logits(model))
    else:
        with pytest.raises((AmbiguousGlobalPerLayerAttributeError, RuntimeError, ValueError)):
            reference(tmp_path / "out", family)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("family", "space"), [("llama", "ffn"), ("mixtral", "expert"), ("gpt2", "head")])
def test_streamed_equals_in_memory(tmp_path: Path, family: str, space: str, ragged: bool) -> None:
    """The path of a run: cut block by block, then the config; against the model cut whole."""
    make(family).save_pretrained(tmp_path / "in")
    store = Store.open(resolve(tmp_path / "in"))
    model = store.skeleton()
    anatomy = anatomy_of(describe_skeleton(model))
    keeps = keeps_of(model, space, ragged)
    writer = StepWriter(tmp_path / "work", store)
    for block in anatomy.blocks:
        store.load_block(model, block.index)
        cut(model, anatomy, {block.name: keeps[block.name]})
        writer.write_block(block.index, model.get_submodule(block.name))
        store.release_block(model, block.index)
    store.load_rest(model)
    writer.write_rest(model)
    ready = writer.finish(outcome_of(anatomy, updated_config(store.config, anatomy, keeps)))
    whole = pruned(tmp_path / "whole", family, space, ragged)
    assert torch.equal(logits(load(ready)), logits(whole))
    theirs = tmp_path / "whole" / "model.safetensors"
    assert (ready / "model.safetensors").read_bytes() == theirs.read_bytes()


def test_cut_twice(tmp_path: Path) -> None:
    """A ragged checkpoint is opened at its own sizes, cut along another space, and both stay written."""
    model = pruned(tmp_path / "one", "llama", "ffn", True)
    store = Store.open(resolve(tmp_path / "one"))
    shapes = {name: value.shape for name, value in store.skeleton().state_dict().items()}
    assert shapes == {name: value.shape for name, value in model.state_dict().items()}
    again = load(tmp_path / "one")
    written(again, tmp_path / "two", keeps_of(again, "kv_group", True), store)
    record = json.loads((tmp_path / "two" / "secateur.json").read_text())
    assert set(record["sizes"]["model.layers.0"]) == {"ffn", "kv_group"}
    assert torch.equal(logits(load(tmp_path / "two")), logits(again))


def test_sizes_per_layer_beside_a_nested_text_config(tmp_path: Path) -> None:
    """Transformers' schema has no place for them; ours is enough, and plain loading refuses."""
    eyes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8)
    text = CONFIGS["gemma3"]().to_dict()
    config = Gemma3Config(text_config=text, vision_config=eyes | {"patch_size": 4}, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    written(model, tmp_path, keeps_of(model, "ffn", True))
    assert "per_layer_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path)), logits(model))
    with pytest.raises(RuntimeError, match="mismatch"):
        reference(tmp_path, "gemma3")


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_cut_twice_under_two_names(tmp_path: Path, family: str) -> None:
    """Where every query head has keys of its own, head and kv_group are the same units."""
    pruned(tmp_path / "one", family, "head", True)
    again = load(tmp_path / "one")
    written(again, tmp_path / "two", keeps_of(again, "kv_group", True), Store.open(resolve(tmp_path / "one")))
    assert torch.equal(logits(load(tmp_path / "two")), logits(again))


def test_layers_dropped_from_a_ragged_model(tmp_path: Path) -> None:
    """Sizes follow their layers to the new numbers."""
    model = pruned(tmp_path / "one", "llama", "ffn", True)
    store = Store.open(resolve(tmp_path / "one"))
    anatomy = anatomy_of(describe_skeleton(store.skeleton()))
    keeps = {"model": {"layer": torch.tensor([False, True, True])}}
    writer, blocks = StepWriter(tmp_path / "work", store), store.skeleton()
    store.load_whole(blocks)
    for index in range(3):
        writer.write_block(index, blocks.model.layers[index])
    writer.write_rest(blocks)
    outcome = outcome_of(anatomy, updated_config(store.config, anatomy, keeps), store.sizes)
    ready = writer.finish(outcome, [1, 2])
    cut(model, anatomy_of(describe_skeleton(model)), keeps)
    assert torch.equal(logits(load(ready)), logits(model))


def test_loading_in_another_dtype(tmp_path: Path) -> None:
    model = make("llama", torch.bfloat16)
    written(model, tmp_path / "out", keeps_of(model, "ffn", True))
    assert load(tmp_path / "out").dtype == torch.bfloat16
    assert load(tmp_path / "out", torch.float32).dtype == torch.float32
    again = load(tmp_path / "out")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert again.model.rotary_emb.inv_freq.dtype == torch.float32  # which .to(bfloat16) does not spare


def spoil(sizes: Any) -> Any:
    return lambda record: record.update(sizes=sizes)


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("must map blocks to sizes", spoil([1])),
        ("gives no sizes", spoil({"model.layers.0": {}})),
        ("gives no sizes", spoil({"model.layers.0": 24})),
        ("impossible size", spoil({"model.layers.0": {"ffn": 0}})),
        ("impossible size", spoil({"model.layers.0": {"ffn": "24"}})),
        ("impossible size", spoil({"model.layers.0": {"ffn": True}})),
        ("more of ffn than", spoil({"model.layers.0": {"ffn": 49}})),
        ("block the model does not have", spoil({"model.layers.7": {"ffn": 24}})),
        ("block the model does not have", spoil({"__class__": {"ffn": 24}})),
        ("space that model.layers.0 does not have", spoil({"model.layers.0": {"__init__": 24}})),
        ("contradicts config.json", spoil({"model.layers.0": {"ffn": 23}})),
        ("no secateur.json with them", spoil({})),
    ],
)
def test_a_spoilt_record_is_refused(tmp_path: Path, says: str, change: Any) -> None:
    pruned(tmp_path / "out", "llama", "ffn", True)
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())
    change(record)
    (tmp_path / "out" / "secateur.json").write_text(json.dumps(record))
    with pytest.raises(SecateurError, match=says):
        load(tmp_path / "out")


def test_layers_of_as_many_sizes_as_there_are_layers_can_still_be_cut(tmp_path: Path) -> None:
    """Sizes that all differ are no numbers of layers."""
    model = make("llama")
    blocks = anatomy_of(describe_skeleton(model)).blocks
    keeps = {b.name: {"ffn": torch.arange(b.spaces["ffn"].size) >= 2 * b.index + 1} for b in blocks}
    keeps = {name: {"ffn": own["ffn"].reshape(blocks[0].spaces["ffn"].shape)} for name, own in keeps.items()}
    loaded = load(written(model, tmp_path / "out", keeps))
    sizes = [layer.mlp.down_proj.in_features for layer in loaded.model.layers]
    assert len(set(sizes)) == len(sizes) > 2
    assert "layer" in anatomy_of(describe_skeleton(loaded)).spaces()
