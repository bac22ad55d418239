"""Evolution with one parent: mutants that cost the same, selected in stages on ever more text, at last with the parent.

Source: Sieberling et al. 2024 (EvoPress), arXiv 2410.14649, by its released code. Everything random in a generation
comes from the seed and the generation's number, so a search goes on from any generation as if it had not stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from secateur.search.ladders import Ladder

Levels = tuple[int, ...]
Piece = tuple[int, int]  # a window of text, and how many of its first tokens

SWITCHES = 3  # at most so many exchanges make a mutant
MOVES = 10  # sites that one exchange may move
TRIES = 100  # exchanges drawn before a mutant is given up


@dataclass(frozen=True)
class Schedule:
    """How long to search, and how hard to look.

    Attributes:
        generations, offspring: how often, and how many mutants each time.
        stages: (survivors, tokens) of each stage of selection; the last leaves one.
    """

    generations: int
    offspring: int
    stages: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Generation:
    """What one generation came to.

    Attributes:
        number: counted from 1.
        parent, best: loss of the parent and of what became the next one, on the same tokens.
        changed: how many sites differ between the two (0: the parent stayed).
    """

    number: int
    parent: float
    best: float
    changed: int


@dataclass
class State:
    """Where a search is.

    Attributes:
        parent: the best so far.
        history: of every generation so far.
    """

    parent: Levels
    history: list[Generation] = field(default_factory=list)


@dataclass(frozen=True)
class Text:
    """Text to compare candidates on: so many windows of so many tokens."""

    windows: int
    length: int

    def everything(self) -> list[Piece]:
        return [(at, self.length) for at in range(self.windows)]

    def drawn(self, tokens: int, random: Random) -> list[Piece]:
        """Windows at random, ``tokens`` together (all of the text if it has fewer); of the last one its beginning."""
        pieces: list[Piece] = []
        for at in random.sample(range(self.windows), self.windows):
            if tokens <= 0:
                break
            pieces.append((at, min(tokens, self.length)))
            tokens -= self.length
        return sorted(pieces)


Loss = Callable[[Sequence[Levels], Sequence[Piece]], list[float]]


def evolve(
    state: State, ladders: Sequence[Ladder], schedule: Schedule, text: Text, seed: str, loss: Loss
) -> State | None:
    """One generation; None if they are all done.

    Args:
        state: not changed.
        loss: of candidates on pieces of the text; lower is better, and what is not finite is worst.
    """
    number = len(state.history) + 1
    if number > schedule.generations:
        return None
    random = Random(f"{seed}/{number}")
    crowd = offspring(state.parent, ladders, schedule.offspring, random)
    if not crowd:
        return None
    values: list[float] = []
    own = math.inf
    for stage, (survivors, tokens) in enumerate(schedule.stages, 1):
        last = stage == len(schedule.stages)
        crowd = [state.parent, *crowd] if last else crowd
        values = [v if math.isfinite(v) else math.inf for v in loss(crowd, text.drawn(tokens, random))]
        own = values[0] if last else own
        best = sorted(range(len(crowd)), key=lambda at: (values[at], at))[:survivors]
        crowd, values = [crowd[at] for at in best], [values[at] for at in best]
    changed = sum(a != b for a, b in zip(state.parent, crowd[0], strict=True))
    return State(crowd[0], [*state.history, Generation(number, own, values[0], changed)])


def offspring(parent: Levels, ladders: Sequence[Ladder], count: int, random: Random) -> list[Levels]:
    """Different mutants of the parent: ``count`` of them, or fewer where no more were found."""
    found: dict[Levels, None] = {}
    for _ in range(TRIES * count):
        if len(found) == count:
            break
        levels: Levels | None = parent
        for _ in range(min(random.randint(1, SWITCHES), random.randint(1, SWITCHES))):
            levels = exchanged(levels, ladders, random) if levels is not None else None
        if levels is not None and levels != parent:
            found[levels] = None
    return list(found)


def exchanged(levels: Levels, ladders: Sequence[Ladder], random: Random) -> Levels | None:
    """One site a level up, another down; where their steps differ, others of the pool make up for it.

    Returns:
        Levels of exactly the same cost, or None if none were found.
    """
    ups = [at for at, ladder in enumerate(ladders) if levels[at] < ladder.high]
    for _ in range(TRIES if ups else 0):
        up = random.choice(ups)
        out = _paid(levels, ladders, up, random)
        if out is not None:
            return out
    return None


def _paid(levels: Levels, ladders: Sequence[Ladder], up: int, random: Random) -> Levels | None:
    """``up`` a level up, and who pays for it."""
    pool = [at for at, ladder in enumerate(ladders) if ladder.pool == ladders[up].pool]
    downs = [at for at in pool if at != up and levels[at] > ladders[at].low]
    if not downs:
        return None
    out = list(levels)
    down = random.choice(downs)
    out[up] += 1
    out[down] -= 1
    moved = {up, down}
    owed = ladders[up].step - ladders[down].step  # above 0: more must go down
    while owed:
        sign = -1 if owed > 0 else 1
        able = [
            at
            for at in pool
            if at not in moved
            and ladders[at].step <= abs(owed)
            and ladders[at].low <= levels[at] + sign <= ladders[at].high
        ]
        if not able or len(moved) == MOVES:
            return None
        at = random.choice(able)
        out[at] += sign
        owed += sign * ladders[at].step
        moved.add(at)
    return tuple(out)
