"""Recipes: frozen dataclasses <-> YAML, in the words of the command line.

A recipe is a model, a text and a list of steps. Everything that can be known from the words alone is refused
here, before a file is opened: unknown words (with the nearest known one), wrong types, words that contradict
each other. Defaults are filled in, so a saved recipe says everything it did.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from secateur.engine.text import TextSource as TextSpec
from secateur.errors import SecateurError, is_text, unknown
from secateur.step import SPACES, Step, read_rules
from secateur.yamlfile import LARGEST, read_yaml, read_yaml_list, write_yaml

DTYPES = ("fp32", "bf16", "fp16")
PACKED_DTYPES = (*DTYPES, "int8")
MOST_THREADS = 1024


@dataclass(frozen=True)
class Recipe:
    """Everything a run does, written down.

    Attributes:
        model: a directory, a hub id, a ``.gguf`` file or ``smollm2``.
        steps: each calibrated on the result of the one before.
        text: calibration text.
        batch_size: windows per forward pass.
        dtype: precision of the forward passes only; statistics are summed in fp32 or better.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``.
        threads: CPU threads; None leaves torch's choice.
        seed: of random choices (the text has its own; either sets the other when that is not given).
        measure: end with a short measurement, dense beside pruned.
        curve: also measure perplexity from 0 to 70 % sparsity, for the report.
        trust_remote_code, revision: for models with code of their own, and hub ids.
        out: where the result goes.
        plan: a plan file to replay; then there may be no steps.
        pack: fp32, bf16, fp16 or int8: the result is written packed, in this dtype.
        title, expect: a name, and numbers this recipe is known to give; for people, not read by the run.
    """

    model: str
    steps: tuple[Step, ...]
    text: TextSpec = field(default_factory=TextSpec)
    batch_size: int = 8
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    measure: bool = True
    curve: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    out: str | None = None
    plan: str | None = None
    pack: str | None = None
    title: str | None = None
    expect: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        if not (self.steps or self.plan) or not all(isinstance(step, Step) for step in self.steps):
            raise SecateurError(
                "nothing says what to prune (no steps)",
                works="--space weight --score wanda --sparsity 0.5, or steps: [...] in a recipe",
            )
        for step in self.steps:
            if step.space == "expert" and step.apply == "mask":
                raise SecateurError(
                    "a mask of experts lives in the router's scores and cannot be saved",
                    received="apply mask",
                    works="apply cut",
                )
        check_type("model", self.model, str)
        if not self.model:
            raise SecateurError(
                "the model's name is empty", works="a directory, a hub id, a .gguf file or smollm2 works"
            )
        check_count("batch_size", self.batch_size, 1)
        check_count("seed", self.seed, 0)
        check_threads(self.threads)
        for word in ("measure", "curve", "trust_remote_code"):
            check_type(word, getattr(self, word), bool)
        for word in ("revision", "out", "plan", "title"):
            check_type(word, getattr(self, word), str, optional=True)
        check_type("expect", self.expect, Mapping)
        if self.pack is not None and self.pack not in PACKED_DTYPES:
            raise unknown("packed dtype", self.pack, PACKED_DTYPES)
        check_device(self.device, self.dtype)
        if len(self.steps) > 1 and any(step.at_most_worse is not None for step in self.steps):
            raise SecateurError(
                "at_most_worse is for a recipe of one step",
                received=f"{len(self.steps)} steps",
                works="one step with at_most_worse, then a second recipe on its result",
            )

    @classmethod
    def from_words(cls, words: Mapping[str, Any]) -> Recipe:
        """A recipe from plain data in the recipe's words.

        Raises:
            SecateurError: an unknown word, a wrong type, a contradiction.
        """
        words = _known(words, "recipe word", cls)
        if "model" not in words:
            raise SecateurError("no model is given", works="a directory, a hub id, a .gguf file or smollm2 works")
        text = words.get("text", {})
        text = {"source": text} if isinstance(text, str) else _known(text, "text word", TextSpec)
        seed = words.get("seed", text.get("seed", 0))
        text.setdefault("seed", seed)
        for word, value in text.items():
            check_type("text source", value, str) if word == "source" else check_count(f"text {word}", value, 0)
        steps = words.get("steps", [])
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise SecateurError(
                "steps is not a list", received=steps, works="steps: [{space: ffn, score: wanda, keep: 0.75}] works"
            )
        made = []
        for number, step in enumerate(steps, 1):
            try:
                made.append(step if isinstance(step, Step) else Step(**_step_words(step)))
            except SecateurError as error:
                if len(steps) == 1:
                    raise
                raise SecateurError(
                    f"step {number}: {error.wrong}", received=error.received, works=error.works
                ) from None
        return cls(**{**words, "text": TextSpec(**text), "seed": seed, "steps": tuple(made)})

    @classmethod
    def from_yaml(cls, text: str, name: str = "the recipe") -> Recipe:
        """A recipe from YAML text; ``name`` is for error messages."""
        return cls.from_words(read_yaml(text, name))

    def to_words(self) -> dict[str, Any]:
        """Plain data that `from_words` reads back as the same recipe; every default is written out."""
        words: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        words["text"], words["expect"] = asdict(self.text), dict(self.expect)
        words["steps"] = [step.to_words() for step in self.steps]
        return {word: value for word, value in words.items() if value is not None and value != {}}

    def to_yaml(self) -> str:
        return write_yaml(self.to_words())


def read_recipe(path: Path) -> dict[str, Any]:
    """The words of a recipe file. A step's ``map`` may name a file, relative to the recipe's directory."""
    words = read_yaml(read_text(path, "recipe"), str(path))
    for step in words["steps"] if isinstance(words.get("steps"), list) else []:
        if isinstance(step, dict) and isinstance(step.get("map"), str):
            step["map"] = read_map(path.parent / step["map"])
    return words


def read_map(path: Path) -> list[Any]:
    """The rules of a map file: a YAML list of ``{match: ..., keep: ...}``."""
    rules = read_yaml_list(read_text(path, "map"), str(path))
    return list(read_rules(rules))


def read_text(path: Path, kind: str) -> str:
    """A small UTF-8 file, or why not in one sentence."""
    try:
        with open(path, "rb") as file:
            raw = file.read(4 * LARGEST + 1)  # what is longer is too large, whatever its characters
        return raw.decode("utf-8", errors="strict" if len(raw) <= 4 * LARGEST else "replace")
    except OSError as error:
        raise SecateurError(
            f"the {kind} cannot be read: {error.strerror}", received=str(path), works=f"give the path of a {kind} file"
        ) from None
    except UnicodeDecodeError as error:
        raise SecateurError(
            f"the {kind} is not UTF-8 text (byte {error.start})", received=str(path), works="save it as UTF-8"
        ) from None


def override(words: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's words with options laid over them.

    Step words (``keep``, ``score``, ...) go to every step; one that says how much (or what) to keep replaces
    whatever said it before, so ``--keep`` overrides ``sparsity`` and ``--method`` overrides ``score``.
    """
    step_words = {f.name for f in fields(Step)}
    rivals = ({"keep", "sparsity", "target", "at_most_worse"}, {"score", "method"})
    out: dict[str, Any] = {**words, **{k: v for k, v in changes.items() if k not in step_words and k != "text"}}
    if "text" in changes or "text" in words:
        old, new = (_known(_text_words(w.get("text")), "text word", TextSpec) for w in (words, changes))
        out["text"] = {**old, **new}
    if "seed" in changes:
        out["text"] = {**out.get("text", {}), "seed": changes["seed"]}
    laid = {k: v for k, v in changes.items() if k in step_words}
    steps = words.get("steps")
    if laid and not steps:
        out["steps"] = [laid]
    elif laid and isinstance(steps, list) and all(isinstance(step, Mapping) for step in steps):
        gone = {word for group in rivals if group & laid.keys() for word in group}
        out["steps"] = [{**{k: v for k, v in step.items() if k not in gone}, **laid} for step in steps]
    return out


def diff(a: Recipe, b: Recipe) -> list[str]:
    """Words that differ in what the run would write: ``steps[0].keep: 0.5 -> 0.6``."""
    idle = {"measure", "curve", "out", "title", "expect"}
    flat_a, flat_b = (_flat({k: v for k, v in r.to_words().items() if k not in idle}) for r in (a, b))
    absent = "(not given)"
    return [
        f"{word}: {flat_a.get(word, absent)} -> {flat_b.get(word, absent)}"
        for word in dict.fromkeys([*flat_a, *flat_b])
        if flat_a.get(word, absent) != flat_b.get(word, absent)
    ]


@dataclass(frozen=True)
class How:
    """How to run a recipe; nothing here changes what is written, only whether.

    Attributes:
        resume: go on from the last finished block.
        overwrite: replace an output that Secateur wrote.
        dry_run: predict and stop.
        measure: end with the short measurement.
        plan_file: replay this plan instead of choosing.
        plan_text: calibration text was named beside the plan, so weight updates are recomputed.
        only_plan: write the plan and no weights.
    """

    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False
    measure: bool = True
    plan_file: Path | None = None
    plan_text: bool = False
    only_plan: bool = False


@dataclass(frozen=True)
class MeasureRequest:
    """What `measure` is asked: models in order, the first is the reference.

    Attributes:
        text: path of the test text; None is the builtin test text.
        windows, length: how much of it.
        dtype: what the models are run in.
        choices: a JSONL file of multiple-choice items.
        tasks: lm-eval tasks (needs the ``tasks`` extra).
        latency: time prefill and decode too.
    """

    models: tuple[str, ...]
    text: str | None = None
    windows: int = 64
    length: int = 1024
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    choices: Path | None = None
    tasks: tuple[str, ...] = ()
    latency: bool = False
    batch_size: int = 4
    device: str = "auto"
    threads: int | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        for word, least in (("windows", 1), ("length", 2), ("batch_size", 1)):
            check_count(word, getattr(self, word), least)
        check_threads(self.threads)
        check_device(self.device, self.dtype)


def check_type(word: str, value: object, kind: type, optional: bool = False) -> None:
    """Refuse a value of the wrong type."""
    if not (isinstance(value, kind) or (optional and value is None)):
        name = {str: "text", bool: "true or false"}.get(kind, f"a {kind.__name__.lower()}")
        works = {str: "a word or a quoted text works", bool: "true and false work"}.get(kind, f"{name} works")
        raise SecateurError(f"{word} is not {name}", received=value, works=works)
    if isinstance(value, str) and not is_text(value):
        raise SecateurError(f"{word} holds NUL or what is not UTF-8", received=value, works="Unicode text works")


def check_threads(value: object) -> None:
    """Refuse a number of threads that the libraries below us would die of; None leaves it to them."""
    check_count("threads", value, 1, optional=True)
    if isinstance(value, int) and value > MOST_THREADS:
        raise SecateurError(
            f"threads is more than {MOST_THREADS}", received=value, works="as many as the processor has cores"
        )


def check_count(word: str, value: object, least: int, optional: bool = False) -> None:
    """Refuse what is not an integer of at least ``least``."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
        raise SecateurError(
            f"{word} is not an integer of at least {least}", received=value, works=f"{max(least, 1) * 8} works"
        )


def check_device(device: object, dtype: object) -> None:
    """Refuse unknown words for device and dtype."""
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", device):
        raise unknown("device", device, ("auto", "cpu", "cuda", "cuda:0"))


def _known(words: object, kind: str, cls: type) -> dict[str, Any]:
    if not isinstance(words, Mapping):
        raise SecateurError(
            f"a mapping of {kind}s was expected", received=words, works=f"{{{fields(cls)[0].name}: ...}} works"
        )
    known = [f.name for f in fields(cls)]
    out = {str(word).replace("-", "_"): value for word, value in words.items()}
    for word in out:
        if word not in known:
            raise unknown(kind, word, known)
    return {word: value for word, value in out.items() if value is not None}


def _step_words(step: object) -> dict[str, Any]:
    words = _known(step, "step word", Step)
    if "space" not in words:
        raise SecateurError("a step has no space", received=step, works=f"space is one of {', '.join(SPACES)}")
    return words


def _text_words(text: object) -> object:
    return {"source": text} if isinstance(text, str) else {} if text is None else text


def _flat(value: object, at: str = "") -> dict[str, object]:
    if isinstance(value, Mapping):
        return {
            k: v for word, item in value.items() for k, v in _flat(item, f"{at}.{word}" if at else str(word)).items()
        }
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{at}[{i}]").items()}
    return {at: value}
