"""Report: what a run did, what it measured and where it came from. ``report.json`` is the truth, the page is drawn
from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from secateur.errors import SecateurError
from secateur.measure.types import Comparison, Measurement
from secateur.report.codec import build, plain

SCHEMA = 1
JSON_NAME, PAGE_NAME = "report.json", "report.html"
WORKS = "the report.json that `secateur prune` wrote works"


@dataclass(frozen=True)
class SiteRecord:
    """What stayed at one site.

    Attributes:
        site: full name (``model.layers.3.mlp.up_proj.weight``; for units the block's name).
        block: index of its block.
        component: ``attention``, ``ffn`` or ``other``.
        kept, total: units (weights, neurons, heads, ...) that stay, and that there were.
        parameters: parameters of the site before the step; ``kept / total`` of them stay.
        kind: the name without its block (``mlp.up_proj``), one row of the page's map; empty: the component.
    """

    site: str
    block: int
    component: str
    kept: int
    total: int
    parameters: int
    kind: str = ""


@dataclass(frozen=True)
class SearchGeneration:
    """One generation of a search: the loss of its parent and of its best on the same tokens, and how many sites
    changed between the two (0: the parent stayed)."""

    number: int
    parent: float
    best: float
    changed: int


@dataclass(frozen=True)
class SearchRecord:
    """How an allocation was searched for.

    Attributes:
        loss: what was made small, with its unit.
        before, after: of where the search began and of what was chosen, on all of its text.
        tokens: of that text.
        changed: sites whose count differs from where the search began.
    """

    loss: str
    before: float
    after: float
    tokens: int
    changed: int
    generations: tuple[SearchGeneration, ...] = ()


@dataclass(frozen=True)
class StepRecord:
    """One step of the recipe as it was carried out.

    Attributes:
        space, method, apply: in the recipe's words (``weight``, ``sparsegpt``, ``mask``); ``plan``: chosen only,
            no weight was touched.
        keep: the amount as it was asked for (``0.5``, ``1152``, ``2:4``, ``params=-20%``).
        words: the step on one line, in the recipe's words.
        chain: the parts the method is made of, by slot (score, grain, budget, repair).
        sites: what stayed, site by site.
        seconds: wall time of the step, if it was taken.
        search: how the counts were found, where the budget searches.
    """

    space: str
    method: str
    keep: str
    apply: Literal["mask", "cut", "plan"]
    words: str = ""
    chain: dict[str, str] = field(default_factory=dict)
    sites: tuple[SiteRecord, ...] = ()
    seconds: float | None = None
    search: SearchRecord | None = None


@dataclass(frozen=True)
class CurvePoint:
    """Perplexity at one sparsity (share of weights that are zero or gone, 0 to 1)."""

    sparsity: float
    perplexity: float


@dataclass(frozen=True)
class Curve:
    """Perplexity against sparsity.

    Attributes:
        label: what was varied (``Wanda, row by row``).
        points: in order of sparsity; the first is the dense model if it is at 0.
        note: how the curve was made, said under it (``one set of dense-stream evidence``).
        chosen: the sparsity that this run used, if it lies on the axis.
    """

    label: str
    points: tuple[CurvePoint, ...]
    note: str = ""
    chosen: float | None = None


@dataclass(frozen=True)
class Prediction:
    """What the dry run said beside what happened. ``unit`` is bytes, parameters, macs or seconds."""

    what: str
    unit: str
    predicted: float
    actual: float | None = None


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from: everything a stranger needs to repeat the run.

    Attributes:
        date: when the run ended, ISO 8601.
        versions: of Secateur, Python, torch, transformers, ...
        hashes: SHA-256 of text, input and output files, by name.
        phases: wall seconds by phase, in order.
        peak_rss: largest resident memory of the run, bytes.
    """

    date: str = ""
    command: str = ""
    seed: int = 0
    device: str = ""
    threads: int = 0
    cpu: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    peak_rss: int | None = None


@dataclass(frozen=True)
class Report:
    """Numbers with their units and conditions, and provenance. It does not know how to compute them.

    Attributes:
        model, out: what was given and where the result lies, as the user wrote them.
        recipe: the effective recipe as plain data.
        steps: what was done, with what stayed where.
        measurements: the dense model first, the result last; empty if nothing was measured.
        comparison: the last measurement against the first.
        loader: what loads the result: ``secateur.load``, or the name of one of Transformers' auto classes.
        notes: what a reader must know (a measurement that was skipped, an updated weight, a refusal).
    """

    model: str
    out: str
    recipe: dict[str, Any] = field(default_factory=dict)
    steps: tuple[StepRecord, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    comparison: Comparison | None = None
    curves: tuple[Curve, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    provenance: Provenance = Provenance()
    loader: str = "AutoModelForCausalLM"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", plain(self.recipe))

    @property
    def dense(self) -> Measurement | None:
        """The reference, if two models were measured."""
        return self.measurements[0] if len(self.measurements) > 1 else None

    @property
    def pruned(self) -> Measurement | None:
        """The result, if it was measured."""
        return self.measurements[-1] if self.measurements else None

    def to_json(self) -> str:
        """The report as JSON text; `from_json` gives an equal report."""
        return json.dumps({"schema": SCHEMA, **plain(self)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Raises SecateurError if the text is not JSON, of another schema, or of the wrong shape."""
        try:
            value = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError) as err:
            raise SecateurError("the report is not valid JSON", received=str(err), works=WORKS) from err
        if not isinstance(value, dict):
            raise SecateurError("a report must be a JSON object", received=type(value).__name__, works=WORKS)
        schema = value.pop("schema", None)
        if schema != SCHEMA or isinstance(schema, bool):
            raise SecateurError(
                "the report has a schema that this version cannot read", received=schema, works=f"schema {SCHEMA}"
            )
        return build(cls, value, "report")

    def write(self, directory: Path) -> None:
        """Write ``report.json`` and ``report.html`` into an existing directory, each whole or not at all."""
        from secateur.report.files import write  # the page needs this module first

        write(self, directory)


def _refuse(word: str) -> None:
    """Python's parser takes NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{word} is not JSON")
