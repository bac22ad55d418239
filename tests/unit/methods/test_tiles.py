"""Scores of tiles against dropping each tile for real, and their allocation under a target in MACs."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from torch import Tensor

from secateur.engine.apply import cut_layers
from secateur.engine.probes import Evidence, Fisher, Gradient, Gram, InputNorm, Probe
from secateur.engine.store import Store
from secateur.errors import SecateurError
from secateur.goals import settled
from secateur.measure.size import size
from secateur.methods.base import MatrixSite
from secateur.methods.grains import Row, Tile
from secateur.methods.scores.output_error import OutputError
from secateur.methods.scores.taylor_block import TaylorBlock
from secateur.parts import parts_of
from secateur.stage import Conditions, Nowhere, Stage
from secateur.step import Step
from whole_toys import make, tokens

TILE = Tile(2, 3)


def site(weight: Tensor) -> MatrixSite:
    return MatrixSite("w", weight, "ffn", 0, 1, torch.Generator())


def heard(probe: Probe, *args: Tensor | None) -> Evidence:
    probe.update(*args)
    return Evidence("w", {type(probe): probe})


def without(weight: Tensor, row: int, column: int, tile: Tile = TILE) -> Tensor:
    out = weight.clone()
    out[row * tile.rows : (row + 1) * tile.rows, column * tile.columns : (column + 1) * tile.columns] = 0
    return out


def test_output_error_is_what_dropping_each_tile_does_to_the_output() -> None:
    w, x = torch.randn(6, 9), torch.randn(20, 9) @ torch.randn(9, 9)  # correlated inputs
    got = TILE.unit_scores(OutputError(grain=TILE).score(site(w), heard(Gram(), x, None)))
    assert got.shape == (3, 3)
    for r in range(3):
        for c in range(3):
            want = float((x @ (w - without(w, r, c)).T).square().sum())
            assert float(got[r, c]) == pytest.approx(want, rel=1e-4)
    element = OutputError(grain=Row()).score(site(w), heard(InputNorm(), x, None))
    one = torch.zeros_like(w)
    one[2, 5] = w[2, 5]
    assert float(element[2, 5]) == pytest.approx(float((x @ one.T).square().sum()), rel=1e-4)


def test_second_order_is_exact_where_the_hessian_is_the_gradients_outer_product() -> None:
    """loss = (c + sum u w)^2 / 2 with c + sum u w = 1: gradient u, Hessian u u^T. Without a tile the loss changes by
    -sum(w g) + (sum w g)^2 / 2 over it."""
    w, u = torch.randn(4, 6), torch.randn(4, 6)
    c = 1 - float((u * w).sum())
    leaf = w.clone().requires_grad_(True)
    (0.5 * (c + (u * leaf).sum()) ** 2).backward()
    got = TILE.unit_scores(TaylorBlock(grain=TILE, damping=0).score(site(w), heard(Gradient(), leaf.grad, None)))
    for r in range(2):
        for k in range(2):
            gone = w - without(w, r, k)
            change = 0.5 * (c + float((u * (w - gone)).sum())) ** 2 - 0.5
            second = change + float((u * gone).sum())
            first = float((gone * u).square().sum()) / 6
            assert float(got[r, k]) == pytest.approx(first + second, rel=1e-3)


def test_damping_adds_the_size_of_what_goes() -> None:
    w, g = torch.randn(4, 6), torch.randn(4, 6)
    plain, damped = (TaylorBlock(grain=TILE, damping=d).score(site(w), heard(Gradient(), g, None)) for d in (0.0, 2.0))
    more = TILE.unit_scores(damped - plain)
    assert float(more[1, 0]) == pytest.approx(float(g.square().mean() * w[2:, :3].square().sum()), rel=1e-4)
    alone = TaylorBlock().score(site(w), heard(Gradient(), g, None))  # weights: tiles of one
    level = 0.01 * float(g.square().mean())
    torch.testing.assert_close(alone, (w * g).square() * 1.5 + level / 2 * w.square())
    with pytest.raises(SecateurError, match="damping"):
        TaylorBlock(damping=-1)


def tiled(**words: object) -> Step:
    return Step(**{"space": "weight", "score": "output_error", "grain": "tile:4x4"} | words)  # type: ignore[arg-type]


def test_parts_know_the_grain() -> None:
    parts = parts_of(tiled(keep="0.5", budget="rate_distortion:by=output"))
    assert parts.needs == (Gram,) and parts.survey_needs == (Gram,)
    parts = parts_of(Step("weight", score="wanda", keep="0.5", budget="rate_distortion:by=output"))
    assert parts.needs == (InputNorm,) and parts.survey_needs == (InputNorm,)
    assert parts_of(Step("ffn", score="wanda", keep="0.5", budget="rate_distortion")).survey_needs == (Fisher,)
    assert parts_of(tiled(score="taylor_block:damping=0.1", keep="0.5")).score == TaylorBlock(Tile(4, 4), 0.1)
    with pytest.raises(SecateurError, match="option"):
        parts_of(tiled(score="output_error:grain=row", keep="0.5"))


def test_the_survey_is_what_dropping_tiles_does_in_a_model() -> None:
    model = make("llama")
    ids = tokens(2, 10)
    stage = Stage(
        Store.of_model(model), tiled(keep="0.5", budget="rate_distortion:by=output"), 0, Conditions(lambda: [ids])
    )
    stage.store.load_rest(stage.model, "cpu")
    scores = {name: value for name, value in stage.survey() if ".1." in name}
    name = "model.layers.1.mlp.down_proj.weight"
    module = model.get_submodule(name.removesuffix(".weight"))
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
    model(ids)
    handle.remove()
    x, w = inputs[0].detach(), module.weight.detach()
    tile = Tile(4, 4)
    got = scores[name].reshape(w.shape[0] // 4, w.shape[1] // 4)
    for r in range(got.shape[0]):
        for c in range(got.shape[1]):
            want = float((x @ (w - without(w, r, c, tile)).T).square().sum())
            assert float(got[r, c]) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(
    "budget", ["uniform", "rate_distortion", "rate_distortion:by=output", "rate_distortion:by=score", "atp"]
)
def test_tiles_under_a_target_in_macs(budget: str) -> None:
    model = make("llama")
    dense = size(model).macs_per_token
    store, conditions = Store.of_model(model), Conditions(lambda: [tokens(2, 10)])
    infos = Stage(store, tiled(keep="0.5"), 0, conditions).infos
    limit = dense - round(sum(i.units * i.cost for i in infos) * 0.3)
    step = tiled(target=f"macs={limit}", budget=budget)
    found = settled(Stage(store, step, 0, conditions), step)
    plan = Stage(store, found, 0, conditions).run(Nowhere()).plan
    left = dense - sum(plan.total(key) - plan.kept(key) for key in plan)
    assert left <= limit < left + 16 * (len(plan) if budget == "uniform" else 2)
    for key in plan:
        keep = plan[key]
        tiles = keep.reshape(keep.shape[0] // 4, 4, keep.shape[1] // 4, 4).float().mean((1, 3))
        assert set(tiles.unique().tolist()) <= {0.0, 1.0}


def test_experts_count_as_often_as_they_are_chosen() -> None:
    model = make("mixtral")
    store, conditions = Store.of_model(model), Conditions(lambda: [tokens(2, 10)])
    dense, chosen = size(model).macs_per_token, model.config.num_experts_per_tok / model.config.num_local_experts
    assert chosen < 1
    words = {"score": "magnitude", "include": "*experts*"}
    infos = Stage(store, tiled(keep="0.5", **words), 0, conditions).infos
    limit = dense - round(sum(i.units * 16 * chosen for i in infos) * 0.3)
    step = tiled(target=f"macs={limit}", **words)
    found = settled(Stage(store, step, 0, conditions), step)
    counts = Stage(store, found, 0, conditions).counts()
    left = dense - sum((i.units - counts[i.name]) * 16 * chosen for i in infos)
    assert left <= limit < left + 16 * chosen * len(infos) + 1


@pytest.mark.parametrize(
    ("family", "space"),
    [("llama", "ffn"), ("llama", "kv_group"), ("llama", "layer"), ("gpt2", "head"), ("mixtral", "ffn")],
)
def test_units_under_a_target_in_macs_hold_when_cut(family: str, space: str) -> None:
    model = make(family)
    store, conditions = Store.of_model(model), Conditions(lambda: [tokens(2, 10)])
    few = cut_macs(store, conditions, Step(space, score="magnitude", keep=1))
    limit = (size(model).macs_per_token + few) // 2
    step = Step(space, score="magnitude", target=f"macs={limit}")
    found = settled(Stage(store, step, 0, conditions), step)
    assert found.target is None and cut_macs(store, conditions, found) <= limit
    if space == "layer":
        more = Step(space, score="magnitude", keep=int(found.keep) + 1)  # type: ignore[arg-type]
    else:
        info = Stage(store, found, 0, conditions).infos[0]
        assert found.amount is not None and found.amount.share is not None
        share = found.amount.share + Decimal(info.groups) / info.units  # a unit more
        more = Step(space, score="magnitude", keep=float(min(share, Decimal(1))))
    assert cut_macs(store, conditions, more) > limit


def cut_macs(store: Store, conditions: Conditions, step: Step) -> int:
    """MACs per token of the model that a step leaves."""
    stage = Stage(store, step, 0, conditions)
    plan = stage.run(Nowhere()).plan
    if step.space == "layer":
        cut_layers(stage.model, stage.anatomy, plan["0/layer/model"])
    return size(stage.model).macs_per_token


def test_what_macs_do_not_count_is_refused() -> None:
    store, conditions = Store.of_model(make("llama")), Conditions(lambda: [tokens(2, 10)])
    refused = {
        "skips no single zero": Step("weight", score="magnitude", target="macs=-30%"),
        "a mask leaves": Step("ffn", score="magnitude", target="macs=-30%", apply="mask"),
        "cannot be met": Step("ffn", score="magnitude", target="macs=-95%"),
        "has only": Step("ffn", score="magnitude", target="macs=900G"),
    }
    for words, step in refused.items():
        with pytest.raises(SecateurError, match=words):
            settled(Stage(store, step, 0, conditions), step)


def test_amounts_read_back() -> None:
    assert Step("ffn", score="magnitude", target="macs=80M").goal is not None
    assert Step("ffn", score="magnitude", target="macs=80M").goal.limit(0) == 80_000_000  # type: ignore[union-attr]
