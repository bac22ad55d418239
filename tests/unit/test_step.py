"""The small operations of a decoding step against float64 written out from their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from secateur.sparse.step import Heads, attend, gate, norm, ready

pytestmark = pytest.mark.skipif(not ready(), reason="the library was not built here")
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found.double() - wanted).abs().max() <= 2e-6 * (1 + wanted.abs().max()))


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (1, 576), (3, 37), (2, 64)])
def test_norm(rows: int, n: int) -> None:
    x, weight = 3 * random(rows, n), random(n)
    a = x.double()
    wanted = a / (a.square().mean(1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert close(norm(x, weight, 1e-3), wanted)


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (1, 1536), (3, 37)])
def test_gate(rows: int, n: int) -> None:
    both = 8 * random(rows, 2 * n)
    both[0, 0] = -200.0  # exp overflows
    both[-1, n - 1] = 200.0
    g, u = both.double().split(n, 1)
    assert close(gate(both), g / (1 + (-g).exp()) * u)


def by_hand(heads: Heads, qkv: Tensor, keys: Tensor, values: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Head by head in float64. ``keys`` and ``values``: those before, [batch, groups, seen, size]."""
    cos, sin = (a.double() for a in angles)
    half, out = heads.size // 2, []

    def turned(head: Tensor, own: int) -> Tensor:
        x = head.double()
        if heads.norms is not None:
            x = x / math.sqrt(float(x.square().mean()) + heads.eps) * heads.norms[own].double()
        pairs = zip(x[:half], x[half:], cos[:half], sin[:half], cos[half:], sin[half:], strict=True)
        first, second = zip(*((a * c - b * s, b * c2 + a * s2) for a, b, c, s, c2, s2 in pairs), strict=True)
        return torch.stack([*first, *second])

    for b, row in enumerate(qkv.view(len(qkv), -1, heads.size)):
        for q in range(heads.queries):
            g = q // (heads.queries // heads.groups)
            k = torch.stack([*keys[b, g].double(), turned(row[heads.queries + g], 1)])
            v = torch.stack([*values[b, g].double(), row[heads.queries + heads.groups + g].double()])
            out.append((k @ turned(row[q], 0) * heads.scale).softmax(0) @ v)
    return torch.cat(out).view(len(qkv), -1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("batch", "queries", "groups", "size", "before"),
    [(1, 9, 3, 64, 40), (2, 4, 4, 8, 0), (3, 6, 1, 24, 17), (2, 4, 2, 128, 300)],
)
def test_attention(batch: int, queries: int, groups: int, size: int, before: int, threads: int) -> None:
    used = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for own in (None, (random(size), random(size))):
            heads = Heads(queries, groups, size, 0.3, 1e-4, own)
            keys, values = random(batch, groups, before + 3, size), random(batch, groups, before + 3, size)
            angles, qkv = (random(size), random(size)), random(batch, (queries + 2 * groups) * size)
            wanted = by_hand(heads, qkv, keys[:, :, :before], values[:, :, :before], angles)
            kept = [t.clone() for t in (keys, values)]
            new = qkv.view(batch, -1, size)[:, queries + groups :].clone()
            assert close(attend(heads, qkv, (keys, values), angles, before), wanted)
            assert torch.equal(values[:, :, before], new)
            for now, then in zip((keys, values), kept, strict=True):  # nothing else is written
                now[:, :, before] = then[:, :, before]
                assert torch.equal(now, then)
    finally:
        torch.set_num_threads(used)


def test_one_large_score_takes_all() -> None:
    heads = Heads(1, 1, 4, 1.0)
    keys, values = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
    keys[..., 0, :], values[..., 0, :], values[..., 1, :] = 300.0, 7.0, -5.0
    qkv = torch.cat([torch.ones(4), torch.zeros(4), torch.full((4,), -3.0)])[None]
    still = (torch.ones(4), torch.zeros(4))
    assert torch.equal(attend(heads, qkv, (keys, values), still, 2), torch.full((1, 4), 7.0))
