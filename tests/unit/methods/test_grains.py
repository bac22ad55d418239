"""Grains against plain sorting in Python: exact counts, ties scattered, a larger count keeps more."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune

from secateur.errors import SecateurError
from secateur.methods.base import Amount
from secateur.methods.grains import Columns, Grain, Matrix, NofM, Row, Tile, Unit, parse_grain
from secateur.methods.top import apportion, scattered, top_rows

ALL = ["row", "matrix", "columns:4", "columns:5", "tile:2x3", "tile:3x4", "unit"]
SHAPE = (6, 12)


def late(index: int) -> int:
    """Where an index stands among equals, from the published definition of MurmurHash3's 32-bit finaliser."""
    h = index
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return -(h ^ h >> 16)


def by_hand(scores: Tensor, grain: Grain, count: int) -> set[tuple[int, int]]:
    """Places handed out one by one, in proportion to the groups' sizes; equal claims to the better next score."""
    rows = isinstance(grain, Row | Unit)
    seats = []
    for g, members in enumerate(groups_of(grain, SHAPE)):
        start = g * len(members) if rows else 0
        tie = {at: late(start + i) for i, at in enumerate(members)}
        ranked = sorted(members, key=lambda at: (-float(scores[at]), tie[at]))
        for k, at in enumerate(ranked, 1):
            seats.append((-Fraction(len(members), 2 * k - 1), -float(scores[at]), late(g) if rows else g, at))
    return {at for *_, at in sorted(seats)[:count]}


def groups_of(grain: Grain, shape: tuple[int, int]) -> list[list[tuple[int, int]]]:
    rows, columns = shape
    if isinstance(grain, Row | Unit):
        return [[(i, j) for j in range(columns)] for i in range(rows)]
    width = grain.width if isinstance(grain, Columns) else columns
    starts = range(0, columns, width)
    return [[(i, j) for i in range(rows) for j in range(a, min(a + width, columns))] for a in starts]


def kept(mask: Tensor) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in mask.nonzero()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("values", [3, 1000])
@pytest.mark.parametrize("name", ["row", "matrix", "columns:4", "columns:5", "columns:100"])
def test_element_grains_equal_sorting_by_hand(name: str, values: int, seed: int) -> None:
    grain = parse_grain(name)
    scores = torch.randint(-values, values, SHAPE, generator=torch.Generator().manual_seed(seed)).float()
    for count in range(SHAPE[0] * SHAPE[1] + 1):
        assert kept(grain.select(scores, count)) == by_hand(scores, grain, count), count


@pytest.mark.parametrize("n_m", [(1, 2), (2, 4), (3, 4), (4, 8), (5, 12), (1, 1)])
def test_n_of_m_equals_sorting_by_hand(n_m: tuple[int, int]) -> None:
    n, m = n_m
    scores = torch.randint(0, 4, (5, 24), generator=torch.Generator().manual_seed(1)).float()
    want = torch.zeros_like(scores, dtype=torch.bool)
    for i in range(5):
        for a in range(0, 24, m):
            for j in sorted(range(a, a + m), key=lambda j: (-float(scores[i, j]), late(i * 24 + j)))[:n]:
                want[i, j] = True
    grain = NofM(n, m)
    assert torch.equal(grain.select(scores, grain.count((5, 24))), want)


def test_tiles_are_chosen_by_their_sum() -> None:
    scores = torch.rand(6, 12, generator=torch.Generator().manual_seed(2))
    grain = Tile(2, 3)
    sums = {(i, j): float(scores[i : i + 2, j : j + 3].sum()) for i in range(0, 6, 2) for j in range(0, 12, 3)}
    for count in range(13):
        mask = grain.select(scores, count)
        best = sorted(sums, key=lambda at: -sums[at])[:count]
        assert kept(mask) == {(i + di, j + dj) for i, j in best for di in range(2) for dj in range(3)}


def test_units_keep_the_same_number_in_every_copy() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [9.0, 8.0, 7.0]])
    assert Unit().select(scores, 4).tolist() == [[False, True, True], [True, True, False]]
    assert Unit().select(scores[0], 1).tolist() == [False, True, False]
    with pytest.raises(SecateurError, match="multiple of 2"):
        Unit().select(scores, 3)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_a_larger_count_keeps_a_superset(name: str, seed: int) -> None:
    grain = parse_grain(name)
    scores = torch.randint(0, 5, SHAPE, generator=torch.Generator().manual_seed(seed)).float()
    step = grain.groups(SHAPE) if name == "unit" else 1
    counts = range(0, grain.units(SHAPE) + 1, step)
    masks = [grain.select(scores, c) for c in counts]
    for count, mask in zip(counts, masks, strict=True):
        assert int(mask.sum()) == count * grain.cost(SHAPE)
    assert all(bool((more | ~less).all()) for less, more in pairwise(masks))


@pytest.mark.parametrize(
    ("name", "share", "count"),
    [
        ("row", "0.5", 6 * 6),
        ("row", "0.375", 6 * 5),  # 4.5 of 12 rounds half up, in every row
        ("matrix", "0.375", 27),
        ("columns:5", "0.62", 45),  # 44.64
        ("tile:2x3", "0.375", 5),  # 4.5 of 12 tiles
        ("unit", "0.29", 6 * 3),  # 3.48 of 12, in every copy
    ],
)
def test_shares_are_rounded_half_up(name: str, share: str, count: int) -> None:
    assert parse_grain(name).count(SHAPE, Amount(share=Decimal(share))) == count


def test_shares_are_exact_decimals() -> None:
    # in binary floating point 0.29 * 100 is 28.999..., and 1.005 * 100 is below a half as well
    assert Matrix().count((10, 20), Amount(share=Decimal("0.145"))) == 29
    assert Matrix().count((10, 100), Amount(share=Decimal("0.0005"))) == 1


def test_counts_of_n_of_m() -> None:
    assert NofM(2, 4).count((3, 8), Amount(share=Decimal("0.5"))) == 12
    with pytest.raises(SecateurError, match=r"2:4 keeps 2 of every 4.*0\.6"):
        NofM(2, 4).count((3, 8), Amount(share=Decimal("0.6")))
    with pytest.raises(SecateurError, match=r"4 divides.*3 x 10"):
        NofM(2, 4).count((3, 10), None)
    with pytest.raises(SecateurError, match="fixes how many"):
        NofM(2, 4).select(torch.rand(3, 8), 11)
    assert NofM(2, 4).select(torch.rand(3, 8), 24).all()


def test_names_survive_parsing() -> None:
    for name in ["row", "matrix", "columns:128", "2:4", "16:32", "tile:16x8", "unit"]:
        assert str(parse_grain(name)) == name


@pytest.mark.parametrize("name", ["", "rows", "4:2", "0:4", "columns:0", "columns:", "tile:16", "tile:0x4", "2:4:8"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(SecateurError, match="received"):
        parse_grain(name)


def test_bad_scores_and_counts_are_refused() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        scores = torch.rand(4, 6)
        scores[1, 2] = bad
        with pytest.raises(SecateurError, match="not finite"):
            Row().select(scores, 12)
    with pytest.raises(SecateurError, match="cannot keep 25 of 24"):
        Row().select(torch.rand(4, 6), 25)
    with pytest.raises(SecateurError, match=r"tile:3x4 does not divide.*4 x 6"):
        Tile(3, 4).select(torch.rand(4, 6), 1)
    with pytest.raises(SecateurError, match="cannot keep 7 of 6"):
        Row().count((4, 6), Amount(count=7))


def test_places_are_handed_out_in_proportion() -> None:
    for sizes in ([30, 30, 12], [7, 1, 3, 3], [5], [128 * 6] * 4 + [64 * 6], [2, 1, 1]):
        claims = sorted((Fraction(s, 2 * k - 1) for s in sizes for k in range(1, s + 1)), reverse=True)
        for count in range(0, sum(sizes) + 1, max(1, sum(sizes) // 60)):
            seats, tied, more = apportion(sizes, count)
            assert sum(seats) + more == count
            assert more < len(tied) or not tied
            mark = claims[count - 1] if count else Fraction(max(sizes) + 1)
            for g, s in enumerate(sizes):
                sure = sum(Fraction(s, 2 * k - 1) > mark for k in range(1, s + 1))
                equal = sum(Fraction(s, 2 * k - 1) == mark for k in range(1, s + 1))
                assert seats[g] == (sure if g in tied else sure + equal)


def test_places_agree_with_rounding_where_the_roundings_add_up() -> None:
    seats, tied, _ = apportion([128 * 6, 128 * 6, 64 * 6], 461 + 461 + 230)  # 0.6 of each: 460.8, 460.8, 230.4
    assert (seats, tied) == ([461, 461, 230], [])


def test_whole_matrix_equals_the_pruning_of_torch() -> None:
    layer = torch.nn.Linear(30, 20)
    prune.l1_unstructured(layer, "weight", amount=213)
    mask = Matrix().select(layer.weight_orig.detach().abs(), 600 - 213)
    assert torch.equal(mask, layer.weight_mask.bool())


def test_many_equal_scores_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.methods.top.CHUNK", 64)
    scores = torch.randint(0, 2, (50, 16), generator=torch.Generator().manual_seed(0)).float()
    mask = top_rows(scores, 5)
    for i, (row, keep) in enumerate(zip(scores.tolist(), mask.tolist(), strict=True)):
        best = sorted(range(16), key=lambda j: (-row[j], late(16 * i + j)))[:5]
        assert [j for j, k in enumerate(keep) if k] == sorted(best)


def test_ranks_are_the_published_hash() -> None:
    # MurmurHash3 of no bytes is the finaliser of the seed: known values of seeds 0, 1 and 2^32 - 1
    assert scattered(torch.tensor([0, 1, 2**32 - 1])).tolist() == [0, 0x514E28B7, 0x81F16F39]


@pytest.mark.parametrize("width", [64, 576, 610, 1536])
@pytest.mark.parametrize("grain", [Row(), Matrix()], ids=str)
def test_equals_make_no_pattern(grain: Grain, width: int) -> None:
    """Of equal weights half stay; whether one does says nothing of its neighbours, at any width."""
    keep = grain.select(torch.ones(256, width), 128 * width)
    for other in (keep[1:] ^ keep[:-1], keep[:, 1:] ^ keep[:, :-1]):
        assert float(other.float().mean()) == pytest.approx(0.5, abs=0.03)
