"""From a step's words to its parts: score, grain, budget, method, repair."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from secateur.engine.host.own_code import BROKEN
from secateur.engine.probes import Gram, Probe, paired
from secateur.errors import SecateurError, unknown
from secateur.methods.base import Budget, MatrixRepair, Method, PartRepair, Repair, Score, UnitScore
from secateur.methods.budgets import BUDGETS
from secateur.methods.budgets.component_map import ComponentMap, Rule
from secateur.methods.budgets.protected import Protected
from secateur.methods.composed import Composed
from secateur.methods.fitting import FITS, FitOn, Pruned
from secateur.methods.grains import Grain, parse_grain
from secateur.methods.joint import METHODS
from secateur.methods.legal import check_legal
from secateur.methods.repairs import REPAIRS
from secateur.methods.scores import SCORES
from secateur.step import Step
from secateur.words import Choice


@dataclass(frozen=True)
class Parts:
    """What a step is made of.

    Attributes:
        method: chooses; `Composed` for a score.
        score: the step's score, or None for a joint method.
        ranking: the score a budget surveys by.
        repair: what mends the survivors, or None.
        fit_on: whose inputs (and outputs) layers are fitted on; see `methods.fitting`.
    """

    method: Method
    score: Score | UnitScore | None
    grain: Grain
    budget: Budget
    ranking: Score | UnitScore
    repair: Repair | None = None
    fit_on: FitOn = field(default_factory=Pruned)

    @property
    def joint(self) -> bool:
        """Whether the method changes weights while it chooses."""
        return not isinstance(self.method, Composed)

    @property
    def needs(self) -> tuple[type[Probe], ...]:
        """Probes that method and repair read."""
        return self.needs_of(choosing=True, fitting=True)

    @property
    def streams(self) -> bool:
        """Whether the repair reads activations themselves."""
        return isinstance(self.repair, PartRepair)

    @property
    def beside(self) -> bool:
        """Whether fitting needs the dense model's activations beside those of the pruned one."""
        whole = isinstance(self.repair, PartRepair) and self.repair.whole
        return self.fit_on.name == "mix" or (whole and self.fit_on.name == "pruned")

    @property
    def reads(self) -> bool:
        """Whether carrying the step out reads calibration text."""
        return bool(self.needs or self.survey_needs) or self.streams

    @property
    def held(self) -> int:
        """Sets of the text's activations that a walk holds at once: what the next block is fitted on, the dense stream
        beside it, its next ones while these are still looked at, and a sub-layer's inputs and targets."""
        coming = self.streams and (self.beside or self.fit_on.name == "dense")
        parts = 2 * int(isinstance(self.repair, PartRepair) and not self.repair.whole)
        return 1 + int(self.beside) + int(coming) + parts

    def needs_of(self, choosing: bool, fitting: bool) -> tuple[type[Probe], ...]:
        """Probes for choosing what stays, for fitting weights (a joint method's and the repair's), or for both."""
        method = self.method.needs if choosing or (fitting and self.joint) else ()
        mended = self.repair.needs if fitting and self.repair is not None else ()
        if self.fit_on.name == "mix":
            method, mended = paired(method) if self.joint else method, paired(mended)
        return tuple(dict.fromkeys([*method, *mended]))

    @property
    def survey_needs(self) -> tuple[type[Probe], ...]:
        """Probes a budget that surveys reads on the dense model."""
        return self.ranking.needs if self.budget.surveys else ()


def parts_of(step: Step) -> Parts:
    """The parts a step names.

    Raises:
        SecateurError: an unknown name or option, or a score that is not legal for the space.
    """
    grain = parse_grain(step.grain or "unit")
    budget, repair, fit_on = budget_of(step), repair_of(step), fit_of(step)
    if step.method is not None:
        choice = step.choice("method")
        assert choice is not None
        method = make(choice, METHODS, Method, "method", {"grain": grain})
        return _fits(Parts(method, None, grain, budget, _ranking(budget, None, grain), repair, fit_on), step)
    choice = step.choice("score")
    assert choice is not None
    score = make(choice, SCORES, (Score, UnitScore), "score", {"grain": grain})
    check_legal(score, step.space)
    if isinstance(score, UnitScore) and step.space in score.needs_in:
        object.__setattr__(score, "needs", score.needs_in[step.space])
    return _fits(
        Parts(Composed(score, grain), score, grain, budget, _ranking(budget, score, grain), repair, fit_on), step
    )


def _fits(parts: Parts, step: Step) -> Parts:
    """The parts, if they go with what layers are to be fitted on.

    Raises:
        SecateurError: no text passes through the layers, or nothing that could aim at another stream's outputs.
    """
    if parts.fit_on.name != "pruned" and (step.space == "layer" or not parts.reads):
        raise SecateurError(
            "nothing in this step is fitted on calibration text as it passes",
            received=f"fit_on {step.fit_on}",
            works="leave fit_on out, or add a repair (--repair least_squares)",
        )
    aims = parts.repair is not None or (parts.joint and Gram in parts.method.needs)
    if parts.fit_on.name == "mix" and not aims:
        raise SecateurError(
            "a mix is something to fit weights to, and nothing in this step changes the weights that stay",
            received=f"fit_on {step.fit_on}",
            works="--repair least_squares, a joint method that reads X^T X (sparsegpt), or fit_on dense or pruned",
        )
    choice = step.choice("fit_on")
    if choice is not None and choice.options and not any(p.kind == "paired" for p in parts.needs):
        raise SecateurError(
            "reconstructions aim at the dense model's answers, not a share of the way",
            received=f"fit_on {step.fit_on}, repair {step.repair}",
            works="fit_on mix, or --repair least_squares",
        )
    return parts


def fit_of(step: Step) -> FitOn:
    """Whose activations a step's layers are fitted on."""
    choice = step.choice("fit_on")
    assert choice is not None
    found: FitOn = make(choice, FITS, FitOn, "fit_on")
    return found


def budget_of(step: Step) -> Budget:
    """The budget a step names, its map, its protected ends."""
    if step.map:
        budget: Budget = ComponentMap(tuple(Rule(r.match, r.amount) for r in step.map))
    else:
        choice = step.choice("budget")
        assert choice is not None
        budget = make(choice, BUDGETS, Budget, "budget")
    first, last = step.ends
    return Protected(budget, first, last) if first or last else budget


def repair_of(step: Step) -> Repair | None:
    """The repair a step names.

    Raises:
        SecateurError: an unknown name or option, or a space in which it has no meaning.
    """
    choice = step.choice("repair")
    if choice is None:
        return None
    repair = make(choice, REPAIRS, (MatrixRepair, PartRepair), "repair")
    assert isinstance(repair, Repair)
    if step.space not in repair.spaces:
        others = [name for name, cls in REPAIRS.items() if step.space in cls.spaces]
        raise SecateurError(
            f"{choice.name} cannot mend what is left of {step.space} units",
            received=f"repair {choice.name} in space {step.space}",
            works=f"--repair {', '.join(others)}" if others else f"no repair, or space {', '.join(repair.spaces)}",
        )
    return repair


def _ranking(budget: Budget, score: Score | UnitScore | None, grain: Grain) -> Score | UnitScore:
    if budget.ranking is not None:
        name = budget.ranking.__name__
        ranking: Score = make(Choice(name), {name: budget.ranking}, Score, "score", {"grain": grain})
        return ranking
    return score if score is not None else SCORES["wanda"]()


def make(choice: Choice, table: Mapping[str, Any], kind: Any, word: str, given: Mapping[str, Any] | None = None) -> Any:
    """An instance of a table's entry (or of ``module:Class``) with the options of a choice.

    Raises:
        SecateurError: no such name, module, class or option, or an option of the wrong type.
    """
    cls = table[choice.name] if choice.name in table else _imported(choice.name, kind, word, table)
    known = {f.name.rstrip("_"): f for f in fields(cls)} if hasattr(cls, "__dataclass_fields__") else {}
    given = given or {}
    options: dict[str, Any] = {k: v for k, v in given.items() if k in known}
    for name, value in choice.options:
        if name not in known or name in given:
            raise unknown(f"option of {choice.name}", name, [k for k in known if k not in given] or ["(none)"])
        options[known[name].name] = value
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise SecateurError(
            f"{word} {choice.name} does not take these options: {error}",
            received=str(choice),
            works=", ".join(f"{name}={f.default}" for name, f in known.items() if name not in given) or "no options",
        ) from None


def _imported(name: str, kind: Any, word: str, table: Mapping[str, Any]) -> Any:
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise unknown(word, name, table)
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except BROKEN as error:
        raise SecateurError(f"{word} cannot be imported: {error}", received=name, works="my.module:MyScore") from None
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise SecateurError(
            f"{word} is not a {' or '.join(k.__name__ for k in kinds)}", received=name, works="subclass it"
        )
    return cls


def needs_text(parts: Parts, step: Step) -> bool:
    """Whether carrying a step out reads calibration text."""
    return parts.reads or step.at_most_worse is not None or parts.budget.searches
