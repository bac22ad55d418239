"""ATP and rate-distortion allocation: closed forms, and every allocation of tiny sites tried out."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import product
from math import inf, nan
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.methods.base import Amount, SiteInfo
from secateur.methods.budgets.atp import Atp
from secateur.methods.budgets.protected import Protected
from secateur.methods.budgets.rate_distortion import Curve, RateDistortion
from secateur.methods.budgets.settle import afford
from secateur.methods.budgets.uniform import Uniform
from secateur.methods.scores.fisher import FisherScore


def share(text: str) -> Amount:
    return Amount(share=Decimal(text))


def layers(units: Sequence[int], costs: Sequence[float] | None = None, groups: int = 1) -> list[SiteInfo]:
    """One site per block."""
    costs = costs if costs is not None else [1.0] * len(units)
    return [
        SiteInfo(f"layers.{i}.w", "w", "ffn", i, len(units), n, cost=c, groups=groups)
        for i, (n, c) in enumerate(zip(units, costs, strict=True))
    ]


def test_atp_is_an_arithmetic_progression() -> None:
    infos = layers([4000] * 5)
    assert list(Atp().allot(infos, share("0.4"), {}).values()) == [1840, 1720, 1600, 1480, 1360]  # 12 points in four
    assert list(Atp(rise=-0.2).allot(infos, share("0.4"), {}).values()) == [1200, 1400, 1600, 1800, 2000]
    assert Atp(rise=0).allot(infos, share("0.4"), {}) == Uniform().allot(infos, share("0.4"), {})
    assert list(Atp().allot(layers([4000]), share("0.4"), {}).values()) == [1600]
    assert list(Atp().allot(infos, share("1.0"), {}).values()) == [4000] * 5


def test_atp_weighs_blocks_by_their_size() -> None:
    """Sizes 1 : 3 : 1 and a mean of 0.5: with the middle one on the line, keep is 0.6, 0.5, 0.4; with sizes 1 : 1 : 3
    the level moves up by what the small first block cannot give."""
    assert list(Atp(rise=0.2).allot(layers([1000, 3000, 1000]), share("0.5"), {}).values()) == [600, 1500, 400]
    assert list(Atp(rise=0.2).allot(layers([1000, 1000, 3000]), share("0.5"), {}).values()) == [640, 540, 1320]


@pytest.mark.parametrize(("keep", "rise"), [("0.9", 0.5), ("0.1", 0.5), ("0.97", -1.0), ("0.5", 1.0)])
def test_atp_held_within_zero_and_one_as_by_brute_force(keep: str, rise: float) -> None:
    levels = np.linspace(-1, 2, 60_001)[:, None]
    line = np.clip(levels + rise * (0.5 - np.arange(6) / 5), 0, 1)
    want = line[np.abs(line.mean(1) - float(keep)).argmin()]
    got = Atp(rise=rise).allot(layers([5000] * 6), share(keep), {})
    assert sum(got.values()) == share(keep).of(30_000)
    assert list(got.values()) == pytest.approx(5000 * want, abs=1)
    assert want.max() == 1 or want.min() == 0 or rise == 1.0


@pytest.mark.parametrize("keep", ["0.3", "0.5", "0.77", "1.0"])
def test_atp_keeps_groups_whole_and_the_total_of_uniform(keep: str) -> None:
    infos = [
        SiteInfo(f"layers.{i}.{n}", n, "ffn", i, 3, rows * 12, groups=rows)
        for i in range(3)
        for n, rows in (("q", 9), ("k", 3), ("up", 24))
    ]
    counts = Atp().allot(infos, share(keep), {})
    assert all(counts[s.name] % s.groups == 0 and 0 <= counts[s.name] <= s.units for s in infos)
    assert sum(counts.values()) == sum(Uniform().allot(infos, share(keep), {}).values())


def test_atp_of_heads_spends_all_heads_that_a_share_of_the_model_has() -> None:
    counts = list(Atp(rise=0.6).allot(layers([3] * 30), share("0.5"), {}).values())
    assert sum(counts) == 45 and sorted(counts, reverse=True) == counts and counts[0] > counts[-1]


def test_atp_between_protected_ends_runs_over_the_others() -> None:
    got = Protected(Atp(rise=0.2), first=1, last=1).allot(layers([1000] * 5), share("0.5"), {})
    assert list(got.values()) == [1000, 600, 500, 400, 1000]
    for bad in (1.5, -2, True):
        with pytest.raises(SecateurError, match="rise"):
            Atp(rise=bad)


@pytest.mark.parametrize("keep", ["0.2", "0.5", "0.61", "0.9"])
def test_units_of_different_price_stay_within_what_uniform_pays(keep: str) -> None:
    infos = layers([40, 30, 20, 10], costs=[3.0, 7.5, 2.0, 11.0])
    whole = sum(Fraction(s.cost) * s.units for s in infos)
    counts = Atp(rise=0.3).allot(infos, share(keep), {})
    paid = sum(Fraction(s.cost) * counts[s.name] for s in infos)
    left = Fraction(keep) * whole - paid
    assert left >= 0
    assert all(left < Fraction(s.cost) or counts[s.name] == s.units for s in infos)
    with pytest.raises(SecateurError, match="must stay"):
        afford(
            [SiteInfo(f"e{i}", "e", "ffn", i, 2, 8, cost=1.0 + i, minimum=4) for i in range(2)], [0, 0], share("0.1")
        )


def seen(budget: RateDistortion, infos: Sequence[SiteInfo], values: Sequence[Tensor]) -> dict[str, Curve]:
    return {s.name: budget.observe(s, v) for s, v in zip(infos, values, strict=True)}


def loss(values: Sequence[Tensor], counts: Sequence[int]) -> float:
    """What goes, added up the long way."""
    return sum(sum(sorted(v.tolist())[: len(v) - n]) for v, n in zip(values, counts, strict=True))


def test_two_quadratic_curves() -> None:
    """Errors of units that rise linearly: D(k) = a / 2 (1 - k)^2. Equal slopes: a1 (1 - k1) / n1 = a2 (1 - k2) / n2."""
    infos, budget = layers([10_000, 10_000]), RateDistortion(by="score", least=0)
    values = [a * torch.arange(1, 10_001).double() / 1e8 for a in (1.0, 3.0)]
    got = budget.allot(infos, share("0.4"), seen(budget, infos, values))
    assert list(got.values()) == pytest.approx([1000, 7000], abs=3)  # 1 - k1 = 0.9, 1 - k2 = 0.3
    relative = RateDistortion(
        by="output", least=0
    )  # the factors no longer count, the sizes do: (1 - k1) / n1 = (1 - k2) / n2
    infos = layers([10_000, 30_000])
    values = [a * torch.arange(1, n + 1).double() for a, n in ((7.0, 10_000), (0.1, 30_000))]
    got = relative.allot(infos, share("0.6"), seen(relative, infos, values))
    gone = 16_000 / (10_000 + 90_000)  # (1 - k1) = 10,000 x, (1 - k2) = 30,000 x, what goes in all is 16,000
    assert list(got.values()) == pytest.approx([10_000 - 10_000 * gone, 30_000 - 90_000 * gone], abs=30)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("by", ["score", "output"])
@pytest.mark.parametrize("most", [inf, 1.5])
def test_no_other_allocation_of_tiny_sites_is_better(seed: int, by: Literal["score", "output"], most: float) -> None:
    g = torch.Generator().manual_seed(seed)
    units = [5, 7, 4]
    values = [torch.rand(n, generator=g) ** 2 * (i + 1) for i, n in enumerate(units)]
    if seed % 3 == 0:
        values = [(4 * v).round() for v in values]  # ties within and between sites
    infos, budget = layers(units), RateDistortion(by=by, least=0, most=most)
    total = [float(v.sum()) if by == "output" else 1.0 for v in values]
    scaled = [v.double() / t for v, t in zip(values, total, strict=True)]
    for kept in range(17):
        keep = Amount(share=Decimal(kept) / 16)
        got = list(budget.allot(infos, keep, seen(budget, infos, values)).values())
        floors = [int(max(0.0, 1 - most * (1 - kept / 16)) * n) if kept < 16 else n for n in units]
        every = [c for c in product(*(range(f, n + 1) for f, n in zip(floors, units, strict=True))) if sum(c) == kept]
        assert sum(got) == kept and all(n >= f for n, f in zip(got, floors, strict=True))
        assert loss(scaled, got) == pytest.approx(min(loss(scaled, c) for c in every), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_units_of_different_price_lose_at_most_one_unit_more_than_the_best(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    infos, budget = layers([6, 5, 4], costs=[1.0, 2.5, 4.0]), RateDistortion(by="score", least=0, most=inf)
    values = [torch.rand(s.units, generator=g) * s.cost for s in infos]
    largest = max(float(v.max()) for v in values)
    for tenth in range(11):
        keep = Amount(share=Decimal(tenth) / 10)
        got = list(budget.allot(infos, keep, seen(budget, infos, values)).values())
        paid = sum(n * s.cost for n, s in zip(got, infos, strict=True))
        limit = 34.5 * tenth / 10
        assert paid <= limit + 1e-9
        every = product(*(range(s.units + 1) for s in infos))
        affordable = [c for c in every if sum(n * s.cost for n, s in zip(c, infos, strict=True)) <= limit + 1e-9]
        assert loss(values, got) <= min(loss(values, c) for c in affordable) + largest


def test_rows_keep_equal_numbers_and_the_curve_is_theirs() -> None:
    values = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    curve = Curve.of(values.reshape(-1), groups=6)
    for kept in range(9):
        want = sum(sum(sorted(row)[: 8 - kept]) for row in values.tolist())
        assert curve.error[kept] == pytest.approx(want, rel=1e-6)
    infos = [SiteInfo(f"l.{i}", "w", "ffn", i, 2, 48, groups=6, minimum=7 * (1 - i)) for i in range(2)]
    budget = RateDistortion(by="score", least=0)
    got = budget.allot(infos, share("0.5"), seen(budget, infos, [values.reshape(-1), 1e3 * values.reshape(-1)]))
    assert got == {"l.0": 12, "l.1": 36}  # the minimum of 7 is 2 a row; 6 of 8 are left for the other


def test_a_large_site_is_summed_up_in_a_few_points() -> None:
    values = torch.rand(300_000, generator=torch.Generator().manual_seed(0)) ** 3
    curve = Curve.of(values)
    assert len(curve.kept) == 1025 and curve.error[0] == pytest.approx(float(values.double().sum()))
    order = values.double().sort().values
    for kept in (0, 1, 1000, 150_000, 299_999, 300_000):
        exact = float(order[: 300_000 - kept].sum())
        assert np.interp(kept, curve.kept, curve.error) == pytest.approx(exact, abs=1e-3 * curve.error[0])


def test_the_hull_is_what_some_slope_chooses() -> None:
    g = np.random.default_rng(0)
    error = np.sort(g.random(40))[::-1].copy()
    curve = Curve(np.arange(40), error)
    slopes = np.linspace(0, 2, 20_001)
    chosen = {int(np.argmin(error + s * curve.kept)) for s in slopes}
    hull = curve.hull()
    assert chosen - {39} <= set(hull.kept.tolist()) and len(hull.kept) < 20
    assert np.all(np.diff(np.diff(hull.error) / np.diff(hull.kept)) > 0)
    assert np.all(np.interp(curve.kept, hull.kept, hull.error) <= error + 1e-12)


def test_counts_are_those_of_one_sorted_list_and_nobody_falls_below_the_least() -> None:
    g = torch.Generator().manual_seed(0)
    infos = layers([400, 600, 500, 300])
    values = [torch.rand(s.units, generator=g) * scale for s, scale in zip(infos, (1.0, 3.0, 0.5, 2.0), strict=True)]
    line = torch.cat(values).sort(descending=True).values[719]  # the last of 720 that stay
    free = RateDistortion(least=0)
    got = free.allot(infos, share("0.4"), seen(free, infos, values))
    assert list(got.values()) == pytest.approx([int((v >= line).sum()) for v in values], abs=2)
    held, values = RateDistortion(least=0.2), [v + 100 * (v is values[1]) for v in values]
    counts = list(held.allot(infos, share("0.3"), seen(held, infos, values)).values())
    assert sum(counts) == 540 and counts[0] == 80 and counts[2] == 100 and counts[3] >= 60
    none_free = RateDistortion(least=0.5).allot(infos, share("0.3"), seen(held, infos, values))
    assert list(none_free.values()) == [120, 180, 150, 90]


def test_distortions_have_names() -> None:
    assert RateDistortion().ranking is FisherScore and RateDistortion(by="score").ranking is None
    with pytest.raises(SecateurError, match="did you mean 'output'"):
        RateDistortion(by="ouput")  # type: ignore[arg-type]
    for least in (1.0, -0.1, True):
        with pytest.raises(SecateurError, match="least"):
            RateDistortion(least=least)
    for most in (0.9, nan, True):
        with pytest.raises(SecateurError, match="most"):
            RateDistortion(most=most)
    with pytest.raises(SecateurError, match="not finite"):
        Curve.of(torch.tensor([1.0, torch.nan]))
