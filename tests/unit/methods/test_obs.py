"""Optimal sets against constrained least squares solved by brute force, group by group."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from layer_toys import case, error, heard, site

from secateur.errors import SecateurError
from secateur.methods.grains import Columns, Grain, Matrix, NofM, Row
from secateur.methods.joint.obs import SetOBS
from secateur.methods.joint.sparsegpt import SparseGPT
from secateur.methods.least_squares import masked_least_squares


def damped_gram(x: np.ndarray, damping: float = 0.01) -> np.ndarray:
    gram = x.astype(np.float64).T @ x.astype(np.float64)
    return gram + damping * np.diag(gram).mean() * np.eye(len(gram))


def without(h: np.ndarray, w: np.ndarray, a: int, gone: list[int]) -> np.ndarray:
    """The row closest to w in h's norm, with ``gone`` at zero and columns before ``a`` as they are (KKT system)."""
    n, fixed = len(w), [*range(a), *gone]
    kkt = np.zeros((n + len(fixed), n + len(fixed)))
    kkt[:n, :n] = h
    for i, j in enumerate(fixed):
        kkt[n + i, j] = kkt[j, n + i] = 1
    value = np.array([w[j] if j < a else 0.0 for j in fixed])
    return np.linalg.solve(kkt, np.concatenate([h @ w, value]))[:n]


@pytest.mark.parametrize(("n", "m", "damping"), [(2, 4, 0.01), (1, 4, 0.01), (3, 6, 0.01), (2, 4, 0.1)])
def test_every_group_loses_the_best_set_of_all(n: int, m: int, damping: float) -> None:
    w, x = case(5, 12, seed=3)
    h, rows = damped_gram(x.numpy(), damping), w.double().numpy().copy()
    keep = np.ones(rows.shape, dtype=bool)
    for a in range(0, 12, m):
        for i, row in enumerate(rows):
            sets = [[a + j for j in q] for q in combinations(range(m), m - n)]
            answers = [without(h, row, a, q) for q in sets]
            costs = [(r - row) @ h @ (r - row) for r in answers]
            best = int(np.argmin(costs))
            keep[i, sets[best]] = False
            rows[i] = answers[best]
    got = SetOBS(NofM(n, m), damping=damping, polish=0).prune(site(w), heard(x), 60 * n // m)
    assert got.weight is not None
    assert np.array_equal(got.mask.numpy(), keep)
    np.testing.assert_allclose(got.weight.numpy(), np.where(keep, rows, 0), atol=5e-4)


@pytest.mark.parametrize(("grain", "group", "spans"), [
    (Columns(6), 128, [(0, 6, 15), (6, 12, 15)]),
    (Columns(6), 3, [(0, 6, 15), (6, 12, 15)]),
    (Matrix(), 12, [(0, 12, 30)]),
    (Matrix(), 5, [(0, 12, 30)]),
])  # fmt: skip
def test_blocks_lose_the_cheapest_jointly(grain: Grain, group: int, spans: list[tuple[int, int, int]]) -> None:
    w, x = case(5, 12, seed=4)
    h, rows = damped_gram(x.numpy()), w.double().numpy().copy()
    keep = np.ones(rows.shape, dtype=bool)
    for a, b, seats in spans:
        runs = [(s, min(s + group, b)) for s in range(a, b, group)]
        free = np.concatenate([np.diag(np.linalg.inv(h[s:, s:]))[: e - s] for s, e in runs])
        saved = rows[:, a:b] ** 2 / free
        worst = np.argsort(saved.ravel())[: saved.size - seats]
        keep[worst // (b - a), a + worst % (b - a)] = False
        for s, e in runs:
            for i in range(5):
                rows[i] = without(h, rows[i], s, [j for j in range(s, e) if not keep[i, j]])
    got = SetOBS(grain, group=group, polish=0).prune(site(w), heard(x), 30)
    assert got.weight is not None
    assert np.array_equal(got.mask.numpy(), keep)
    np.testing.assert_allclose(got.weight.numpy(), np.where(keep, rows, 0), atol=5e-4)


@pytest.mark.parametrize(("grain", "columns"), [(Columns(16), 48), (Matrix(), 48), (NofM(2, 4), 4), (NofM(4, 8), 8)])
def test_not_above_sparsegpt_with_the_same_mask(grain: Grain, columns: int) -> None:
    """Where one group is all there is, it is least squares on the mask; in a sweep, not above in sum over layers."""
    ours = theirs = 0.0
    for seed in range(4):
        w, x = case(16, columns, seed=seed)
        other = SparseGPT(grain, polish=0).prune(site(w), heard(x), 8 * columns)
        assert other.weight is not None
        value = SetOBS(grain, polish=0).reweigh(site(w), heard(x), other.mask)
        assert value is not None and not value[~other.mask].any()
        ours, theirs = ours + error(w, value, x), theirs + error(w, other.weight, x)
        if not isinstance(grain, Columns):
            gram = x.double().T @ x.double()
            best = masked_least_squares(gram, gram @ w.double().T, other.mask, 0.01, w.double())
            torch.testing.assert_close(value.double(), best, atol=1e-3, rtol=1e-3)
    assert ours <= theirs


@pytest.mark.parametrize("grain", [Columns(16), Columns(200), Matrix(), NofM(2, 4)])
def test_a_mask_from_elsewhere_gets_the_same_values(grain: Grain) -> None:
    w, x = case(6, 264, seed=6)
    got = SetOBS(grain).prune(site(w), heard(x), 792)
    again = SetOBS(grain).reweigh(site(w), heard(x), got.mask)
    torch.testing.assert_close(again, got.weight, atol=1e-4, rtol=1e-3)


def test_words_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SecateurError, match=r"grain row.*columns:128"):
        SetOBS(Row())
    with pytest.raises(SecateurError, match=r"12870.*2:4"):
        SetOBS(NofM(8, 16))
    with pytest.raises(SecateurError, match="group"):
        SetOBS(Columns(4), group=0)


@pytest.mark.parametrize("grain", [Columns(16), NofM(2, 4)])
def test_polish_comes_to_least_squares_on_the_same_mask(grain: Grain) -> None:
    w, x = case(16, 48, seed=7)
    gram = x.double().T @ x.double()
    plain, ten, many = (SetOBS(grain, polish=n).prune(site(w), heard(x), 384) for n in (0, 10, 400))
    assert torch.equal(plain.mask, ten.mask) and torch.equal(plain.mask, many.mask)
    best = masked_least_squares(gram, gram @ w.double().T, plain.mask, 0.01, w.double())
    assert many.weight is not None and plain.weight is not None and ten.weight is not None
    torch.testing.assert_close(many.weight.double(), best, atol=1e-3, rtol=1e-3)
    assert error(w, plain.weight, x) > error(w, ten.weight, x) >= error(w, best.float(), x) * (1 - 1e-3)
    with pytest.raises(SecateurError, match="polish"):
        SetOBS(polish=-1)
