"""What lies between the products of a decoding step: norm, attention over a static cache, gated activation.

Each is one call into the library (csrc/step.cpp), fp32 on the CPU. In torch a layer's small operations take longer
than its products, because every operation costs a few microseconds however small it is. Ask `ready` first.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from secateur.sparse.kernels import library


def ready() -> bool:
    """Whether the library is there and has these functions."""
    return _functions() is not None


@dataclass(frozen=True)
class Heads:
    """Attention of one layer.

    Attributes:
        queries, groups: query heads; key/value heads, a divisor of it.
        size: entries of a head, even.
        scale: what scores are multiplied by.
        eps: of the heads' norms.
        norms: weights [size] of an RMS norm of every query and key head, or None.
    """

    queries: int
    groups: int
    size: int
    scale: float
    eps: float = 0.0
    norms: tuple[Tensor, Tensor] | None = None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of rows [batch, n]: x / sqrt(mean(x^2) + eps) * weight."""
    y = torch.empty_like(x)
    _library().secateur_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.shape[0], x.shape[1], eps)
    return y


def gate(both: Tensor) -> Tensor:
    """silu(gate) * up of [batch, (gate, up)]: [batch, n]."""
    n = both.shape[1] // 2
    y = both.new_empty(both.shape[0], n)
    _library().secateur_gate(both.data_ptr(), y.data_ptr(), both.shape[0], n)
    return y


def attend(heads: Heads, qkv: Tensor, cache: tuple[Tensor, Tensor], angles: tuple[Tensor, Tensor], at: int) -> Tensor:
    """The attention of one new token over everything before it and itself.

    Args:
        heads: the layer's.
        qkv: [batch, (queries, keys, values)], heads one after another, contiguous; overwritten.
        cache: keys and values [batch, groups, room, size], contiguous; position ``at`` is written.
        angles: cosines and sines [size] of position ``at``; a head turns as x cos + (-x2, x1) sin.
        at: position of the new token, below room.

    Returns:
        [batch, queries * size].
    """
    (keys, values), (cos, sin) = cache, angles
    out = qkv.new_empty(len(qkv), heads.queries * heads.size)
    sizes = (ctypes.c_int64 * 6)(len(qkv), heads.queries, heads.groups, heads.size, keys.shape[2], at)
    own = [w.data_ptr() for w in heads.norms] if heads.norms else [None, None]
    _library().secateur_attend(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        *own,
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        sizes,
        heads.scale,
        heads.eps,
        torch.get_num_threads(),
    )
    return out


def _library() -> ctypes.CDLL:
    found = _functions()
    assert found is not None, "ready() says so"
    return found


@cache
def _functions() -> ctypes.CDLL | None:
    """The library with the types of its functions; None where it was not built, or before these were part of it."""
    found = library()
    if found is None or not hasattr(found, "secateur_attend"):
        return None
    p, n, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    found.secateur_norm.argtypes = (p, p, p, n, n, f)
    found.secateur_gate.argtypes = (p, p, n, n)
    found.secateur_attend.argtypes = (*(p,) * 9, f, f, ctypes.c_int)
    for function in (found.secateur_norm, found.secateur_gate, found.secateur_attend):
        function.restype = None
    return found
