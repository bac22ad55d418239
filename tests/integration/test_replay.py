"""Plans replayed, targets met, sites chosen by name, and dry runs that tell what then happens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import secateur
from secateur.engine.plan import Plan
from whole_toys import cli, read_all, said, weights_of, write_model, write_text

SMALL = ["--samples", 4, "--length", 10, "--batch-size", 2, "--no-measure", "--json"]
MATRICES = 7  # of a Llama layer


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a sibling of the same shape, one of another shape, and a text."""
    place = tmp_path_factory.mktemp("replay")
    write_model(place / "model", "llama")
    write_model(place / "sibling", "llama", seed=7)
    write_model(place / "wide", "llama", intermediate_size=44)
    write_model(place / "moe", "mixtral")
    write_text(place / "text.txt")
    return place


Prune = Callable[..., dict[str, Any]]


@pytest.fixture
def prune(ground: Path, capsys: pytest.CaptureFixture[str]) -> Prune:
    """``prune(model, out, words...)``: runs, insists on success, gives what was printed."""

    def go(model: str, out: Path, *words: Any, verb: str = "prune", text: bool = True) -> dict[str, Any]:
        source = ["--text", ground / "text.txt"] if text else []
        assert cli(verb, ground / model, "-o", out, *words, *source, *SMALL) == 0, capsys.readouterr().err
        return said(capsys)

    return go


def weights(place: Path) -> dict[str, Tensor]:
    return load_file(place / "model.safetensors")


def masked(dense: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The dense weights with zeros where the plan says so."""
    out = dict(dense)
    for key in plan:
        name = key.split("/", 2)[2]
        out[name] = torch.where(plan[key], dense[name], torch.zeros(()))
    return out


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert cli(*words) == 2
    heard = capsys.readouterr()
    assert heard.out == "" and heard.err.count("\n") == 1
    return heard.err


WANDA = ["--space", "weight", "--score", "wanda", "--sparsity", 0.5]
GPT = ["--space", "weight", "--method", "sparsegpt", "--sparsity", 0.5]
FFN = ["--space", "ffn", "--score", "wanda", "--keep", 0.75]


def test_the_plan_verb_writes_the_plan_and_no_weights(ground: Path, tmp_path: Path, prune: Prune) -> None:
    told = prune("model", tmp_path / "plan", *GPT, verb="plan")
    prune("model", tmp_path / "whole", *GPT)
    assert told["plan"] == str(tmp_path / "plan/plan.safetensors")
    assert set(weights_of(tmp_path / "plan")) == {"plan.safetensors"}
    assert not (tmp_path / "plan/config.json").exists()
    assert weights_of(tmp_path / "plan")["plan.safetensors"] == weights_of(tmp_path / "whole")["plan.safetensors"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_replayed_on_a_sibling_the_booleans_are_applied(ground: Path, tmp_path: Path, prune: Prune) -> None:
    prune("model", tmp_path / "first", *WANDA)
    plan = tmp_path / "first/plan.safetensors"
    told = prune("sibling", tmp_path / "again", "--plan", plan, text=False)
    assert Plan.open(tmp_path / "again/plan.safetensors").diff(Plan.open(plan)) == {}
    assert equal(weights(tmp_path / "again"), masked(weights(ground / "sibling"), Plan.open(plan)))
    assert told["steps"] == [
        {
            "step": 1,
            "space": "weight",
            "method": told["steps"][0]["method"],
            "kept": 10368,
            "of": 20736,
            "apply": "mask",
        }
    ]


def test_units_replayed_are_cut(ground: Path, tmp_path: Path, prune: Prune) -> None:
    prune("model", tmp_path / "first", *FFN)
    plan = Plan.open(tmp_path / "first/plan.safetensors")
    prune("sibling", tmp_path / "again", "--plan", tmp_path / "first/plan.safetensors", text=False)
    dense, got = weights(ground / "sibling"), weights(tmp_path / "again")
    for i in range(3):
        keep = plan[f"0/ffn/model.layers.{i}"]
        name = f"model.layers.{i}.mlp."
        assert torch.equal(got[name + "up_proj.weight"], dense[name + "up_proj.weight"][keep])
        assert torch.equal(got[name + "down_proj.weight"], dense[name + "down_proj.weight"][:, keep])
    assert json.loads((tmp_path / "again/config.json").read_text())["intermediate_size"] == 30


def test_experts_layers_and_both_steps_replay(
    ground: Path, tmp_path: Path, prune: Prune, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "two.yaml"
    steps = [dict(space="layer", score="block_influence", keep=2), dict(space="expert", score="router_mass", keep=3)]
    recipe.write_text(json.dumps({"model": str(ground / "moe"), "steps": steps}))
    out = ["--text", ground / "text.txt", *SMALL]
    assert cli("prune", "--recipe", recipe, "-o", tmp_path / "first", *out) == 0
    said(capsys)
    prune("moe", tmp_path / "again", "--plan", tmp_path / "first/plan.safetensors", text=False)
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "first")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert (config["num_hidden_layers"], config["num_local_experts"]) == (2, 3)


def test_weight_updates_are_recomputed_only_with_text(ground: Path, tmp_path: Path, prune: Prune) -> None:
    prune("model", tmp_path / "first", *GPT)
    file = tmp_path / "first/plan.safetensors"
    plain = prune("sibling", tmp_path / "plain", *GPT, "--plan", file, text=False)
    mended = prune("sibling", tmp_path / "mended", *GPT, "--plan", file)
    plan = Plan.open(file)
    for name in ("plain", "mended"):
        assert Plan.open(tmp_path / name / "plan.safetensors").diff(plan) == {}
    want = masked(weights(ground / "sibling"), plan)
    assert equal(weights(tmp_path / "plain"), want)
    assert any("plain mask" in note and "--text" in note for note in plain["notes"])
    assert not any("plain mask" in note for note in mended["notes"])
    changed = weights(tmp_path / "mended")
    assert not equal(changed, want)
    assert all(torch.all(changed[k.split("/", 2)[2]][~plan[k]] == 0) for k in plan)
    # on the model it was made on, with its own text, the result is the first one
    prune("model", tmp_path / "same", *GPT, "--plan", file)
    for key, value in weights(tmp_path / "same").items():
        torch.testing.assert_close(value, weights(tmp_path / "first")[key], rtol=1e-3, atol=1e-5)


def test_a_plan_that_does_not_fit_is_refused(
    ground: Path, tmp_path: Path, prune: Prune, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, step in (("weight", WANDA), ("ffn", FFN)):
        prune("model", tmp_path / name, *step)
        plan = tmp_path / name / "plan.safetensors"
        for model in ("wide", "moe"):
            error = refused(capsys, "prune", ground / model, "-o", tmp_path / "no", "--plan", plan, "--no-measure")
            assert "plan" in error and "shape" in error
            assert not (tmp_path / "no").exists()
    odd = Plan({"0/ffn/model.layers.9": torch.ones(40, dtype=torch.bool)})
    odd.save(tmp_path / "odd.safetensors")
    error = refused(capsys, "prune", ground / "model", "-o", tmp_path / "no", "--plan", tmp_path / "odd.safetensors")
    assert "model.layers.9" in error


def test_set_operations_on_plans_can_be_replayed(ground: Path, tmp_path: Path, prune: Prune) -> None:
    prune("model", tmp_path / "a", *WANDA)
    prune("model", tmp_path / "b", "--space", "weight", "--score", "magnitude", "--sparsity", 0.5)
    a, b = (Plan.open(tmp_path / n / "plan.safetensors") for n in "ab")
    assert a.diff(b) and all(n == int((a[k] != b[k]).sum()) for k, n in a.diff(b).items())
    for name, plan, want in (
        ("both", a & b, lambda x, y: x & y),
        ("either", a | b, lambda x, y: x | y),
        ("minus", a - b, lambda x, y: x & ~y),
    ):
        assert all(torch.equal(plan[k], want(a[k], b[k])) for k in a)
        plan.save(tmp_path / f"{name}.safetensors")
        prune("model", tmp_path / name, "--plan", tmp_path / f"{name}.safetensors", text=False)
        assert equal(weights(tmp_path / name), masked(weights(ground / "model"), plan))


def parameters(place: Path) -> int:
    """Of the checkpoint's tensors; what is tied counts once, as on disk."""
    return sum(v.numel() for v in weights(place).values())


ROOM = {"ffn": 96, "kv_group": 1536, "layer": 6976}  # parameters of one unit, all layers alike


@pytest.mark.parametrize("target", ["-10%", "20k"])
@pytest.mark.parametrize(
    ("space", "budget"), [(s, b) for s in ("ffn", "kv_group") for b in ("uniform", "pooled")] + [("layer", "uniform")]
)
def test_a_parameter_target_is_met_and_not_by_more_than_needed(
    ground: Path, tmp_path: Path, prune: Prune, space: str, target: str, budget: str
) -> None:
    now = parameters(ground / "model")
    words = ["--space", space, "--score", "magnitude", "--target", f"params={target}", "--budget", budget]
    limit = {"-10%": now * 0.9, "20k": 20_000}[target]
    dry = prune("model", tmp_path / "out", *words, "--dry-run", text=False)["dry_run"]
    prune("model", tmp_path / "out", *words, text=False)
    got = parameters(tmp_path / "out")
    assert got == sum(p.numel() for p in secateur.load(tmp_path / "out").parameters())
    # never above, and one more unit in every layer would be
    step = ROOM[space] * (1 if space == "layer" or budget == "pooled" else 3)
    assert limit - step < got <= limit
    if budget == "uniform":
        assert dry["parameters"] == [now, got]


def test_a_byte_target_is_met(ground: Path, tmp_path: Path, prune: Prune) -> None:
    size = (ground / "model/model.safetensors").stat().st_size
    header = int.from_bytes((ground / "model/model.safetensors").read_bytes()[:8], "little") + 8
    words = ["--space", "ffn", "--score", "magnitude", "--target"]
    prune("model", tmp_path / "a", *words, "bytes=-10%", text=False)
    got = parameters(tmp_path / "a") * 4
    assert 0.9 * (size - header) - 3 * 4 * ROOM["ffn"] < got <= 0.9 * (size - header)
    prune("model", tmp_path / "b", *words, "bytes=85kB", text=False)
    got = parameters(tmp_path / "b") * 4
    assert 85_000 - 3 * 4 * ROOM["ffn"] < got <= 85_000


def test_targets_for_weights_are_nonzeros(ground: Path, tmp_path: Path, prune: Prune) -> None:
    now = parameters(ground / "model")
    words = ["--space", "weight", "--score", "magnitude", "--target", f"params={now - 5000}"]
    told = prune("model", tmp_path / "out", *words, "--dry-run", text=False)["dry_run"]
    prune("model", tmp_path / "out", *words, text=False)
    nonzero = sum(int(v.count_nonzero()) for v in weights(tmp_path / "out").values())
    dense = sum(int(v.count_nonzero()) for v in weights(ground / "model").values())
    assert dense == now
    rows = 3 * (4 * 32 + 3 * 40)  # one more in every row would be at most this
    assert now - 5000 - rows < nonzero <= now - 5000
    assert told["nonzero"] == [now, nonzero]


def test_targets_that_cannot_be_met_are_refused(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ffn = ["prune", ground / "model", "-o", tmp_path / "no", "--no-measure", "--space", "ffn", "--score", "magnitude"]
    assert "cannot be met" in refused(capsys, *ffn, "--target", "params=1000")
    assert "only" in refused(capsys, *ffn, "--target", "params=1M")
    weight = [*ffn[:-3], "weight", *ffn[-2:]]
    assert "mask" in refused(capsys, *weight, "--target", "bytes=-10%")
    assert not (tmp_path / "no").exists()


def kept(place: Path) -> dict[str, float]:
    """Share kept by each site of a plan."""
    plan = Plan.open(place / "plan.safetensors")
    return {k.split("/", 2)[2]: plan.kept(k) / plan.total(k) for k in plan}


def test_protected_layers_keep_everything(tmp_path: Path, prune: Prune) -> None:
    prune("model", tmp_path / "w", *WANDA, "--protect", "first:1,last:1")
    for name, share in kept(tmp_path / "w").items():
        assert share == (0.5 if ".layers.1." in name else 1.0)
    prune("model", tmp_path / "f", *FFN, "--protect", "last:1", "--apply", "mask")
    assert kept(tmp_path / "f") == {f"model.layers.{i}": s for i, s in enumerate((0.75, 0.75, 1.0))}


def test_a_map_says_how_much_each_component_keeps(tmp_path: Path, prune: Prune) -> None:
    rules = tmp_path / "map.yaml"
    rules.write_text(
        "- {match: '*.k_proj.weight', keep: 1.0}\n- {match: attention, keep: 0.75}\n"
        "- {match: 'layers:0-1', keep: 0.25}\n"
    )
    prune("model", tmp_path / "out", "--space", "weight", "--score", "magnitude", "--map", rules, text=False)
    found = kept(tmp_path / "out")
    assert len(found) == 3 * MATRICES
    for name, share in found.items():
        ffn = 1.0 if ".layers.2." in name else 0.25
        assert share == (1.0 if "k_proj" in name else 0.75 if "self_attn" in name else ffn), name


def test_include_and_exclude_choose_sites_by_name(ground: Path, tmp_path: Path, prune: Prune) -> None:
    words = ["--include", "*.mlp.*", "--exclude", "*.down_proj.*", "--exclude", "*.layers.0.*"]
    prune("model", tmp_path / "out", *WANDA, *words)
    want = {f"model.layers.{i}.mlp.{m}_proj.weight" for i in (1, 2) for m in ("gate", "up")}
    assert set(kept(tmp_path / "out")) == want
    dense, got = weights(ground / "model"), weights(tmp_path / "out")
    assert {k for k in dense if not torch.equal(dense[k], got[k])} == want
    prune("model", tmp_path / "units", *FFN, "--include", "*.layers.1", "--apply", "cut")
    assert set(kept(tmp_path / "units")) == {"model.layers.1"}
    ragged = secateur.load(tmp_path / "units")
    assert [layer.mlp.up_proj.out_features for layer in ragged.model.layers] == [40, 30, 40]


DRY = {
    "ffn": FFN,
    "kv_group": ["--space", "kv_group", "--score", "magnitude", "--keep", 1],
    "layer": ["--space", "layer", "--score", "block_influence", "--keep", 2],
    "weight": WANDA,
    "2:4": ["--space", "weight", "--method", "sparsegpt", "--grain", "2:4"],
    "protected": [*FFN, "--protect", "first:1"],
}


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_writes_nothing_and_tells_what_happens(
    ground: Path, tmp_path: Path, prune: Prune, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = read_all(ground)
    told = prune("model", tmp_path / "out", *DRY[name], "--dry-run")["dry_run"]
    assert list(tmp_path.iterdir()) == [] and read_all(ground) == before
    prune("model", tmp_path / "out", *DRY[name])
    model = secateur.load(tmp_path / "out")
    tensors = list(model.parameters())
    dense = parameters(ground / "model")
    assert told["parameters"] == [dense, sum(p.numel() for p in tensors)]
    assert told["nonzero"] == [dense, sum(int(p.count_nonzero()) for p in tensors)]
    assert told["bytes"] == [4 * dense, sum(v.nbytes for v in weights(tmp_path / "out").values())]
    heads = [layer.self_attn.k_proj.out_features for layer in model.model.layers]
    assert told["kv_bytes_per_token"][1] * sum([16] * 3) == told["kv_bytes_per_token"][0] * sum(heads)
    assert told["peak_ram"] > 0 and told["seconds"] > 0


def test_a_dry_run_of_a_replay(ground: Path, tmp_path: Path, prune: Prune) -> None:
    """A plan's own counts, whatever words stand beside it."""
    for name, words in (("w", WANDA), ("f", FFN), ("l", DRY["layer"])):
        prune("model", tmp_path / name, *words)
        plan = ["--plan", tmp_path / name / "plan.safetensors"]
        told = prune("sibling", tmp_path / "none", *plan, "--dry-run", text=False)["dry_run"]
        got = weights(tmp_path / name)
        assert told["parameters"][1] == sum(v.numel() for v in got.values())
        assert told["nonzero"][1] == sum(int(v.count_nonzero()) for v in got.values())


def test_what_a_later_step_cannot_do_is_said_before_the_first(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """29 neurons are left after the first step, and 2:4 needs a multiple of four."""
    recipe = tmp_path / "two.yaml"
    steps = [dict(space="ffn", score="wanda", keep=29), dict(space="weight", score="wanda", grain="2:4")]
    recipe.write_text(json.dumps({"model": str(ground / "model"), "steps": steps}))
    error = refused(capsys, "prune", "--recipe", recipe, "-o", tmp_path / "out", "--text", ground / "text.txt", *SMALL)
    assert "down_proj" in error and "29" in error
    assert [p.name for p in tmp_path.iterdir()] == ["two.yaml"]


HALF = dict(space="weight", score="magnitude", sparsity=0.5)
NEURONS = dict(space="ffn", score="magnitude", keep=0.75, apply="mask")
TWICE = {  # steps, and how near the zeros are told where they depend on which units go
    "neurons cut, then weights": ([dict(space="ffn", score="wanda", keep=0.75), HALF | {"score": "wanda"}], 0.0),
    "weights, then more of them": ([HALF, HALF | {"sparsity": 0.8}], 0.0),
    "weights, then fewer of them": ([HALF | {"sparsity": 0.8}, HALF], 0.0),
    "weights, then layers cut": ([HALF, dict(space="layer", score="block_influence", keep=2)], 0.0),
    "weights, then neurons cut": ([HALF, dict(space="ffn", score="magnitude", keep=0.75, apply="cut")], 0.02),
    "weights, then neurons": ([HALF, NEURONS], 0.02),
    "neurons, then weights": ([NEURONS, HALF], 0.0),
    "neurons, then weights of rows": ([NEURONS, HALF | {"score": "wanda"}], 0.0),
    "neurons, then 2:4": ([NEURONS, dict(space="weight", score="magnitude", grain="2:4")], 0.02),
    "neurons twice": ([dict(space="ffn", score="magnitude", keep=k, apply="mask") for k in (0.75, 0.5)], 0.0),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_dry_run_of_two_steps(ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    steps, near = TWICE[name]
    recipe = tmp_path / "two.yaml"
    recipe.write_text(json.dumps({"model": str(ground / "model"), "steps": steps}))
    words = ["prune", "--recipe", recipe, "-o", tmp_path / "out", "--text", ground / "text.txt", *SMALL]
    assert cli(*words, "--dry-run") == 0
    told = said(capsys)["dry_run"]
    assert cli(*words) == 0
    got = weights(tmp_path / "out")
    total = parameters(tmp_path / "out")
    assert told["parameters"][1] == total
    zeros = total - sum(int(v.count_nonzero()) for v in got.values())
    assert total - told["nonzero"][1] == (pytest.approx(zeros, rel=near) if near else zeros)


def test_the_input_and_its_copy_give_the_same_bytes(ground: Path, tmp_path: Path, prune: Prune) -> None:
    """Where files lie does not show in what is written."""
    shutil.copytree(ground / "model", ground / "copy")
    prune("model", tmp_path / "a", *WANDA)
    prune("copy", tmp_path / "b", *WANDA)
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert str(tmp_path).encode() not in b"".join(weights_of(tmp_path / "a").values())
