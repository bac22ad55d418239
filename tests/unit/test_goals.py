"""Targets on layers of unequal size hold, by brute force; and how inspect says that such models load."""

from __future__ import annotations

import copy
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from secateur import cliff
from secateur.anatomy import anatomy_of
from secateur.engine.apply import cut_block, cut_layers
from secateur.engine.host.build import default_config, describe_skeleton
from secateur.engine.host.origin import resolve
from secateur.engine.host.toy import toy_config
from secateur.engine.store import Store
from secateur.errors import SecateurError
from secateur.goals import settled
from secateur.inspection import inspection
from secateur.methods.sites import unit_cost
from secateur.stage import Conditions, Nowhere, Stage
from secateur.step import Step
from whole_toys import ROPE, make, tokens

LAYERS = 5


def uneven() -> Any:
    """Dense layers first, third and last, experts (twice as large) between."""
    config = Qwen3MoeConfig(
        **ROPE | {"num_hidden_layers": LAYERS}, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        decoder_sparse_step=1, mlp_only_layers=[0, 2, 4], head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("target", ["params=-5%", "params=-15%", "params=-35%", "params=-55%"])
@pytest.mark.parametrize("apply", ["cut", "mask"])
@pytest.mark.parametrize("score", ["magnitude", "block_influence"])
def test_a_target_on_unequal_layers(score: str, apply: str, target: str) -> None:
    model = uneven()
    store = Store.of_model(model)
    step = Step("layer", score=score, target=target, apply=apply)  # type: ignore[arg-type]
    conditions = Conditions(lambda: [tokens(3, 10)])
    sizes = {parameters(layer) for layer in model.model.layers}
    assert len(sizes) == 2
    limit = parameters(model) * (1 - float(target[8:-1]) / 100)

    def left(count: int) -> float:
        """Non-zero parameters after ``count`` layers were kept for real."""
        stage = Stage(store, Step("layer", score=score, keep=count, apply=apply), 0, conditions)  # type: ignore[arg-type]
        whole = _Held(store, model)
        stage.store = whole  # type: ignore[assignment]
        stage.model = whole.copy()
        stage.blocks = list(stage.model.model.layers)
        plan = stage.run(Nowhere()).plan
        if apply == "cut":
            cut_layers(stage.model, stage.anatomy, plan["0/layer/model"])
        return sum(int(p.count_nonzero()) for p in stage.model.parameters())

    try:
        found = settled(Stage(store, step, 0, conditions), step)
    except SecateurError as error:
        assert "cannot be met" in str(error) and left(1) > limit
        return
    count = int(found.keep)  # type: ignore[arg-type]
    assert found.target is None and left(count) <= limit
    assert count == LAYERS or left(count + 1) > limit


class _Held:
    """A store whose blocks stay where they are."""

    def __init__(self, store: Store, model: Any) -> None:
        self._store, self._model = store, model

    def copy(self) -> Any:
        return copy.deepcopy(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def load_rest(self, model: Any, device: Any) -> None:
        return None

    def release_rest(self, model: Any) -> None:
        return None

    def load_block(self, model: Any, index: int, device: Any) -> None:
        return None

    def release_block(self, model: Any, index: int) -> None:
        return None


def test_a_surveying_budget_may_have_a_target() -> None:
    """The survey runs on a model of which nothing was loaded yet."""
    model = make("llama")
    step = Step("ffn", score="wanda", target="params=-10%", budget="pooled")
    stage = Stage(Store.of_model(model), step, 0, Conditions(lambda: [tokens(3, 10)]))
    found = settled(stage, step)
    counts = stage.counts(found.amount)
    gone = sum(i.units - counts[i.name] for i in stage.infos) * 96  # gate, up and down of 32
    now = parameters(model)
    assert now - gone <= 0.9 * now < now - gone + 2 * 96


@pytest.mark.parametrize("kind", ["even", "uneven", "by turns"])
def test_inspect_says_whether_layers_can_be_cut(kind: str, tmp_path: Path) -> None:
    config = LlamaConfig(**ROPE) if kind == "even" else uneven().config
    if kind == "by turns":  # every second layer has experts: without one of them, or of the others, no config says it
        config.mlp_only_layers, config.decoder_sparse_step = [], 2
    config.save_pretrained(tmp_path)
    rows = {row["space"]: row for row in inspection(resolve(tmp_path), False)["spaces"]}
    model = AutoModelForCausalLM.from_config(config)
    plain = []
    for gone in range(config.num_hidden_layers):
        cut, keep = AutoModelForCausalLM.from_config(copy.deepcopy(config)), torch.ones(config.num_hidden_layers).bool()
        keep[gone] = False
        cut_layers(cut, anatomy_of(describe_skeleton(cut)), keep)
        words = config.to_dict() | {"num_hidden_layers": config.num_hidden_layers - 1, "layer_types": None}
        if kind == "uneven":
            words["mlp_only_layers"] = [i - (i > gone) for i in config.mlp_only_layers if i != gone]
        fresh = AutoModelForCausalLM.from_config(type(config).from_dict(words))
        shapes = [{n: tuple(v.shape) for n, v in m.state_dict().items()} for m in (cut, fresh)]
        plain.append(shapes[0] == shapes[1])
    says = {(True, True): "mask, cut", (False, True): "mask, cut if the config can say what stays"}
    assert all(plain) == (kind != "by turns")
    assert (rows["layer"]["apply"], rows["layer"]["loads_with"]) == (says[all(plain), any(plain)], "AutoModel")
    mean = sum(parameters(layer) for layer in model.model.layers) / config.num_hidden_layers
    assert rows["layer"]["parameters_each"] == round(mean)


def test_inspect_counts_the_cache_of_layers_that_have_one(tmp_path: Path) -> None:
    config = toy_config(default_config("qwen3_next"))  # linear attention beside the ordinary
    config.save_pretrained(tmp_path)
    rows = {row["space"]: row for row in inspection(resolve(tmp_path), False)["spaces"]}
    assert config.layer_types.count("full_attention") < config.num_hidden_layers
    assert rows["kv_group"]["kv_bytes_each"] == 2 * config.head_dim * 4


def test_a_bound_that_nothing_keeps_when_it_is_pruned_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense stream says 2/128; tried are 2 and 1, and then nothing is left to try."""
    tried = []

    class Dial:
        def perplexity(self, sparsity: Decimal) -> float:
            return 1.0 if sparsity <= Decimal(2) / 128 else 9.0

        def sequential(self, sparsity: Decimal) -> float:
            tried.append(sparsity * 128)
            return 9.0

    monkeypatch.setattr(cliff, "dial_of", lambda *args: Dial())
    step = Step("weight", score="magnitude", at_most_worse="5%")
    with pytest.raises(SecateurError, match="no sparsity was found within 5%"):
        cliff.within_bound(None, None, step, 0)  # type: ignore[arg-type]
    assert tried == [2, 1]


@pytest.mark.parametrize(
    ("bound", "real", "tried"), [("5%", 1.0, [6]), ("5%", 1.2, [6, 5]), ("50%", 1.0, [64]), ("50%", 1.2, [64, 60, 52])]
)
def test_a_bound_is_met_and_not_by_more_than_needed(
    monkeypatch: pytest.MonkeyPatch, bound: str, real: float, tried: list[int]
) -> None:
    """Perplexity 10 (1 + s) on the dense stream, 10 (1 + real s) for real; what broke the bound goes back by a
    sixteenth, then by twice as much."""
    asked = []

    class Dial:
        def perplexity(self, sparsity: Decimal) -> float:
            return 10 * (1 + float(sparsity))

        def sequential(self, sparsity: Decimal) -> float:
            asked.append(sparsity * 128)
            return 10 * (1 + real * float(sparsity))

        def measured(self) -> dict[Decimal, float]:
            return {}

    monkeypatch.setattr(cliff, "dial_of", lambda *args: Dial())
    step = Step("weight", score="magnitude", at_most_worse=bound)
    found = cliff.within_bound(None, None, step, 0).step  # type: ignore[arg-type]
    assert asked == tried and found.at_most_worse is None
    assert found.amount is not None and found.amount.share == 1 - Decimal(tried[-1]) / 128


@pytest.mark.parametrize(
    ("family", "space"),
    [
        ("mixtral", "ffn"),
        ("mixtral", "expert"),
        ("gpt2", "ffn"),
        ("gpt2", "head"),
        ("llama", "head"),
        ("llama", "kv_group"),
    ],
)
def test_a_unit_costs_the_parameters_that_a_cut_takes(family: str, space: str) -> None:
    model = make(family)
    anatomy = anatomy_of(describe_skeleton(model))
    block = anatomy.blocks[0]
    units, module = block.spaces[space], model.get_submodule(block.name)
    cost, before = unit_cost(block, units, module), parameters(model)
    keep = torch.ones(units.shape, dtype=torch.bool)
    keep[..., 0] = False
    cut_block(module, block, {space: keep})
    assert before - parameters(model) == cost * units.copies > 0
