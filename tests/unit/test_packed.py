"""Packed checkpoints: exact round trips, predicted bytes, and the same model again when loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_toys import CONFIGS, make
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BertForMaskedLM

import secateur
from secateur import packing, run
from secateur.anatomy import anatomy_of
from secateur.engine import write
from secateur.engine.host.build import describe_skeleton
from secateur.engine.host.origin import resolve
from secateur.engine.packed import pack_checkpoint, unpack_checkpoint
from secateur.engine.store import Store
from secateur.errors import SecateurError
from secateur.sparse.linear import PackedLinear
from whole_toys import cli, read_all, said, weights_of, write_model, written

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {4: torch.int32, 2: torch.int16, 1: torch.int8}


def zeroed(family: str, share: float = 0.5, seed: int = 0) -> Any:
    """A random model with zeros of both signs in everything that has two axes or more."""
    model = make(family, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                gone = torch.rand(parameter.shape, generator=rng) < share
                parameter[gone] = torch.where(torch.rand(parameter.shape, generator=rng) < 0.5, 0.0, -0.0)[gone]
    return model


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toys")
    for family in CONFIGS:
        zeroed(family).save_pretrained(root / family)
    return root


def bits(value: Tensor) -> Tensor:
    return value.view(BITS[value.element_size()])


def packable(folder: Path) -> set[str]:
    """Names on disk of the matrices inside the blocks, by hand: two axes, not a router, not outside the layers."""
    state = load_file(folder / "model.safetensors")
    inside = {n for n, v in state.items() if v.dim() == 2 and any(w.isdigit() for w in n.split("."))}
    return {n for n in inside if not n.endswith(("block_sparse_moe.gate.weight", "mlp.gate.weight"))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", CONFIGS)
def test_unpacking_gives_every_bit_back(toys: Path, tmp_path: Path, family: str, dtype: str) -> None:
    secateur.pack(toys / family, tmp_path / "p", dtype)
    secateur.unpack(tmp_path / "p", tmp_path / "u")
    before, after = (load_file(p / "model.safetensors") for p in (toys / family, tmp_path / "u"))
    assert before.keys() == after.keys()
    matrices = packable(toys / family)
    assert matrices
    for name, value in before.items():
        want = value.to(DTYPES[dtype])
        want = want.masked_fill(want == 0, 0.0) if name in matrices else want
        assert torch.equal(bits(want), bits(after[name])), name
    with safe_open(tmp_path / "p" / "model-packed-00001-of-00004.safetensors", "pt") as shard:
        names, words = set(shard.keys()), shard.metadata()
    assert words["secateur-packed"] == "1"
    assert json.loads(words["matrices"]).keys() == {n for n in matrices if re.search(r"\d+", n)[0] == "0"}
    assert not names & matrices
    auto = BertForMaskedLM if family == "bert" else AutoModelForCausalLM
    model, told = auto.from_pretrained(tmp_path / "u", dtype="auto", output_loading_info=True)
    assert model.dtype == DTYPES[dtype] and not told["missing_keys"] and not told["unexpected_keys"]
    assert {p.name for p in (tmp_path / "u").iterdir()} >= {"config.json", "generation_config.json"} - (
        {"generation_config.json"} if family == "bert" else set()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_int8_is_exact_for_its_own_codes(toys: Path, tmp_path: Path, family: str) -> None:
    secateur.pack(toys / family, tmp_path / "p", "int8")
    secateur.unpack(tmp_path / "p", tmp_path / "u")
    before, after = (load_file(p / "model.safetensors") for p in (toys / family, tmp_path / "u"))
    for name, value in before.items():
        if name not in packable(toys / family):
            assert torch.equal(after[name], value.bfloat16()), name
            continue
        out = -1 if family == "gpt2" else 0  # the axis of outputs: each has a scale
        peak = value.abs().amax(1 - out % 2, keepdim=True)
        assert after[name].dtype == torch.float32
        assert bool(((after[name] - value).abs() <= peak / 127 * 0.51 + 1e-12).all()), name
    secateur.pack(tmp_path / "u", tmp_path / "q", "int8")
    assert weights_of(tmp_path / "p") == weights_of(tmp_path / "q")


@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("bf16", 2), ("fp16", 2), ("int8", 1)])
def test_bytes_are_those_predicted(tmp_path: Path, dtype: str, width: int) -> None:
    """A bit per weight in blocks of 16 rows by 4 columns, an offset per block, the non-zeros; no more."""
    model = zeroed("llama")
    model.save_pretrained(tmp_path / "m")
    told = secateur.pack(tmp_path / "m", tmp_path / "p", dtype)
    state = load_file(tmp_path / "m" / "model.safetensors")
    expected, plain = 0, 0
    for name, value in state.items():
        if name not in packable(tmp_path / "m"):
            expected += value.numel() * max(width, 2)
            plain += value.numel() * max(width, 2)
            continue
        (out, ins), nonzero = value.shape, int(value.count_nonzero())
        if dtype == "int8":  # small weights of a row round to zero
            scale = value.abs().amax(1, keepdim=True) / 127
            nonzero = int((value / scale).round().count_nonzero())
        words = -(-out // 16) * -(-ins // 4)
        expected += 8 * words + 8 * (-(-out // 16) + 1) + width * nonzero + (4 * out if dtype == "int8" else 0)
        plain += width * value.numel()
    slack = 64 if dtype == "int8" else 0  # scales have 16 bits, so a few more may round to zero
    assert abs(told["bytes"] - expected) <= slack and told["plain_bytes"] == plain
    headers = 0
    for shard in (tmp_path / "p").glob("*.safetensors"):
        headers += 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    assert sum(len(b) for b in weights_of(tmp_path / "p").values()) == told["bytes"] + headers
    assert json.loads((tmp_path / "p" / "model-packed.safetensors.index.json").read_text())["metadata"] == {
        "total_size": told["bytes"]
    }


def test_half_of_bf16_takes_nine_sixteenths(tmp_path: Path) -> None:
    """As the format promises, up to one offset per 16 rows."""
    model = make("llama")
    config = type(model.config)(**{**model.config.to_dict(), "hidden_size": 128, "intermediate_size": 256})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "proj" in name:
                flat = value.view(-1)
                flat[torch.randperm(flat.numel())[: flat.numel() // 2]] = 0.0
    model.save_pretrained(tmp_path / "m")
    told = secateur.pack(tmp_path / "m", tmp_path / "p")
    assert told["nonzero"] * 2 == told["weights"]
    rest = told["plain_bytes"] - 2 * told["weights"]
    share = (told["bytes"] - rest) / (2 * told["weights"])
    assert 9 / 16 <= share < 9 / 16 + 0.006


@pytest.mark.parametrize("share", [0, 50, 95])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_prediction_is_what_comes_out(tmp_path: Path, family: str, dtype: str, share: int) -> None:
    """Where every matrix has the same share of zeros, whatever kind it is packed as."""
    model = make(family)
    names = {f"{b.name}.{m.tensor}" for b in anatomy_of(describe_skeleton(model)).blocks for m in b.matrices}
    zeros = 0
    with torch.no_grad():
        for name in names:
            value = model.get_parameter(name)
            value.fill_(1.0)  # nothing that int8 would round to zero
            for matrix in value if value.dim() == 3 else value[None]:
                count = matrix.shape[0] * matrix.shape[1] * share // 100
                # an expert's first matrix lies on disk in two halves, each of which must have its share
                order = torch.arange(matrix.numel()).reshape(matrix.shape).T.reshape(-1) * 7919 % matrix.numel()
                matrix.view(-1)[order[:count]] = 0.0
                zeros += count
    model.save_pretrained(tmp_path / "m")
    told = secateur.pack(tmp_path / "m", tmp_path / "p", dtype)
    assert told["weights"] - told["nonzero"] == zeros
    predicted = packing.packed_bytes(model, zeros, dtype)
    if family == "llama":
        assert abs(predicted - told["bytes"]) <= 2 * len(names)  # a share of a weight is rounded in each
    else:
        assert abs(predicted / told["bytes"] - 1) < 0.05


def test_same_input_same_bytes(toys: Path, tmp_path: Path) -> None:
    shutil.copytree(toys / "mixtral", tmp_path / "elsewhere")
    secateur.pack(toys / "mixtral", tmp_path / "a")
    secateur.pack(tmp_path / "elsewhere", tmp_path / "b")
    assert read_all(tmp_path / "a") == read_all(tmp_path / "b")
    secateur.unpack(tmp_path / "a", tmp_path / "u")
    secateur.pack(tmp_path / "u", tmp_path / "c")
    assert read_all(tmp_path / "a") == read_all(tmp_path / "c")


def test_sharded_in_and_sharded_out(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeroed("llama").save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert not (tmp_path / "m" / "model.safetensors").exists()
    secateur.pack(tmp_path / "m", tmp_path / "p", "fp32")
    secateur.pack(toys / "llama", tmp_path / "q", "fp32")
    assert read_all(tmp_path / "p") == read_all(tmp_path / "q")
    monkeypatch.setattr(write, "LARGEST_SINGLE", 1000)
    secateur.unpack(tmp_path / "p", tmp_path / "u")
    assert len(list((tmp_path / "u").glob("model-*.safetensors"))) == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "u")
    for name, value in AutoModelForCausalLM.from_pretrained(toys / "llama").state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_one_block_in_memory_at_a_time(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = Store.load_block, []

    def watched(self: Store, model: Any, index: int, *more: Any) -> None:
        seen.append(index)
        assert all(p.is_meta for n, p in model.named_parameters() if ".layers." in n)
        real(self, model, index, *more)

    monkeypatch.setattr(Store, "load_block", watched)
    secateur.pack(toys / "llama", tmp_path / "p")
    assert seen == [0, 1, 2]


def test_transformers_refuses_a_packed_directory(toys: Path, tmp_path: Path) -> None:
    """It must never fill in random weights."""
    secateur.pack(toys / "llama", tmp_path / "p")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")


def test_what_travels_and_what_does_not(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    (tmp_path / "m" / "plan.safetensors").write_bytes(b"x")
    (tmp_path / "m" / "LICENSE").write_text("free")
    secateur.pack(tmp_path / "m", tmp_path / "p")
    names = set(read_all(tmp_path / "p"))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "secateur.json"} <= names
    assert "plan.safetensors" not in names and "model.safetensors" not in names
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "secateur-packed",
        "format_version": 1,
        "dtype": "bf16",
    }
    assert config == json.loads((tmp_path / "m" / "config.json").read_text()) | {"dtype": "bfloat16"}
    assert json.loads((tmp_path / "p" / "secateur.json").read_text())["packed"]["dtype"] == "bf16"
    secateur.unpack(tmp_path / "p", tmp_path / "u")
    assert "packed" not in json.loads((tmp_path / "u" / "secateur.json").read_text())
    assert "quantization_config" not in json.loads((tmp_path / "u" / "config.json").read_text())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_checkpoints_with_a_size_per_layer(tmp_path: Path, family: str) -> None:
    model = zeroed(family)
    anatomy = anatomy_of(describe_skeleton(model))
    keeps = {}
    for block in anatomy.blocks:
        space = block.spaces["ffn"]
        keep = torch.ones(space.shape, dtype=torch.bool)
        keep[..., space.size - 7 * block.index :] = block.index == 0
        keeps[block.name] = {"ffn": keep}
    written(model, tmp_path / "m", keeps)
    secateur.pack(tmp_path / "m", tmp_path / "p", "fp32")
    secateur.unpack(tmp_path / "p", tmp_path / "u")
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        want = model(ids).logits
        assert torch.equal(secateur.load(tmp_path / "u")(ids).logits, want)
        torch.testing.assert_close(secateur.load(tmp_path / "p")(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_tile_plans_are_packed_as_tiles(tmp_path: Path) -> None:
    write_model(tmp_path / "m", "llama", hidden_size=64, intermediate_size=128, head_dim=16)
    words = ("--space", "weight", "--score", "magnitude", "--grain", "tile:8x8", "--sparsity", "0.75", "--no-measure")
    assert cli("prune", tmp_path / "m", "-o", tmp_path / "t", *words) == 0
    secateur.pack(tmp_path / "t", tmp_path / "p")
    with safe_open(tmp_path / "p" / "model-packed-00001-of-00004.safetensors", "pt") as shard:
        rows = json.loads(shard.metadata()["matrices"])
    assert {m["kind"] for row in rows.values() for m in row["matrices"]} == {"tile"}
    secateur.unpack(tmp_path / "p", tmp_path / "u")
    for name, value in load_file(tmp_path / "t" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "u" / "model.safetensors")[name], value.bfloat16()), name


def test_prune_and_pack_in_one_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "m")
    words = ("--space", "weight", "--score", "magnitude", "--sparsity", "0.5", "--no-measure")
    assert cli("prune", tmp_path / "m", "-o", tmp_path / "a", *words) == 0
    assert cli("pack", tmp_path / "a", "-o", tmp_path / "b") == 0
    assert cli("prune", tmp_path / "m", "-o", tmp_path / "c", *words, "--pack") == 0
    assert weights_of(tmp_path / "b") == weights_of(tmp_path / "c")
    assert cli("prune", tmp_path / "m", "-o", tmp_path / "d", *words, "--pack", "int8") == 0
    assert weights_of(tmp_path / "c") != weights_of(tmp_path / "d")
    capsys.readouterr()
    assert cli("prune", tmp_path / "m", "-o", tmp_path / "c", *words, "--pack", "--resume", "--json") == 0
    assert "finished" in said(capsys)["note"]
    assert cli("prune", tmp_path / "m", "-o", tmp_path / "c", *words, "--resume") == 2
    assert "pack: bf16 -> (not given)" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_refusals(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secateur.pack(toys / "llama", tmp_path / "p")
    before = read_all(tmp_path / "p")

    def refused(*words: object) -> str:
        assert cli(*words) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    words = ("--space", "weight", "--score", "magnitude", "--sparsity", "0.5")
    assert "unpack" in refused("prune", tmp_path / "p", "-o", tmp_path / "x", *words)
    assert "packed already" in refused("pack", tmp_path / "p", "-o", tmp_path / "x")
    assert "not packed" in refused("unpack", toys / "llama", "-o", tmp_path / "x")
    assert "int9" in refused("pack", toys / "llama", "-o", tmp_path / "x", "--dtype", "int9")
    assert "not empty" in refused("pack", toys / "llama", "-o", tmp_path / "p")
    assert "replace the input" in refused("unpack", tmp_path / "p", "-o", tmp_path / "p", "--overwrite")
    assert "no such" in refused("pack", "no where", "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists() and read_all(tmp_path / "p") == before
    assert cli("pack", toys / "llama", "-o", tmp_path / "p", "--dtype", "fp32", "--overwrite") == 0
    assert read_all(tmp_path / "p") != before


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        model = zeroed("llama")
        with torch.no_grad():
            model.get_parameter(name).view(-1)[3] = 1e5
        model.save_pretrained(tmp_path / "m")
        with pytest.raises(SecateurError, match=f"{name}.*fp16"):
            secateur.pack(tmp_path / "m", tmp_path / "p", "fp16")
        assert {p.name for p in tmp_path.iterdir()} == {"m"}


def test_an_interrupted_pack_leaves_nothing(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(resolve(toys / "llama"), tmp_path / "p", tick=stop)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_write_one_output(toys: Path, tmp_path: Path) -> None:
    """The second is told so, and leaves the first one's files alone."""
    secateur.pack(toys / "llama", tmp_path / "alone", "fp32")

    def packing(done: int, total: int) -> None:
        if done == 2:
            with pytest.raises(SecateurError, match="another run"):
                secateur.pack(toys / "gpt2", tmp_path / "p")

    def unpacking(done: int, total: int) -> None:
        with pytest.raises(SecateurError, match="another run"):
            secateur.unpack(tmp_path / "p", tmp_path / "u")

    pack_checkpoint(resolve(toys / "llama"), tmp_path / "p", "fp32", tick=packing)
    assert read_all(tmp_path / "p") == read_all(tmp_path / "alone")
    unpack_checkpoint(resolve(tmp_path / "p"), tmp_path / "u", tick=unpacking)
    assert {p.name for p in tmp_path.iterdir()} == {"alone", "p", "u"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "neox", "opt", "mixtral", "qwen3_moe"])
def test_a_packed_model_is_its_twin_with_zeros(toys: Path, tmp_path: Path, family: str, dtype: str) -> None:
    """The same logits up to rounding, the same greedy tokens, and nothing dense where a matrix is packed."""
    secateur.pack(toys / family, tmp_path / "p", dtype)
    secateur.unpack(tmp_path / "p", tmp_path / "u")
    model: Any = secateur.load(tmp_path / "p", torch.float32)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "u", dtype=torch.float32, attn_implementation="sdpa").eval()
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    anatomy = anatomy_of(describe_skeleton(twin))
    assert len(packed) == sum(max(m.experts, 1) for b in anatomy.blocks for m in b.matrices)
    names = {f"{b.name}.{m.tensor}" for b in anatomy.blocks for m in b.matrices}
    state = twin.state_dict()
    assert {m.dtype for m in packed} == {DTYPES[dtype]}
    assert sum(m.packed.nonzeros for m in packed) == sum(int(state[n].count_nonzero()) for n in names)
    assert not names & {n for n, _ in model.named_parameters()}
    assert not model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for tokens in (1, 7, 40):  # the kernel that skips zeros, and panels above its limit
        ids = torch.randint(3, 60, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-4)
    ids = torch.tensor([[3, 14, 15, 9, 26]])
    words = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **words), twin.generate(ids, **words))
    if dtype == "bf16":
        assert {p.dtype for p in secateur.load(tmp_path / "p").parameters()} == {torch.bfloat16}


def test_a_packed_encoder(toys: Path, tmp_path: Path) -> None:
    secateur.pack(toys / "bert", tmp_path / "p", "fp32")
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        want = BertForMaskedLM.from_pretrained(toys / "bert").eval()(ids).logits
        torch.testing.assert_close(secateur.load(tmp_path / "p")(ids).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_measure_and_inspect_see_through_the_packing(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    secateur.pack(toys / family, tmp_path / "p", "fp32")
    assert cli("measure", toys / family, tmp_path / "p", "--json") == 0
    plain, packed = said(capsys)["models"]
    for word in ("parameters", "nonzero", "macs_per_token", "kv_bytes_per_token"):
        assert plain[word] == packed[word], word
    state = load_file(toys / family / "model.safetensors")
    assert packed["bytes"] == sum(len(b) for b in weights_of(tmp_path / "p").values()) < plain["bytes"]
    assert cli("inspect", tmp_path / "p", "--json") == 0
    told = said(capsys)["packed"]
    names = packable(toys / family)
    assert told["weights"] == sum(state[n].numel() for n in names)
    assert told["nonzero"] == sum(int(state[n].count_nonzero()) for n in names)
    assert (told["dtype"], told["bytes"]) == ("fp32", packed["bytes"])


def test_the_report_of_a_packed_result_weighs_the_packed_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "m")
    words = ("--space", "weight", "--score", "magnitude", "--sparsity", "0.5", "--pack", "--json")
    assert cli("prune", tmp_path / "m", "-o", tmp_path / "p", *words) == 0
    dense, packed = said(capsys)["models"]
    assert packed["bytes"] == sum(len(b) for b in weights_of(tmp_path / "p").values()) < dense["bytes"]
    assert packed["nonzero"] < dense["nonzero"] and packed["parameters"] == dense["parameters"]
    assert "secateur.load" in (tmp_path / "p" / "README.md").read_text()
    assert cli("prune", tmp_path / "m", "-o", tmp_path / "q", *words, "--dry-run") == 0
    predicted = said(capsys)["dry_run"]["bytes"][1]
    headers = sum(8 + int.from_bytes(b[:8], "little") for b in weights_of(tmp_path / "p").values())
    assert predicted == packed["bytes"] - headers


@pytest.mark.parametrize("point", ["while it packs", "between two names", "before it is published"])
def test_a_run_stopped_while_packing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    write_model(tmp_path / "m")
    words = ("--space", "weight", "--score", "magnitude", "--sparsity", "0.5", "--no-measure", "--pack")
    assert cli("prune", tmp_path / "m", "-o", tmp_path / "a", *words) == 0
    real_write, real_rename = packing.write_packed, Path.rename

    def stop(store: Store, ready: Path, dtype: str) -> None:
        real_write(store, ready, dtype)
        (ready / "config.json").unlink()
        raise KeyboardInterrupt

    def stop_at(self: Path, target: Path) -> Path:
        if self.name == "packed":
            raise KeyboardInterrupt
        return real_rename(self, target)

    def stop_publishing(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if point == "while it packs":
            patch.setattr(packing, "write_packed", stop)
        elif point == "between two names":
            patch.setattr(Path, "rename", stop_at)
        else:
            patch.setattr(run, "publish", stop_publishing)
        assert cli("prune", tmp_path / "m", "-o", tmp_path / "b", *words) == 130
    assert not (tmp_path / "b").exists()
    assert cli("prune", tmp_path / "m", "-o", tmp_path / "b", *words, "--resume") == 0
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert {p.name for p in tmp_path.iterdir()} == {"m", "a", "b"}
