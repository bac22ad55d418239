"""ADMM against its own equations, written out in fp64 with an explicit inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layer_toys import case, error, heard, site

from secateur.errors import SecateurError
from secateur.methods.grains import Columns, Grain, Matrix, NofM, Row, Tile
from secateur.methods.joint.admm import ADMM, project
from secateur.methods.joint.sparsegpt import SparseGPT
from secateur.methods.least_squares import masked_least_squares


def literal(w: np.ndarray, x: np.ndarray, keep: int, gradual: int, iterations: int, damping: float = 0.1):
    """The paper's algorithm on [in, out] with U and Z kept apart; ``keep`` largest of the whole matrix."""
    gram = x.astype(np.float64).T @ x.astype(np.float64)
    norm = np.sqrt(np.diag(gram))
    h = gram / np.outer(norm, norm) + damping * np.eye(len(gram))
    v0 = w.astype(np.float64).T * norm[:, None]
    v, u = v0.copy(), np.zeros_like(v0)
    inverse = np.linalg.inv(h + np.eye(len(gram)))
    total = v.size
    mask = np.zeros(v.shape, dtype=bool)
    for t in range(iterations):
        if t < gradual or t == 0:
            gone = 1 - (1 - (t + 1) / gradual) ** 3 if gradual else 1
            stay = keep + round((total - keep) * (1 - gone))
            order = np.argsort(-((v + u) ** 2).T.ravel(), kind="stable")
            flat = np.zeros(total, dtype=bool)
            flat[order[:stay]] = True
            mask = flat.reshape(v.T.shape).T
        z = (v + u) * mask
        u = u + v - z
        v = inverse @ (h @ v0 + z - u)
    return mask.T, (((v + u) * mask) / norm[:, None]).T


@pytest.mark.parametrize(("gradual", "iterations"), [(15, 20), (4, 9), (0, 6)])
def test_equals_the_literal_algorithm(gradual: int, iterations: int) -> None:
    w, x = case(7, 16)
    got = ADMM(Matrix(), gradual=gradual, iterations=iterations).prune(site(w), heard(x), 45)
    keep, values = literal(w.numpy(), x.numpy(), 45, gradual, iterations)
    assert np.array_equal(got.mask.numpy(), keep)
    assert got.weight is not None
    np.testing.assert_allclose(got.weight.numpy(), values, atol=2e-4, rtol=1e-3)


def test_the_schedule_matters_and_ends_at_the_count() -> None:
    w, x = case(12, 32, seed=1)
    at_once, slowly = (ADMM(Matrix(), gradual=g).prune(site(w), heard(x), 150) for g in (0, 15))
    assert not torch.equal(at_once.mask, slowly.mask)
    assert int(at_once.mask.sum()) == int(slowly.mask.sum()) == 150
    shape, method = (12, 32), ADMM(Matrix())
    counts = [method._count(t, shape, 150) for t in range(15)]
    assert counts == [150 + round(234 * (1 - (t + 1) / 15) ** 3) for t in range(15)]
    assert all(method_count % 12 == 0 for method_count in (ADMM(Row())._count(t, shape, 156) for t in range(15)))
    assert int(ADMM(Matrix(), gradual=15, iterations=3).prune(site(w), heard(x), 150).mask.sum()) == 150


@pytest.mark.parametrize("grain", [Matrix(), Row(), Columns(8), NofM(2, 4), NofM(3, 8), Tile(2, 2)])
def test_many_iterations_reach_exact_least_squares_on_the_mask(grain: Grain) -> None:
    """At a fixed mask ADMM's fixed point is the constrained minimum (of the damped problem)."""
    w, x = case(8, 16, seed=2)
    count = {"2:4": 64, "3:8": 48, "tile:2x2": 16}.get(str(grain), 64)
    got = ADMM(grain, iterations=400, gradual=5, damping=0.01).prune(site(w), heard(x), count)
    gram = x.double().T @ x.double()
    ridge = gram + 0.01 * torch.diag(gram.diagonal())  # damping of the scaled system, scaled back
    best = masked_least_squares(ridge, ridge @ w.double().T, got.mask, 0.0)
    assert got.weight is not None
    d, b = got.weight.double() - w.double(), best - w.double()
    assert float((d @ ridge * d).sum()) < float((b @ ridge * b).sum()) * (1 + 1e-3)
    assert int(got.mask.sum()) == {"tile:2x2": 64}.get(str(grain), count)


@pytest.mark.parametrize("grain", [Columns(32), NofM(2, 4)])
def test_below_sparsegpt_on_correlated_inputs(grain: Grain) -> None:
    for seed in range(3):
        w, x = case(32, 64, seed=seed)
        got, other = (m.prune(site(w), heard(x), 1024) for m in (ADMM(grain), SparseGPT(grain, polish=0)))
        assert got.weight is not None and other.weight is not None
        assert error(w, got.weight, x) < error(w, other.weight, x)


def test_polish_lowers_the_damped_error() -> None:
    w, x = case(16, 48, seed=3)
    plain, polished = (ADMM(Matrix(), polish=p).prune(site(w), heard(x), 300) for p in (0, 20))
    assert torch.equal(plain.mask, polished.mask)
    assert plain.weight is not None and polished.weight is not None
    gram = x.double().T @ x.double()
    ridge = gram + 0.1 * torch.diag(gram.diagonal())
    damped = [float(((v.double() - w) @ ridge * (v.double() - w)).sum()) for v in (plain.weight, polished.weight)]
    assert damped[1] < damped[0]


def test_projection_of_n_of_m_keeps_the_groups_best_throughout() -> None:
    values = torch.randn(6, 16, generator=torch.Generator().manual_seed(4))
    final = project(NofM(2, 4), values, 48, 48)
    wider = project(NofM(2, 4), values, 70, 48)
    assert int(final.sum()) == 48 and int(wider.sum()) == 70
    assert bool((wider | ~final).all())
    rest = values.abs().masked_fill(final, 0)
    assert bool((rest[wider & ~final].min() >= rest[~wider].max()).all())


def test_words_that_do_not_fit_are_refused() -> None:
    for bad in (dict(damping=-1.0), dict(iterations=0), dict(gradual=-1), dict(polish=1.5)):
        with pytest.raises(SecateurError):
            ADMM(Matrix(), **bad)
    w, x = case(4, 8)
    with pytest.raises(SecateurError, match="fixes how many"):
        ADMM(NofM(2, 4)).prune(site(w), heard(x), 15)
    with pytest.raises(SecateurError, match="cannot keep 33 of 32"):
        ADMM(Matrix()).prune(site(w), heard(x), 33)
