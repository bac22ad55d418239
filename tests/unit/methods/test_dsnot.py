"""DSnoT against its own words, one row and one exchange at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layer_toys import case, heard, site

from secateur.errors import SecateurError
from secateur.methods.grains import Columns, Grain, Matrix, NofM, Row, Tile
from secateur.methods.joint import METHODS
from secateur.methods.joint.dsnot import DSnoT
from secateur.methods.scores import SCORES


def literal(
    w: np.ndarray, x: np.ndarray, keep: np.ndarray, cycles: int, threshold: float, m: int = 0, turns: bool = False
) -> np.ndarray:
    """The mask after exchanges; ``m``: the weight that goes is the smallest of the group of the one that comes."""
    mean, variance, norm = x.mean(0), x.var(0), np.sqrt((x**2).mean(0))
    keep = keep.copy()
    for i in range(len(w)):
        error = sum(w[i, j] * mean[j] for j in range(len(mean)) if not keep[i, j])
        sign, moved = np.sign(error), set()
        for _ in range(cycles):
            if abs(error) <= threshold:
                break
            sign = np.sign(error) if turns else sign
            grow = [j for j in range(len(mean)) if not keep[i, j] and j not in moved]
            grow = [j for j in grow if sign * w[i, j] * mean[j] > 0]
            if not grow:
                break
            p = max(grow, key=lambda j: sign * w[i, j] * mean[j] / variance[j])
            drop = [j for j in range(len(mean)) if keep[i, j] and j not in moved]
            drop = [j for j in drop if (j // m == p // m if m else sign * w[i, j] * mean[j] < 0)]
            if not drop:
                break
            q = min(drop, key=lambda j: abs(w[i, j]) * norm[j])
            after = error - w[i, p] * mean[p] + w[i, q] * mean[q]
            if not turns and (np.sign(after) != sign or abs(after) >= abs(error)):
                break
            keep[i, p], keep[i, q] = True, False
            moved |= {p, q}
            error = after
    return keep


CASES = [(Row(), 320, 0), (Matrix(), 300, 0), (NofM(2, 4), 320, 4), (NofM(3, 8), 240, 8)]


@pytest.mark.parametrize(("grain", "count", "m"), CASES)
@pytest.mark.parametrize("start", ["wanda", "magnitude"])
@pytest.mark.parametrize("turns", [False, True])
def test_equals_the_literal_algorithm(grain: Grain, count: int, m: int, start: str, turns: bool) -> None:
    w, x = case(20, 32, seed=1)
    x = x + torch.linspace(1, 0.02, 32)  # means that matter
    seen = heard(x)
    first = grain.select(SCORES[start]().score(site(w), seen), count)  # type: ignore[union-attr]
    got = DSnoT(grain, start=start, threshold=0.05 * 2048, turns=turns).prune(site(w), seen, count)
    expected = literal(w.double().numpy(), x.double().numpy(), first.numpy(), 50, 0.05, m, turns and not m)
    assert np.array_equal(got.mask.numpy(), expected)
    assert int((got.mask ^ first).sum()) > 5
    assert got.weight is None


@pytest.mark.parametrize("start", ["sparsegpt", "obs", "admm", "alps"])
def test_a_joint_method_gives_the_first_mask_and_no_values(start: str) -> None:
    """Errors are those of the weights as they are, not of what the other method made of them."""
    w, x = case(20, 32, seed=1)
    x, grain = x + torch.linspace(1, 0.02, 32), Columns(32)  # means that matter; one block is a row
    seen = heard(x)
    first = METHODS[start](grain=grain).prune(site(w), seen, 320).mask  # type: ignore[call-arg]
    got = DSnoT(grain, start=start, threshold=0.05 * 2048).prune(site(w), seen, 320)
    expected = literal(w.double().numpy(), x.double().numpy(), first.numpy(), 50, 0.05)
    assert np.array_equal(got.mask.numpy(), expected)
    assert int((got.mask ^ first).sum()) > 5 and got.weight is None


def test_the_expected_error_shrinks_and_counts_stay() -> None:
    w, x = case(20, 32, seed=2)
    x, grain = x + 1, Columns(16)
    seen = heard(x)
    first = grain.select(SCORES["wanda"]().score(site(w), seen), 320)  # type: ignore[union-attr]
    got = DSnoT(grain).prune(site(w), seen, 320).mask
    before, after = ((w.double() * ~m) @ x.double().mean(0) for m in (first, got))
    assert bool((after.abs() <= before.abs() + 1e-5).all())
    assert float(after.abs().sum()) < 0.8 * float(before.abs().sum())
    assert torch.equal(got.sum(1), first.sum(1))
    assert all(torch.equal(got[:, a : a + 16].sum(1), first[:, a : a + 16].sum(1)) for a in (0, 16))
    assert torch.equal(DSnoT(grain, cycles=0).prune(site(w), seen, 320).mask, first)
    assert torch.equal(DSnoT(grain, threshold=1e9).prune(site(w), seen, 320).mask, first)


def test_with_turns_a_row_goes_on_where_its_error_changed_sign() -> None:
    w, x = case(20, 32, seed=1)
    seen = heard(x + torch.linspace(1, 0.02, 32))
    keeps, turns = (DSnoT(turns=t).prune(site(w), seen, 320).mask for t in (False, True))
    first = Row().select(SCORES["wanda"]().score(site(w), seen), 320)  # type: ignore[union-attr]
    assert int((turns ^ first).sum()) > 1.5 * int((keeps ^ first).sum())


def test_words_that_do_not_fit_are_refused() -> None:
    for bad in (dict(cycles=-1), dict(threshold=-1.0), dict(start="nothing")):
        with pytest.raises(SecateurError):
            DSnoT(**bad)  # type: ignore[arg-type]
    with pytest.raises(SecateurError, match="tile"):
        DSnoT(Tile(2, 2))
