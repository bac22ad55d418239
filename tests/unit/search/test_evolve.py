"""The search without models: exchanges are exact, evolution finds what enumeration finds, text is drawn as asked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import lcm
from random import Random

import pytest
import torch

from secateur.search.evolve import Levels, Piece, Schedule, State, Text, evolve, exchanged, offspring
from secateur.search.ladders import Ladder, Rungs, closed, ladders, together
from secateur.search.likely import Likely

SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
QWEN2 = [(896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864)]


def rungs(shapes: Sequence[tuple[int, int]], rows: bool, blocks: int = 3, keep: float = 0.4) -> list[Rungs]:
    return [Rungs(o * i, o if rows else 1, o * round(i * keep)) for _ in range(blocks) for o, i in shapes]


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("shapes", [SMOLLM2, QWEN2])
def test_ladders_step_in_whole_groups_and_can_be_paid_for(shapes: list[tuple[int, int]], rows: bool) -> None:
    sites = rungs(shapes, rows)
    made = ladders(sites, 3, 0.05)
    for site, ladder in zip(sites, made, strict=True):
        assert ladder.step % site.group == 0
        assert 0.5 <= ladder.step / (0.05 * site.size) <= 2.1
        assert (ladder.low, ladder.high) == (-3, 3)
        smallest = min(m.step for m in made if m.pool == ladder.pool)
        assert ladder.step % smallest == 0
    # q, k, gate and down of SmolLM2 share a unit of 4,608 weights (a weight more or less in each of 1,536 rows ...)
    assert len({m.pool for m in made}) == (2 if shapes is QWEN2 and rows else 1)


def test_ladders_stay_within_what_there_is() -> None:
    sites = [Rungs(100, 1, kept, least) for kept, least in ((100, 0), (5, 0), (50, 45), (98, 0), (1, 0))]
    made = ladders(sites, 4, 0.1)
    assert [(m.step, m.low, m.high) for m in made] == [
        (10, -4, 0),
        (10, 0, 4),
        (10, 0, 4),
        (10, -4, 0),
        (10, 0, 4),
    ]
    (heads,) = ladders([Rungs(3 * 700, 700, 2 * 700, 700)], 3, 0.05)  # three large units: one at a time
    assert (heads.step, heads.low, heads.high) == (700, -1, 1)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("shapes", [SMOLLM2, QWEN2])
def test_mutants_cost_exactly_the_same(shapes: list[tuple[int, int]], rows: bool) -> None:
    made = ladders(rungs(shapes, rows), 3, 0.05)
    random, parent = Random(0), (0,) * len(made)
    crossed = 0
    for _ in range(40):
        children = offspring(parent, made, 8, random)
        assert len(set(children)) == 8 and parent not in children
        for child in children:
            assert sum(level * m.step for level, m in zip(child, made, strict=True)) == 0
            assert all(m.low <= level <= m.high for level, m in zip(child, made, strict=True))
            moved = {m.step for a, b, m in zip(parent, child, made, strict=True) if a != b}
            crossed += len(moved) > 1
        parent = children[0]
    assert crossed  # sites of different size exchange, too


def test_sites_that_move_together_cost_what_they_cost_together() -> None:
    steps = [Ladder(4, -2, 3), Ladder(6, -3, 1), Ladder(4, -1, 1), Ladder(6, -3, 3), Ladder(5, -1, 1)]
    made = together(steps, [[0, 1], [2, 3], [4]])
    assert [(m.step, m.low, m.high) for m in made] == [(10, -2, 1), (10, -1, 1), (5, -1, 1)]
    assert {exchanged((0, 0, 0), made, Random(s)) for s in range(9)} == {(1, -1, 0), (-1, 1, 0)}


def test_sites_that_are_closed_or_alone_do_not_move() -> None:
    alone = [Ladder(10, -2, 2, 0), Ladder(7, -2, 2, 1), closed(Ladder(10, -2, 2, 0))]
    assert exchanged((0, 0, 0), alone, Random(0)) is None
    assert offspring((0, 0, 0), alone, 4, Random(0)) == []
    assert evolve(State((0, 0, 0)), alone, Schedule(5, 4, ((1, 8),)), Text(2, 8), "0", lambda c, p: [0.0]) is None


class Landscape:
    """A loss with interactions between sites, and noise from the text that shrinks as more is read."""

    def __init__(self, seed: int, sites: int, noise: float) -> None:
        g = torch.Generator().manual_seed(seed)
        half = torch.randn(sites, sites, generator=g, dtype=torch.float64)
        self.square = half @ half.T / sites
        self.slope = torch.randn(sites, generator=g, dtype=torch.float64)
        self.noise = noise
        self.asked: list[tuple[list[Levels], list[Piece]]] = []

    def exact(self, levels: Levels) -> float:
        x = torch.tensor(levels, dtype=torch.float64)
        return float(10 + self.slope @ x + x @ self.square @ x)

    def __call__(self, candidates: Sequence[Levels], pieces: Sequence[Piece]) -> list[float]:
        self.asked.append((list(candidates), list(pieces)))
        words = sum(n for _, n in pieces)
        return [self.exact(c) + self.noise * Random(f"{c}{pieces}").gauss(0, 1) / words for c in candidates]


def run(landscape: Landscape, steps: Sequence[Ladder], schedule: Schedule, text: Text, seed: str = "7") -> list[State]:
    states = [State((0,) * len(steps))]
    while (following := evolve(states[-1], steps, schedule, text, seed, landscape)) is not None:
        states.append(following)
    return states


@pytest.mark.parametrize("seed", range(6))
def test_evolution_finds_what_enumeration_finds(seed: int) -> None:
    steps = [Ladder(2, -1, 1), Ladder(2, -1, 1), Ladder(1, -2, 1), Ladder(1, -1, 2), Ladder(4, -1, 1)]
    landscape = Landscape(seed, len(steps), 0.0)
    every = [
        levels
        for levels in itertools.product(*(m.levels for m in steps))
        if sum(level * m.step for level, m in zip(levels, steps, strict=True)) == 0
    ]
    assert 20 < len(every) < 100
    best = min(every, key=landscape.exact)
    text = Text(4, 10)
    last = run(landscape, steps, Schedule(25, 8, ((3, 10), (1, 40))), text)[-1]
    assert last.parent == best
    asked = {c for crowd, _ in landscape.asked for c in crowd}
    assert asked <= set(every)  # nothing was ever tried that costs more or less


def test_the_parent_is_never_replaced_by_what_is_worse_on_the_same_text() -> None:
    steps = [Ladder(lcm(2, 3), -3, 3) for _ in range(8)]
    landscape = Landscape(0, 8, 3.0)
    states = run(landscape, steps, Schedule(20, 6, ((2, 5), (1, 20))), Text(6, 5))
    assert len(states) == 21
    for before, after in itertools.pairwise(states):
        said = after.history[-1]
        assert said.best <= said.parent
        assert (said.changed == 0) == (before.parent == after.parent)
    for crowd, pieces in landscape.asked:
        assert sum(n for _, n in pieces) in (5, 20) and len(crowd) in (6, 3)


def test_a_search_goes_on_from_any_generation_as_if_it_had_not_stopped() -> None:
    steps, schedule, text = [Ladder(1, -3, 3) for _ in range(6)], Schedule(12, 5, ((2, 8), (1, 24))), Text(5, 8)
    whole = run(Landscape(1, 6, 1.0), steps, schedule, text)
    again = State(whole[5].parent, list(whole[5].history))
    while (following := evolve(again, steps, schedule, text, "7", Landscape(1, 6, 1.0))) is not None:
        again = following
    assert again == whole[-1]
    assert run(Landscape(1, 6, 1.0), steps, schedule, text, seed="8")[-1].history != whole[-1].history


def test_what_is_not_finite_is_worst() -> None:
    steps = [Ladder(1, -1, 1), Ladder(1, -1, 1)]

    def loss(candidates: Sequence[Levels], pieces: Sequence[Piece]) -> list[float]:
        return [float("nan") if c[0] else 1.0 for c in candidates]

    state = evolve(State((0, 0)), steps, Schedule(1, 2, ((1, 4),)), Text(1, 4), "0", loss)
    assert state is not None and state.parent == (0, 0) and state.history[0].best == 1.0


def test_text_is_drawn_in_exact_numbers_of_tokens() -> None:
    text = Text(5, 10)
    for tokens in (1, 10, 13, 49):
        pieces = text.drawn(tokens, Random(tokens))
        assert sum(n for _, n in pieces) == tokens and len({at for at, _ in pieces}) == len(pieces)
    assert text.drawn(1000, Random(0)) == text.everything() == [(at, 10) for at in range(5)]
    assert len({tuple(text.drawn(20, Random(s))) for s in range(20)}) > 5


@pytest.mark.parametrize("top", [3, 8, 11, 50])
def test_remembered_answers_give_the_divergence_of_lumped_outcomes(top: int) -> None:
    g = torch.Generator().manual_seed(top)
    p, q = (4 * torch.randn(6, 11, generator=g, dtype=torch.float64) for _ in range(2))
    got = Likely.of(p.float(), top).divergence(q.float())
    a, b = p.softmax(-1), q.softmax(-1)
    full = (a * (a / b).log()).sum(-1)
    want = []
    for x, y in zip(a, b, strict=True):  # by hand: the largest one by one, the others as one outcome
        order = x.argsort(descending=True)[:top].tolist()
        rest = [i for i in range(11) if i not in order]
        cells = [(x[i], y[i]) for i in order] + ([(x[rest].sum(), y[rest].sum())] if rest else [])
        want.append(sum(float(m * (m / n).log()) for m, n in cells))
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert bool((got <= full + 1e-5).all())
    if top >= 11:
        torch.testing.assert_close(got, full, rtol=1e-4, atol=1e-5)
    assert float(Likely.of(p.float(), top).divergence(p.float()).max()) < 1e-6
    torch.testing.assert_close(Likely.of(p.float(), top).divergence(q.float()[:4]), got[:4])
