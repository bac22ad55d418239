"""Grain: who competes with whom inside a site, and what lives or dies together.

    row           every output row keeps its own best weights
    matrix        all weights of a matrix compete
    columns:B     the weights of each run of B input columns compete (SparseGPT's blocks)
    n:m           n of every m neighbours along the input axis stay
    tile:RxC      rectangles of R rows and C columns stay or go whole
    unit          units of a space (neurons, heads, experts, layers)

Counts are exact, ties included, and a larger count keeps a superset of a smaller one.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.methods.base import Amount
from secateur.methods.top import apportion, check_scores, kth_largest, spread, top_rows, top_total

Shape = tuple[int, ...]
WORKS = "row, matrix, columns:128, 2:4 (n:m), tile:16x16 or unit"


class Grain(ABC):
    """How the scores of one site are turned into booleans. ``str(grain)`` is its name in a recipe."""

    def check(self, shape: Shape) -> None:
        """Refuse a matrix that this grain does not divide."""
        return None

    def units(self, shape: Shape) -> int:
        """Number of things that compete in a site of this shape."""
        return prod(shape)

    def cost(self, shape: Shape) -> int:
        """Weights per competing thing."""
        return prod(shape) // max(self.units(shape), 1)

    def groups(self, shape: Shape) -> int:
        """Number of equal parts that keep equal counts (rows for ``row``)."""
        return 1

    def count(self, shape: Shape, amount: Amount) -> int:
        """How many stay in a site of this shape: ``amount`` of each group's units, rounded half up per group."""
        self.check(shape)
        groups = self.groups(shape)
        each = self.units(shape) // groups
        return groups * amount_within(amount, each)

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Scores of the things that compete, from those of single weights (a tile's is the sum)."""
        return scores

    @abstractmethod
    def select(self, scores: Tensor, count: int) -> Tensor:
        """Booleans of the scores' shape (True stays): exactly ``count`` units, the best ones.

        Raises:
            SecateurError: the scores are not finite, or the count is impossible here.
        """

    def _start(self, scores: Tensor, count: int) -> None:
        self.check(tuple(scores.shape))
        check_scores(scores)
        units = self.units(tuple(scores.shape))
        if not 0 <= count <= units:
            raise SecateurError(f"cannot keep {count} of {units}", received=count, works=f"a count from 0 to {units}")


def amount_within(amount: Amount, n: int) -> int:
    """``amount`` of n, refusing what is not there."""
    kept = amount.of(n)
    if not 0 <= kept <= n:
        raise SecateurError(
            f"cannot keep {kept} of {n}",
            received=amount.share if amount.share is not None else amount.count,
            works=f"a share from 0.0 to 1.0, or a count from 0 to {n}",
        )
    return kept


@dataclass(frozen=True)
class Row(Grain):
    """Each output row keeps its own best weights (Wanda's comparison group)."""

    def groups(self, shape: Shape) -> int:
        return shape[0]

    def select(self, scores: Tensor, count: int) -> Tensor:
        self._start(scores, count)
        return top_total(scores, count)

    def __str__(self) -> str:
        return "row"


@dataclass(frozen=True)
class Matrix(Grain):
    """All weights of a matrix compete."""

    def select(self, scores: Tensor, count: int) -> Tensor:
        self._start(scores, count)
        return top_rows(scores.reshape(1, -1), count).reshape(scores.shape)

    def __str__(self) -> str:
        return "matrix"


@dataclass(frozen=True)
class Columns(Grain):
    """The weights of each run of ``width`` input columns compete; every run keeps its proportional share."""

    width: int = 128

    def __post_init__(self) -> None:
        if self.width < 1:
            raise SecateurError("blocks of columns need a width", received=self.width, works="columns:128")

    def blocks(self, shape: Shape) -> list[tuple[int, int]]:
        """Start and end column of every run; the last may be narrower."""
        return [(at, min(at + self.width, shape[1])) for at in range(0, shape[1], self.width)]

    def split(self, shape: Shape, count: int) -> list[int]:
        """``count`` divided over the runs without looking at scores (equal claims go to the earlier run)."""
        seats, tied, more = apportion([(b - a) * shape[0] for a, b in self.blocks(shape)], count)
        for g in tied[:more]:
            seats[g] += 1
        return seats

    def select(self, scores: Tensor, count: int) -> Tensor:
        self._start(scores, count)
        blocks = self.blocks(tuple(scores.shape))
        seats, tied, more = apportion([(b - a) * scores.shape[0] for a, b in blocks], count)
        claims = []
        for g in tied:
            a, b = blocks[g]
            claims.append((-float(kth_largest(scores[:, a:b].reshape(1, -1), seats[g] + 1)), g))
        for _, g in sorted(claims)[:more]:
            seats[g] += 1
        keep = torch.empty_like(scores, dtype=torch.bool)
        for (a, b), places in zip(blocks, seats, strict=True):
            part = scores[:, a:b]
            keep[:, a:b] = top_rows(part.reshape(1, -1), places).reshape(part.shape)
        return keep

    def __str__(self) -> str:
        return f"columns:{self.width}"


@dataclass(frozen=True)
class NofM(Grain):
    """``n`` of every ``m`` neighbours along the input axis stay."""

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise SecateurError(
                "n:m keeps n of every m", received=str(self), works="n from 1 to m, for example 2:4 (half stays)"
            )

    def check(self, shape: Shape) -> None:
        if shape[1] % self.m:
            raise SecateurError(
                f"{self} needs a number of input columns that {self.m} divides",
                received=f"{shape[0]} x {shape[1]}",
                works="another n:m, or --exclude this matrix",
            )

    def groups(self, shape: Shape) -> int:
        return shape[0] * shape[1] // self.m

    def count(self, shape: Shape, amount: Amount | None = None) -> int:
        """``n/m`` of the matrix; an amount may be given and must then say the same."""
        self.check(shape)
        if amount is not None and (amount.count != self.n if amount.share is None else amount.share * self.m != self.n):
            raise SecateurError(
                f"{self} keeps {self.n} of every {self.m}",
                received=f"keep {amount.share if amount.share is not None else amount.count}",
                works=f"leave keep out, or say {self.n / self.m:g}",
            )
        return self.groups(shape) * self.n

    def select(self, scores: Tensor, count: int) -> Tensor:
        self._start(scores, count)
        if count == scores.numel():  # protected: everything stays
            return torch.ones_like(scores, dtype=torch.bool)
        fixed = self.groups(tuple(scores.shape)) * self.n
        if count != fixed:
            raise SecateurError(f"{self} fixes how many stay", received=count, works=f"{fixed} of {scores.numel()}")
        return self.pick(scores)

    def pick(self, scores: Tensor) -> Tensor:
        """The n best of every m neighbours of [rows, columns]."""
        s = scores.reshape(-1, self.m)
        if self.m > 8:
            return top_rows(s, self.n).reshape(scores.shape)
        keep = torch.empty_like(s, dtype=torch.bool)
        for i in range(self.m):  # a score's rank is the number of those that beat it; cheaper than sorting
            rank = torch.zeros(len(s), dtype=torch.int8, device=s.device)
            for j in range(self.m):
                if j != i:
                    rank += s[:, j] > s[:, i]
            keep[:, i] = rank < self.n
        tied = (keep.sum(1) > self.n).nonzero().squeeze(1)
        if len(tied):
            equal = s[tied] == s[tied].masked_fill(~keep[tied], torch.inf).amin(1, keepdim=True)
            sure = keep[tied] & ~equal
            keep[tied] = sure | spread(equal, self.n - sure.sum(1), tied)
        return keep.reshape(scores.shape)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Tile(Grain):
    """Rectangles of ``rows`` x ``columns`` weights stay or go whole; a tile's score is the sum of its weights'."""

    rows: int = 16
    columns: int = 16

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise SecateurError("a tile needs rows and columns", received=str(self), works="tile:16x16")

    def check(self, shape: Shape) -> None:
        if shape[0] % self.rows or shape[1] % self.columns:
            raise SecateurError(
                f"{self} does not divide the matrix",
                received=f"{shape[0]} x {shape[1]}",
                works="a tile whose sides divide every matrix, or --exclude this one",
            )

    def units(self, shape: Shape) -> int:
        return (shape[0] // self.rows) * (shape[1] // self.columns)

    def unit_scores(self, scores: Tensor) -> Tensor:
        out, inn = scores.shape
        tiles = scores.reshape(out // self.rows, self.rows, inn // self.columns, self.columns)
        return tiles.double().sum((1, 3))

    def spread(self, values: Tensor) -> Tensor:
        """Scores of tiles as scores of weights, fp32: every weight gets an equal part."""
        parts = (values / (self.rows * self.columns)).float()
        return parts.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def select(self, scores: Tensor, count: int) -> Tensor:
        self._start(scores, count)
        tiles = self.unit_scores(scores)
        keep = top_rows(tiles.reshape(1, -1), count).reshape(tiles.shape)
        return keep.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def __str__(self) -> str:
        return f"tile:{self.rows}x{self.columns}"


@dataclass(frozen=True)
class Unit(Grain):
    """Units of a space; scores [units], or [copies, units] where every copy keeps the same number."""

    def groups(self, shape: Shape) -> int:
        return shape[0] if len(shape) == 2 else 1

    def select(self, scores: Tensor, count: int) -> Tensor:
        self._start(scores, count)
        copies = self.groups(tuple(scores.shape))
        if count % copies:
            raise SecateurError(
                f"{copies} copies of a space must keep equal numbers of units",
                received=f"{count} in all",
                works=f"a multiple of {copies}",
            )
        return top_rows(scores.reshape(copies, -1), count // copies).reshape(scores.shape)

    def __str__(self) -> str:
        return "unit"


def parse_grain(text: str) -> Grain:
    """The grain a recipe or command line names: ``row``, ``columns:128``, ``2:4``, ``tile:16x16``, ..."""
    plain: dict[str, Grain] = {"row": Row(), "matrix": Matrix(), "unit": Unit()}
    if text in plain:
        return plain[text]
    if m := re.fullmatch(r"columns:(\d{1,9})", text):
        return Columns(int(m[1]))
    if m := re.fullmatch(r"(\d{1,9}):(\d{1,9})", text):
        return NofM(int(m[1]), int(m[2]))
    if m := re.fullmatch(r"tile:(\d{1,9})x(\d{1,9})", text):
        return Tile(int(m[1]), int(m[2]))
    raise SecateurError("unknown grain", received=text, works=f"known are {WORKS}")
