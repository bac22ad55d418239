"""One step carried out: survey if the budget asks, walk the blocks, prune them, hand over what was finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.anatomy import anatomy_of
from secateur.anatomy.types import Anatomy
from secateur.engine.distribute import World
from secateur.engine.heap import give_back
from secateur.engine.host.build import describe_skeleton
from secateur.engine.outcome import check_layers
from secateur.engine.plan import Plan
from secateur.engine.probes import Evidence, Probe, walked
from secateur.engine.store import Store
from secateur.engine.walk import Visit, WalkSettings, walk
from secateur.engine.whole import Told, Whole
from secateur.errors import SecateurError
from secateur.methods.base import Amount, MatrixSite, SiteInfo, UnitScore
from secateur.methods.grains import Unit
from secateur.methods.mending import Fitted
from secateur.methods.sites import (
    WHOLE,
    block_matrices,
    matrix_sites,
    unit_infos,
    unit_site,
    weight_infos,
)
from secateur.parts import Parts, parts_of
from secateur.pruning import Pruner
from secateur.step import Step


class Sink(Protocol):
    """Where finished blocks go; the shards of a work directory, or nowhere for a model that stays in memory."""

    def finished(self, index: int) -> bool:
        """Whether this block was finished by an earlier run (then `restore` gives its weights and plan)."""

    def restore(self, model: nn.Module, index: int) -> Plan: ...

    def write(self, index: int, module: nn.Module, plan: Plan) -> Plan:
        """Take a finished block, and give its part of the plan back: in memory, or as a file that holds it."""


class Nowhere:
    """The sink of a model in memory."""

    def finished(self, index: int) -> bool:
        return False

    def restore(self, model: nn.Module, index: int) -> Plan:
        raise AssertionError("nothing was finished")

    def write(self, index: int, module: nn.Module, plan: Plan) -> Plan:
        return plan


@dataclass(frozen=True)
class Conditions:
    """What all steps of a run share.

    Attributes:
        batches: token ids [batch, length]; called once, and only if a statistic is needed.
        spill: where activations go that do not fit; None keeps them in memory.
        tick: told a phase's name, how much is done and how much there is.
    """

    batches: Callable[[], list[Tensor]]
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    spill: Path | None = None
    world: World = field(default_factory=World)
    tick: Callable[[str, int, int], None] = lambda phase, done, total: None


@dataclass
class Outcome:
    """What a step did.

    Attributes:
        plan: this step's sites.
        infos: what the budget knew of them; by name.
        anatomy: of the model before the step.
        dropped: indices of layers that were cut out.
        fits: what fits of sub-layers came to, where the repair is one (blocks done in this run).
    """

    plan: Plan
    infos: dict[str, SiteInfo]
    anatomy: Anatomy
    dropped: tuple[int, ...] = ()
    fits: tuple[Fitted, ...] = ()


class Stage:
    """One step on one model. ``model`` is a skeleton that `store` fills block by block (unless another is given,
    to predict on: one that earlier steps have cut)."""

    def __init__(
        self, store: Store, step: Step, number: int, conditions: Conditions, model: nn.Module | None = None
    ) -> None:
        self.store, self.step, self.number, self.at = store, step, number, conditions
        self.parts: Parts = parts_of(step)
        self.model: Any = store.skeleton() if model is None else model
        self.anatomy = anatomy_of(describe_skeleton(self.model))
        check_space(self.anatomy, step.space)
        self.blocks: list[nn.Module] = list(self.model.get_submodule(self.anatomy.path).children())
        self.infos = self._infos()
        if not self.infos:
            raise SecateurError(
                f"no {step.space} site is left to prune",
                received=f"include {list(step.include)}, exclude {list(step.exclude)}",
                works=f"patterns such as '{self.anatomy.blocks[0].name}*'",
            )
        if self.parts.streams and conditions.world.size > 1:
            raise SecateurError(
                "a fit of sub-layers takes its steps one after the other, and cannot be shared by processes",
                received=f"repair {step.repair}, {conditions.world.size} processes",
                works="one process, or --repair least_squares",
            )
        self.pruner = Pruner(step, self.parts, number, len(self.anatomy.blocks), conditions.seed)
        self.silenced, self.fits = self.pruner.silenced, self.pruner.fits
        c = conditions
        self.whole = Whole(self.model, store, self.anatomy, c.batches, c.world, c.seed, c.device, c.spill, c.tick)
        self.told: Told = {}

    def run(self, sink: Sink, replay: Plan | None = None, reweigh: bool = True) -> Outcome:
        """Carry the step out; every finished block goes to ``sink`` in order.

        Args:
            replay: booleans decided elsewhere, applied as they are.
            reweigh: with a replay, recompute the weight updates of a joint method and of a repair (this reads text).
        """
        self.pruner.reweigh = reweigh
        self.store.load_rest(self.model, "cpu")
        if replay is not None:
            counts: dict[str, int] = {}
            self.check_replay(replay)
        elif self.step.space == "layer":
            replay, counts = self.choose_layers(), {}
        else:
            counts = self.counts()
        if replay is None:
            self.told = self.whole.tell(self.parts.needs)
        layers = replay[f"{self.number}/layer/model"] if replay is not None and self.step.space == "layer" else None
        gone = torch.zeros(len(self.blocks)).bool()
        if layers is not None and self.step.apply == "cut":
            check_layers(self.store.config, self.anatomy, layers)
            gone = ~layers
        plan = Plan()
        skip = {i for i in range(len(self.blocks)) if sink.finished(i)}
        fits = len(skip) < len(self.blocks) and self.step.space != "layer" and (replay is None or reweigh)
        needs = self._walk_needs(replay is None, fits) if len(skip) < len(self.blocks) else ()
        for visit in self.visits(needs, phase=f"step {self.number + 1}", skip=skip, fits=fits):
            index = visit.block.index
            if index in skip:
                done = sink.restore(self.model, index)
            else:
                done = self.prune_block(visit, counts, replay)
                self._round(visit)
                if not gone[index]:
                    done = sink.write(index, visit.module, done)
            plan = Plan.merged([plan, done])
        self.store.load_rest(self.model, "cpu")
        if layers is not None and replay is not None:
            plan = Plan.merged([plan, replay.step(self.number)])
        dropped = tuple(int(i) for i in gone.nonzero().reshape(-1))
        return Outcome(plan, {i.name: i for i in self.infos}, self.anatomy, dropped, tuple(self.fits))

    def counts(self, amount: Amount | None = None) -> dict[str, int]:
        """Grain units kept per site, as the budget allots them (of the step's own amount unless one is given)."""
        amount = amount if amount is not None else self.step.amount
        assert amount is not None or self.step.map, "targets become amounts before a stage runs"
        return self.parts.budget.allot(self.infos, amount or Amount(share=Decimal(1)), self._seen)

    @cached_property
    def _seen(self) -> dict[str, Any]:
        """What a surveying budget has seen of every site; the survey runs once."""
        if not self.parts.budget.surveys:
            return {}
        by_name = {i.name: i for i in self.infos}
        return {name: self.parts.budget.observe(by_name[name], scores) for name, scores in self.survey()}

    def survey(self) -> Iterator[tuple[str, Tensor]]:
        """Scores of every site on the dense model, in order: the ranking score, folded to the step's grain."""
        ranking = self.parts.ranking
        told = self.whole.tell(ranking.needs)
        for visit in self.visits(walked(ranking.needs), "survey", dense=True, told=told):
            yield from self._scores(visit)

    def _scores(self, visit: Visit) -> Iterator[tuple[str, Tensor]]:
        ranking, step = self.parts.ranking, self.step
        if step.space == "weight":
            assert not isinstance(ranking, UnitScore)
            for site in self._matrix_sites(visit):
                scores = ranking.score(site, visit.evidence.get(site.name, Evidence(site.name)))
                yield site.name, self.parts.grain.unit_scores(scores).reshape(-1)
        else:
            space = WHOLE if step.space == "layer" else visit.block.spaces.get(step.space)
            if space is not None:
                units = unit_site(visit, space, len(self.anatomy.blocks), self.at.seed)
                yield visit.block.name, ranking.units(units)

    def choose_layers(self, amount: Amount | None = None) -> Plan:
        """Which layers stay, from one survey of the dense model."""
        count, (first, last) = self.layer_count(amount), self.step.ends
        values = self._layer_scores.clone()
        values[:first], values[len(values) - last :] = torch.inf, torch.inf
        finite = values.clamp(max=torch.finfo(torch.float32).max)
        keep = Unit().select(finite, count)
        return Plan({f"{self.number}/layer/model": keep})

    def layer_count(self, amount: Amount | None = None) -> int:
        """How many layers stay (under the step's own amount unless one is given).

        Raises:
            SecateurError: none, more than there are, or fewer than are protected.
        """
        amount = amount if amount is not None else self.step.amount
        assert amount is not None
        units, least = self.infos[0].units, max(1, sum(self.step.ends))
        count = amount.of(units)
        if not least <= count <= units:
            raise SecateurError(
                f"{count} of {units} layers cannot stay",
                received=f"keep {self.step.keep}" + (f", protect {self.step.protect}" if self.step.protect else ""),
                works=f"a count from {least} to {units}",
            )
        return count

    @cached_property
    def _layer_scores(self) -> Tensor:
        scores = dict(self.survey())
        return torch.cat([scores[b.name].reshape(-1).double() for b in self.anatomy.blocks])

    def _walk_needs(self, choosing: bool, fits: bool) -> tuple[type[Probe], ...]:
        if self.step.space == "layer":
            return ()
        return walked(self.parts.needs_of(choosing, fits))

    def visits(
        self,
        needs: tuple[type[Probe], ...],
        phase: str,
        dense: bool = False,
        told: Told | None = None,
        skip: set[int] | None = None,
        fits: bool = False,
    ) -> Iterator[Visit]:
        """Visit the blocks with these statistics (and what the whole model told) as evidence; see `walk`.

        Args:
            dense: survey the dense model, whatever the step is fitted on.
            fits: weights will be fitted, so the walk carries what `Parts.fit_on` and the repair ask for.
        """
        told, skip = self.told if told is None else told, skip or set()
        survey = dense
        inputs, beside = fits and self.parts.streams, fits and self.parts.beside
        dense = dense or self.parts.fit_on.name == "dense"
        if not beside:  # one stream alone: a survey, or a search on the dense model's activations
            needs = tuple(p for p in needs if p.kind != "paired")
        reads = bool(needs) or inputs
        batches = self.at.batches() if reads else []
        if inputs:
            batches = [window for batch in batches for window in batch.split(1)]  # a fit takes a step per window
        if reads and len(batches) < self.at.world.size:
            raise SecateurError(
                f"{len(batches)} batches of text cannot be split over {self.at.world.size} processes",
                works="more --samples, or a smaller --batch-size",
            )
        mine = len(self.at.world.mine(batches)) if batches else 1
        n = len(self.anatomy.blocks)
        total = n * mine if dense or not reads else (2 * n - 1 - (0 if beside else len(skip))) * mine
        done = 0

        def tick(n: int) -> None:
            nonlocal done
            done += n
            self.at.tick(phase, done, total)

        how = WalkSettings(
            needs=needs,
            dense=dense,
            beside=beside,
            aim=self.parts.fit_on.aim,
            inputs=inputs,
            device=self.at.device,
            dtype=self.at.dtype,
            spill=self.at.spill,
            captured=(lambda: None) if survey else self._let_go,
            world=self.at.world,
            skip=skip.__contains__,
            tick=tick,
        )
        for visit in walk(self.model, self.anatomy, self.store, batches, how):
            if told:
                for name in self._site_names(visit):
                    own = dict(visit.evidence.get(name, Evidence(name)).items())
                    visit.evidence[name] = Evidence(name, {**own, **told[name]})
            yield visit
            if not reads:
                tick(1)

    def _let_go(self) -> None:
        """Embedding and head go before the first block comes; `run` brings them back at its end."""
        self.store.release_rest(self.model)
        give_back()

    def _site_names(self, visit: Visit) -> list[str]:
        return [s.name for s in matrix_sites(visit, visit.block.matrices, len(self.anatomy.blocks), self.at.seed)]

    def _round(self, visit: Visit) -> None:
        """Round to the dtype that is written, so that the next block is fed by what a resumed run would read."""
        for name, value in visit.module.named_parameters():
            dtype = self.store.dtype_of(f"{visit.block.name}.{name}")
            if dtype != value.dtype and value.is_floating_point():
                value.data = value.data.to(dtype).to(value.dtype)

    def prune_block(self, visit: Visit, counts: Mapping[str, int], replay: Plan | None) -> Plan:
        """Decide about one block, apply, mend; returns the block's part of the plan."""
        return self.pruner.block(visit, counts, replay)

    def _matrix_sites(self, visit: Visit) -> Iterator[MatrixSite]:
        matrices = block_matrices(visit.block, self.step.include, self.step.exclude)
        return matrix_sites(visit, matrices, len(self.anatomy.blocks), self.at.seed)

    def _infos(self) -> list[SiteInfo]:
        step = self.step
        if step.space == "weight":
            for block in self.anatomy.blocks:
                for m in block_matrices(block, step.include, step.exclude):
                    try:
                        self.parts.grain.check(m.shape)
                    except SecateurError as error:
                        raise SecateurError(
                            f"{block.name}.{m.tensor}: {error.wrong}", received=error.received, works=error.works
                        ) from None
            return weight_infos(self.anatomy, self.parts.grain, step.include, step.exclude)
        return unit_infos(self.anatomy, step.space, self.blocks, step.include, step.exclude)

    def check_replay(self, replay: Plan) -> None:
        """Refuse a plan with sites that this step's model does not have or has in another size, or left too small."""
        shapes = self.plan_shapes()
        for key in replay:
            shape = replay.bits(key).shape
            if shapes.get(key) != shape:
                raise SecateurError(
                    "the plan does not fit this model",
                    received=f"{key} of shape {list(shape)}",
                    works="replay a plan on a checkpoint of the same architecture and sizes",
                )
        least = {"model": 1} if self.step.space == "layer" else {i.name: i.minimum for i in self.infos}
        for key in replay if self.step.space != "weight" else ():
            if replay.kept(key) < (needed := least.get(key.split("/", 2)[2], 0)):
                raise SecateurError(
                    f"the plan leaves too little at {key}",
                    received=f"{replay.kept(key)} of {replay.total(key)} kept",
                    works=f"at least {needed} must stay",
                )

    def plan_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every key this step could write, with its shape."""
        n, space = self.number, self.step.space
        if space == "layer":
            return {f"{n}/layer/model": (len(self.anatomy.blocks),)}
        if space != "weight":
            return {f"{n}/{space}/{b.name}": b.spaces[space].shape for b in self.anatomy.blocks if space in b.spaces}
        return {
            f"{n}/weight/{b.name}.{m.tensor}": _stored_shape(self.blocks[b.index], m.tensor)
            for b in self.anatomy.blocks
            for m in b.matrices
        }


def _stored_shape(module: nn.Module, tensor: str) -> tuple[int, ...]:
    return tuple(module.get_parameter(tensor).shape)


def check_space(anatomy: Anatomy, space: str) -> None:
    """Refuse a space this model does not have, with the reason if the anatomy knows it."""
    if space not in anatomy.spaces():
        reason = anatomy.refused.get(space)
        raise SecateurError(
            f"{anatomy.family} models cannot be pruned in {space!r}" + (f": {reason}" if reason else ""),
            received=f"--space {space}",
            works=f"{', '.join(anatomy.spaces())} can",
        )
