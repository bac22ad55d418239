"""Bad input through the whole command line: one sentence, exit code 2, nothing lost, nothing left behind.

Every case spoils one thing in a small world of files, runs the real command, and looks at everything a user could
see: exit code, both streams, and each file of the world, byte by byte, before and after.

A refusal comes as early as it can, and the spies hold it to that: ``words`` are refused before any model is
looked at, ``headers`` before a weight is read; ``weights`` need the weights themselves.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_files import UP, config, header, index, pickled, text, truncated, weights

import secateur.run  # noqa: F401 (before the spies, which what it imports would keep)
from secateur import cli
from secateur.engine import reading
from secateur.engine.host import build
from secateur.errors import SecateurError

Change = Callable[[Path], Any]
MAGNITUDE = "prune m -o out --no-measure --space weight --score magnitude"
WANDA = (
    "prune m -o out --no-measure --text text.txt --samples 2 --length 16 --space weight --score wanda --sparsity 0.5"
)
FFN = "prune m -o out --no-measure --space ffn --score magnitude"
PLAN = "prune m -o out --no-measure --plan plan.safetensors"
RECIPE = "prune --recipe r.yaml -o out --no-measure"


@dataclass(frozen=True)
class Case:
    """One thing that is wrong.

    Attributes:
        name: what is wrong.
        command: the command line, split at spaces; a list where a word holds what no file of tests could.
        says: words that the one line must hold: what was received, and what works.
        spoil: a change to the world, a directory with ``m`` (a Llama) and ``text.txt``.
        model: what ``m`` is a copy of.
        stage: words, headers or weights: how far the command may go before it refuses.
    """

    name: str
    command: str | list[str]
    says: tuple[str, ...]
    spoil: Change | None = None
    model: str = "llama"
    stage: str = "headers"


def at_model(*changes: Change) -> Change:
    return lambda world: [change(world / "m") for change in changes]


def gone(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def put(name: str, content: str | bytes) -> Change:
    return text(name, content)


def bomb_in_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    (folder / "tokenizer.model").write_bytes(pickle.dumps(("a", 1)))


def full_directory(name: str) -> Change:
    def spoil(world: Path) -> None:
        (world / name).mkdir()
        (world / name / "thesis.tex").write_text("years of work")

    return spoil


def earlier_result(world: Path) -> None:
    """A directory that Secateur wrote."""
    assert cli.main(f"{MAGNITUDE} --sparsity 0.25".split()) == 0


def interrupted(world: Path) -> None:
    """What a killed run leaves: its working directory, with a finished block in it."""
    earlier_result(world)
    (world / "out").rename(world / "made")
    work = world / ".out.secateur-work"
    (work / "step-0").mkdir(parents=True)
    (work / "lock").touch()
    (work / "step-0" / "block-00000.safetensors").write_bytes((world / "made" / "plan.safetensors").read_bytes())
    record = json.loads((world / "made" / "secateur.json").read_text())
    (work / "run.json").write_text(json.dumps({"recipe": record["recipe"], "model": "0" * 64}))


def a_plan(change: Callable[[dict[str, torch.Tensor]], Any] | None = None, **shapes: Any) -> Change:
    def spoil(world: Path) -> None:
        assert cli.main(["plan", "m", "-o", "planned", "--space", "ffn", "--score", "magnitude", "--keep", "0.5"]) == 0
        raw = (world / "planned" / "plan.safetensors").read_bytes()
        head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        said = json.loads(head["__metadata__"]["secateur"])
        bits = load_file(world / "planned" / "plan.safetensors")
        if change is not None:
            change(bits)
        said["shapes"] = {k: said["shapes"].get(k, [48]) for k in bits} | shapes
        save_file(bits, world / "plan.safetensors", {"secateur": json.dumps(said)})

    return spoil


def renamed_plan(old: str, new: str) -> Change:
    return a_plan(lambda bits: [bits.update({k.replace(old, new): bits.pop(k)}) for k in sorted(bits)])


BOMB = "a: &a [x, x]\n" + "\n".join(f"{n}: &{n} [*{p}, *{p}]" for p, n in zip("abcdefgh", "bcdefghi", strict=True))
STEP = "{space: weight, score: magnitude, sparsity: 0.5}"

CASES = [
    # the words of the command line
    Case("no verb", "", ("VERB", "--help"), stage="words"),
    Case("unknown verb", "prun m", ("'prun'", "prune", "measure"), stage="words"),
    Case("unknown option", f"{FFN} --keeep 0.5", ("--keeep", "--keep"), stage="words"),
    Case("no model", "prune -o out --space ffn --score magnitude --keep 0.5", ("no model",), stage="words"),
    Case("no output", "prune m --space ffn --score magnitude --keep 0.5", ("-o OUT",), stage="words"),
    Case("nothing to do", "prune m -o out", ("--space",), stage="words"),
    Case("unknown space", "prune m -o out --space neuron --score magnitude --keep 0.5", ("neuron", "ffn"), stage="words"),
    Case("unknown score", "prune m -o out --space ffn --score wands --keep 0.5", ("wands", "'wanda'"), stage="words"),
    Case("a method that is a score", "prune m -o out --space weight --method wanda --keep 0.5", ("'wanda'", "sparsegpt"), stage="words"),
    Case("a score that is a method", "prune m -o out --space weight --score sparsegpt --keep 0.5", ("'sparsegpt'",), stage="words"),
    Case("both score and method", "prune m -o out --space weight --score wanda --method sparsegpt --keep 0.5", ("give one",), stage="words"),
    Case("neither", "prune m -o out --space weight --keep 0.5", ("magnitude",), stage="words"),
    Case("unknown budget", f"{FFN} --keep 0.5 --budget owls", ("owls", "'owl'"), stage="words"),
    Case("unknown option of a score", "prune m -o out --space ffn --score magnitude:q=2 --keep 0.5", ("'q'", "p"), stage="words"),
    Case("wrong option of a score", "prune m -o out --space ffn --score magnitude:p=3 --keep 0.5", ("3", "p: 1 or p: 2"), stage="words"),
    Case("option of another kind", "prune m -o out --space weight --score ria:a=many --keep 0.5", ("many",), stage="words"),
    Case("option without a value", "prune m -o out --space weight --score ria:a= --keep 0.5", ("ria:a=",), stage="words"),
    Case("a class that is not there", "prune m -o out --space weight --score no.such:Thing --keep 0.5", ("no.such:Thing", "my.module:MyScore"), stage="words"),
    Case("a class of another kind", "prune m -o out --space weight --score pathlib:Path --keep 0.5", ("pathlib:Path",), stage="words"),
    Case("a class by a file's path", "prune m -o out --space weight --score ./mine.py:Mine --keep 0.5", ("./mine.py:Mine", "my.module:MyScore"), stage="words"),
    Case("owl with nonsense", f"{MAGNITUDE} --sparsity 0.5 --budget owl:m=few", ("m=few", "strength"), stage="words"),
    Case("illegal score for the space", "prune m -o out --space weight --score activation_norm --keep 0.5", ("space weight", "ffn"), stage="words"),
    Case("layers by an expert score", "prune m -o out --space layer --score router_mass --keep 1", ("layer", "expert"), stage="words"),
    Case("sparsity 1.5", f"{MAGNITUDE} --sparsity 1.5", ("1.5", "0.5 or 50%"), stage="words"),
    Case("sparsity -0.1", f"{MAGNITUDE} --sparsity=-0.1", ("-0.1",), stage="words"),
    Case("sparsity 1", f"{MAGNITUDE} --sparsity 1", ("'1'",), stage="words"),
    Case("sparsity nan", f"{MAGNITUDE} --sparsity nan", ("nan",), stage="words"),
    Case("keep 0", f"{FFN} --keep 0", ("'0'",), stage="words"),
    Case("keep 120%", f"{FFN} --keep 120%", ("120%",), stage="words"),
    Case("keep inf", f"{FFN} --keep inf", ("inf",), stage="words"),
    Case("keep without end", f"{FFN} --keep {'9' * 400}", ("999", "0.75"), stage="words"),
    Case("keep and sparsity disagree", f"{MAGNITUDE} --sparsity 0.5 --keep 0.6", ("keep 0.6, sparsity 0.5", "1 - sparsity"), stage="words"),
    Case("keep and target", f"{FFN} --keep 0.5 --target params=-10%", ("keep, target",), stage="words"),
    Case("no amount", FFN, ("keep, sparsity, target",), stage="words"),
    Case("target nonsense", f"{FFN} --target params=lots", ("params=lots", "params=100M"), stage="words"),
    Case("target of another kind", f"{FFN} --target latency=10ms", ("latency=10ms", "bytes=90MB"), stage="words"),
    Case("target that grows", f"{FFN} --target params=+20%", ("+20%",), stage="words"),
    Case("at most worse nonsense", f"{MAGNITUDE} --at-most-worse=-5%", ("-5%", "5% or 0.05"), stage="words"),
    Case("n:m nonsense", f"{MAGNITUDE} --grain 5:4", ("5:4",), stage="words"),
    Case("n:m and keep disagree", f"{MAGNITUDE} --grain 2:4 --keep 0.7", ("keep 0.7, grain 2:4", "2/4"), stage="words"),
    Case("n:m with a budget", f"{MAGNITUDE} --grain 2:4 --budget owl", ("owl", "uniform"), stage="words"),
    Case("unknown grain", f"{MAGNITUDE} --grain rows --keep 0.5", ("rows", "row"), stage="words"),
    Case("a tile of nothing", f"{MAGNITUDE} --grain tile:0x4 --keep 0.5", ("tile:0x4",), stage="words"),
    Case("a grain for units", f"{FFN} --keep 0.5 --grain row", ("grain row", "unit"), stage="words"),
    Case("weights in units", f"{MAGNITUDE} --keep 0.5 --grain unit", ("grain unit", "row"), stage="words"),
    Case("weights cut", f"{MAGNITUDE} --keep 0.5 --apply cut", ("apply cut", "mask"), stage="words"),
    Case("another way to apply", f"{FFN} --keep 0.5 --apply melt", ("melt", "cut, mask"), stage="words"),
    Case("experts masked", "prune m -o out --space expert --score magnitude --keep 2 --apply mask", ("apply mask", "cut"), model="mixtral", stage="words"),
    Case("protect nonsense", f"{FFN} --keep 0.5 --protect middle:2", ("middle", "first"), stage="words"),
    Case("protect without a count", f"{FFN} --keep 0.5 --protect first:all", ("first:all", "first:2,last:1"), stage="words"),
    Case("no such dtype", f"{FFN} --keep 0.5 --dtype int8", ("int8", "bf16"), stage="words"),
    Case("no such device", f"{FFN} --keep 0.5 --device tpu", ("tpu", "cpu"), stage="words"),
    Case("batch size 0", f"{FFN} --keep 0.5 --batch-size 0", ("batch_size", "0"), stage="words"),
    Case("samples -1", f"{FFN} --keep 0.5 --samples=-1", ("samples", "-1"), stage="words"),
    Case("length 1", f"{FFN} --keep 0.5 --length 1", ("length", "1"), stage="words"),
    Case("length of words", f"{FFN} --keep 0.5 --length long", ("long",), stage="words"),
    Case("threads 0", f"{FFN} --keep 0.5 --threads 0", ("threads", "0"), stage="words"),
    Case("threads beyond any machine", f"{FFN} --keep 0.5 --threads 4294967296", ("threads", "4294967296"), stage="words"),
    Case("threads beyond any machine, measured", "measure m --threads 100000", ("threads", "100000"), stage="words"),
    Case("seed beyond 64 bits", f"{FFN} --keep 0.5 --seed {1 << 80}", ("seed",), stage="words"),
    Case("seed -1", f"{FFN} --keep 0.5 --seed=-1", ("seed", "-1"), stage="words"),
    Case("measure with no windows", "measure m --windows 0", ("windows", "0"), stage="words"),
    Case("measure one token", "measure m --length 1", ("length", "1"), stage="words"),
    Case("measure in int8", "measure m --dtype int8", ("int8", "bf16"), stage="words"),
    Case("bench of more sequences than fit", "bench m --batch 100000000000", ("bytes", "100000000000")),
    Case("an output that is not UTF-8", [*FFN.replace("-o out", "-o caf\udce9").split(), "--keep", "0.5"], ("caf\\udce9", "UTF-8"), stage="words"),
    Case("a model that is not UTF-8, measured", ["measure", "m\udce9"], ("m\\udce9", "UTF-8"), stage="words"),
    Case("a prompt that is not UTF-8", ["run", "m", "--prompt", "\udcff"], ("\\udcff", "UTF-8"), stage="words"),
    Case("resume and dry run of nothing", "report", ("OUT", "--help"), stage="words"),
    # recipes and maps
    Case("no recipe", RECIPE, ("r.yaml",), stage="words"),
    Case("an empty recipe", RECIPE, ("r.yaml",), put("r.yaml", ""), stage="words"),
    Case("a recipe that is a list", RECIPE, ("r.yaml", "mapping"), put("r.yaml", "[1, 2]"), stage="words"),
    Case("a recipe of bytes", RECIPE, ("r.yaml", "UTF-8"), put("r.yaml", b"\xff\xfe\x00m"), stage="words"),
    Case("a recipe that is a directory", RECIPE, ("r.yaml",), lambda w: (w / "r.yaml").mkdir(), stage="words"),
    Case("not YAML", RECIPE, ("r.yaml", "line"), put("r.yaml", "model: [m\nsteps: }"), stage="words"),
    Case("an unknown recipe word", RECIPE, ("modle", "'model'"), put("r.yaml", f"modle: m\nsteps: [{STEP}]"), stage="words"),
    Case("an unknown step word", RECIPE, ("sparseness", "sparsity"), put("r.yaml", "model: m\nsteps: [{space: weight, score: magnitude, sparseness: 0.5}]"), stage="words"),
    Case("an unknown text word", RECIPE, ("lenght", "'length'"), put("r.yaml", f"model: m\ntext: {{lenght: 5}}\nsteps: [{STEP}]"), stage="words"),
    Case("a YAML tag", RECIPE, ("!!python/object", "tag"), put("r.yaml", "model: !!python/object/apply:os.system [touch exploded]"), stage="words"),
    Case("YAML aliases", RECIPE, ("alias",), put("r.yaml", "model: &m m\nout: *m"), stage="words"),
    Case("billion laughs", RECIPE, ("alias",), put("r.yaml", BOMB), stage="words"),
    Case("endless nesting", RECIPE, ("nested",), put("r.yaml", "model: " + "[" * 5000), stage="words"),
    Case("a huge recipe", RECIPE, ("256 KiB",), put("r.yaml", "model: m\n" + "#" * 300_000), stage="words"),
    Case("a word twice", RECIPE, ("model", "twice"), put("r.yaml", "model: m\nmodel: n"), stage="words"),
    Case("half a surrogate pair in a recipe", RECIPE, ("r.yaml", "\\ud800"), put("r.yaml", f'title: "\\ud800"\nmodel: m\nsteps: [{STEP}]'), stage="words"),
    Case("half a surrogate pair as a key", RECIPE, ("r.yaml", "\\ud800"), put("r.yaml", f'expect: {{"\\ud800": 1}}\nmodel: m\nsteps: [{STEP}]'), stage="words"),
    Case("NUL in the name of an output", "prune --recipe r.yaml", ("r.yaml", "a\\x00b"), put("r.yaml", f'out: "a\\0b"\nmodel: m\nsteps: [{STEP}]'), stage="words"),
    Case("NUL in the name of a map", RECIPE, ("r.yaml", "a\\x00b"), put("r.yaml", 'model: m\nsteps: [{space: weight, score: magnitude, map: "a\\0b"}]'), stage="words"),
    Case("steps that are a word", RECIPE, ("prune", "[{space"), put("r.yaml", "model: m\nsteps: prune"), stage="words"),
    Case("a step that is a word", RECIPE, ("prune",), put("r.yaml", "model: m\nsteps: [prune]"), stage="words"),
    Case("a step without a space", RECIPE, ("space",), put("r.yaml", "model: m\nsteps: [{score: wanda, keep: 0.5}]"), stage="words"),
    Case("the second step is wrong", RECIPE, ("step 2", "1.5"), put("r.yaml", f"model: m\nsteps: [{STEP}, {{space: weight, score: wanda, sparsity: 1.5}}]"), stage="words"),
    Case("a model that is a number", RECIPE, ("model", "7"), put("r.yaml", f"model: 7\nsteps: [{STEP}]"), stage="words"),
    Case("samples that are text", RECIPE, ("samples", "many"), put("r.yaml", f"model: m\ntext: {{samples: many}}\nsteps: [{STEP}]"), stage="words"),
    Case("text that is a number", RECIPE, ("text", "5"), put("r.yaml", f"model: m\ntext: 5\nsteps: [{STEP}]"), stage="words"),
    Case("keep that is a list", RECIPE, ("keep", "[1]"), put("r.yaml", "model: m\nsteps: [{space: ffn, score: magnitude, keep: [1]}]"), stage="words"),
    Case("no map", f"{MAGNITUDE} --map map.yaml", ("map.yaml",), stage="words"),
    Case("a map that is a mapping", f"{MAGNITUDE} --map map.yaml", ("map.yaml", "list"), put("map.yaml", "ffn: 0.5"), stage="words"),
    Case("a map rule without keep", f"{MAGNITUDE} --map map.yaml", ("match", "keep"), put("map.yaml", "[{match: ffn}]"), stage="words"),
    Case("a map rule with 150%", f"{MAGNITUDE} --map map.yaml", ("150%",), put("map.yaml", "[{match: ffn, keep: 150%}]"), stage="words"),
    Case("a map that matches nothing", f"{MAGNITUDE} --map map.yaml", ("layers:7-9",), put("map.yaml", "[{match: layers:7-9, keep: 0.5}]")),
    # the model
    Case("no such model", MAGNITUDE.replace(" m ", " nowhere/at/all ") + " --sparsity 0.5", ("nowhere/at/all", "hub id"), stage="words"),
    Case("a hub id without network", MAGNITUDE.replace(" m ", " some-org/some-model ") + " --sparsity 0.5", ("some-org/some-model", "smollm2"), stage="words"),
    Case("a file that is no model", "inspect text.txt", ("text.txt", "config.json"), stage="words"),
    Case("measure a missing model", "measure m nowhere/at/all", ("nowhere/at/all",), stage="words"),
    Case("garbage GGUF", "inspect g.gguf", ("g.gguf", "GGUF"), put("g.gguf", b"GGML" + bytes(50)), stage="words"),
    Case("truncated GGUF", f"{MAGNITUDE.replace(' m ', ' g.gguf ')} --sparsity 0.5", ("g.gguf",), put("g.gguf", b"GGUF\x03\x00\x00\x00" + b"\xff" * 30), stage="words"),
    Case("an empty GGUF", "measure g.gguf", ("g.gguf",), put("g.gguf", b""), stage="words"),
    Case("no config", f"{FFN} --keep 0.5", ("config.json",), at_model(gone("config.json")), stage="words"),
    Case("config is no JSON", f"{FFN} --keep 0.5", ("config.json", "JSON"), at_model(put("config.json", "{")), stage="words"),
    Case("unknown architecture", f"{FFN} --keep 0.5", ("lamma", "llama"), at_model(config(model_type="lamma")), stage="words"),
    Case("auto_map", f"{FFN} --keep 0.5", ("evil.Evil", "--trust-remote-code"), at_model(config(auto_map={"AutoModel": "evil.Evil"}), put("evil.py", "raise SystemExit('run')")), stage="words"),
    Case("auto_map, inspected", "inspect m --check", ("evil.Evil", "--trust-remote-code"), at_model(config(auto_map={"AutoModel": "evil.Evil"})), stage="words"),
    Case("auto_map, measured", "measure m", ("evil.Evil", "--trust-remote-code"), at_model(config(auto_map={"AutoModel": "evil.Evil"})), stage="words"),
    Case("trusted code that is not there", f"{FFN} --keep 0.5 --trust-remote-code", ("m",), at_model(config(auto_map={"AutoConfig": "evil.Evil"})), stage="words"),
    Case("GPTQ", f"{FFN} --keep 0.5", ("gptq", "unquantised"), at_model(config(quantization_config={"quant_method": "gptq"})), stage="words"),
    Case("AWQ", "inspect m", ("awq", "unquantised"), at_model(config(quantization_config={"quant_method": "awq"})), stage="words"),
    Case("bitsandbytes", "measure m", ("bitsandbytes", "unquantised"), at_model(config(quantization_config={"quant_method": "bitsandbytes"})), stage="words"),
    Case("MXFP4", f"{FFN} --keep 0.5", ("mxfp4", "unquantised"), at_model(config(quantization_config={"quant_method": "mxfp4"})), stage="words"),
    Case("FP8", f"{FFN} --keep 0.5", ("F8_E4M3", "unquantised"), at_model(header(lambda t: t[UP].update(dtype="F8_E4M3")))),
    Case("FP8, measured", "measure m", ("F8_E4M3", "unquantised"), at_model(header(lambda t: t[UP].update(dtype="F8_E4M3")))),
    Case("absurd layers", f"{FFN} --keep 0.5", ("num_hidden_layers", "1000000000"), at_model(config(num_hidden_layers=10**9)), stage="words"),
    Case("absurd width", "inspect m", ("intermediate_size",), at_model(config(intermediate_size=2**50)), stage="words"),
    Case("negative width", "inspect m", ("hidden_size", "-32"), at_model(config(hidden_size=-32)), stage="words"),
    Case("no heads", "inspect m", ("num_attention_heads",), at_model(config(num_attention_heads=0)), stage="words"),
    Case("a width that is a word", "inspect m", ("hidden_size",), at_model(config(hidden_size="wide"))),
    Case("config contradicts headers", f"{FFN} --keep 0.5", ("contradicts", "[32, 48]"), at_model(config(intermediate_size=40))),
    Case("a layer too many", f"{FFN} --keep 0.5", ("missing", "layers.2"), at_model(config(num_hidden_layers=3))),
    Case("no weights", f"{FFN} --keep 0.5", ("no weights", "model.safetensors"), at_model(gone("model.safetensors"))),
    Case("no weights, measured", "measure m", ("no weights", "model.safetensors"), at_model(gone("model.safetensors"))),
    Case("a pickle", f"{FFN} --keep 0.5", ("pytorch_model.bin", "save_pretrained"), at_model(pickled)),
    Case("a pickle, measured", "measure m", ("pytorch_model.bin", "save_pretrained"), at_model(pickled)),
    Case("an empty safetensors", f"{FFN} --keep 0.5", ("truncated", "0 bytes"), at_model(put("model.safetensors", b""))),
    Case("a truncated safetensors", f"{FFN} --keep 0.5", ("truncated",), at_model(truncated)),
    Case("a header that lies", f"{FFN} --keep 0.5", ("up_proj", "6144 bytes"), at_model(header(lambda t: t[UP].update(shape=[48, 33])))),
    Case("overlapping tensors", f"{FFN} --keep 0.5", ("byte",), at_model(header(lambda t: t[UP].update(data_offsets=[0, 6144])))),
    Case("a missing tensor", f"{FFN} --keep 0.5", ("missing", "up_proj"), at_model(weights(lambda s: s.pop(UP)))),
    Case("a wrong shape", f"{FFN} --keep 0.5", ("up_proj", "[48, 31]"), at_model(weights(lambda s: s.update({UP: torch.ones(48, 31)})))),
    Case("a missing shard", f"{FFN} --keep 0.5", ("shard", "missing"), at_model(lambda p: next(p.glob("model-0*")).unlink()), model="sharded"),
    Case("a shard outside", f"{FFN} --keep 0.5", ("../x.safetensors",), at_model(index(lambda t: t.update({UP: "../x.safetensors"}))), model="sharded"),
    Case("NaN", f"{FFN} --keep 0.5", ("up_proj", "NaN", "1 of 1536"), at_model(weights(lambda s: s[UP].view(-1).__setitem__(3, float("nan")))), stage="weights"),
    Case("infinity", f"{WANDA}", ("embed_tokens", "infinite"), at_model(weights(lambda s: s["model.embed_tokens.weight"].view(-1).__setitem__(3, float("inf")))), stage="weights"),
    Case("NaN, measured", "measure m --text text.txt --length 16", ("up_proj", "NaN"), at_model(weights(lambda s: s[UP].view(-1).__setitem__(3, float("nan")))), stage="weights"),
    Case("initial values that cannot be drawn", f"{MAGNITUDE} --keep 0.5", ("MixtralForCausalLM", "config.json"), at_model(config(initializer_range=-0.5)), model="mixtral", stage="weights"),
    Case("a record of ours that is no JSON", f"{FFN} --keep 0.5", ("secateur.json", "JSON"), at_model(put("secateur.json", "{"))),
    Case("a record with nonsense sizes", f"{FFN} --keep 0.5", ("ffn", "many"), at_model(put("secateur.json", '{"sizes": {"model.layers.0": {"ffn": "many"}}}'))),
    Case("a broken generation config", f"{FFN} --keep 0.5", ("generation_config.json",), at_model(put("generation_config.json", "{"))),
    Case("a generation config that is a list", f"{FFN} --keep 0.5", ("generation_config.json",), at_model(put("generation_config.json", "[]"))),
    Case("a generation config out of this world, run", "run m --prompt a", ("generation_config.json", "max_new_tokens"), at_model(put("generation_config.json", '{"max_new_tokens": 0}'))),
    Case("a record with sizes too large", f"{FFN} --keep 0.5", ("ffn", "49", "48"), at_model(put("secateur.json", '{"sizes": {"model.layers.0": {"ffn": 49}}}'))),
    Case("a record of another model", "measure m", ("model.layers.9",), at_model(put("secateur.json", '{"sizes": {"model.layers.9": {"ffn": 4}}}'))),
    # what this model cannot do
    Case("n:m that does not divide", f"{MAGNITUDE} --grain 2:5", ("2:5", "32")),
    Case("tiles that do not divide", f"{MAGNITUDE} --grain tile:16x10 --keep 0.5", ("tile:16x10", "32")),
    Case("more neurons than there are", f"{FFN} --keep 49", ("49", "48")),
    Case("patterns that match nothing", f"{MAGNITUDE} --sparsity 0.5 --include *.qproj.*", ("*.qproj.*", "model.layers.0*")),
    Case("protected from end to end", f"{FFN} --keep 0.5 --protect first:1,last:1", ("first:1,last:1", "fewer")),
    Case("experts below the router's top-k", "prune m -o out --no-measure --space expert --score magnitude --keep 1", ("1", "at least 2"), model="mixtral"),
    Case("experts of a dense model", "prune m -o out --no-measure --space expert --score magnitude --keep 1", ("expert", "ffn")),
    Case("layers of BERT", "prune m -o out --no-measure --space layer --score magnitude --keep 1", ("layer", "ffn"), model="bert"),
    Case("groups where there are none", "prune m -o out --no-measure --space kv_group --score magnitude --keep 1", ("kv_group", "ffn"), model="mqa"),
    Case("all layers but none", "prune m -o out --no-measure --space layer --score magnitude --keep 3", ("3", "2")),
    Case("the second step does not divide", RECIPE, ("2:5",), put("r.yaml", f"model: m\nsteps: [{STEP}, {{space: weight, score: magnitude, grain: '2:5'}}]")),
    Case("the second step has too many", RECIPE, ("400", "48"), put("r.yaml", f"model: m\nsteps: [{STEP}, {{space: ffn, score: magnitude, keep: 400}}]")),
    Case("the second step has no such space", RECIPE, ("expert", "ffn"), put("r.yaml", f"model: m\nsteps: [{STEP}, {{space: expert, score: magnitude, keep: 4}}]")),
    Case("a target out of reach", f"{FFN} --target params=10", ("params=10", "another space")),
    Case("a target beyond the model", f"{FFN} --target params=9G", ("params=9G",)),
    Case("a mask for bytes", f"{FFN} --target bytes=-10% --apply mask", ("bytes=-10%", "cut")),
    # text
    Case("no tokenizer", WANDA, ("tokenizer", "magnitude"), at_model(gone("tokenizer.json", "tokenizer_config.json"))),
    Case("a broken tokenizer", WANDA, ("tokenizer",), at_model(put("tokenizer.json", "{"))),
    Case("a tokenizer of nonsense", WANDA, ("tokenizer",), at_model(bomb_in_tokenizer)),
    Case("a tokenizer without its parts", WANDA, ("tokenizer", "vocab"), at_model(put("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE"}}'))),
    Case("a broken tokenizer, measured", "measure m", ("tokenizer",), at_model(put("tokenizer.json", "{"))),
    Case("no such text", WANDA.replace("text.txt", "nowhere.txt"), ("nowhere.txt", "builtin")),
    Case("text that is a directory", WANDA.replace("text.txt", "m"), ("m", "jsonl")),
    Case("an empty text", WANDA, ("text.txt", "empty"), put("text.txt", "")),
    Case("text too short", WANDA, ("10 tokens", "18"), put("text.txt", "a" * 10)),
    Case("more text than fits", WANDA.replace("--samples 2", "--samples 1000000000000"), ("bytes", "1000000000000")),
    Case("text that is not UTF-8", WANDA, ("text.txt", "UTF-8"), put("text.txt", b"caf\xe9 " * 100)),
    Case("JSONL without text", WANDA.replace("text.txt", "t.jsonl"), ("line 1", '"text"'), put("t.jsonl", '{"words": "a"}\n')),
    Case("JSONL that is no JSON", WANDA.replace("text.txt", "t.jsonl"), ("line 2", "t.jsonl"), put("t.jsonl", '{"text": "a"}\n{\n')),
    Case("a data set that is not there", WANDA.replace("text.txt", "no/such-data"), ("no/such-data", "builtin")),
    Case("windows longer than the model", WANDA.replace("--length 16", "--length 65"), ("65", "64")),
    Case("measure: no such text", "measure m --text nowhere.txt", ("nowhere.txt",)),
    Case("measure: text too short", "measure m --text text.txt --length 60", ("tokens", "60"), put("text.txt", "short")),
    Case("no choices", "measure m --choices c.jsonl", ("c.jsonl",)),
    Case("choices that are no JSON", "measure m --choices c.jsonl", ("line 1",), put("c.jsonl", "[")),
    Case("choices of another form", "measure m --choices c.jsonl", ("line 1", "goal"), put("c.jsonl", '{"q": 1}\n')),
    Case("choices with a label too far", "measure m --choices c.jsonl", ("label", "2"), put("c.jsonl", '{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}\n')),
    Case("an empty file of choices", "measure m --choices c.jsonl", ("c.jsonl", "empty"), put("c.jsonl", "")),
    Case("tasks without the extra", "measure m --tasks nosuchtask", ("nosuchtask", "secateur[tasks]")),
    Case("no CUDA", f"{FFN} --keep 0.5 --device cuda", ("--device cuda", "cpu"), stage="words"),
    Case("no CUDA, measured", "measure m --device cuda:1", ("cuda:1", "cpu"), stage="words"),
    # plans
    Case("no plan", PLAN, ("plan.safetensors",), stage="words"),
    Case("a plan of garbage", PLAN, ("plan.safetensors",), put("plan.safetensors", b"\x08" + bytes(80)), stage="words"),
    Case("a plan that is a model", PLAN, ("not a plan",), lambda w: shutil.copy(w / "m" / "model.safetensors", w / "plan.safetensors"), stage="words"),
    Case("a plan of another size", PLAN, ("0/ffn/model.layers.0", "[40]"), a_plan(lambda b: b.update({"0/ffn/model.layers.0": torch.zeros(5, dtype=torch.uint8)}), **{"0/ffn/model.layers.0": [40]})),
    Case("a plan that keeps nothing", PLAN, ("0/ffn/model.layers.0",), a_plan(lambda b: b["0/ffn/model.layers.0"].zero_())),
    Case("a plan with half its bits", PLAN, ("0/ffn/model.layers.0", "48"), a_plan(lambda b: b.update({"0/ffn/model.layers.0": torch.zeros(3, dtype=torch.uint8)})), stage="words"),
    Case("a plan with nonsense shapes", PLAN, ("0/ffn/model.layers.0",), a_plan(**{"0/ffn/model.layers.0": "many"}), stage="words"),
    Case("a plan of another model", PLAN, ("model.layers.7",), renamed_plan("layers.1", "layers.7")),
    Case("a plan of an unknown space", PLAN, ("neuron",), renamed_plan("ffn", "neuron"), stage="words"),
    Case("a plan that starts at step 3", PLAN, ("3: ffn",), renamed_plan("0/", "3/"), stage="words"),
    Case("a plan of a raised step", PLAN, ("²/ffn",), renamed_plan("0/", "²/"), stage="words"),
    Case("a plan beside other steps", f"{PLAN} --space weight --score magnitude --keep 0.5", ("0/ffn/model.layers.0", "[48]"), a_plan()),
    # outputs
    Case("output is full", f"{FFN} --keep 0.5", ("out", "not empty"), full_directory("out"), stage="words"),
    Case("output is full, overwritten", f"{FFN} --keep 0.5 --overwrite", ("out", "secateur.json"), full_directory("out"), stage="words"),
    Case("output was written before", f"{FFN} --keep 0.5", ("out", "--overwrite"), earlier_result, stage="words"),
    Case("output is a file", f"{FFN} --keep 0.5", ("out",), put("out", "a"), stage="words"),
    Case("output is the input", f"{FFN} --keep 0.5 --overwrite".replace("-o out", "-o m"), ("m", "input"), stage="words"),
    Case("output is the input by a link", f"{FFN} --keep 0.5 --overwrite", ("out", "input"), lambda w: (w / "out").symlink_to("m"), stage="words"),
    Case("output holds the input", f"{FFN} --keep 0.5 --overwrite".replace("-o out", "-o ."), ("input",), stage="words"),
    Case("output is inside the input", f"{FFN} --keep 0.5".replace("-o out", "-o m/sub"), ("m/sub", "input"), stage="words"),
    Case("output is inside by a link", f"{FFN} --keep 0.5".replace("-o out", "-o l/sub"), ("l/sub", "input"), lambda w: (w / "l").symlink_to("m"), stage="words"),
    Case("output is under a file", f"{FFN} --keep 0.5".replace("-o out", "-o text.txt/out"), ("text.txt/out",), stage="words"),
    Case("output's name is too long", f"{FFN} --keep 0.5".replace("-o out", "-o " + "x" * 250), ("long",), stage="words"),
    Case("output is a link to nowhere", f"{FFN} --keep 0.5", ("out",), lambda w: (w / "out").symlink_to("nowhere"), stage="words"),
    Case("output is empty text", ["prune", "m", "-o", "", "--space", "ffn", "--score", "magnitude", "--keep", "0.5"], ("-o",), stage="words"),  # type: ignore[arg-type]
    Case("resume with other words", f"{FFN} --keep 0.5 --resume", ("steps[0]", "another recipe"), earlier_result, stage="words"),
    Case("resume on what is not ours", f"{FFN} --keep 0.5 --resume", ("out", "not empty"), full_directory("out"), stage="words"),
    Case("resume with other words, interrupted", f"{FFN} --keep 0.5 --resume", ("recipe changed", "steps[0]", "--overwrite"), interrupted),
    Case("resume with another model", f"{MAGNITUDE} --sparsity 0.25 --resume", ("files changed", "--overwrite"), interrupted),
    Case("an interrupted run in the way", f"{FFN} --keep 0.5", (".out.secateur-work", "--resume", "--overwrite"), interrupted),
    # reports
    Case("no report", "report m", ("report.json", "prune"), stage="words"),
    Case("no such output", "report nowhere", ("nowhere",), stage="words"),
    Case("a report that is no JSON", "report m", ("report", "JSON"), at_model(put("report.json", "{")), stage="words"),
    Case("a report of another kind", "report m", ("schema",), at_model(put("report.json", '{"a": 1}')), stage="words"),
    Case("a report in bad bytes", "report m", ("report.json", "UTF-8"), at_model(put("report.json", b"\xff")), stage="words"),
    Case("a report with NaN", "report m", ("NaN",), at_model(put("report.json", '{"schema": NaN}')), stage="words"),
]  # fmt: skip


class TooLate(BaseException):
    """What a spy raises; no handler of ours takes it for somebody's bad input."""


def seen(world: Path) -> dict[str, str]:
    """Everything below a directory: kind, content or target of every path."""
    out = {}
    for path in sorted(world.rglob("*")):
        name = str(path.relative_to(world))
        if path.is_symlink():
            out[name] = f"link to {path.readlink()}"
        else:
            out[name] = "directory" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return out


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SecateurError]]:
    """Every SecateurError that reached the command line."""
    caught: list[SecateurError] = []
    run = cli._run

    def noting(words: list[str]) -> int:
        try:
            return run(words)
        except SecateurError as error:
            caught.append(error)
            raise

    monkeypatch.setattr(cli, "_run", noting)
    return caught


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_refused(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    refusals: list[SecateurError],
    case: Case,
) -> None:
    shutil.copytree(models / case.model, tmp_path / "m")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    monkeypatch.chdir(tmp_path)
    if case.spoil is not None:
        case.spoil(tmp_path)
    before = seen(tmp_path)
    capfd.readouterr()

    def never(what: str) -> Callable[..., Any]:
        def spy(*args: Any, **kwargs: Any) -> Any:
            raise TooLate(f"{what} before the refusal")

        return spy

    if case.stage != "weights":
        monkeypatch.setattr(reading, "read_entry", never("a weight was read"))
    if case.stage == "words":
        monkeypatch.setattr(build, "build_model", never("a model was built"))
    code = cli.main(case.command.split() if isinstance(case.command, str) else case.command)
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("secateur: ") and err.count("\n") == 1 and len(err) < 800, err
    for words in case.says:
        assert words in err
    after = seen(tmp_path)
    work = {name for name in after if name.startswith(".out.secateur-work")} if case.stage == "weights" else set()
    assert {k: v for k, v in after.items() if k not in work} == before
    assert len(refusals) == 1 and refusals[0].works, f"it does not say what works: {err}"
