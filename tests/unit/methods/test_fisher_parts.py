"""Scores and rows by the Fisher information, against closed forms and sorting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_toys import case, heard, site
from torch import Tensor

from secateur.engine.probes import Evidence, Fisher, Gram
from secateur.errors import SecateurError
from secateur.methods.grains import Matrix
from secateur.methods.joint import METHODS
from secateur.methods.joint.layer import row_scale
from secateur.methods.scores.fisher import FisherScore

WITH_ROWS = ("alps", "admm", "sparsegpt")


def told(rows: Tensor, columns: Tensor) -> Fisher:
    """One window's gradient rows x columns, of one token."""
    probe = Fisher()
    probe.update(torch.outer(rows, columns), torch.empty(0))
    return probe


def test_a_gradient_of_rank_one_is_known_exactly() -> None:
    g = torch.Generator().manual_seed(0)
    w, rows, columns = torch.randn(4, 6, generator=g), torch.randn(4, generator=g), torch.randn(6, generator=g)
    scores = FisherScore().score(site(w), Evidence("w", {Fisher: told(rows, columns)}))
    assert torch.allclose(scores, (w * torch.outer(rows, columns)).square() / 2)


def test_no_gradient_is_no_loss() -> None:
    scores = FisherScore().score(site(torch.ones(2, 3)), Evidence("w", {Fisher: told(torch.zeros(2), torch.ones(3))}))
    assert 0 < float(scores.max()) < 1e-20  # all but nothing: such weights still rank by their size


def test_with_independent_inputs_the_best_choice_is_a_sort() -> None:
    """... of F_i w_ij^2, or sqrt(F_i) w_ij^2, not of w_ij^2."""
    g = torch.Generator().manual_seed(1)
    w, rows = torch.randn(5, 8, generator=g), torch.logspace(-2, 1, 5)
    root = rows.sqrt()
    gram = Gram()
    gram.update(torch.eye(8))
    seen = Evidence("w", {Gram: gram, Fisher: told(rows.sqrt(), torch.ones(8))})
    for way, scale in (("fisher", rows), ("root", root), ("even", torch.ones(5))):
        keep = METHODS["sparsegpt"](grain=Matrix(), rows=way).prune(site(w), seen, 20)  # type: ignore[call-arg]
        want = torch.zeros(40).index_fill(0, (w.square() * scale.unsqueeze(1)).reshape(-1).topk(20).indices, 1)
        assert torch.equal(keep.mask.reshape(-1), want.bool())
        assert keep.weight is not None and torch.allclose(keep.weight, w * keep.mask, atol=1e-5)


@pytest.mark.parametrize("name", WITH_ROWS)
def test_rows_count_by_what_they_cost(name: str) -> None:
    """The error that is weighed by rows falls, the one that is not rises."""
    make: Any = METHODS[name]
    errors = {way: torch.zeros(2) for way in ("fisher", "root", "even")}
    for seed in range(3):
        w, x = case(16, 24, seed)
        rows = torch.logspace(-2, 0, 16)
        seen = Evidence("w", {**dict(heard(x).items()), Fisher: told(rows.sqrt(), torch.ones(24))})
        for way, sums in errors.items():
            keep = make(grain=Matrix(), rows=way).prune(site(w), seen, 150)
            off = ((keep.weight - w) @ x.T).square().sum(1)
            assert int(keep.mask.sum()) == 150 and bool((keep.weight[~keep.mask] == 0).all())
            sums += torch.stack([(off * rows).sum(), off.sum()])
    assert errors["fisher"][0] < 0.9 * errors["even"][0] and errors["fisher"][1] > errors["even"][1]
    assert errors["root"][0] < errors["even"][0] and errors["root"][1] < errors["fisher"][1]


def saturated(heads: int = 4, size: int = 4, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of random heads, the last of which rests on the first token: queries [heads * size, in], inputs
    [tokens, in], keys and values [heads, tokens, size]."""
    g = torch.Generator().manual_seed(3)
    q = torch.randn(heads * size, 12, generator=g)
    x = torch.randn(tokens, 12, generator=g) + torch.cat([torch.full((1,), 3.0), torch.zeros(11)])
    k, v = torch.randn(2, heads, tokens, size, generator=g) / 2
    q[-size:, 0] += 6.0  # what every token has in common points at the first key
    k[-1, 0] += 3.0
    return q, x, k, v


def attend(q: Tensor, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Outputs [heads, tokens, size]."""
    queries = (x @ q.T).unflatten(1, (len(k), -1)).transpose(0, 1)
    return (queries @ k.transpose(1, 2)).softmax(-1) @ v


def test_a_head_that_rests_on_one_token_hears_no_slope_but_fails_without_its_queries() -> None:
    """Why the root is there: `fisher` empties the queries of a saturated head, and the outputs that no slope foretold
    change most."""
    q, x, k, v = saturated()
    want = attend(q, x, k, v)
    probe, g = Fisher(), torch.Generator().manual_seed(0)
    for _ in range(4):
        wanted = q.clone().requires_grad_()
        (attend(wanted, x, k, v) * torch.randn(want.shape, generator=g)).sum().backward()
        assert wanted.grad is not None
        probe.update(wanted.grad, torch.empty(0))
    seen = Evidence("q", {**dict(heard(x).items()), Fisher: probe})
    off = {}
    for way in ("fisher", "root", "even"):
        keep = METHODS["alps"](rows=way).prune(site(q), seen, 64)  # type: ignore[call-arg]
        assert keep.weight is not None
        off[way] = (attend(keep.weight, x, k, v) - want).square().mean((1, 2))
    assert off["root"][-1] < 0.01 * off["fisher"][-1]
    assert off["root"].sum() < off["even"].sum() < off["fisher"].sum()


@pytest.mark.parametrize("name", WITH_ROWS)
def test_equal_rows_change_nothing(name: str) -> None:
    w, x = case(6, 12)
    seen = dict(heard(x).items())
    make: Any = METHODS[name]
    plain = make(grain=Matrix()).prune(site(w), Evidence("w", seen), 36)
    same = make(grain=Matrix(), rows="fisher").prune(
        site(w), Evidence("w", {**seen, Fisher: told(torch.full((6,), 3.0), torch.ones(12))}), 36
    )
    assert torch.equal(plain.mask, same.mask) and torch.allclose(plain.weight, same.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITH_ROWS)
@pytest.mark.parametrize("way", ["fisher", "root"])
def test_a_row_that_no_loss_hears_counts_a_little(name: str, way: str) -> None:
    """Weights are divided by what rows were multiplied by, which must not be 0."""
    w, x = case(6, 12)
    rows = torch.tensor([1.0, 2.0, 0.0, 3.0, 1.0, 2.0])
    seen = Evidence("w", {**dict(heard(x).items()), Fisher: told(rows.sqrt(), torch.ones(12))})
    assert float(row_scale(seen, way)[2]) == pytest.approx(1e-4 ** {"fisher": 0.5, "root": 0.25}[way])
    make: Any = METHODS[name]
    keep = make(grain=Matrix(), rows=way).prune(site(w), seen, 36)
    assert int(keep.mask.sum()) == 36 and bool(torch.isfinite(keep.weight).all())


def test_an_expert_that_nothing_reaches_counts_rows_alike() -> None:
    w, x = case(6, 12)
    seen = {**dict(heard(x).items()), Fisher: told(torch.zeros(6), torch.zeros(12))}
    keep = METHODS["alps"](rows="fisher").prune(site(w), Evidence("w", seen), 36)  # type: ignore[call-arg]
    assert torch.equal(keep.mask, METHODS["alps"]().prune(site(w), Evidence("w", seen), 36).mask)


def test_unknown_rows_are_refused() -> None:
    with pytest.raises(SecateurError, match=r"'odd'.*even, fisher"):
        METHODS["alps"](rows="odd")  # type: ignore[call-arg]
