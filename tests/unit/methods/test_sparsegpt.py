"""SparseGPT against the formulas it comes from, with explicit inverses in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.engine.probes import Evidence, Gram
from secateur.errors import SecateurError
from secateur.methods.base import MatrixSite
from secateur.methods.grains import Columns, Grain, Matrix, NofM, Row
from secateur.methods.joint.sparsegpt import SparseGPT
from secateur.methods.joint.sweeping import inverse_factor
from secateur.methods.least_squares import masked_least_squares


def site(weight: Tensor, name: str = "w") -> MatrixSite:
    return MatrixSite(name, weight, "ffn", 0, 1, torch.Generator())


def heard(x: Tensor) -> Evidence:
    gram = Gram()
    gram.update(x)
    return Evidence("w", {Gram: gram})


def case(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    return torch.randn(rows, columns, generator=g), x


def literal(w: np.ndarray, x: np.ndarray, width: int, counts: list[int], damping: float = 0.01, n_m=None):
    """Column by column; the inverse Hessian of what is still open is computed anew each time.

    ``counts``: kept per block of ``width`` columns; with ``n_m`` the n best of each row's m columns stay.
    """
    w = w.astype(np.float64).copy()
    h = x.astype(np.float64).T @ x.astype(np.float64)
    live = np.diag(h) > 0
    mean = np.diag(h)[live].mean()
    h[~live, ~live] = mean
    w[:, ~live] = 0
    h += damping * mean * np.eye(len(h))
    columns = len(h)
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(columns)]
    saved = np.array([inverses[j][0, 0] for j in range(columns)])
    keep = np.ones(w.shape, dtype=bool)
    for block, a in enumerate(range(0, columns, width)):
        b = min(a + width, columns)
        metric = w[:, a:b] ** 2 / saved[a:b]
        if n_m:
            for i in range(len(w)):
                keep[i, a + np.argsort(metric[i])[: n_m[1] - n_m[0]]] = False
        else:
            worst = np.argsort(metric.ravel())[: metric.size - counts[block]]
            keep[worst // (b - a), a + worst % (b - a)] = False
        for j in range(a, b):
            for i in range(len(w)):
                if not keep[i, j]:
                    w[i, j:] -= w[i, j] / inverses[j][0, 0] * inverses[j][:, 0]
    return keep, np.where(keep, w, 0)


@pytest.mark.parametrize(
    ("grain", "width", "counts"),
    [
        (Columns(4), 4, [12, 12, 12]),
        (Columns(5), 5, [15, 15, 6]),
        (Matrix(), 12, [36]),
        (Columns(128), 12, [36]),
        (Columns(1), 1, [3] * 12),
    ],
)
def test_equals_the_literal_algorithm(grain: Grain, width: int, counts: list[int]) -> None:
    w, x = case(6, 12)
    got = SparseGPT(grain, polish=0).prune(site(w), heard(x), 36)
    keep, values = literal(w.numpy(), x.numpy(), width, counts)
    assert np.array_equal(got.mask.numpy(), keep)
    assert got.weight is not None
    np.testing.assert_allclose(got.weight.numpy(), values, atol=2e-4)


@pytest.mark.parametrize("n_m", [(2, 4), (1, 4), (3, 6)])
def test_n_of_m_equals_the_literal_algorithm(n_m: tuple[int, int]) -> None:
    w, x = case(5, 12, seed=3)
    got = SparseGPT(NofM(*n_m), polish=0).prune(site(w), heard(x), 60 * n_m[0] // n_m[1])
    keep, values = literal(w.numpy(), x.numpy(), n_m[1], [], n_m=n_m)
    assert np.array_equal(got.mask.numpy(), keep)
    np.testing.assert_allclose(got.weight.numpy(), values, atol=2e-4)


@pytest.mark.parametrize("width", [48, 150, 33])
def test_wide_matrices_go_through_matrix_products(width: int) -> None:
    w, x = case(4, 150, seed=5)
    x = x + 4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))  # well conditioned: no close calls
    got = SparseGPT(Columns(width), polish=0).prune(site(w), heard(x), 300)
    sizes = [4 * min(width, 150 - a) for a in range(0, 150, width)]
    keep, values = literal(w.numpy(), x.numpy(), width, [s // 2 for s in sizes])
    assert np.array_equal(got.mask.numpy(), keep)
    np.testing.assert_allclose(got.weight.numpy(), values, atol=1e-3)


def test_removing_the_first_weight_is_exact_least_squares() -> None:
    w, x = case(1, 6, seed=1)
    w[0, 0] = 1e-3  # the cheapest by far, and first in order: all others may make up for it
    got = SparseGPT(Matrix(), damping=1e-9, polish=0).prune(site(w), heard(x), 5)
    target = x.double() @ w[0].double()
    best = torch.linalg.lstsq(x[:, 1:].double(), target.unsqueeze(1)).solution.squeeze(1)
    assert not got.mask[0, 0]
    torch.testing.assert_close(got.weight[0, 1:].double(), best, atol=1e-5, rtol=1e-4)


def test_factor_is_the_factor_of_the_inverse() -> None:
    _, x = case(1, 20)
    gram = (x.T @ x).double()
    factor = inverse_factor(gram, 0.01, "w")
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(h), atol=0, rtol=1e-8)


def test_inputs_that_never_fire_lose_their_weights() -> None:
    w, x = case(6, 12, seed=2)
    x[:, [3, 7]] = 0
    got = SparseGPT(Columns(4), polish=0).prune(site(w), heard(x), 36)
    keep, values = literal(w.numpy(), x.numpy(), 4, [12, 12, 12])
    assert not got.weight[:, [3, 7]].any()
    assert int(got.mask.sum()) == 36
    np.testing.assert_allclose(got.weight.numpy(), values, atol=2e-4)
    assert np.array_equal(got.mask.numpy(), keep)


def test_an_expert_that_no_token_reached_keeps_its_largest_weights() -> None:
    w = case(6, 12)[0]
    got = SparseGPT(Matrix()).prune(site(w), heard(torch.zeros(0, 12)), 36)
    assert torch.equal(got.mask, Matrix().select(w.abs(), 36))
    assert torch.equal(got.weight, w * got.mask)
    got = SparseGPT(Columns(5)).prune(site(w), heard(torch.zeros(0, 12)), 35)  # every block its share: 14.6, 14.6, 5.8
    for at, count in ((0, 15), (5, 14), (10, 6)):
        part = w[:, at : at + 5].abs()
        least = part.flatten().sort(descending=True).values[count - 1]
        assert torch.equal(got.mask[:, at : at + 5], part >= least)
    torch.testing.assert_close(got.weight, w * got.mask, rtol=1e-6, atol=0)


def test_matrices_of_one_input_are_pruned_together_as_one_by_one() -> None:
    w, x = case(9, 12)
    seen, other = heard(x), heard(case(1, 12, seed=9)[1])
    parts = [site(w[:4], "a"), site(w[4:6], "b"), site(w[6:], "c")]
    method = SparseGPT(Columns(4))
    together = method.prune_many(parts, [seen, other, seen], [20, 24, 13])
    for part, evidence, count, got in zip(parts, [seen, other, seen], [20, 24, 13], together, strict=True):
        alone = method.prune(part, evidence, count)
        assert torch.equal(got.mask, alone.mask)
        torch.testing.assert_close(got.weight, alone.weight)
    assert together[1].weight is parts[1].weight  # keep everything: nothing is touched


@pytest.mark.parametrize("count", [0, 1, 17, 36, 71])
@pytest.mark.parametrize("grain", [Columns(5), Matrix()])
def test_counts_are_exact(grain: Grain, count: int) -> None:
    w, x = case(6, 12)
    got = SparseGPT(grain).prune(site(w), heard(x), count)
    assert int(got.mask.sum()) == count
    assert not got.weight[~got.mask].any()
    assert not torch.signbit(got.weight[~got.mask]).any()


def test_a_mask_from_elsewhere_gets_the_same_values() -> None:
    w, x = case(6, 40)
    got = SparseGPT(Columns(8)).prune(site(w), heard(x), 120)
    again = SparseGPT(Columns(8)).reweigh(site(w), heard(x), got.mask)
    torch.testing.assert_close(again, got.weight, atol=1e-5, rtol=1e-4)
    assert torch.equal(SparseGPT().reweigh(site(w), heard(x), torch.ones(6, 40, dtype=torch.bool)), w)


def test_the_input_is_not_changed() -> None:
    w, x = case(6, 12)
    before = w.clone()
    SparseGPT(Columns(4)).prune(site(w), heard(x), 36)
    assert torch.equal(w, before)


def test_output_error_is_below_that_of_the_mask_alone() -> None:
    w, x = case(8, 32)
    got = SparseGPT(Columns(8)).prune(site(w), heard(x), 128)
    updated = ((got.weight - w) @ x.T).norm()
    assert updated < 0.8 * ((w * got.mask - w) @ x.T).norm()


def test_too_little_text_is_damped_and_nonsense_is_refused() -> None:
    w, x = case(6, 12)
    few = SparseGPT(Columns(4), damping=0.0).prune(site(w), heard(x[:3]), 36)  # rank 3 of 12
    assert torch.isfinite(few.weight).all()
    bad = Gram()
    bad.update(x)
    bad.sums["gram"][0, 1] = torch.nan
    with pytest.raises(SecateurError, match="statistics are not finite"):
        SparseGPT(Columns(4)).prune(site(w), Evidence("w", {Gram: bad}), 36)
    wrong = torch.eye(12)
    wrong[0, 1] = wrong[1, 0] = 1e9
    with pytest.raises(SecateurError, match="not positive definite"):
        inverse_factor(wrong, 0.01, "w")
    w[0, 0] = torch.inf
    with pytest.raises(SecateurError, match="weights are not finite"):
        SparseGPT(Columns(4)).prune(site(w), heard(x), 36)


def test_words_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SecateurError, match=r"grain row.*columns:128"):
        SparseGPT(Row())
    with pytest.raises(SecateurError, match="damping"):
        SparseGPT(damping=-1.0)
    w, x = case(6, 12)
    with pytest.raises(SecateurError, match="fixes how many"):
        SparseGPT(NofM(2, 4)).prune(site(w), heard(x), 35)
    with pytest.raises(SecateurError, match="no Gram evidence"):
        SparseGPT().prune(site(w), Evidence("w", {}), 36)


def test_polish_comes_to_least_squares_on_the_same_mask() -> None:
    w, x = case(6, 24)
    seen = heard(x)
    plain, ten, many = (SparseGPT(Columns(8), polish=n).prune(site(w), seen, 72) for n in (0, 10, 400))
    exact = masked_least_squares(seen[Gram].gram, seen[Gram].gram @ w.T, plain.mask, 0.01, w)
    assert torch.equal(plain.mask, ten.mask) and torch.equal(plain.mask, many.mask)
    assert torch.allclose(many.weight, exact, rtol=1e-3, atol=1e-4)
    errors = [float(((k.weight - w) @ x.T).square().sum()) for k in (plain, ten, many)]
    assert errors[0] > errors[1] >= errors[2] * (1 - 1e-3)
    with pytest.raises(SecateurError, match="polish"):
        SparseGPT(polish=-1)
