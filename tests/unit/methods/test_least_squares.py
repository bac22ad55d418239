"""Masked least squares against a general solver, row by row."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.methods import least_squares
from secateur.methods.least_squares import conjugate_gradients, damped, masked_least_squares, refit


def case(rows: int, columns: int, seed: int = 0, tokens: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, inputs with correlated channels of very different size, and a mask with another count in every row."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens * columns, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    x = x * torch.logspace(-2, 1, columns)
    mask = torch.rand(rows, columns, generator=g) < torch.linspace(0.2, 0.9, rows).unsqueeze(1)
    return torch.randn(rows, columns, generator=g), x, mask


def by_rows(x: Tensor, y: Tensor, mask: Tensor, shift: float = 0.0, prior: Tensor | None = None) -> Tensor:
    """The same by `torch.linalg.lstsq` in fp64 on the inputs themselves, damping as extra rows of data."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    columns = x.shape[1]
    prior = torch.zeros(mask.shape) if prior is None else prior
    for i, keep in enumerate(mask):
        a = torch.cat([x.double(), shift**0.5 * torch.eye(columns, dtype=torch.float64)])
        b = torch.cat([y[:, i].double(), shift**0.5 * prior[i].double()])
        out[i, keep] = torch.linalg.lstsq(a[:, keep], b.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    return out


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_equals_a_general_solver_on_every_row(damping: float) -> None:
    w, x, mask = case(9, 24)
    noise = torch.randn(len(x), 9, generator=torch.Generator().manual_seed(1))
    gram, y = x.double().T @ x.double(), x.double() @ w.T.double() + noise
    got = masked_least_squares(gram, x.double().T @ y, mask, damping, w.double())
    expected = by_rows(x, y, mask, damping * float(gram.diagonal().mean()), w)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)
    assert not got[~mask].any()


def test_fp32_is_as_good_as_fp64_in_what_counts() -> None:
    w, x, mask = case(12, 64, seed=2)
    gram = x.T @ x
    got = masked_least_squares(gram, gram @ w.T, mask, 1e-3, w)
    best = by_rows(x, x @ w.T, mask, 1e-3 * float(gram.diagonal().mean()), w)
    error, least = (((v - w.double()) @ x.T.double()).square().sum() for v in (got.double(), best))
    assert error < least * (1 + 1e-3)


def test_rows_with_equal_masks_share_and_chunks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x, mask = case(12, 24, seed=3)
    mask[4], mask[7], mask[9] = mask[1], mask[1], mask[2]
    mask[5] = False  # nothing stays
    mask[6] = True
    gram = x.double().T @ x.double()
    together = masked_least_squares(gram, gram @ w.double().T, mask, 0.01, w.double())
    alone = [masked_least_squares(gram, gram @ w[i : i + 1].double().T, mask[i : i + 1], 0.01, w[i : i + 1].double())
             for i in range(12)]  # fmt: skip
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-10)
    monkeypatch.setattr(least_squares, "BYTES", 1)
    single = masked_least_squares(gram, gram @ w.double().T, mask, 0.01, w.double())
    torch.testing.assert_close(together, single, rtol=1e-9, atol=1e-10)
    turned = masked_least_squares(gram, gram @ w.double().T, mask.T.contiguous().T, 0.01, w.double())
    assert torch.allclose(turned, single)  # whatever the mask's memory layout
    assert not together[5].any()
    torch.testing.assert_close(together[6], w[6].double(), rtol=1e-8, atol=1e-9)  # nothing goes: nothing changes


def test_the_gradient_is_zero_on_the_survivors() -> None:
    w, x, mask = case(6, 32, seed=4)
    gram = x.double().T @ x.double()
    got = masked_least_squares(gram, gram @ w.double().T, mask, 0.0)
    gradient = (got - w.double()) @ gram
    assert gradient[mask].abs().max() < 1e-8 * (w.double() @ gram).abs().max()
    assert gradient[~mask].abs().max() > 1e-3 * (w.double() @ gram).abs().max()


def test_fewer_tokens_than_inputs_and_inputs_that_never_fire() -> None:
    w, x, mask = case(6, 24, seed=5)
    x = x[:7]
    x[:, [3, 11]] = 0
    mask[:, 3] = True
    gram = x.double().T @ x.double()
    got = masked_least_squares(gram, gram @ w.double().T, mask, 0.0)
    best = by_rows(x, x @ w.T, mask)
    error, least = (((v - w.double()) @ x.T.double()).square().sum() for v in (got, best))
    assert torch.isfinite(got).all()
    assert error <= least * (1 + 1e-6) + 1e-9
    assert not got[:, 3].any()
    nothing = torch.zeros(24, 24)
    for damping in (0.0, 0.01):
        kept = masked_least_squares(gram, gram @ w.double().T, mask, damping, w.double())
        torch.testing.assert_close(kept[:, 3], w[:, 3].double())  # with a prior it stays what it was
        torch.testing.assert_close(kept[:, 11], (w * mask)[:, 11].double())
        torch.testing.assert_close(masked_least_squares(nothing, nothing @ w.T, mask, damping, w), w * mask)


def test_nearly_singular_in_fp32_is_solved_in_fp64() -> None:
    g = torch.Generator().manual_seed(6)
    x = torch.randn(400, 8, generator=g, dtype=torch.float64)
    x = torch.cat([x, x + 1e-5 * torch.randn(400, 8, generator=g, dtype=torch.float64)], dim=1)  # twins
    w = torch.randn(3, 16, generator=g, dtype=torch.float64)
    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[0, 0], mask[1, 1], mask[2, 2] = False, False, False
    gram = (x.T @ x).float()
    got = masked_least_squares(gram, gram @ w.float().T, mask, 0.0).double()
    error = ((got - w) @ x.T).square().sum()
    assert error < 1e-4 * (w @ x.T).square().sum()
    assert error < 1e-4 * ((w * mask - w) @ x.T).square().sum()


def test_conjugate_gradients_reach_the_exact_answer_and_never_get_worse() -> None:
    w, x, mask = case(9, 40, seed=7)
    h, shift = damped(x.double().T @ x.double(), 0.01)
    right = w.double() @ h
    exact = masked_least_squares(x.double().T @ x.double(), right.T - shift * w.double().T, mask, 0.01, w.double())
    got = conjugate_gradients(h, right, mask, w.double(), steps=200, tolerance=1e-12)
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-7)
    errors = []
    for steps in range(6):
        d = conjugate_gradients(h, right, mask, w.double(), steps) - w.double()
        errors.append((d @ h * d).sum(1))
        assert not conjugate_gradients(h, right, mask, w.double(), steps)[~mask].any()
    for before, after in pairwise(errors):
        assert bool((after <= before * (1 + 1e-9)).all())
    assert bool((errors[-1] < errors[0]).all())


def test_wide_rows_are_iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x, mask = case(20, 40, seed=8)
    gram = x.double().T @ x.double()
    exact = refit(gram, w.double(), mask)
    monkeypatch.setattr(least_squares, "WIDE", 4)
    iterated = refit(gram, w.double(), mask)
    assert not torch.equal(exact, iterated)
    errors = [((v - w.double()) @ gram * (v - w.double())).sum() for v in (exact, iterated, w.double() * mask)]
    assert errors[1] - errors[0] < 1e-3 * (errors[2] - errors[0])


def test_what_does_not_belong_together_is_refused() -> None:
    w, x, mask = case(6, 24)
    gram = x.T @ x
    with pytest.raises(SecateurError, match="do not belong to one matrix"):
        masked_least_squares(gram, gram @ w.T, mask.T)
    with pytest.raises(SecateurError, match="damping"):
        masked_least_squares(gram, gram @ w.T, mask, -1.0)
    gram[2, 2] = torch.nan
    with pytest.raises(SecateurError, match="not finite"):
        masked_least_squares(gram, gram @ w.T, mask)
