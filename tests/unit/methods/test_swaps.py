"""Swaps against brute force over all pairs and all masks of tiny rows."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from layer_toys import case, error, heard, site
from torch import Tensor

from secateur.errors import SecateurError
from secateur.methods.grains import Columns, Grain, Matrix, NofM, Row, Tile
from secateur.methods.joint import swaps
from secateur.methods.joint.swaps import SparseSwaps, improve
from secateur.methods.least_squares import masked_least_squares
from secateur.methods.scores import SCORES


def lost(w: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """Each row's error in fp64, from the inputs themselves."""
    return ((w.double() * ~mask) @ x.double().T).square().sum(1)


def better_swaps(w: Tensor, mask: Tensor, x: Tensor, width: int) -> int:
    """How many single swaps within runs of ``width`` columns would lower a row's error by more than 0.01 %."""
    count = 0
    for i in range(len(w)):
        now = lost(w[i : i + 1], mask[i : i + 1], x)
        for p in (~mask[i]).nonzero().flatten().tolist():
            for q in mask[i].nonzero().flatten().tolist():
                if p // width == q // width:
                    other = mask[i].clone()
                    other[p], other[q] = True, False
                    count += bool(lost(w[i : i + 1], other.unsqueeze(0), x) < now * (1 - 1e-4))
    return count


CASES = [(Row(), 60, 12), (Matrix(), 61, 12), (Columns(5), 61, 5), (NofM(2, 4), 60, 4), (NofM(4, 6), 80, 6)]


@pytest.mark.parametrize(("grain", "count", "width"), CASES)
@pytest.mark.parametrize("start", ["wanda", "magnitude"])
def test_no_swap_is_left_that_helps(grain: Grain, count: int, width: int, start: str) -> None:
    w, x = case(10, 12, seed=1)
    seen = heard(x)
    first = grain.select(SCORES[start]().score(site(w), seen), count)  # type: ignore[union-attr]
    got = SparseSwaps(grain, start=start).prune(site(w), seen, count)
    assert got.weight is None
    assert better_swaps(w, first, x, width) > 0
    assert better_swaps(w, got.mask, x, width) == 0
    assert bool((lost(w, got.mask, x) <= lost(w, first, x) * (1 + 1e-6)).all())
    assert torch.equal(got.mask.sum(1), first.sum(1))
    runs = range(0, 12, width)
    assert all(torch.equal(got.mask[:, a : a + width].sum(1), first[:, a : a + width].sum(1)) for a in runs)


def test_often_the_best_of_all_masks() -> None:
    """All 252 masks of each row with weights that stay as they are."""
    w, x = case(30, 10, seed=2)
    got = SparseSwaps().prune(site(w), heard(x), 150)
    masks = torch.zeros(252, 10, dtype=torch.bool)
    for i, stay in enumerate(combinations(range(10), 5)):
        masks[i, list(stay)] = True
    best = torch.stack([lost(row.expand(252, 10), masks, x).min() for row in w])
    ratio = lost(w, got.mask, x) / best
    assert bool((ratio > 1 - 1e-6).all())
    assert int((ratio < 1 + 1e-5).sum()) >= 12
    start = SCORES["wanda"]().score(site(w), heard(x))  # type: ignore[union-attr]
    assert float(ratio.mean() - 1) < 0.5 * float((lost(w, Row().select(start, 150), x) / best).mean() - 1)


def test_likely_pairs_and_chunks_only_save_time(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = case(6, 40, seed=3)
    gram = x.double().T @ x.double()
    mask = torch.rand(6, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    monkeypatch.setattr(swaps, "LIKELY", 3)
    monkeypatch.setattr(swaps, "TAKE", 2)
    small = improve(w.double(), gram, mask, 40, 50)
    monkeypatch.setattr(swaps, "BYTES", 64)
    chunked = improve(w.double(), gram, mask, 40, 50)
    assert torch.equal(small, chunked)
    assert better_swaps(w, small, x, 40) == 0
    narrow = improve(w.double(), gram, mask, 7, 50)
    monkeypatch.undo()
    assert torch.equal(narrow, improve(w.double(), gram, mask, 7, 50)) or better_swaps(w, narrow, x, 7) == 0
    assert torch.equal(improve(w.double(), gram, mask, 40, 0), mask)


def test_rows_that_keep_all_or_nothing_stay() -> None:
    w, x = case(3, 12, seed=4)
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[1] = True
    assert torch.equal(improve(w, x.T @ x, mask, 12, 5), mask)
    assert torch.equal(improve(w, x.T @ x, mask, 4, 5), mask)


@pytest.mark.parametrize(
    ("start", "damping"), [("wanda", 0.01), ("sparsegpt", 0.01), ("obs", 0.01), ("admm", 0.01), ("alps", 0.01),
                           ("wanda", 0.3)]
)  # fmt: skip
def test_refit_is_least_squares_on_the_mask_from_any_start(start: str, damping: float) -> None:
    w, x = case(8, 24, seed=5)
    got = SparseSwaps(Columns(24), start=start, refit=True, damping=damping).prune(site(w), heard(x), 96)
    gram = x.double().T @ x.double()
    best = masked_least_squares(gram, gram @ w.double().T, got.mask, damping, w.double())
    torch.testing.assert_close(got.weight.double(), best, atol=2e-3, rtol=1e-2)
    assert error(w, got.weight, x) < error(w, w * got.mask, x)
    assert int(got.mask.sum()) == 96


def test_a_replay_is_mended_only_with_refit() -> None:
    w, x = case(8, 24, seed=6)
    mask = SparseSwaps().prune(site(w), heard(x), 96).mask
    assert SparseSwaps().reweigh(site(w), heard(x), mask) is None
    for damping in (0.0, 0.01, 0.1):
        method = SparseSwaps(refit=True, damping=damping)
        assert torch.equal(method.reweigh(site(w), heard(x), mask), method.prune(site(w), heard(x), 96).weight)


def test_words_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SecateurError, match="tile"):
        SparseSwaps(Tile(2, 2))
    with pytest.raises(SecateurError, match=r"wandah.*wanda"):
        SparseSwaps(start="wandah")
    with pytest.raises(SecateurError, match="start"):
        SparseSwaps(start="block_influence")
    with pytest.raises(SecateurError, match="rounds"):
        SparseSwaps(rounds=-1)
