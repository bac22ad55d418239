"""Budgets against sorting everything in one list, and against the published formulas."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.methods.base import Amount, Budget, SiteInfo
from secateur.methods.budgets import BUDGETS
from secateur.methods.budgets.component_map import ComponentMap, Rule
from secateur.methods.budgets.owl import Owl
from secateur.methods.budgets.pooled import Pooled
from secateur.methods.budgets.protected import Protected
from secateur.methods.budgets.ranks import Ranks, merged, order_key
from secateur.methods.budgets.settle import settle
from secateur.methods.budgets.uniform import Uniform


def share(text: str) -> Amount:
    return Amount(share=Decimal(text))


def sites(units: Sequence[int], **common: Any) -> list[SiteInfo]:
    """One site per layer, attention and ffn in turn."""
    return [
        SiteInfo(f"layers.{i}.w", "w", "ffn" if i % 2 else "attention", i, len(units), n, **common)
        for i, n in enumerate(units)
    ]


def scores(infos: Sequence[SiteInfo], seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {s.name: torch.randn(s.units, generator=g).abs() * (1 + s.block) for s in infos}


def run(budget: Budget, infos: Sequence[SiteInfo], keep: Amount, values: dict[str, Tensor]) -> dict[str, int]:
    seen = {s.name: budget.observe(s, values[s.name]) for s in infos} if budget.surveys else {}
    return budget.allot(infos, keep, seen)


def best(values: dict[str, Tensor], count: int) -> dict[str, int]:
    ranked = sorted((-float(v), name) for name, s in values.items() for v in s)
    won = [name for _, name in ranked[:count]]
    return {name: won.count(name) for name in values}


def test_uniform_rounds_half_up_at_every_site_and_group() -> None:
    infos = [*sites([7, 9]), SiteInfo("rows", "w", "ffn", 0, 1, 30, groups=6)]
    assert Uniform().allot(infos, share("0.5"), {}) == {"layers.0.w": 4, "layers.1.w": 5, "rows": 18}
    assert Uniform().allot(infos, Amount(count=5), {})["rows"] == 30
    with pytest.raises(SecateurError, match=r"layers.0.w cannot keep 8 of 7"):
        Uniform().allot(infos, Amount(count=8), {})
    with pytest.raises(SecateurError, match="at least 4"):
        Uniform().allot([SiteInfo("e", "e", "ffn", 0, 1, 8, minimum=4)], share("0.25"), {})


@pytest.mark.parametrize("keep", ["0.0", "0.1", "0.37", "0.5", "0.999", "1.0"])
def test_pooled_equals_one_sorted_list(keep: str) -> None:
    infos = sites([40, 25, 60, 11])
    values = scores(infos)
    total = share(keep).of(136)
    assert run(Pooled(), infos, share(keep), values) == best(values, total)
    assert run(BUDGETS["class_blind"](), infos, share(keep), values) == best(values, total)


def test_pooled_standardised() -> None:
    infos = sites([40, 25, 60])
    values = scores(infos)
    z = {n: (s - s.mean()) / s.std(correction=0) for n, s in values.items()}
    assert run(Pooled(standardise="zscore"), infos, share("0.4"), values) == best(z, 50)


def test_class_distribution_is_one_lambda_for_all_deviations() -> None:
    infos = sites([400, 250, 600])
    values = scores(infos)
    low, high = 0.0, 100.0
    for _ in range(100):  # removed |w| < lambda sigma: search lambda
        mid = (low + high) / 2
        removed = sum(int((s < mid * s.square().mean().sqrt()).sum()) for s in values.values())
        low, high = (mid, high) if removed < 750 else (low, mid)
    want = {n: int((s >= high * s.square().mean().sqrt()).sum()) for n, s in values.items()}
    assert run(BUDGETS["class_distribution"](), infos, share("0.4"), values) == want
    assert run(BUDGETS["class_uniform"](), infos, share("0.4"), values) == dict(zip(want, [160, 100, 240], strict=True))


def test_pooled_within_layers() -> None:
    infos = [SiteInfo(f"layers.{i}.{w}", w, "ffn", i, 2, 20) for i in range(2) for w in "ab"]
    values = {s.name: torch.rand(20) * (3 if s.kind == "a" else 1) for s in infos}
    got = run(Pooled(over="layer"), infos, share("0.5"), values)
    for i in range(2):
        own = {n: s for n, s in values.items() if n.startswith(f"layers.{i}")}
        assert {n: got[n] for n in own} == best(own, 20)


def test_pooled_fills_a_budget_of_parameters() -> None:
    infos = [
        SiteInfo("heads", "h", "attention", 0, 1, 3, cost=170.5),
        SiteInfo("neurons", "n", "ffn", 0, 1, 100, cost=1.0),
    ]
    values = {"heads": torch.tensor([300.0, 200.0, 100.0]), "neurons": torch.linspace(0.02, 2, 100)}
    plain = run(Pooled(), infos, share("0.5"), values)
    assert plain == {"heads": 1, "neurons": 0}  # raw scores rank every head first; two of them are too many
    fair = run(Pooled(cost=True), infos, share("0.5"), values)
    ranked = sorted([(-float(v) / s.cost, s.name) for s in infos for v in values[s.name]])
    spent, want = 0.0, {"heads": 0, "neurons": 0}
    for _, name in ranked:
        cost = 170.5 if name == "heads" else 1.0
        if spent + cost > 0.5 * 611.5:
            break
        spent, want = spent + cost, want | {name: want[name] + 1}
    assert fair == want


def test_minimum_takes_places_from_the_others() -> None:
    infos = sites([10, 10, 10], minimum=2)
    values = {s.name: torch.rand(10) + 10 * s.block for s in infos}
    assert list(run(Pooled(), infos, share("0.5"), values).values()) == [2, 3, 10]
    with pytest.raises(SecateurError, match=r"at least 6 units must stay.*3 to keep"):
        run(Pooled(), infos, share("0.1"), values)


def test_minima_that_cost_more_than_what_may_stay_are_refused() -> None:
    infos = [
        SiteInfo("heads", "h", "attention", 0, 1, 4, cost=100.0, minimum=1),
        SiteInfo("neurons", "n", "ffn", 0, 1, 100, cost=1.0, minimum=1),
    ]
    assert run(Pooled(), infos, share("0.202"), scores(infos)) == {"heads": 1, "neurons": 1}  # 101 of 500
    with pytest.raises(SecateurError, match=r"at least 2 units must stay.*100 parameters to keep"):
        run(Pooled(), infos, share("0.201"), scores(infos))


@pytest.mark.parametrize("name", ["pooled", "owl", "class_blind", "class_distribution"])
@pytest.mark.parametrize("keep", ["0.3", "0.5", "0.77"])
def test_groups_stay_whole_and_totals_equal_those_of_uniform(name: str, keep: str) -> None:
    infos = [
        SiteInfo(f"layers.{i}.{n}", n, "ffn", i, 3, rows * 12, groups=rows)
        for i in range(3)
        for n, rows in (("q", 9), ("k", 3), ("up", 24))
    ]
    counts = run(BUDGETS[name](), infos, share(keep), scores(infos))
    assert all(counts[s.name] % s.groups == 0 and 0 <= counts[s.name] <= s.units for s in infos)
    assert sum(counts.values()) == sum(Uniform().allot(infos, share(keep), {}).values())


def test_heads_are_counted_over_the_model_where_they_may_move() -> None:
    infos = sites([3] * 30)
    assert sum(run(Pooled(), infos, share("0.5"), scores(infos)).values()) == 45
    layers = sites([1] * 30)
    assert sum(run(Pooled(), layers, Amount(count=24), scores(layers)).values()) == 24


@pytest.mark.parametrize("name", [n for n in BUDGETS if n != "component_map"])
def test_keeping_everything_keeps_everything(name: str) -> None:
    infos = sites([40, 25, 60])
    assert run(BUDGETS[name](), infos, share("1.0"), scores(infos)) == {s.name: s.units for s in infos}


@pytest.mark.parametrize("name", ["pooled", "class_blind", "class_distribution"])
def test_more_keep_is_never_less_anywhere(name: str) -> None:
    infos = sites([40, 25, 60])
    values = scores(infos)
    runs = [run(BUDGETS[name](), infos, share(str(k / 50)), values) for k in range(51)]
    assert all(b[n] >= a[n] for a, b in pairwise(runs) for n in a)


@pytest.mark.parametrize("m", [5, 3])
def test_owl_equals_the_formula_held_in_its_band(m: int) -> None:
    """Layers of one size: keep_l = keep + 2 lambda (D - min) / (max - min) + shift, D the outlier ratio."""
    infos = [SiteInfo(f"layers.{i}.{w}", w, "ffn", i, 6, 5000) for i in range(6) for w in "ab"]
    g = torch.Generator().manual_seed(0)
    values = {s.name: torch.randn(5000, generator=g).abs() ** (1 + s.block / 3) for s in infos}
    ratios = []
    for i in range(6):
        flat = torch.cat([values[s.name] for s in infos if s.block == i]).numpy()
        ratios.append((flat > m * flat.mean()).mean())
    d = np.array(ratios)
    raised = (d - d.min()) / (d.max() - d.min()) * 0.16 + 0.4
    assert np.abs(raised - raised.mean()).max() > 0.08  # the published form leaves the band here
    shifts = np.linspace(-0.16, 0.0, 160_001)[:, None]
    clipped = np.clip(raised + shifts, 0.32, 0.48)
    want = clipped[np.abs(clipped.mean(1) - 0.4).argmin()]
    got = run(Owl(m=m), infos, share("0.4"), values)
    assert sum(got.values()) == 24_000
    for s in infos:
        assert got[s.name] == pytest.approx(5000 * want[s.block], abs=2)


def test_owl_without_clipping_is_the_published_formula_exactly() -> None:
    infos = sites([4000] * 3)
    values = {}
    for s, outliers in zip(infos, (40, 60, 80), strict=True):  # ratios 1 %, 1.5 %, 2 %: want -0.08, 0, +0.08
        values[s.name] = torch.ones(4000)
        values[s.name][:outliers] = 100.0
    assert list(run(Owl(), infos, share("0.5"), values).values()) == [1680, 2000, 2320]
    assert list(run(Owl(strength=0.0), infos, share("0.5"), values).values()) == [2000] * 3
    with pytest.raises(SecateurError, match="out of range"):
        Owl(m=0)


def test_protected_ends_keep_everything_and_the_others_as_asked() -> None:
    infos = sites([10, 10, 10, 10])
    values = scores(infos)
    got = run(Protected(Pooled(), first=1, last=1), infos, share("0.5"), values)
    middle = {s.name: values[s.name] for s in infos[1:3]}
    assert got == {infos[0].name: 10, **best(middle, 10), infos[3].name: 10}
    assert Protected(Owl(), 1).ranking is Owl.ranking
    assert not Protected(Uniform(), 1).surveys
    with pytest.raises(SecateurError, match="every layer is protected"):
        run(Protected(Uniform(), 3, 3), infos, share("0.5"), values)


def test_a_map_by_component_layer_and_name() -> None:
    infos = sites([10] * 6)
    rules = (Rule("layers:4-5", share("1.0")), Rule("attention", share("0.8")), Rule("*.1.w", Amount(count=3)))
    got = ComponentMap(rules).allot(infos, share("0.5"), {})
    assert list(got.values()) == [8, 3, 8, 5, 10, 10]
    with pytest.raises(SecateurError, match=r"matches nothing.*typo"):
        ComponentMap((Rule("typo", share("0.5")),)).allot(infos, share("0.5"), {})
    with pytest.raises(SecateurError, match="--map"):
        ComponentMap().allot(infos, share("0.5"), {})


def test_keys_sort_as_numbers_do() -> None:
    values = torch.tensor([-torch.inf, -3e38, -2.0, -1e-40, 0.0, 1e-45, 1e-3, 1.0, 1.0000001, 3e38, torch.inf])
    keys = order_key(values).tolist()
    assert keys == sorted(set(keys))
    assert int(order_key(torch.tensor(-0.0))) == int(order_key(torch.tensor(0.0)))


def test_large_sites_are_counted_coarsely_but_totals_are_exact() -> None:
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=g) * s for n, s in ((70_000, 1.0), (1_000, 2.0), (150_000, 0.5))]
    ranks = [Ranks.of(v) for v in values]
    assert [r.shift for r in ranks] == [12, 0, 12]
    assert [int(r.counts.sum()) for r in ranks] == [70_000, 1_000, 150_000]
    assert ranks[0].mean == pytest.approx(float(values[0].double().mean()), abs=1e-9)
    assert ranks[0].deviation == pytest.approx(float(values[0].double().std(correction=0)), rel=1e-9)
    order = torch.cat(values).sort(descending=True).values
    for count in (1, 500, 50_000, 110_500, 220_999, 221_000):
        won = merged(ranks).best(count)
        assert sum(won) == count
        exact = [int((v >= order[count - 1]).sum()) for v in values]
        assert all(abs(a - b) <= 0.002 * count + 8 for a, b in zip(won, exact, strict=True))


def test_whole_groups_add_up_by_exchange() -> None:
    infos = [SiteInfo("a", "a", "ffn", 0, 1, 30, groups=5), SiteInfo("b", "b", "ffn", 0, 1, 30, groups=3)]
    assert settle(infos, [10.0, 9.0], 17) == {"a": 5, "b": 12}  # neither step alone closes the gap of 2
    assert sum(settle(infos, [0.0, 0.0], 1).values()) <= 1  # no sum of fives and threes makes 1


def test_words_are_checked() -> None:
    with pytest.raises(SecateurError, match="did you mean 'zscore'"):
        Pooled(standardise="zscor")  # type: ignore[arg-type]
    with pytest.raises(SecateurError, match="unknown pool"):
        Pooled(over="row")  # type: ignore[arg-type]
    with pytest.raises(SecateurError, match="from the ends"):
        Protected(Uniform(), first=-1)
    with pytest.raises(SecateurError, match="cost: true or cost: false"):
        Pooled(cost="yes please")  # type: ignore[arg-type]
    with pytest.raises(SecateurError, match=r"zscore.*cost: true.*standardise: rms"):
        Pooled(standardise="zscore", cost=True)
