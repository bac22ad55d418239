"""ATP and rate-distortion allocation: closed forms, and every allocation of tiny sites tried out."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from secateur.errors import SecateurError
from secateur.methods.base import Amount, SiteInfo
from secateur.methods.budgets.atp import Atp
from secateur.methods.budgets.protected import Protected
from secateur.methods.budgets.settle import afford
from secateur.methods.budgets.uniform import Uniform


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
