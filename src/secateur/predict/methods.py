"""What methods and repairs that solve a layer's problem from its statistics take: multiply-accumulates and memory.

Counted for matrices that share an input: n columns, R rows together. n^3 is a factorisation of X^T X, R n^2 a product
of the matrices with it. How often a method that stops by itself goes round is not known before; the constants below say
what was seen on matrices of 576 and 1,536 channels, half of whose weights stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

from secateur.engine.probes import CrossGram, Gram
from secateur.methods.base import Method, PartRepair, Repair
from secateur.methods.grains import NofM
from secateur.methods.joint.admm import ADMM
from secateur.methods.joint.alps import ALPS
from secateur.methods.joint.dsnot import DSnoT
from secateur.methods.joint.obs import SetOBS
from secateur.methods.joint.sparsegpt import SparseGPT
from secateur.methods.joint.start import start_from
from secateur.methods.joint.swaps import SparseSwaps, swap_width
from secateur.methods.joint.sweeping import Sweeping
from secateur.methods.least_squares import BYTES, STEPS, WIDE
from secateur.methods.repairs.least_squares import LeastSquares
from secateur.parts import Parts

PENALTIES = 12  # of ALPS, `every` iterations under each
LOOKS = 0.04  # looks of SparseSwaps at the likely pairs of a row, per column; at all pairs once
ROUNDS = 5  # of its looks at all pairs, where swaps stay within runs of columns
EXCHANGES = 3  # of a row, in DSnoT
EIGEN = 1.3  # multiply-accumulates of an eigendecomposition, in n^3


@dataclass(frozen=True)
class Group:
    """Matrices that share an input: rows of each, columns, and how many such groups there are (experts)."""

    rows: tuple[int, ...]
    columns: int
    count: int = 1

    @property
    def weights(self) -> int:
        """Of one such group."""
        return self.columns * sum(self.rows)


@dataclass(frozen=True)
class Work:
    """What is to be computed.

    Attributes:
        products: multiply-accumulates of matrix products.
        factors: those of factorisations, which run slower.
        chosen: weights scored and compared.
        passed: weights gone over once, elementwise.
        columns: taken one by one.
    """

    products: float = 0.0
    factors: float = 0.0
    chosen: float = 0.0
    passed: float = 0.0
    columns: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def times(self, count: float) -> Work:
        """So many of it."""
        return Work(*(a * count for a in vars(self).values()))


def method_work(method: Method, rows: int, n: int, share: float) -> Work:
    """What a method computes for matrices of one input beside one scoring of every weight.

    Args:
        rows: R, of all matrices together.
        share: of the weights that stay.
    """
    size, cube = float(rows * n), float(n) ** 3
    if isinstance(method, SetOBS):
        swept = Work(size * n / 2, cube / 3) + _polish_work(method.polish, size, n)
        if isinstance(method.grain, NofM):
            m, sets = method.grain.m, comb(method.grain.m, method.grain.n)
            return swept + Work(size * sets * m, passed=20 * size * sets, columns=n / m)
        group = min(method.group, n)
        return swept + _system((1 - share) * group).times(size / group)
    if isinstance(method, ADMM):
        solved = size * n * (1 + method.iterations + method.polish)
        return Work(solved, cube / 2, size * method.gradual, 6 * size * method.iterations)
    if isinstance(method, ALPS):
        rounds = PENALTIES * method.every
        inverses = PENALTIES * cube if 3 * rows > n else size * n * rounds
        solved = size * n * (1 + rounds + method.polish) + inverses
        return Work(solved, EIGEN * cube, size * rounds, 6 * size * rounds)
    if isinstance(method, SparseSwaps):
        width, rounds = swap_width(method.grain, n), min(ROUNDS, method.rounds)
        if width >= n:
            likely = Work(passed=100.0 * n, columns=0.5).times(rows * LOOKS * n)
            found = likely + Work(2 * size * n, passed=3 * size * n * share * (1 - share))
        else:
            found = Work(2 * size * n, passed=5 * size * width).times(rounds)
        found = found + (refit_work(rows, n, share) if method.refit else Work())
        return found + method_work(start_from(method.start, method.grain), rows, n, share)
    if isinstance(method, DSnoT):
        found = Work(passed=size * (8 + 12 * min(EXCHANGES, method.cycles)))
        return found + method_work(start_from(method.start, method.grain), rows, n, share)
    if isinstance(method, SparseGPT):
        return Work(size * n / 2, cube / 3, columns=n) + _polish_work(method.polish, size, n)
    return Work(size * n / 2, cube / 3, columns=n) if Gram in method.needs else Work()  # strangers


def _polish_work(steps: int, size: float, n: int) -> Work:
    """Conjugate gradients on the survivors of matrices with ``size`` weights and n inputs."""
    return Work(size * n * (steps + 2), passed=8 * size * steps) if steps else Work()


def _system(kept: float) -> Work:
    """One of many small systems of equations: gathered, factorised, solved, refined."""
    return Work(factors=kept**3 / 3, passed=6 * kept**2, columns=1.5)


def refit_work(rows: int, n: int, share: float, alike: bool = False) -> Work:
    """Masked least squares on the survivors of every row; ``alike``: all rows keep the same."""
    kept = share * n
    if alike:
        return Work(rows * kept**2, kept**3 / 3)
    if kept <= WIDE:
        return Work(float(rows) * n**2) + _system(kept).times(rows)
    return Work(rows * STEPS * float(n) ** 2, passed=12.0 * STEPS * rows * n)


def aim_work(rows: int, n: int) -> Work:
    """The weights to aim at where both streams are walked."""
    return Work(2.0 * rows * n**2, n**3 / 6)


def method_bytes(method: Method, rows: Sequence[int], n: int, share: float) -> int:
    """Bytes that a method holds at most while it decides about matrices of one input; what was there before and its
    answers aside.

    Args:
        rows: of each matrix.
    """
    square, all_, one = 4 * n**2, 4 * n * sum(rows), 4 * n * max(rows)
    polish = 7 * one if isinstance(method, Sweeping) and method.polish else 0
    if isinstance(method, SetOBS):
        small = 0
        if not isinstance(method.grain, NofM):
            group = min(method.group, n)
            gone = (1 - share) * group + 3 * sqrt(group * share * (1 - share))  # of the row that loses most
            small = _systems_bytes(sum(rows), gone)
        return max(
            4 * square + all_, 2 * square + 3 * all_ + all_ // 4 + small, 2 * square + 2 * all_ + all_ // 4 + polish
        )
    if isinstance(method, ADMM):
        return max(5 * square, 3 * square + 25 * one // 4)
    if isinstance(method, ALPS):
        return max(7 * square, 5 * square + 29 * one // 4)
    if isinstance(method, SparseSwaps):
        first = method_bytes(start_from(method.start, method.grain), rows, n, share)
        pairs = min(BYTES, 4 * max(rows) * round(n * n * share * (1 - share)))
        again = refit_bytes(max(rows), n, share) if method.refit else 0
        return max(first, square + max(11 * one + pairs, again))
    if isinstance(method, DSnoT):
        return max(method_bytes(start_from(method.start, method.grain), rows, n, share), 6 * one + all_ // 4)
    if Gram in method.needs:  # SparseGPT, and strangers
        return max(4 * square + all_, 2 * square + 2 * all_ + all_ // 4 + polish)
    return 2 * one


def refit_bytes(rows: int, n: int, share: float) -> int:
    """Bytes of masked least squares on one matrix."""
    square, one, kept = 4 * n**2, 4 * n * rows, share * n
    return 2 * square + (7 * one if kept > WIDE else 4 * one + _systems_bytes(rows, kept))


def _systems_bytes(count: int, size: float) -> int:
    """Bytes of systems of equations solved together: gathered and factorised."""
    return min(2 * BYTES // 3, round(8 * count * size**2))


def mending_bytes(rows: int, n: int, share: float) -> int:
    """Bytes of a repair by least squares on one matrix: X^T X, its problem, and the errors before and after."""
    return 4 * n**2 + max(refit_bytes(rows, n, share), 4 * 4 * n * rows)


def deciding_bytes(parts: Parts, groups: Sequence[Group], share: float) -> int:
    """Bytes of deciding about one block, at most: what is decided of it, and what the largest group takes.

    Args:
        groups: the block's pruned matrices.
        share: of the weights that stay.
    """
    weights, mix, method = sum(g.weights * g.count for g in groups), mixes(parts), parts.method
    moved = parts.joint and not (isinstance(method, DSnoT) or (isinstance(method, SparseSwaps) and not method.refit))
    held = weights + 4 * weights * int(moved)  # booleans, and new weights
    most = [method_bytes(method, g.rows, g.columns, share) for g in groups]
    aims = [4 * (5 * g.columns**2 + 3 * g.weights) * mix for g in groups]
    if parts.joint:
        held += 4 * weights * mix
        most += aims
    if isinstance(parts.repair, LeastSquares):
        held += 4 * weights * (mix + 1)
        most += [mending_bytes(max(g.rows), g.columns, share) for g in groups] + aims
    elif parts.repair is not None and not isinstance(parts.repair, PartRepair):  # the bias, in fp64
        most += [24 * g.columns * max(g.rows) for g in groups]
    return held + max(most, default=0)


def mixes(parts: Parts) -> int:
    """1 where layers are fitted on both streams, else 0."""
    return int(parts.fit_on.name == "mix" and any(p is CrossGram for p in parts.needs))


def repair_work(repair: Repair | None, rows: int, n: int, share: float, units: bool) -> Work:
    """What a repair from sums computes for one matrix; ``units``: all rows keep the same columns."""
    if isinstance(repair, LeastSquares):  # and the error before and after
        return refit_work(rows, n, share, units) + Work(2.0 * rows * n**2)
    return Work()
