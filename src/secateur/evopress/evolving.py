"""A budget that searches: levels made, candidates put together and compared with the dense model, the winner's counts.

What a search leaves in the step's working directory, so that it goes on where it was killed, with the same result:

    search-levels-00003.safetensors   a block at every level (`levels`)
    search-dense.safetensors          the dense model's likeliest answers at every position of the text
    search.json                       parent and losses after every generation; at the end what was chosen
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.engine.distribute import World
from secateur.engine.headers import read_json
from secateur.engine.plan import Plan
from secateur.engine.write import write_json
from secateur.errors import SecateurError
from secateur.evopress.answers import Answers, note_answers
from secateur.evopress.levels import Layers, LevelFiles, Site, Switchboard, as_mask, sites_of
from secateur.methods.base import Amount, Budget, SiteInfo
from secateur.methods.budgets.evopress import EvoPress
from secateur.methods.budgets.protected import Protected
from secateur.parts import Parts
from secateur.report.model import SearchGeneration, SearchRecord
from secateur.search.evolve import Generation, Levels, Piece, Schedule, State, Text, evolve
from secateur.search.ladders import Ladder, together
from secateur.stage import Stage
from secateur.step import Step

SMALL = 1e-9  # a winner's gain below this share is rounding


@dataclass(frozen=True)
class Found(Budget):
    """Counts that are known."""

    counts: Mapping[str, int]

    def allot(self, sites: Sequence[SiteInfo], keep: Amount, seen: Mapping[str, Any]) -> dict[str, int]:
        return {site.name: self.counts[site.name] for site in sites}


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        counts: units kept by site name; of layers, none.
        layers: which layers stay, as a plan to replay; None for other spaces.
        record: for the report.
        note: the same in a sentence.
    """

    counts: Mapping[str, int]
    layers: Plan | None
    record: SearchRecord
    note: str

    def settle(self, stage: Stage) -> Plan | None:
        """Let a stage keep what was found; returns what it is to replay, if it is layers."""
        if self.layers is None:
            stage.parts = replace(stage.parts, budget=Found(self.counts))
        return self.layers


def options_of(budget: Budget) -> EvoPress | None:
    """The search's options, if the budget is one."""
    inner = budget.inner if isinstance(budget, Protected) else budget
    return inner if isinstance(inner, EvoPress) else None


def check(model: Any, step: Step, parts: Parts, world: World) -> None:
    """Refuse what cannot be searched, before any work.

    Args:
        model: a skeleton.
    """
    if not parts.budget.searches:
        return
    if world.size > 1:
        raise SecateurError("a search runs in one process", received=f"{world.size} processes", works="leave torchrun")
    if step.worse is not None:
        raise SecateurError(
            "a bound on perplexity and a search of the allocation do not go together",
            received=f"at_most_worse {step.at_most_worse}, budget {step.budget}",
            works="find keep with --at-most-worse and budget uniform first",
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise SecateurError(
            "a search compares what models predict, and this one has no output head",
            received=type(model).__name__,
            works="a causal language model, or --budget owl or pooled",
        )


def searched(stage: Stage, folder: Path) -> Searched:
    """Search the allocation of a stage's step; goes on with what is in ``folder``.

    Args:
        stage: on the model before the step.
        folder: the step's working directory.
    """
    options = options_of(stage.parts.budget)
    assert options is not None
    return _Search(stage, folder, options).go()


class _Search:
    """One search, and what it knows."""

    def __init__(self, stage: Stage, folder: Path, options: EvoPress) -> None:
        self.stage, self.folder, self.options = stage, folder, options
        self.windows = torch.cat(stage.at.batches())
        self.text = Text(len(self.windows), self.windows.shape[1])
        stages = tuple(zip(options.kept, options.read, strict=True))
        self.schedule = Schedule(options.generations, options.offspring, stages)
        self.path = folder / "search.json"
        self.seed = f"{stage.at.seed}/{stage.number}"
        self.read = self.total = self.count = 0
        self.groups: list[list[int]] = []  # sites with a level in common; none: each has its own
        self.board: Switchboard | Layers | None = None
        self.answers: Answers | None = None

    def go(self) -> Searched:
        stage, layers = self.stage, self.stage.step.space == "layer"
        sites: list[Site] = []
        if layers:
            stage.store.load_rest(stage.model, "cpu")
            (keep,) = stage.choose_layers().values()
            steps = layer_ladders(keep.tolist(), stage.step.ends)
            files = None
        else:
            sites = sites_of(stage, self.options.levels, self.options.step)
            steps = [s.ladder for s in sites]
            files = LevelFiles(self.folder, sites)
            if self.options.each == "layer":
                self.groups = by_layer(sites)
                steps = together(steps, self.groups)
        self.count = len(sites) or len(steps)
        start = tuple(0 for _ in steps)
        state, ends = self._taken_up(State(start), steps)
        while ends is None:
            if self.board is None:
                self._open(files, keep if layers else None)
                self._total(state)
            following = evolve(state, steps, self.schedule, self.text, self.seed, self._loss)
            if following is not None:
                state = following
                self._write(state, steps)
                continue
            before, after = self._loss([start, state.parent], self.text.everything())
            if not after < before * (1 - SMALL):
                state, after = State(start, state.history), before
            ends = (before, after)
            self._write(state, steps, ends)
        if files is not None:
            files.remove()
        (self.folder / "search-dense.safetensors").unlink(missing_ok=True)
        counts = {s.info.name: s.count(level) for s, level in zip(sites, self._each(state.parent), strict=False)}
        plan = None
        if layers:
            stays = torch.tensor([bool(k + level) for k, level in zip(keep.tolist(), state.parent, strict=True)])
            plan = Plan({f"{stage.number}/layer/model": stays})
        return Searched(counts, plan, *self._told(state, ends))

    def _each(self, levels: Levels) -> Levels:
        """The levels of all sites."""
        if not self.groups:
            return levels
        own = {at: level for members, level in zip(self.groups, levels, strict=True) for at in members}
        return tuple(own.get(at, 0) for at in range(self.count))

    def _told(self, state: State, ends: tuple[float, float]) -> tuple[SearchRecord, str]:
        generations = tuple(SearchGeneration(**asdict(g)) for g in state.history)
        moved = sum(level != 0 for level in self._each(state.parent))
        tokens = self.text.windows * self.text.length
        record = SearchRecord("KL to dense, nats a token", *ends, tokens, moved, generations)
        origin = "the score's choice of layers" if self.stage.step.space == "layer" else "uniform"
        better = (
            f"{moved} of {self.count} sites differ from {origin}"
            if moved
            else f"nothing better than {origin} was found"
        )
        how = "" if self.stage.step.space == "layer" else ", every site pruned on the dense model's activations"
        note = (
            f"step {self.stage.number + 1}: a search over {len(state.history)} generations: {better}; KL to the dense "
            f"model {ends[0]:.4g} to {ends[1]:.4g} nats a token on {tokens:,} tokens of the calibration text{how}"
        )
        return record, note

    def _taken_up(self, state: State, steps: Sequence[Ladder]) -> tuple[State, tuple[float, float] | None]:
        """Where an interrupted search was."""
        if not self.path.is_file():
            return state, None
        said = read_json(self.path)
        if said.get("ladders") != _ladder_words(steps):
            return state, None
        history = [Generation(**{k: _number(v) for k, v in g.items()}) for g in said["history"]]
        ends = said["ends"] and tuple(_number(v) for v in said["ends"])
        return State(tuple(said["parent"]), history), ends

    def _write(self, state: State, steps: Sequence[Ladder], ends: tuple[float, float] | None = None) -> None:
        history = [{k: _word(v) for k, v in asdict(g).items()} for g in state.history]
        said = {"ladders": _ladder_words(steps), "parent": list(state.parent), "history": history}
        write_json(self.path, {**said, "ends": ends and [_word(v) for v in ends]})

    def _open(self, files: LevelFiles | None, keep: Tensor | None) -> None:
        """Levels made, the dense model's answers noted, a model to turn."""
        stage = self.stage
        place = self.folder / "search-dense.safetensors"
        if not place.is_file():
            note_answers(stage, self.windows, place)
        self.answers = Answers(place)
        if files is None:
            assert keep is not None
            self.board = Layers(stage, keep)
            return
        mask = as_mask(stage)
        files.make(mask)
        self.board = Switchboard(files, mask)

    def _total(self, state: State) -> None:
        """Tokens that are left to read, for progress."""
        each = 0
        entered = self.schedule.offspring
        for number, (survivors, tokens) in enumerate(self.schedule.stages, 1):
            entered += number == len(self.schedule.stages)
            each += entered * min(tokens, self.text.windows * self.text.length)
            entered = survivors
        left = self.schedule.generations - len(state.history)
        self.total = left * each + 2 * self.text.windows * self.text.length

    def _loss(self, candidates: Sequence[Levels], pieces: Sequence[Piece]) -> list[float]:
        """KL to the dense model in nats a token, of every candidate."""
        assert self.board is not None and self.answers is not None
        out = []
        for candidate in candidates:
            self.board.set(self._each(candidate))
            out.append(self.answers.divergence(self.board.model, self.windows, pieces, self.stage.at.dtype))
            self.read += sum(n for _, n in pieces)
            self.stage.at.tick(f"step {self.stage.number + 1}, search", min(self.read, self.total), self.total)
        return out


def by_layer(sites: Sequence[Site]) -> list[list[int]]:
    """The sites of every layer that can move, by their numbers."""
    found: dict[int, list[int]] = {}
    for at, site in enumerate(sites):
        if len(site.ladder.levels) > 1:
            found.setdefault(site.info.block, []).append(at)
    return list(found.values())


def layer_ladders(keep: Sequence[bool], ends: tuple[int, int]) -> list[Ladder]:
    """Layers that stay may go and the other way round; protected ones stay."""
    first, last = ends
    return [
        Ladder(1, 0, 0) if at < first or at >= len(keep) - last else Ladder(1, -1, 0) if stays else Ladder(1, 0, 1)
        for at, stays in enumerate(keep)
    ]


def _ladder_words(steps: Sequence[Ladder]) -> list[list[int]]:
    return [[s.step, s.low, s.high, s.pool] for s in steps]


def _word(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"


def _number(value: Any) -> Any:
    return math.inf if value == "inf" else value
