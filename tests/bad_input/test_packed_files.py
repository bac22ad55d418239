"""Packed checkpoints that are wrong: one sentence each, whatever was spoiled; and thousands of mutants."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import secateur
from secateur.errors import SecateurError

HERE = Path(__file__).parent
SIZES: dict[str, Any] = dict(
    vocab_size=20,
    hidden_size=32,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    bos_token_id=1,
    eos_token_id=2,
)


def thinned(model: Any, share: float) -> Any:
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1 and ("proj" in name or "mlp" in name or "attn" in name):
                value[torch.rand(value.shape) < share] = 0.0
    return model


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind and dtype: bitmasks, csr, tiles, dense; codes with scales; stacks and turned matrices."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("plain")
    thinned(LlamaForCausalLM(LlamaConfig(**SIZES)), 0.5).save_pretrained(root / "half")
    wide = SIZES | {"hidden_size": 128}  # rows so long that column indices take less than bits
    thinned(LlamaForCausalLM(LlamaConfig(**wide)), 0.98).save_pretrained(root / "few")
    thinned(LlamaForCausalLM(LlamaConfig(**SIZES)), 0.0).save_pretrained(root / "whole")
    thinned(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)), 0.5).save_pretrained(root / "experts")
    gpt2 = GPT2Config(vocab_size=20, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2)
    thinned(GPT2LMHeadModel(gpt2), 0.5).save_pretrained(root / "turned")
    record = {"sizes": {}, "recipe": {"steps": [{"space": "weight", "grain": "tile:8x4"}]}}
    shutil.copytree(root / "few", root / "tiles")
    (root / "tiles" / "secateur.json").write_text(json.dumps(record))
    out = tmp_path_factory.mktemp("packed")
    for name, dtype in (
        ("half", "bf16"), ("half", "int8"), ("few", "fp32"), ("whole", "fp16"), ("experts", "bf16"), ("turned", "int8"),
        ("tiles", "bf16"),
    ):  # fmt: skip
        secateur.pack(root / name, out / f"{name}-{dtype}", dtype)
    return out


def test_all_kinds_are_there(packed: Path) -> None:
    kinds = set()
    for shard in packed.glob("*/*.safetensors"):
        raw = shard.read_bytes()
        table = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        rows = json.loads(table["__metadata__"]["matrices"])
        kinds |= {m["kind"] for row in rows.values() for m in row["matrices"]}
    assert kinds == {"bitmask", "csr", "tile", "dense"}


def header(change: Callable[[dict[str, Any]], Any], shard: int = 1) -> Callable[[Path], None]:
    """Spoil a shard's header."""

    def spoil(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[shard - 1]
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8 : 8 + length])
        change(table)
        head = json.dumps(table).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + length :])

    return spoil


UP = "model.layers.0.mlp.up_proj.weight"


def matrices(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Spoil the list of packed matrices of the first shard."""

    def inner(table: dict[str, Any]) -> None:
        rows = json.loads(table["__metadata__"]["matrices"])
        change(rows)
        table["__metadata__"]["matrices"] = json.dumps(rows)

    return header(inner)


def matrix(**words: Any) -> Callable[[Path], None]:
    return matrices(lambda rows: rows[UP]["matrices"][0].update(words))


def part(name: str, at: int, value: int, width: int = 8) -> Callable[[Path], None]:
    """Overwrite one number of a part of ``UP``."""

    def spoil(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        raw = bytearray(path.read_bytes())
        length = int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8 : 8 + length])
        begin, end = table[f"{UP}.packed.{name}"]["data_offsets"]
        begin, end = begin + 8 + length, end + 8 + length
        place = (begin if at >= 0 else end) + width * at
        raw[place : place + width] = value.to_bytes(width, "little", signed=True)
        path.write_bytes(raw)

    return spoil


def words(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        table = json.loads((folder / file).read_text())
        change(table)
        (folder / file).write_text(json.dumps(table))

    return spoil


def cut_short(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-3])


def quantised(**changes: Any) -> Callable[[Path], None]:
    return words("config.json", lambda c: c["quantization_config"].update(changes))


def doubled(table: dict[str, Any]) -> None:
    rows = table["__metadata__"]["matrices"]
    table["__metadata__"]["matrices"] = rows[:-1] + "," + rows[1:]


WORD = "secateur-packed"
INDEX = "model-packed.safetensors.index.json"
CASES: list[tuple[str, str, Callable[[Path], None], str]] = [
    ("truncated", "half-bf16", cut_short, "truncated"),
    ("no index", "half-bf16", lambda p: (p / INDEX).unlink(), "has no model-packed"),
    ("no shard", "half-bf16", lambda p: sorted(p.glob("*.safetensors"))[1].unlink(), "is missing"),
    ("index forgets", "half-bf16", words(INDEX, lambda t: t["weight_map"].popitem()), "index.json says otherwise"),
    ("shard outside", "half-bf16", words(INDEX, lambda t: t["weight_map"].update(x="../x.safetensors")), "beside it"),
    ("newer in config", "half-bf16", quantised(format_version=2), "another version"),
    ("newer in a shard", "half-bf16", header(lambda t: t["__metadata__"].update({WORD: "2"})), "version 2"),
    ("no version", "half-bf16", header(lambda t: t["__metadata__"].pop(WORD)), "version None"),
    ("config forgets", "half-bf16", words("config.json", lambda c: c.pop("quantization_config")), "does not say"),
    ("another method", "half-bf16", quantised(quant_method="gptq"), "does not say"),
    ("another dtype", "half-bf16", quantised(dtype="fp32"), "not in the dtype"),
    ("odd dtype", "half-bf16", quantised(dtype=["bf16"]), "unknown dtype"),
    ("no list", "half-bf16", header(lambda t: t["__metadata__"].pop("matrices")), "not valid JSON"),
    ("a list of another kind", "half-bf16", header(lambda t: t["__metadata__"].update(matrices="[]")), "is none"),
    ("a name twice", "half-bf16", header(doubled), "appears twice"),
    ("a matrix not listed", "half-bf16", matrices(lambda r: r.pop(UP)), "part of"),
    ("a matrix without parts", "half-bf16", matrices(lambda r: r.update(ghost=r[UP])), "parts of its kind"),
    ("a part not listed", "half-bf16", header(lambda t: t.update({f"{UP}.packed.more": t.pop(f"{UP}.packed.mask")})),
     "index.json says otherwise"),
    ("a word too many", "half-bf16", matrices(lambda r: r[UP].update(more=1)), "exactly turned, stacked"),
    ("two matrices", "half-bf16", matrices(lambda r: r[UP]["matrices"].append(r[UP]["matrices"][0])), "no stack"),
    ("none", "half-bf16", matrices(lambda r: r[UP].update(matrices=[])), "not described"),
    ("turned", "half-bf16", matrices(lambda r: r[UP].update(turned=True)), "contradicts config.json"),
    ("stacked", "half-bf16", matrices(lambda r: r[UP].update(stacked=True)), "parts of its kind"),
    ("unknown kind", "half-bf16", matrix(kind="zip"), "zip"),
    ("kind of another", "half-bf16", matrix(kind="csr"), "parts of its kind"),
    ("a list as dtype", "half-bf16", matrix(dtype=["bf16"]), "unknown dtype"),
    ("wide", "half-bf16", matrix(shape=[36, 2**33]), "contradicts config.json"),
    ("absurd", "half-bf16", matrix(shape=[2**30, 2**30]), "impossible shape"),
    ("negative", "half-bf16", matrix(shape=[-36, 32]), "impossible shape"),
    ("flat", "half-bf16", matrix(shape=[36 * 32]), "impossible shape"),
    ("fractional", "half-bf16", matrix(shape=[36.0, 32]), "impossible shape"),
    ("offsets fall", "half-bf16", part("offsets", 1, 10**6), "offsets"),
    ("offsets from below", "half-bf16", part("offsets", 0, -8), "offsets"),
    ("offsets beyond", "half-bf16", part("offsets", -1, 2**62), "offsets"),
    ("bits too many", "half-bf16", part("mask", 0, -1), "offsets do not count"),
    ("bits beyond", "half-bf16", part("mask", -1, -1), "beyond"),
    ("not a number", "half-bf16", part("values", 0, 0x7FC0, 2), "NaN or infinite"),
    ("scale below", "half-int8", part("scales", 0, -(2**30), 4), "scales"),
    ("scale infinite", "half-int8", part("scales", 0, 0x7F800000, 4), "scales"),
    ("columns beyond", "few-fp32", part("col", -1, 128, 2), "indices outside"),
    ("columns below", "few-fp32", part("col", 0, -1, 2), "indices outside"),
    ("rows fall", "few-fp32", part("crow", 1, -5), "rising"),
    ("tiles of nothing", "tiles-bf16", matrix(tile=[0, 4]), "tile"),
    ("tiles of the sky", "tiles-bf16", matrix(tile=[2**31, 2**31]), "tile"),
]  # fmt: skip


@pytest.mark.parametrize(("folder", "spoil", "says"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refused(packed: Path, tmp_path: Path, folder: str, spoil: Callable[[Path], None], says: str) -> None:
    shutil.copytree(packed / folder, tmp_path / "p")
    secateur.load(tmp_path / "p")
    spoil(tmp_path / "p")
    with pytest.raises(SecateurError) as told:
        secateur.load(tmp_path / "p")
    assert says in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(SecateurError):
        secateur.unpack(tmp_path / "p", tmp_path / "u")
    assert {p.name for p in tmp_path.iterdir()} == {"p"}


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors of the first shard; its index follows."""

    def spoil(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        with safe_open(path, "pt") as shard:
            said = shard.metadata()
        held = load_file(path)
        change(held)
        save_file(held, path, said)
        table = json.loads((folder / INDEX).read_text())
        others = {name: shard for name, shard in table["weight_map"].items() if shard != path.name}
        table["weight_map"] = others | dict.fromkeys(held, path.name)
        (folder / INDEX).write_text(json.dumps(table))

    return spoil


VALUES = f"{UP}.packed.values"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (matrices(lambda r: r[UP]["matrices"][0].pop("kind")), "unknown kind"),
        (matrix(kind=[]), "unknown kind (received: [])"),
        (matrix(kind="zip"), "unknown kind (received: 'zip')"),
        (matrix(kind="csr"), "parts of its kind"),
        (tensors(lambda t: t.pop(VALUES)), "parts of its kind"),
        (tensors(lambda t: t.update({f"{UP}.packed.more": t[VALUES].clone()})), "parts of its kind"),
        (tensors(lambda t: t.update({VALUES: t[VALUES][0].clone()})), "number of axes"),
    ],
)
def test_inspect_refuses_them_too(packed: Path, tmp_path: Path, spoil: Callable[[Path], None], says: str) -> None:
    """It reads headers only, so whatever it goes by is checked there."""
    shutil.copytree(packed / "half-bf16", tmp_path / "p")
    secateur.inspect(tmp_path / "p")
    spoil(tmp_path / "p")
    with pytest.raises(SecateurError) as told:
        secateur.inspect(tmp_path / "p")
    assert says in str(told.value) and UP in str(told.value)


def test_sizes_are_refused_before_anything_is_allotted(packed: Path, tmp_path: Path) -> None:
    """A config and headers that agree on a matrix beyond this machine, with next to no bytes for it."""
    shutil.copytree(packed / "few-fp32", tmp_path / "p")
    wide = 2**34
    words("config.json", lambda c: c.update(intermediate_size=wide))(tmp_path / "p")
    for shard in (1, 2):

        def grow(table: dict[str, Any]) -> None:
            rows = json.loads(table["__metadata__"]["matrices"])
            for row in rows.values():
                for m in row["matrices"]:
                    m["shape"] = [wide if n == 36 else n for n in m["shape"]]
            table["__metadata__"]["matrices"] = json.dumps(rows)

        header(grow, shard)(tmp_path / "p")
    for attempt in (lambda: secateur.load(tmp_path / "p"), lambda: secateur.unpack(tmp_path / "p", tmp_path / "u")):
        with pytest.raises(SecateurError):
            attempt()


def mutants(packed: Path, tmp_path: Path, count: int, seed: int) -> None:
    """Run the mutants in a process of its own."""
    shutil.copytree(packed, tmp_path / "all")
    path = os.pathsep.join([str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "mutants.py"), str(tmp_path / "all"), str(count), str(seed)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures"] == []
    assert found["refused"] + found["loads"] == count and found["refused"] > count / 2


def test_mutants(packed: Path, tmp_path: Path) -> None:
    mutants(packed, tmp_path, 300, 0)


@pytest.mark.slow
def test_ten_thousand_mutants(packed: Path, tmp_path: Path) -> None:
    mutants(packed, tmp_path, 10_000, 1)
