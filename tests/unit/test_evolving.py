"""A budget that searches, on tiny models: levels are what the method makes, the best allocation is found, and kept."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.engine.headers import read_header
from secateur.engine.plan import Plan
from secateur.engine.probes import walked
from secateur.engine.store import Store
from secateur.errors import SecateurError
from secateur.evopress.answers import Answers
from secateur.evopress.evolving import check, searched
from secateur.evopress.levels import Layers, LevelFiles, Switchboard, as_mask, sites_of
from secateur.parts import parts_of
from secateur.predict import time as predict_time
from secateur.predict.search import tokens_read
from secateur.report.model import Report
from secateur.stage import Conditions, Stage
from secateur.step import Step
from whole_toys import cli, make, tokens, weights_of, write_model, write_text

WINDOWS = [tokens(3, 10, 1), tokens(2, 10, 2)]


def stage_of(model: Any, step: Step, seed: int = 0) -> Stage:
    return Stage(Store.of_model(model), step, 0, Conditions(lambda: WINDOWS, seed=seed))


def divergence(dense: Any, model: Any) -> float:
    """Mean KL over all positions of all windows, written out."""
    total = []
    with torch.inference_mode():
        for ids in WINDOWS:
            p = dense(input_ids=ids).logits.double().log_softmax(-1)
            q = model(input_ids=ids).logits.double().log_softmax(-1)
            total.append((p.exp() * (p - q)).sum(-1).reshape(-1))
    return float(torch.cat(total).mean())


def smallest_gone(w: Tensor, kept: int) -> Tensor:
    """Magnitude pruning, row by row, written out."""
    each = kept // w.shape[0]
    at = w.abs().argsort(1, descending=True)[:, :each]
    return torch.zeros_like(w).scatter(1, at, w.gather(1, at))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_of_all_allocations_is_found(seed: int, tmp_path: Path) -> None:
    model = make("llama", seed=seed)
    budget = "evopress:generations=15,offspring=8,survivors=3/1,tokens=20/50,levels=1,step=0.2"
    patterns = ("*.gate_proj.weight", "*.q_proj.weight")
    step = Step("weight", score="magnitude", sparsity=0.5, budget=budget, include=patterns)
    stage = stage_of(model, step)
    sites = sites_of(stage, 1, 0.2)
    assert len(sites) == 6 and {s.ladder.step for s in sites} == {160, 320}  # 5 a row of 32 x 32, 8 of 40 x 32
    found = searched(stage, tmp_path)
    losses = {}
    for levels in itertools.product((-1, 0, 1), repeat=6):
        if sum(level * s.ladder.step for level, s in zip(levels, sites, strict=True)):
            continue
        other = copy.deepcopy(model)
        for level, s in zip(levels, sites, strict=True):
            weight = other.get_parameter(s.info.name)
            weight.data = smallest_gone(weight.data, s.units + level * s.ladder.step)
        losses[levels] = divergence(model, other)
    assert len(losses) > 30
    best = min(losses, key=lambda levels: losses[levels])
    assert found.counts == {s.info.name: s.units + n * s.ladder.step for n, s in zip(best, sites, strict=True)}
    assert found.record.before == pytest.approx(losses[(0,) * 6], rel=1e-4)
    assert found.record.after == pytest.approx(losses[best], rel=1e-4)
    assert sum(found.counts.values()) == sum(s.units for s in sites)
    assert not list(tmp_path.glob("*.safetensors"))  # levels are let go when they are no longer needed


def test_layers_whose_sites_move_together(tmp_path: Path) -> None:
    """Every allocation in which a layer's sites are at one level; the best of these is found."""
    model = make("llama", num_hidden_layers=4)
    budget = "evopress:generations=10,offspring=6,survivors=1,tokens=50,levels=1,step=0.2,each=layer"
    step = Step("weight", score="magnitude", sparsity=0.5, budget=budget, protect="last:1")
    stage = stage_of(model, step)
    sites = sites_of(stage, 1, 0.2)
    found = searched(stage, tmp_path)
    losses = {}
    for levels in itertools.product((-1, 0, 1), repeat=3):
        if sum(levels):
            continue
        other = copy.deepcopy(model)
        counts = {s.info.name: s.units + levels[s.info.block] * s.ladder.step for s in sites if s.info.block < 3}
        for name, count in counts.items():
            weight = other.get_parameter(name)
            weight.data = smallest_gone(weight.data, count)
        losses[divergence(model, other)] = counts
    assert len(losses) == 7
    last = {s.info.name: s.info.units for s in sites if s.info.block == 3}
    assert found.counts == losses[min(losses)] | last
    assert found.record.after == pytest.approx(min(losses), rel=1e-4)


def test_the_best_pair_of_layers_is_found(tmp_path: Path) -> None:
    model = make("llama", num_hidden_layers=6)
    budget = "evopress:generations=8,offspring=4,survivors=1,tokens=50"
    stage = stage_of(model, Step("layer", score="magnitude", keep=3, budget=budget, protect="first:1"))
    found = searched(stage, tmp_path)
    assert found.layers is not None and not found.counts
    losses = {}
    for gone in itertools.combinations(range(1, 6), 3):
        other = copy.deepcopy(model)
        other.model.layers = torch.nn.ModuleList(m for at, m in enumerate(other.model.layers) if at not in gone)
        for at, layer in enumerate(other.model.layers):
            layer.self_attn.layer_idx = at
        other.config.num_hidden_layers = 3
        other.model.config.num_hidden_layers = 3
        losses[gone] = divergence(model, other)
    best = min(losses, key=lambda gone: losses[gone])
    assert found.layers["0/layer/model"].tolist() == [at not in best for at in range(6)]
    assert found.record.after == pytest.approx(losses[best], rel=1e-4)


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "wanda": ("llama", dict(space="weight", score="wanda")),
    "sparsegpt": ("llama", dict(space="weight", method="sparsegpt")),
    "admm rows": ("gpt2", dict(space="weight", method="admm", grain="row")),
    "tiles": ("llama", dict(space="weight", score="magnitude", grain="tile:4x4")),
    "least squares on conv1d": ("gpt2", dict(space="weight", score="wanda", repair="least_squares")),
    "bias": ("gpt2", dict(space="weight", score="magnitude", repair="mean_bias")),
    # an expert that sees fewer tokens than it has inputs: polished values follow rounding where no token looks
    "experts' weights": ("mixtral", dict(space="weight", method="sparsegpt:polish=0")),
    "neurons": ("llama", dict(space="ffn", score="wanda")),
    "neurons of experts": ("mixtral", dict(space="ffn", score="magnitude")),
    "neurons, repaired": ("llama", dict(space="ffn", score="wanda", repair="least_squares")),
    "neurons, biased": ("gpt2", dict(space="ffn", score="wanda", repair="mean_bias")),
    "groups": ("llama", dict(space="kv_group", score="magnitude")),
    "experts": ("mixtral", dict(space="expert", score="router_mass")),
    "fisher": ("mixtral", dict(space="weight", method="alps:rows=fisher")),
    "gradients": ("llama", dict(space="weight", score="taylor")),
}


@pytest.mark.parametrize("case", CASES)
def test_levels_are_what_the_method_makes_of_each_site(case: str, tmp_path: Path) -> None:
    """A model put together from levels is the model pruned at once to these counts on the dense evidence."""
    family, words = CASES[case]
    model = make(family)
    step = Step(**words, keep=0.5, budget="evopress:levels=2,step=0.1")
    stage = as_mask(stage_of(model, step))
    sites = sites_of(stage, 2, 0.1)
    files = LevelFiles(tmp_path, sites)
    files.make(stage)
    board = Switchboard(files, as_mask(stage_of(model, step)))
    random = Random(case)
    drawn = [tuple(random.choice(s.ladder.levels) for s in sites) for _ in range(2)]
    board.set(drawn[0])
    first = state_of(board.model)
    changes = not {"method", "repair"}.isdisjoint(words)
    assert any(levels != drawn[0] for levels in drawn)
    for levels in drawn[::-1]:  # ends where it began
        board.set(levels)
        counts = {s.info.name: s.count(n) for s, n in zip(sites, levels, strict=True)}
        other = as_mask(stage_of(model, step))
        other.store.load_rest(other.model)
        told = other.whole.tell(other.parts.needs)
        other.store.load_whole(other.model)
        other.store = _Held(other.store)  # type: ignore[assignment]
        visits = list(other.visits(walked(other.parts.needs), "", dense=True, told=told))
        for visit in visits:
            plan = other.prune_block(visit, counts, None)
            assert sum(plan.kept(key) for key in plan) == sum(
                counts[s.info.name] * (16 if "tile" in step.grain else 1)  # type: ignore[operator]
                for s in sites
                if s.info.block == visit.block.index
            )
        with torch.inference_mode():
            a, b = (m(input_ids=WINDOWS[0]).logits for m in (board.model, other.model))
        torch.testing.assert_close(a, b, rtol=0.1 if changes else 1e-5, atol=0.02 if changes else 1e-5)
        for name, value in state_of(other.model).items():
            got = board.model.state_dict()[name]
            zeros = (got == 0) == (value == 0)
            assert bool(zeros.all()), name
            if changes:
                assert bool(((got - value).abs() <= 2**-8 * value.abs() + 1e-6).all()), name
            else:
                assert torch.equal(got, value), name
    again = state_of(board.model)
    assert all(torch.equal(first[name], again[name]) for name in first)


class _Held:
    """A store whose blocks are in memory already."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def load_rest(self, model: Any, device: Any) -> None:
        return None

    def load_block(self, model: Any, index: int, device: Any) -> None:
        return None

    def release_block(self, model: Any, index: int) -> None:
        return None


def test_layers_come_and_go_without_a_trace() -> None:
    model = make("gpt2")
    board = Layers(stage_of(model, Step("layer", score="magnitude", keep=2)), torch.tensor([True, False, True]))
    board.set((0, 1, 0))
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in board.model.state_dict().items())
    board.set((-1, 1, 0))
    with torch.inference_mode():
        hidden = board.model.transformer(input_ids=WINDOWS[0], output_hidden_states=True).hidden_states
    assert torch.equal(hidden[0], hidden[1]) and not torch.equal(hidden[1], hidden[2])
    board.set((0, 1, 0))
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in board.model.state_dict().items())


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("evolving")
    write_model(place / "model", "llama", torch.bfloat16)
    write_text(place / "text.txt")
    return place


def prune(ground: Path, out: str, *words: object) -> dict[str, Any]:
    """Prune on a little text; the step's record."""
    text = ("--text", ground / "text.txt", "--samples", 5, "--length", 10, "--batch-size", 2, "--no-measure")
    assert cli("prune", ground / "model", "-o", ground / out, *text, *words, "--json") == 0
    report = (ground / out / "report.json").read_text()
    assert Report.from_json(report).to_json() == report
    return json.loads(report)["steps"][-1]  # type: ignore[no-any-return]


SHORT = "evopress:generations=4,offspring=5,survivors=2/1,tokens=20/50,step=0.1"


@pytest.mark.parametrize(
    "words",
    [
        ("--space", "weight", "--method", "sparsegpt", "--sparsity", 0.6),
        ("--space", "weight", "--score", "magnitude", "--sparsity", 0.5, "--protect", "first:1"),
        ("--space", "ffn", "--score", "wanda", "--target", "params=-10%"),
    ],
    ids=lambda words: words[3],
)
def test_the_total_is_uniforms_and_the_same_seed_finds_the_same(
    ground: Path, words: tuple[object, ...], request: pytest.FixtureRequest
) -> None:
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    uniform = prune(ground, f"{name}-u", *words)
    found = prune(ground, f"{name}-a", *words, "--budget", SHORT)
    again = prune(ground, f"{name}-b", *words, "--budget", SHORT)
    counts = [{s["site"]: s["kept"] for s in r["sites"]} for r in (uniform, found, again)]
    assert sum(counts[0].values()) == sum(counts[1].values()) and counts[0].keys() == counts[1].keys()
    assert counts[1] == counts[2] and weights_of(ground / f"{name}-a") == weights_of(ground / f"{name}-b")
    search = found["search"]
    assert search["after"] <= search["before"]
    assert (counts[0] != counts[1]) == bool(search["changed"])
    assert len(search["generations"]) == 4 and uniform["search"] is None
    if "--protect" in words:
        assert all(s["kept"] == s["total"] for s in found["sites"] if s["block"] == 0)
    # what was found is replayed without another search
    plan = ground / f"{name}-a" / "plan.safetensors"
    replayed = prune(ground, f"{name}-c", *words, "--budget", SHORT, "--plan", plan)
    assert replayed["search"] is None
    assert not Plan.open(plan).diff(Plan.open(ground / f"{name}-c" / "plan.safetensors"))


def test_layers_go_as_found(ground: Path) -> None:
    found = prune(ground, "layers", "--space", "layer", "--score", "block_influence", "--keep", 2, "--budget", SHORT)
    assert sum(s["kept"] for s in found["sites"]) == 2
    assert json.loads((ground / "layers" / "config.json").read_text())["num_hidden_layers"] == 2


def test_what_cannot_be_searched_is_refused_before_any_work(ground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = ("--space", "weight", "--score", "magnitude")
    for words, said in (
        ((*step, "--at-most-worse", "5%", "--budget", "evopress"), "bound on perplexity"),
        ((*step, "--grain", "2:4", "--budget", "evopress"), "n:m fixes"),
        ((*step, "--sparsity", 0.5, "--budget", "evopress:survivors=4/2"), "out of range"),
        ((*step, "--sparsity", 0.5, "--budget", "evopress:survivors=4/1,tokens=100"), "out of range"),
        ((*step, "--sparsity", 0.5, "--budget", "evopress:step=2.0"), "out of range"),
        ((*step, "--sparsity", 0.5, "--budget", "evopress:offspring=1"), "out of range"),
        ((*step, "--sparsity", 0.5, "--budget", "evopress:each=matrix"), "site"),
        ((*step, "--sparsity", 0.5, "--budget", "evopress:generation=1"), "generations"),
    ):
        assert cli("prune", ground / "model", "-o", ground / "no", *words) == 2
        assert said in capsys.readouterr().err
        assert not (ground / "no").exists() and not (ground / ".no.secateur-work").exists()
    headless = make("llama").model
    step_ = Step("weight", score="magnitude", keep=0.5, budget="evopress")
    with pytest.raises(SecateurError, match="no output head"):
        check(headless, step_, parts_of(step_), Conditions(list).world)
    with pytest.raises(SecateurError, match="next tokens"):
        searched(stage_of(make("bert"), step_), ground)


def test_options_say_what_a_generation_reads() -> None:
    step = Step("weight", score="magnitude", keep=0.5, budget="evopress:offspring=16,survivors=4/1,tokens=1024/4096")
    budget: Any = parts_of(step).budget
    text, each = 8192, budget.generations
    assert tokens_read(budget, text) == each * (16 * 1024 + 5 * 4096) + 2 * text
    assert tokens_read(replace(budget, survivors=1, tokens=100), text) == each * 17 * 100 + 2 * text


def test_the_dry_run_knows_what_a_search_reads_and_keeps(
    ground: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words: Sequence[object] = ("--space", "weight", "--score", "magnitude", "--sparsity", 0.5, "--budget", SHORT)
    text = ("--text", ground / "text.txt", "--samples", 5, "--length", 10, "--batch-size", 2, "--no-measure")
    command = ("prune", ground / "model", "-o", ground / "dry", *text, *words, "--json")
    speed = predict_time.Speed(product=1e-6, measured=0.0, vector=0.0, score=0.0, logit=0.0, hashed=0.0, fitted=0.0)
    monkeypatch.setattr(predict_time, "speed_of", lambda run, first: speed)
    assert cli(*command, "--dry-run") == 0
    told = json.loads(capsys.readouterr().out)["dry_run"]
    read, kept = [50], []  # the dense model reads the text once

    def divergence(self: Answers, model: Any, windows: Tensor, pieces: Any, dtype: torch.dtype) -> float:
        read.append(sum(n for _, n in pieces))
        return real(self, model, windows, pieces, dtype)

    def remove(self: LevelFiles) -> None:
        for path in self.folder.glob("search-*.safetensors"):
            kept.append(sum(e.end - e.begin for e in read_header(path).tensors.values()))
        gone(self)

    real, gone = Answers.divergence, LevelFiles.remove
    monkeypatch.setattr(Answers, "divergence", divergence)
    monkeypatch.setattr(LevelFiles, "remove", remove)
    assert cli(*command) == 0
    per_token = 3 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 40 + 2 * 32 * 10) + 64 * 32
    seconds = sum(read) * (1e-6 * predict_time.OVERHEAD * per_token + 3 * predict_time.CALL / 10)
    assert told["phases"]["search of step 1"] == pytest.approx(seconds, rel=1e-3)
    weights = sum(s["total"] for s in prune(ground, "dry-u", *words[:6])["sites"])
    levels = 7 * weights // 8
    answers = 50 * (64 * 8 + 4)  # all of a vocabulary of 64
    assert sum(kept) == pytest.approx(levels + answers, rel=0.01)
    assert told["disk"] - answers - levels == 2 * told["bytes"][1]
    assert any("searched" in note for note in told["notes"])
