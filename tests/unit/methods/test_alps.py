"""ALPS against brute force, exact least squares, and the methods it must beat."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from layer_toys import case, error, heard, site

from secateur.errors import SecateurError
from secateur.methods.grains import Columns, Grain, Matrix, NofM, Row, Tile
from secateur.methods.joint.admm import ADMM
from secateur.methods.joint.alps import ALPS, Ridge
from secateur.methods.joint.obs import SetOBS
from secateur.methods.joint.sparsegpt import SparseGPT
from secateur.methods.least_squares import masked_least_squares
from secateur.methods.scores import SCORES


def test_close_to_the_best_of_all_masks_of_a_row() -> None:
    """252 masks of one row, each with exact least squares: often the best, and far closer than the median mask."""
    ratios, others = [], []
    for seed in range(12):
        w, x = case(1, 10, seed=seed)
        x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        gram = x.double().T @ x.double()
        masks = torch.zeros(252, 10, dtype=torch.bool)
        for i, stay in enumerate(combinations(range(10), 5)):
            masks[i, list(stay)] = True
        every = w.double().expand(252, 10)
        fits = masked_least_squares(gram, gram @ every.T, masks, 0.0)
        errors = ((fits - every) @ gram * (fits - every)).sum(1)
        got = ALPS(Row(), damping=1e-6, polish=50).prune(site(w), heard(x), 5)
        assert got.weight is not None
        ratios.append(error(w, got.weight, x) / float(errors.min()))
        others.append(float(errors.median() / errors.min()))
    assert min(ratios) > 1 - 1e-3
    assert sum(r < 1 + 1e-3 for r in ratios) >= 4
    assert sum(ratios) / len(ratios) < 1.25
    assert sum(ratios) - 12 < 0.1 * (sum(others) - 12)


@pytest.mark.parametrize("grain", [Matrix(), Row(), Columns(8), NofM(2, 4), NofM(3, 8), Tile(2, 2)])
def test_polish_ends_at_exact_least_squares_on_its_mask(grain: Grain) -> None:
    w, x = case(8, 16, seed=2)
    count = {"2:4": 64, "3:8": 48, "tile:2x2": 16}.get(str(grain), 64)
    got = ALPS(grain, polish=100).prune(site(w), heard(x), count)
    gram = x.double().T @ x.double()
    best = masked_least_squares(gram, gram @ w.double().T, got.mask, 0.01, w.double())
    torch.testing.assert_close(got.weight.double(), best, atol=2e-3, rtol=1e-2)
    assert int(got.mask.sum()) == {"tile:2x2": 64}.get(str(grain), count)


@pytest.mark.parametrize(("grain", "count"), [(Columns(64), 1024), (Columns(64), 614), (NofM(2, 4), 1024)])
def test_errors_are_ordered(grain: Grain, count: int) -> None:
    """ALPS <= ADMM <= optimal sets and SparseGPT <= Wanda, each with its own mask, on three layers."""
    for seed in range(3):
        w, x = case(32, 64, seed=10 + seed)
        seen = heard(x)
        kept = [
            m.prune(site(w), seen, count).weight
            for m in (ALPS(grain), ADMM(grain), SetOBS(grain, polish=0), SparseGPT(grain, polish=0))
        ]
        mask = grain.select(SCORES["wanda"]().score(site(w), seen), count)  # type: ignore[union-attr]
        alps, admm, obs, sparsegpt, wanda = (error(w, v, x) for v in (*kept, w * mask))  # type: ignore[arg-type]
        assert alps <= admm <= min(obs, sparsegpt)
        assert max(obs, sparsegpt) <= wanda


def test_least_squares_beats_every_method_on_its_own_mask() -> None:
    w, x = case(24, 48, seed=5)
    gram = x.double().T @ x.double()
    for method in (ALPS(), ADMM(), SetOBS(), SparseGPT()):
        got = method.prune(site(w), heard(x), 500)
        best = masked_least_squares(gram, gram @ w.double().T, got.mask, 0.0)
        assert error(w, best, x) <= error(w, got.weight, x) * (1 + 1e-6)


def test_slower_penalties_find_better_supports_on_average() -> None:
    errors = {1: 0.0, 6: 0.0}
    for seed in range(4):
        w, x = case(24, 48, seed=seed)
        for every in errors:
            got = ALPS(Matrix(), every=every).prune(site(w), heard(x), 400)
            errors[every] += error(w, got.weight, x) / error(w, torch.zeros_like(w), x)
    assert errors[6] < errors[1]


@pytest.mark.parametrize("rows", [2, 400])
def test_ridge_is_the_inverse_either_way(rows: int) -> None:
    _, x = case(1, 12)
    h = x.double().T @ x.double()
    values, vectors = torch.linalg.eigh(h)
    ridge = Ridge(values, vectors, rows)
    assert ridge.whole == (rows == 400)
    right = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rho in (0.1, 3.0):
        ridge.at(rho)
        expected = right @ torch.linalg.inv(h + rho * torch.eye(12, dtype=torch.float64))
        torch.testing.assert_close(ridge.solve(right), expected)


def test_words_that_do_not_fit_are_refused() -> None:
    for bad in (dict(damping=-1.0), dict(every=0), dict(polish=-1)):
        with pytest.raises(SecateurError):
            ALPS(Matrix(), **bad)
