"""Where the packed kernel stops paying: the largest number of tokens at which it still beats torch's dense product.

The packed kernel reads fewer bytes, torch's product computes faster once unpacking is shared by many tokens. Both are
timed on the first rows of the matrix, doubling the tokens until the packed kernel has lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from secateur.sparse.formats import Packed
from secateur.sparse.kernels import Handle, row_blocks

TOKENS = (4, 8, 16, 32, 64, 128)
WEIGHTS = 1 << 20  # of a matrix looked at: a few milliseconds
REPEATS = 3


def calibrated(handle: Handle, dtype: torch.dtype = torch.float32) -> int:
    """The number of tokens up to which ``handle`` should use the packed kernel on this machine, now.

    Args:
        handle: the matrix.
        dtype: of the activations; torch multiplies bf16 several times as fast as fp32, so that it takes over earlier.
    """
    some = Handle(_head(handle.packed))
    best = 1
    for tokens in TOKENS:
        x = torch.ones(tokens, handle.packed.shape[1], dtype=dtype)
        by_kernel = _seconds(lambda x=x: some.direct(x))  # type: ignore[misc]  # bound now on purpose
        by_torch = _seconds(lambda x=x: some.by_panels(x))  # type: ignore[misc]
        if by_kernel > by_torch:
            break
        best = tokens
    return best


def _head(packed: Packed) -> Packed:
    """The first rows of a bitmask, and any other matrix whole."""
    blocks = max(1, WEIGHTS // (16 * packed.shape[1]))
    if packed.kind == "bitmask" and blocks * 16 < packed.shape[0]:
        return row_blocks(packed, 0, blocks)
    return packed


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of a few runs, after one that does not count."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
