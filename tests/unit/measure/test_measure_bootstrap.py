"""The bootstrap against the normal interval it approaches, and its exact cases."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.measure.bootstrap import interval, safe_exp


def test_the_interval_of_a_mean_approaches_the_normal_one() -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = interval(x.tolist(), level=0.9)
    half = 1.6449 * float(x.std(correction=0)) / math.sqrt(400)
    assert got.value == pytest.approx(float(x.mean()))
    assert got.low == pytest.approx(float(x.mean()) - half, abs=0.1 * half)
    assert got.high == pytest.approx(float(x.mean()) + half, abs=0.1 * half)


def test_two_values_give_the_three_means_there_are() -> None:
    got = interval([0.0, 1.0])
    assert (got.value, got.low, got.high) == (0.5, 0.0, 1.0)


def test_weights_and_transform() -> None:
    got = interval([0.0, math.log(2)], [1, 3], transform=safe_exp)
    assert got.value == pytest.approx(2 ** (3 / 4))
    assert (got.low, got.high) == (pytest.approx(1), pytest.approx(2))


def test_no_spread_no_width_and_the_same_seed_the_same_interval() -> None:
    assert interval([0.25] * 9).low == interval([0.25] * 9).high == 0.25
    x = [0.1, 0.7, 0.3, 0.9]
    assert interval(x, seed=1) == interval(x, seed=1)


def test_infinite_losses_stay_infinite() -> None:
    got = interval([math.inf, math.inf], transform=safe_exp)
    assert (got.value, got.low, got.high) == (math.inf,) * 3
