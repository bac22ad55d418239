"""Repairs through whole steps: every repair, grain and space on three families, and what layers are fitted on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import secateur
from secateur.anatomy import anatomy_of
from secateur.cliff import Dial
from secateur.effort import CHAINS
from secateur.engine.distribute import World
from secateur.engine.host.build import describe_skeleton
from secateur.engine.host.origin import resolve
from secateur.engine.plan import Plan
from secateur.engine.probes import CrossGram, DenseMean, Gram
from secateur.engine.store import Store
from secateur.engine.walk import batches_of
from secateur.engine.write import StepWriter
from secateur.errors import SecateurError
from secateur.measure.perplexity import perplexity
from secateur.methods.joint import METHODS
from secateur.prepared import prepared
from secateur.stage import Conditions, Nowhere, Stage
from secateur.step import Step
from secateur.workdir import BlockSink
from whole_toys import cli, make, said, tokens, weights_of, write_model, write_text

REPAIRS = ("least_squares", "mean_bias", "local_reconstruction", "block_reconstruction")
FAMILIES = ("llama", "gpt2", "mixtral")
CHOICES: dict[str, dict[str, Any]] = {
    "row": {"space": "weight", "score": "wanda", "grain": "row", "keep": 0.5},
    "matrix": {"space": "weight", "score": "magnitude", "grain": "matrix", "keep": 0.5},
    "columns": {"space": "weight", "score": "magnitude", "grain": "columns:8", "keep": 0.5},
    "2:4": {"space": "weight", "score": "wanda", "grain": "2:4"},
    "tile": {"space": "weight", "score": "magnitude", "grain": "tile:4x4", "keep": 0.75},
    "joint": {"space": "weight", "method": "sparsegpt", "keep": 0.5},
    "exchanged": {"space": "weight", "method": "dsnot", "keep": 0.5},
    "ffn": {"space": "ffn", "score": "wanda", "keep": 0.5},
    "ffn, masked": {"space": "ffn", "score": "wanda", "keep": 0.5, "apply": "mask"},
    "kv_group": {"space": "kv_group", "score": "wanda", "keep": 0.5},
    "head": {"space": "head", "score": "wanda", "keep": 0.5},
}
BATCHES = batches_of(tokens(6, 12), 2)


class Kept(Nowhere):
    """A sink that remembers every finished block's tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def write(self, index: int, module: nn.Module, plan: Plan) -> Plan:
        self.tensors |= {f"{index}.{name}": value.clone() for name, value in module.state_dict().items()}
        return plan


def carried_out(model: nn.Module, words: dict[str, Any], **at: Any) -> tuple[Plan, dict[str, Tensor], Stage]:
    """A step on a model in memory: its plan, its blocks' tensors, and the stage."""
    step = Step(**words)
    store = prepared(Store.of_model(model, torch.float32), step)
    stage, sink = Stage(store, step, 0, replace(Conditions(lambda: BATCHES), **at)), Kept()
    return stage.run(sink).plan, sink.tensors, stage


def pruned(model: Any, tensors: dict[str, Tensor], upto: int | None = None) -> Any:
    """A copy of the model with the first ``upto`` blocks (all by default) as they came out, masked."""
    new = copy.deepcopy(model)
    blocks: Any = new.get_submodule(anatomy_of(describe_skeleton(new)).path)
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if upto is None or int(index) < upto:
            blocks[int(index)].get_parameter(name).data = value.clone()
    return new


@contextmanager
def hearing(model: nn.Module, *names: str) -> Iterator[dict[str, list[Tensor]]]:
    """Inputs [tokens, in] of modules, batch by batch."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda m, a, n=n: found[n].append(a[0].reshape(-1, a[0].shape[-1]))
        )
        for n in names
    ]
    yield found
    for handle in handles:
        handle.remove()


@torch.no_grad()
def inputs(model: nn.Module, name: str) -> Tensor:
    """What a module reads on all of the text, in fp64 [tokens, in]."""
    with hearing(model, name) as found:
        for ids in BATCHES:
            model(input_ids=ids)
    return torch.cat(found[name]).double()


@torch.no_grad()
def answers(model: Any, block: int) -> list[Tensor]:
    """What a block answers, window by window, [length, hidden]."""
    found: list[Tensor] = []
    handle = model.model.layers[block].register_forward_hook(lambda m, a, out: found.append(out.squeeze(0)))
    for window in torch.cat(BATCHES).split(1):
        model(input_ids=window)
    handle.remove()
    return found


def relative(answer: Sequence[Tensor], target: Sequence[Tensor]) -> float:
    """|error|^2 / (|target|^2 + its median), the mean over each window's tokens, and over the windows."""
    found = []
    for y, t in zip(answer, target, strict=True):
        sizes = [float(row @ row) for row in t.double()]
        middle = sorted(sizes)[(len(sizes) - 1) // 2]
        off = [float(row @ row) for row in (y - t).double()]
        found.append(sum(o / (s + middle) for o, s in zip(off, sizes, strict=True)) / len(sizes))
    return sum(found) / len(found)


def solved(x: Tensor, y: Tensor, prior: Tensor, mask: Tensor, damping: float = 0.01) -> Tensor:
    """min |X w - y|^2 + shift |w - prior|^2 on each row's survivors by a general solver; y [tokens, out]."""
    shift = damping * float((x**2).sum(0).mean())
    x = torch.cat([x, shift**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    y = torch.cat([y, shift**0.5 * prior.double().T])
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for i, keep in enumerate(mask):
        out[i, keep] = torch.linalg.lstsq(x[:, keep], y[:, i : i + 1]).solution.squeeze(1)
    return out


LEGAL = [(f, r, c) for f in FAMILIES for r in REPAIRS for c in CHOICES if (f, r) != ("mixtral", "mean_bias")]


@pytest.mark.parametrize(("family", "repair", "choice"), LEGAL)
def test_every_repair_on_every_choice(family: str, repair: str, choice: str) -> None:
    """The same booleans in the first block as without; zeros stay; what is not read by what was pruned stays."""
    model, words = make(family), CHOICES[choice]
    plan, plain, _ = carried_out(model, words)
    mended_plan, mended, stage = carried_out(model, {**words, "repair": repair})
    for key in plan:
        if ".0." in key or key.endswith(".0"):
            assert torch.equal(plan[key], mended_plan[key])
        assert int(plan[key].sum()) == int(mended_plan[key].sum())
    nothing = torch.zeros(1)  # what a bias that was added began as
    changed = {
        n for n, v in mended.items() if n[:2] == "0." and not torch.equal(v, plain.get(n, nothing.expand(v.shape)))
    }
    assert changed
    assert all(bool(torch.isfinite(v).all()) for v in mended.values())
    if repair == "mean_bias":
        assert all("bias" in name for name in changed)
        assert {n for n in mended if n not in plain} <= {n for n in mended if n.endswith("bias")}
    else:
        assert mended.keys() == plain.keys()
        assert all("bias" not in name and "norm" not in name and "gate.weight" not in name for name in changed)
    if words["space"] == "weight":
        for key in mended_plan:
            index, _, name = key.split("layers.")[-1].split("h.")[-1].partition(".")
            gone = mended[f"{index}.{name}"][~mended_plan[key]]
            assert torch.equal(gone.view(torch.int32), torch.zeros_like(gone).view(torch.int32)), key
    if repair == "least_squares" and words["space"] != "weight":
        assert all(n.split(".")[-2] in ("down_proj", "o_proj", "c_proj", "experts") for n in changed)
    if repair.endswith("_reconstruction"):
        assert len(stage.fits) == (6 if words["space"] == "weight" and repair.startswith("local") else 3)
        assert all(f.after <= f.before for f in stage.fits) and any(f.after < 0.95 * f.before for f in stage.fits)


@pytest.mark.parametrize(
    ("choice", "names"), [("row", ("attn.c_attn", "mlp.c_proj")), ("ffn, masked", ("mlp.c_proj",))]
)
def test_mean_bias_keeps_the_mean_output_beside_biases_that_were_there(choice: str, names: tuple[str, ...]) -> None:
    """In the first block, whose inputs nothing changed; the neurons that a mask takes are zeroed before the reader."""
    model, words = make("gpt2"), CHOICES[choice] | {"repair": "mean_bias"}
    plan, tensors, _ = carried_out(model, words)
    for name in names:
        x, old = inputs(model, f"transformer.h.0.{name}"), model.transformer.h[0].get_submodule(name)
        before = x @ old.weight.detach().double() + old.bias.detach().double()
        if choice != "row":
            x = x * plan["0/ffn/transformer.h.0"]
        assert float(old.bias.detach().abs().max()) > 0.01  # there is something to overwrite
        after = x @ tensors[f"0.{name}.weight"].double() + tensors[f"0.{name}.bias"].double()
        torch.testing.assert_close(after.mean(0), before.mean(0), rtol=1e-4, atol=1e-5)
        assert float((after - before).abs().max()) > 0.01


@pytest.mark.parametrize("apply", ["mask", "cut"])
def test_experts_are_fitted_and_nothing_else_mends_them(apply: str) -> None:
    words = {"space": "expert", "score": "router_mass", "keep": 3, "apply": apply}
    _, _, stage = carried_out(make("mixtral"), {**words, "repair": "local_reconstruction"})
    assert [f.name for f in stage.fits] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert all(f.after < f.before for f in stage.fits)
    for repair in ("least_squares", "mean_bias"):
        with pytest.raises(SecateurError, match="expert"):
            carried_out(make("mixtral"), {**words, "repair": repair})


@pytest.mark.parametrize("family", ["opt", "bert", "falcon", "gemma2"])
@pytest.mark.parametrize("choice", ["row", "ffn"])
@pytest.mark.parametrize("repair", ["local_reconstruction", "block_reconstruction"])
def test_sub_layers_and_blocks_of_other_shapes_are_fitted(family: str, choice: str, repair: str) -> None:
    _, _, stage = carried_out(make(family), {**CHOICES[choice], "repair": f"{repair}:products=walk"})
    assert stage.fits and all(f.after < f.before for f in stage.fits)


MATRICES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize("fit_on", ["dense", "pruned", "mix", "mix:share=1"])
@pytest.mark.parametrize("choice", ["row", "ffn"])
def test_least_squares_fits_what_it_says(fit_on: str, choice: str) -> None:
    """The second block against a general solver, on inputs heard in the host's own forward passes."""
    model, words = make("llama"), {**CHOICES[choice], "repair": "least_squares", "fit_on": fit_on}
    plan, tensors, _ = carried_out(model, words)
    behind = pruned_or_cut(model, tensors, plan, 1)
    for name in MATRICES if choice == "row" else ("mlp.down_proj",):
        full = f"model.layers.1.{name}"
        w = model.get_submodule(full).weight.detach().double()
        dense, here = inputs(model, full), inputs(behind, full)
        x = dense if fit_on == "dense" else here
        share = {"dense": 1, "pruned": 0, "mix": 0.25, "mix:share=1": 1}[fit_on]
        y = (here + share * (dense - here)) @ w.T
        if choice == "row":
            mask, got = plan[f"0/weight/{full}.weight"], tensors[f"1.{name}.weight"]
        else:
            mask = plan["0/ffn/model.layers.1"].expand(w.shape)
            got = torch.zeros_like(w).masked_scatter(mask, tensors[f"1.{name}.weight"].double())
        want = solved(x, y, w, mask)
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-3)
        off = [float((x @ v.double().T - y).square().sum()) for v in (got, w.float() * mask)]
        assert off[0] < 0.9 * off[1]


def pruned_or_cut(model: Any, tensors: dict[str, Tensor], plan: Plan, upto: int) -> Any:
    """Like `pruned`, also where neurons were cut."""
    new = pruned(model, tensors, upto)
    for layer in list(new.model.layers)[:upto]:
        layer.mlp.gate_proj.out_features = layer.mlp.up_proj.out_features = layer.mlp.up_proj.weight.shape[0]
    return new


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if Gram in cls().needs])
def test_a_joint_method_sees_the_weights_to_aim_at(method: str) -> None:
    """On a mix, its errors against the dense model's outputs are smaller than when it is fitted on one stream."""
    model, words = make("llama"), {"space": "weight", "method": method, "keep": 0.5}
    off = {}
    for fit_on in ("pruned", "mix"):
        _, tensors, _ = carried_out(model, {**words, "fit_on": fit_on})
        behind, off[fit_on] = pruned(model, tensors, 2), 0.0
        for name in MATRICES:
            full = f"model.layers.2.{name}"
            y = inputs(model, full) @ model.get_submodule(full).weight.detach().double().T
            got = inputs(behind, full) @ tensors[f"2.{name}.weight"].double().T
            off[fit_on] += float((got - y).square().sum() / y.square().sum())
    assert off["mix"] < off["pruned"]


@pytest.mark.parametrize("share", [1, 0.25])
def test_the_two_streams_of_experts_are_paired_token_by_token(share: float) -> None:
    """Every expert's cross statistics against the definition of a Mixtral layer, on both streams' inputs."""
    model = make("mixtral")
    step = Step("weight", score="wanda", keep=0.5, repair="least_squares", fit_on=f"mix:share={share}")
    stage = Stage(Store.of_model(model, torch.float32), step, 0, Conditions(lambda: BATCHES))
    stage.store.load_rest(stage.model, "cpu")
    seen = {}
    for visit in stage.visits((Gram, CrossGram, DenseMean), "t", fits=True):
        seen = visit.evidence
        if visit.block.index == 1:
            break
        for p in visit.module.parameters():
            p.data = (10 * p.data).round() / 10  # a changed block
    behind = copy.deepcopy(model)
    for p in behind.model.layers[0].parameters():
        p.data = (10 * p.data).round() / 10
    x, z = (inputs(m, "model.layers.1.mlp").float() for m in (behind, model))
    moe: Any = model.model.layers[1].mlp
    best = torch.softmax(x @ moe.gate.weight.T, -1).topk(2, -1).indices
    for e in range(4):
        at = (best == e).any(-1)
        cross = seen[f"model.layers.1.mlp.experts.gate_up_proj[{e}]"][CrossGram].cross
        aim = x[at] + share * (z[at] - x[at])
        torch.testing.assert_close(cross, x[at].T @ aim, rtol=1e-3, atol=1e-3)

        def inner(v: Tensor, e: int = e) -> Tensor:
            a, b = (v @ moe.experts.gate_up_proj[e].T).chunk(2, -1)
            return torch.nn.functional.silu(a) * b

        down = seen[f"model.layers.1.mlp.experts.down_proj[{e}]"]
        aim = inner(x[at]) + share * (inner(z[at]) - inner(x[at]))
        torch.testing.assert_close(down[CrossGram].cross, inner(x[at]).T @ aim, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(down[DenseMean].mean, aim.mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fit_on", ["dense", "pruned", "mix"])
def test_local_reconstruction_reports_what_it_did(fit_on: str) -> None:
    """The reported errors of the last FFN against the host's own forward passes."""
    model = make("llama")
    words = {**CHOICES["row"], "repair": "local_reconstruction:passes=2", "fit_on": fit_on}
    _, tensors, stage = carried_out(model, words)
    fit = stage.fits[-1]
    assert fit.name == "model.layers.2.mlp" and fit.after < fit.before
    after = pruned(model, tensors)
    with torch.no_grad():
        dense = inputs(model, fit.name).float()
        x = dense if fit_on == "dense" else inputs(after, fit.name).float()
        target = model.model.layers[2].mlp(x if fit_on == "pruned" else dense)
        answer = after.model.layers[2].mlp(x)
    windows = [v.split(BATCHES[0].shape[1]) for v in (answer, target)]
    assert fit.after == pytest.approx(relative(*windows), rel=1e-3)


@pytest.mark.parametrize("fit_on", ["dense", "pruned", "mix"])
def test_block_reconstruction_reports_how_far_the_dense_stream_is(fit_on: str) -> None:
    """The reported errors of every block against the hidden states of two whole models."""
    model = make("llama")
    words = {**CHOICES["row"], "repair": "block_reconstruction:passes=2", "fit_on": fit_on}
    _, tensors, stage = carried_out(model, words)
    assert [f.name for f in stage.fits] == [f"model.layers.{i}" for i in range(3)]
    assert all(f.after < f.before for f in stage.fits)
    for i, fit in enumerate(stage.fits):
        own = pruned(model, tensors, i + 1)
        if fit_on == "dense":
            own.model.layers = nn.ModuleList([*model.model.layers[:i], *own.model.layers[i:]])
        assert fit.after == pytest.approx(relative(answers(own, i), answers(model, i)), rel=1e-3), fit.name


@pytest.mark.parametrize("fit_on", ["dense", "pruned", "mix"])
@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("space", ["weight", "ffn"])
def test_keeping_everything_does_nothing(space: str, repair: str, fit_on: str) -> None:
    model = make("llama")
    words = {"space": space, "score": "wanda", "keep": "1.0", "repair": repair, "fit_on": fit_on}
    _, tensors, stage = carried_out(model, words)
    want = {n.removeprefix("model.layers."): v for n, v in model.state_dict().items() if ".layers." in n}
    assert tensors.keys() == want.keys() and all(torch.equal(tensors[n], want[n]) for n in want)
    assert stage.fits == []


@pytest.mark.parametrize("fit_on", ["dense", "pruned", "mix"])
@pytest.mark.parametrize(("repair", "family"), [("local_reconstruction", "llama"), ("least_squares", "mixtral")])
def test_spilled_and_resumed_runs_give_the_same_bytes(tmp_path: Path, repair: str, family: str, fit_on: str) -> None:
    """A run that stopped after two blocks goes on as if it had not; activations on disk change nothing and go."""
    write_model(tmp_path / "model", family, torch.bfloat16, num_hidden_layers=4)
    step = Step(**{**CHOICES["row"], "repair": repair, "fit_on": fit_on})  # type: ignore[arg-type]

    def run(name: str, before: Callable[[Path], None] = lambda work: None, **at: Any) -> dict[str, bytes]:
        work = tmp_path / name
        work.mkdir()
        before(work)
        store = Store.open(resolve(str(tmp_path / "model"), None, False))
        stage = Stage(store, step, 0, replace(Conditions(lambda: BATCHES), **at))
        stage.run(BlockSink(StepWriter(work, store), 0, "mask", World()))
        return weights_of(work)

    calm = run("calm")

    def half(work: Path) -> None:
        for path in (tmp_path / "calm").glob("*-0000[01].safetensors"):
            (work / path.name).write_bytes(path.read_bytes())

    assert len(calm) == 8 and run("again", half) == calm
    assert run("spilled", spill=tmp_path / "spill") == calm
    assert [p for p in (tmp_path / "spill").rglob("*") if p.is_file()] == []


def test_a_fit_of_sub_layers_is_refused_to_several_processes() -> None:
    with pytest.raises(SecateurError, match="processes"):
        carried_out(make("llama"), {**CHOICES["row"], "repair": "local_reconstruction"}, world=World(0, 2))


SMALL = ["--samples", 4, "--length", 10, "--batch-size", 2, "--no-measure", "--json"]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and a text."""
    place = tmp_path_factory.mktemp("repair")
    write_model(place / "model", "llama", torch.bfloat16)
    write_model(place / "moe", "mixtral")
    write_text(place / "text.txt")
    return place


@pytest.mark.parametrize(
    "words",
    [
        ["--space", "weight", "--score", "wanda", "--sparsity", 0.5],
        ["--space", "ffn", "--score", "wanda", "--keep", 0.5],
    ],
)
def test_biases_are_added_where_the_config_can_say_so(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[Any]
) -> None:
    out = tmp_path / "out"
    assert (
        cli(
            "prune", ground / "model", "-o", out, *words, "--repair", "mean_bias", "--text", ground / "text.txt", *SMALL
        )
        == 0
    )
    config = json.loads((out / "config.json").read_text())
    assert config["mlp_bias"] is True and config.get("attention_bias", False) is (words[1] == "weight")
    plain, ours = AutoModelForCausalLM.from_pretrained(out), secateur.load(out)
    assert plain.model.layers[0].mlp.down_proj.bias.dtype == torch.bfloat16
    assert bool(plain.model.layers[1].mlp.down_proj.bias.abs().sum() > 0)
    ids = tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, ours(input_ids=ids).logits)
    again = tmp_path / "again"  # a checkpoint with biases is pruned further like any other
    assert cli("prune", out, "-o", again, "--space", "weight", "--score", "magnitude", "--keep", 0.5, *SMALL) == 0
    assert bool(secateur.load(again).model.layers[1].mlp.down_proj.bias.abs().sum() > 0)


def test_biases_that_no_config_can_say_are_refused_before_the_work(ground: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--space", "ffn", "--score", "wanda", "--keep", 0.5, "--repair", "mean_bias"]
    assert cli("prune", ground / "moe", "-o", tmp_path / "out", *words, "--text", ground / "text.txt", *SMALL) == 2
    heard = capsys.readouterr().err
    assert "no bias at mlp.experts" in heard and "--repair least_squares" in heard and heard.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_one_word_of_falcon_adds_every_bias() -> None:
    _, tensors, stage = carried_out(make("falcon"), CHOICES["ffn"] | {"repair": "mean_bias"})
    assert stage.store.config.bias is True
    linears = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    added = {f"{i}.{name}.bias" for i in range(3) for name in linears}
    assert {n for n in tensors if n.endswith(".bias") and "norm" not in n} == added
    assert {n for n in added if bool(tensors[n].any())} == {n for n in added if "4h_to_h" in n}


@pytest.mark.parametrize(("family", "choice", "place"), [
    ("gemma2", "ffn", "mlp.down_proj"),  # its config has a word for those of attention alone
    ("qwen2", "ffn", "mlp.down_proj"),
    ("qwen2", "row", "mlp.down_proj, mlp.gate_proj, mlp.up_proj, self_attn.o_proj"),  # q, k and v have theirs
])  # fmt: skip
def test_biases_of_other_families_without_a_word_are_refused(family: str, choice: str, place: str) -> None:
    with pytest.raises(SecateurError, match=f"no bias at {place}, and its config has no word"):
        carried_out(make(family), CHOICES[choice] | {"repair": "mean_bias"})


REPLAYED = {
    "least squares": ["--space", "weight", "--score", "wanda", "--sparsity", 0.5, "--repair", "least_squares"],
    "units": ["--space", "kv_group", "--score", "wanda", "--keep", 1, "--repair", "least_squares", "--fit-on", "mix"],
    "bias": ["--space", "ffn", "--score", "wanda", "--keep", 0.5, "--repair", "mean_bias"],
    "joint": ["--space", "weight", "--method", "sparsegpt", "--sparsity", 0.5, "--repair", "local_reconstruction"],
}


@pytest.mark.parametrize("name", REPLAYED)
def test_a_replayed_plan_is_mended_when_text_is_named(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """With the text of the run that made the plan, the same bytes; without one, a plain mask or cut and a note."""
    words, text = REPLAYED[name], ["--text", ground / "text.txt"]
    assert cli("prune", ground / "model", "-o", tmp_path / "first", *words, *text, *SMALL) == 0
    capsys.readouterr()
    plan = ["--plan", tmp_path / "first/plan.safetensors"]
    assert cli("prune", ground / "model", "-o", tmp_path / "again", *words, *plan, *text, *SMALL) == 0
    notes = said(capsys).get("notes", [])
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "first")
    assert any("parts were fitted" in note for note in notes) == (name == "joint")
    assert cli("prune", ground / "model", "-o", tmp_path / "bare", *words, *plan, *SMALL) == 0
    assert any("recomputed only when" in note for note in said(capsys)["notes"])
    bare, first = weights_of(tmp_path / "bare"), weights_of(tmp_path / "first")
    assert (
        bare["plan.safetensors"] == first["plan.safetensors"]
        and bare["model.safetensors"] != first["model.safetensors"]
    )
    report = json.loads((tmp_path / "first/report.json").read_text())
    assert report["steps"][0]["chain"]["repair"] == words[words.index("--repair") + 1]


@pytest.mark.parametrize("repair", [None, *REPAIRS])
@pytest.mark.parametrize("fit_on", ["dense", "pruned", "mix"])
def test_a_search_for_a_bound_mends_too(repair: str | None, fit_on: str) -> None:
    """A search turns the keep on dense-stream evidence: exactly what a run that is fitted on it does."""
    if repair is None and fit_on == "mix":
        pytest.skip("nothing to fit")
    step = Step("weight", score="wanda", at_most_worse="50%", repair=repair, fit_on=fit_on)  # type: ignore[arg-type]
    store = prepared(Store.of_model(make("llama"), torch.float32), step)
    dial = Dial(store, step, 0, Conditions(lambda: BATCHES), tokens(3, 12, seed=9))
    dense, turned = dial.perplexity(Decimal(0)), dial.perplexity(Decimal("0.5"))
    bare = Dial(store, replace(step, repair=None, fit_on="pruned"), 0, Conditions(lambda: BATCHES), dial.windows)
    real = dial.sequential(Decimal("0.5"))
    if repair in ("least_squares", "mean_bias"):
        assert turned != bare.perplexity(Decimal("0.5"))
    if fit_on == "dense" and not str(repair).endswith("_reconstruction"):  # these fits are made for real only
        assert real == pytest.approx(turned, rel=1e-5)
    dial.restore()
    assert perplexity(dial.model, dial.windows).value == dense


@pytest.mark.parametrize("space", ["ffn", "kv_group", "layer"])
def test_a_bound_that_all_meet_leaves_a_unit(ground: Path, tmp_path: Path, space: str) -> None:
    """127 of 128 parts of 40 neurons, two groups or three layers would be all of them."""
    score = "block_influence" if space == "layer" else "wanda"
    words = ["--space", space, "--score", score, "--apply", "mask", "--at-most-worse", "500%"]
    more = ["--text", ground / "text.txt", *SMALL]
    assert cli("prune", ground / "model", "-o", tmp_path / "out", *words, *more) == 0
    plan = Plan.open(tmp_path / "out/plan.safetensors")
    assert {plan.kept(key) for key in plan} == {1}


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
@pytest.mark.parametrize("grain", ["matrix", "2:4"])
def test_an_effort_is_carried_out_and_the_report_says_which_chain(
    ground: Path, tmp_path: Path, effort: str, grain: str
) -> None:
    """What an effort writes is what its words written out write."""
    common = ["--space", "weight", "--keep", 0.5, "--grain", grain, "--text", ground / "text.txt", *SMALL]
    assert cli("prune", ground / "model", "-o", tmp_path / "effort", "--effort", effort, *common) == 0
    chain = CHAINS[effort][grain == "2:4"]
    words = [text for word, value in chain.items() for text in ("--" + word.replace("_", "-"), value)]
    assert cli("prune", ground / "model", "-o", tmp_path / "words", *words, *common) == 0
    assert weights_of(tmp_path / "effort") == weights_of(tmp_path / "words")
    told = json.loads((tmp_path / "effort/report.json").read_text())["steps"][0]["chain"]
    assert {word: told[{"fit_on": "fitted on"}.get(word, word)] for word in chain} == chain
