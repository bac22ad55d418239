"""In and out against Transformers' own loading and saving, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_toys import CONFIGS, logits, make, reference
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.engine import write
from secateur.engine.checkpoint import load
from secateur.engine.host.build import default_config
from secateur.engine.host.convert import cast
from secateur.engine.host.origin import resolve
from secateur.engine.host.toy import toy_config, toy_model
from secateur.engine.store import Store
from secateur.engine.walk import running_as
from secateur.engine.write import Outcome, StepWriter, publish
from secateur.errors import SecateurError


def through(store: Store, work: Path, blocks: list[int] | None = None, outcome: Outcome | None = None) -> Path:
    """Block by block through a writer, holding one block at a time."""
    writer, model = StepWriter(work, store), store.skeleton()
    for index in range(store.blocks):
        module = model.get_submodule(f"{store.blocks_path}.{index}")
        store.load_block(model, index)
        writer.write_block(index, module)
        store.release_block(model, index)
        assert all(p.is_meta for p in module.parameters())
    store.load_rest(model)
    writer.write_rest(model)
    return writer.finish(outcome or Outcome(), blocks)


def shards(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_round_trip(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = make(family, dtype)
    model.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    model.save_pretrained(tmp_path / "single")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    store = Store.open(resolve(tmp_path / "in"))

    loaded, want = store.skeleton(), reference(tmp_path / "in", family)
    store.load_whole(loaded)
    assert loaded.state_dict().keys() == want.state_dict().keys()
    for (name, ours), theirs in zip(loaded.state_dict().items(), want.state_dict().values(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    for (name, ours), (_, theirs) in zip(loaded.named_buffers(), want.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())
    assert torch.equal(logits(loaded), logits(want))

    publish(through(store, tmp_path / "work"), tmp_path / "out")
    single = (tmp_path / "single" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == single
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (tmp_path / "in" / "config.json").read_text()
    )
    assert torch.equal(logits(reference(tmp_path / "out", family)), logits(want))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
def test_loads_in_the_dtype_transformers_would(tmp_path: Path, family: str) -> None:
    """Also where some tensors were stored wider than the rest, and where the architecture keeps some wide."""
    make(family, torch.bfloat16).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(n for n in state if "layers.1" in n and "norm" in n)
    state[name] = state[name].float()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    for dtype in (None, torch.bfloat16, torch.float16, torch.float32):
        ours, theirs = load(tmp_path, dtype), reference(tmp_path, family, dtype or "auto")
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), name
        assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_cast_as_loading_would(tmp_path: Path, family: str) -> None:
    """Rotary tables and the corrections of a router stay exact, for a while (`running_as`) and for good (`cast`)."""
    toy_model(toy_config(default_config(family))).save_pretrained(tmp_path)
    model, want = load(tmp_path, torch.float32), tensors(load(tmp_path, torch.bfloat16))
    before = tensors(model)
    assert {value.dtype for value in want.values()} == {torch.float32, torch.bfloat16}
    with running_as(model, torch.bfloat16):
        assert same(tensors(model), want)
    assert same(tensors(model), before)
    cast(model, torch.bfloat16)
    assert same(tensors(model), want)


def test_tied_stays_tied(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_untied_where_the_files_say_so(tmp_path: Path) -> None:
    """Both tensors on disk and different: two tensors, whatever the config says, as Transformers has it."""
    model = make("llama")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = torch.randn(64, 32)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    ours = load(tmp_path)
    assert torch.equal(ours.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(ours.model.embed_tokens.weight, state["model.embed_tokens.weight"])


def test_names_without_the_base_models_prefix_stay_so(tmp_path: Path) -> None:
    model = make("gpt2")
    model.transformer.save_pretrained(tmp_path / "in")
    before = load_file(tmp_path / "in" / "model.safetensors")
    assert not any(name.startswith("transformer.") for name in before)
    store = Store.open(resolve(tmp_path / "in"))
    after = shards(through(store, tmp_path / "work"))
    assert after.keys() == before.keys()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sharded_output(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(family, torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    store = Store.open(resolve(tmp_path / "in"))
    monkeypatch.setattr(write, "LARGEST_SINGLE", 1000)
    ready = through(store, tmp_path / "work")
    assert len(list(ready.glob("model-*-of-00004.safetensors"))) == 4
    before, after = load_file(tmp_path / "in" / "model.safetensors"), shards(ready)
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert torch.equal(logits(reference(ready, family)), logits(reference(tmp_path / "in", family)))
    index = json.loads((ready / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in before.values())


@pytest.mark.parametrize("size", [10**9, 1000])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_dropped_layers_are_renumbered(tmp_path: Path, family: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(family)
    model.save_pretrained(tmp_path / "in")
    store = Store.open(resolve(tmp_path / "in"))
    monkeypatch.setattr(write, "LARGEST_SINGLE", size)
    ready = through(store, tmp_path / "work", [0, 2], Outcome(fields={"num_hidden_layers": 2}))
    layers = model.get_submodule(store.blocks_path)
    kept = nn.ModuleList([layers[0], layers[2]])
    parent, _, leaf = store.blocks_path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, kept)
    model.config.num_hidden_layers = 2
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    assert torch.equal(logits(reference(ready, family)), logits(model))


def test_a_block_holds_what_was_written(tmp_path: Path) -> None:
    make("llama", torch.bfloat16).save_pretrained(tmp_path / "in")
    store = Store.open(resolve(tmp_path / "in"))
    model, writer = store.skeleton(), StepWriter(tmp_path / "work", store)
    store.load_block(model, 1)
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(1.001)
    sharp = weight.detach().clone()
    writer.write_block(1, model.model.layers[1])
    on_disk = load_file(writer.block_file(1))["model.layers.1.mlp.up_proj.weight"]
    assert on_disk.dtype == torch.bfloat16 and torch.equal(on_disk.float(), weight.detach())
    assert not torch.equal(sharp, weight.detach())


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path / "in")
    store = Store.open(resolve(tmp_path / "in"))
    first = through(store, tmp_path / "a")
    second = through(Store.open(resolve(tmp_path / "in")), tmp_path / "b")
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    assert all((second / p.name).read_bytes() == p.read_bytes() for p in first.iterdir())
    assert not list(tmp_path.rglob("*.part"))


def test_numbers_in_names_are_put_in_their_order() -> None:
    names = ["layer.10", "layer.2", "5²10", "5²9"]
    assert sorted(names, key=write.natural) == ["5²9", "5²10", "layer.2", "layer.10"]


def test_done_is_said_of_complete_blocks_only(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "in")
    store = Store.open(resolve(tmp_path / "in"))
    model, writer = store.skeleton(), StepWriter(tmp_path / "work", store)
    store.load_block(model, 0)
    writer.write_block(0, model.model.layers[0])
    (tmp_path / "work" / "block-00001.safetensors.part").write_bytes(b"half")
    again = StepWriter(tmp_path / "work", store)
    assert [again.done(i) for i in range(3)] == [True, False, False]


def test_other_files_travel(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "in")
    for name in ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json", "vocab.txt"):
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "in" / "optimizer.pt").write_bytes(b"not this")
    ready = through(
        Store.open(resolve(tmp_path / "in")),
        tmp_path / "work",
        outcome=Outcome(record={"seed": 3}, files={"README.md": b"a card"}),
    )
    names = {p.name for p in ready.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "special_tokens_map.json", "vocab.txt", "README.md"} <= names
    assert "generation_config.json" in names and "optimizer.pt" not in names
    assert json.loads((ready / "secateur.json").read_text())["seed"] == 3


def test_a_model_in_memory(tmp_path: Path) -> None:
    for family in ("mixtral", "gpt2"):
        model = make(family)
        store = Store.of_model(model)
        copy = store.skeleton()
        assert all(p.is_meta for p in copy.parameters())
        store.load_whole(copy)
        assert torch.equal(logits(copy), logits(model))
        with torch.no_grad():
            for parameter in copy.get_submodule(store.blocks_path).parameters():
                parameter.zero_()
        again = store.skeleton()
        store.load_whole(again)
        assert torch.equal(logits(again), logits(model))  # what was loaded was a copy
        ready = through(store, tmp_path / family)
        model.save_pretrained(tmp_path / f"{family}-theirs")
        theirs = (tmp_path / f"{family}-theirs" / "model.safetensors").read_bytes()
        assert (ready / "model.safetensors").read_bytes() == theirs


@pytest.mark.parametrize(("family", "kind"), [("llama", "LlamaForCausalLM"), ("bert", "BertForMaskedLM")])
def test_without_architectures(tmp_path: Path, family: str, kind: str) -> None:
    """Causal, then masked, then a plain encoder: the first that the tensors on disk suffice for."""
    model = make(family)
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "base")
    for name in ("whole", "base"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        config.pop("architectures")
        config["tie_word_embeddings"] = False
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "whole" / "model.safetensors")
    head = "lm_head.weight" if family == "llama" else "cls.predictions.decoder.weight"
    state[head] = torch.randn(64, 32)
    if family == "bert":
        state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"].clone()
    save_file(state, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    assert type(load(tmp_path / "whole")).__name__ == kind
    if family == "llama":
        assert type(load(tmp_path / "base")).__name__ == "LlamaModel"


def test_publish_never_loses_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama").save_pretrained(tmp_path / "in")
    store = Store.open(resolve(tmp_path / "in"))
    out = tmp_path / "out"
    publish(through(store, tmp_path / "work"), out)
    old = (out / "model.safetensors").read_bytes()
    (out / "mine").write_text("a")
    ready = through(store, tmp_path / "work")
    with pytest.raises(SecateurError, match="--overwrite"):
        publish(ready, out)

    rename = write.os.rename

    def fails(a: Path, b: Path) -> None:
        if Path(a) == ready:
            raise OSError(28, "No space left on device")
        rename(a, b)

    monkeypatch.setattr(write.os, "rename", fails)
    with pytest.raises(SecateurError, match="disk is full"):
        publish(ready, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == old and (out / "mine").exists()
    monkeypatch.undo()
    publish(ready, out, overwrite=True)
    assert not (out / "mine").exists() and (out / "model.safetensors").read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "work"]


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama").save_pretrained(tmp_path / "hub")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "modeling_own.py", "tokenizer.model"):
        (tmp_path / "hub" / name).write_bytes(b"")

    def fetched(repository: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (repository, revision) == ("some-org/some-model", "v2")
        names = [path.name for path in (tmp_path / "hub").iterdir()]
        (tmp_path / "cache").mkdir()
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copy(tmp_path / "hub" / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    origin = resolve("some-org/some-model", "v2")
    assert {p.name for p in origin.path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model"
    }  # fmt: skip
    assert same(tensors(load(origin.path)), tensors(reference(tmp_path / "hub", "llama")))
