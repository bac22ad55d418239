"""The verbs: recipe in, checkpoint and report out. The whole path of a run, top to bottom.

Long because the path is read in one piece; what a run merely needs (goals, cliff, forecast, records) lives elsewhere.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.account import Clock, file_hash, predictions, provenance, step_record, tensor_hash
from secateur.cliff import curve_of, within_bound
from secateur.engine.apply import ConfigChange, updated_config
from secateur.engine.backward import GROUP
from secateur.engine.check import refuse_unproved
from secateur.engine.checkpoint import load, read_generation
from secateur.engine.decode import self_text
from secateur.engine.distribute import World, world
from secateur.engine.host.origin import PACKAGED, Origin, read_tokenizer, resolve
from secateur.engine.outcome import outcome_of
from secateur.engine.packed import refuse_packed
from secateur.engine.plan import Plan, keeps_of
from secateur.engine.probes import Gradient
from secateur.engine.store import RECORD, Store
from secateur.engine.text import calibration, check_disjoint, check_ids, documents, test_windows
from secateur.engine.text import pack as packed_text
from secateur.engine.walk import batches_of
from secateur.engine.write import StepWriter, check_out, publish, writing
from secateur.errors import SecateurError
from secateur.evopress.evolving import check as check_search
from secateur.evopress.evolving import searched
from secateur.goals import settled
from secateur.inspection import inspection
from secateur.measure.compare import measure as measure_subjects
from secateur.measure.latency import LatencyOptions
from secateur.measure.options import MeasureOptions, Subject
from secateur.measure.types import Comparison, Measurement
from secateur.packing import pack as pack
from secateur.packing import packed_in_place
from secateur.packing import unpack as unpack
from secateur.parts import needs_text, parts_of
from secateur.predict.forecast import predict
from secateur.prepared import fits_said, prepared
from secateur.printing import measured
from secateur.progress import Progress, Silent
from secateur.recipe import How, MeasureRequest, Recipe, check_type
from secateur.replay import steps_of
from secateur.report.card import card
from secateur.report.codec import build, plain
from secateur.report.files import redraw
from secateur.report.model import Report, StepRecord
from secateur.speed import bench as bench
from secateur.speed import run as run
from secateur.stage import Conditions, Stage, check_space
from secateur.step import Step
from secateur.workdir import BlockSink, finished, inputs_of, opened, remove, same_result

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLAN = "plan.safetensors"


def inspect(
    model: str, *, check: bool = False, trust_remote_code: bool = False, revision: str | None = None
) -> dict[str, Any]:
    """What a model is made of and what can be pruned; needs only its config.json.

    Args:
        model: a directory, a hub id, a ``.gguf`` file or ``smollm2``.
        check: prove mask = cut = reloaded on a toy copy, for every space (``proved`` in the answer).

    Raises:
        SecateurError: no such model, or a config that is not understood.
    """
    return inspection(resolve(model, revision, trust_remote_code), check)


def prune(
    recipe: Recipe, out: Path | str | None = None, how: How | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Carry a recipe out and write the checkpoint, its plan and its report to ``out``.

    Returns:
        plain data: where it lies, sizes, what was measured, notes; with ``how.dry_run`` the prediction instead.

    Raises:
        SecateurError: anything wrong with recipe, model, text or output; nothing the user had is lost.
    """
    place = Path(out if out is not None else recipe.out or "out")
    check_type("out", str(place), str)  # a path may hold any bytes
    with world() as w:
        return _Run(recipe, place, how or How(), progress or Silent(), w).go()


def plan(
    recipe: Recipe, out: Path | str | None = None, how: How | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Decide what stays, and write only the plan (``out/plan.safetensors``)."""
    return prune(recipe, out, replace(how or How(), only_plan=True), progress)


def measure(request: MeasureRequest, progress: Progress | None = None) -> tuple[list[Measurement], list[Comparison]]:
    """Measure models; the first is what the others are compared with.

    Raises:
        SecateurError: a model, text or file that cannot be used.
    """
    _threads(request.threads)
    device = _device(request.device)
    origins = [resolve(given, request.revision, request.trust_remote_code) for given in request.models]
    subjects = []
    for given, origin in zip(request.models, origins, strict=True):
        path = origin.path / origin.gguf_file if origin.gguf_file else origin.path

        def opener(o: Origin = origin) -> nn.Module:
            return _whole(o, device)

        subjects.append(Subject(given, opener, read_tokenizer(origin), path, origin.trust_remote_code))
        if origin.kind == "directory":  # every model's headers, before the first one's weights
            _check_text(request, subjects[-1].tokenizer, Store.open(origin).config)
    options = MeasureOptions(
        text=request.text or "builtin",
        windows=request.windows,
        length=request.length,
        batch_size=request.batch_size,
        dtype=request.dtype,
        choices=request.choices,
        tasks=request.tasks,
        latency=LatencyOptions() if request.latency else None,
    )
    return measure_subjects(subjects, options, _shares(progress or Silent()))


def _check_text(request: MeasureRequest, tokenizer: Any, config: Any) -> None:
    """Refuse test text that is too short for one window; text that is long by any tokenizer is not read twice."""
    docs = documents(request.text or "builtin", "test")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = min(request.length, limit) if isinstance(limit, int) and limit > 0 else request.length
    if tokenizer is not None and sum(map(len, docs)) < 64 * length:
        test_windows(packed_text(tokenizer, docs), 1, length)


def report(out: Path | str) -> Path:
    """Redraw ``report.html`` from ``report.json``."""
    return redraw(Path(out))


class _Run:
    """One run of a recipe: what is known of it, gathered once."""

    def __init__(self, recipe: Recipe, out: Path, how: How, progress: Progress, w: World) -> None:
        self.recipe, self.out, self.how, self.progress, self.world = recipe, out, how, progress, w
        self.clock = Clock()
        self.device = _device(recipe.device)
        self.notes: list[str] = []
        self.hashes: dict[str, str] = {}
        self.curves: list[Any] = []
        _threads(recipe.threads)

    def go(self) -> dict[str, Any]:
        done = self.how.resume and finished(self.out, self.recipe, self.how)
        self.origin = resolve(self.recipe.model, self.recipe.revision, self.recipe.trust_remote_code)
        self.replay = Plan.open(self.how.plan_file) if self.how.plan_file else None
        if done and same_result(self.out, self.recipe, self._inputs, self.how.overwrite):
            return {"out": str(self.out), "note": "this result is finished already; nothing was done"}
        refuse_packed(self.origin, "a packed checkpoint cannot be pruned", "secateur unpack DIR -o OUT, then prune OUT")
        source = self.origin.path / self.origin.gguf_file if self.origin.gguf_file else self.origin.path
        check_out(self.out, source, self.how.overwrite)
        if self.origin.kind == "directory":
            read_generation(self.origin)  # it goes with the result, which is loaded when it is measured
        self.steps = self.recipe.steps or steps_of(self.replay)
        all_parts = [parts_of(step) for step in self.steps]
        with self.clock.phase("open"):
            self.store = Store.open(self.origin)
        first = Stage(self.store, self.steps[0], 0, self.conditions())
        for step in self.steps[1:]:
            check_space(first.anatomy, step.space)
        for step, parts in zip(self.steps, all_parts, strict=True) if self.replay is None else ():
            check_search(first.model, step, parts, self.world)
        for step in self.steps if self._text_wanted else ():
            prepared(self.store, step)  # a repair that has nowhere to write is refused before the work
        reads = any(needs_text(p, s) for p, s in zip(all_parts, self.steps, strict=True)) and self._text_wanted
        if reads and self.recipe.text.source != "self":
            self._windows  # noqa: B018 (text errors belong before the work)
        self._check_measurable()
        self._prove()
        self.forecast = predict(self, first)
        if self.how.dry_run:
            return {"dry_run": plain(self.forecast)}
        inputs = {**self._inputs, "tokens": self.hashes.get("calibration tokens")}
        with opened(self.out, self.recipe, inputs, self.how, self.world) as work:
            records, ready = [], work
            store = self.store
            for number, step in enumerate(self.steps):
                record, ready = self._step(work / f"step-{number}", store, step, number)
                records.append(record)
                if number + 1 < len(self.steps):
                    store = Store.open(replace(self.origin, kind="directory", path=ready, gguf_file=None))
            if self.recipe.curve and not self.how.only_plan and self.world.first:
                with self.clock.phase("curve"):
                    self.curves.append(curve_of(self, self.store, self.steps[0]))
            self.world.wait()
            if self.recipe.pack and not self.how.only_plan and self.world.first:
                with self.clock.phase("pack"):
                    packed_in_place(ready, self.origin, self.recipe.pack)
            result = self._result(ready, tuple(records)) if self.world.first else {}
            if self.world.first:
                publish(self._only_plan(ready) if self.how.only_plan else ready, self.out, self.how.overwrite)
                remove(work)
            self.world.wait()
        return result

    def _check_measurable(self) -> None:
        """Refuse a tokenizer of another model before the work, also where only the measurement reads text."""
        if self.recipe.measure and self.how.measure and not self.how.only_plan and self.tokenizer is not None:
            self._check_ids(packed_text(self.tokenizer, documents("builtin", "test")))

    def _check_ids(self, ids: Tensor) -> None:
        embeddings: Any = self.store.skeleton().get_input_embeddings()  # type: ignore[operator]
        check_ids(ids, embeddings.weight.shape[0])

    def _prove(self) -> None:
        """Refuse units that are not what the anatomy says; of layers the config says later which may go."""
        problem = None
        spaces = dict.fromkeys(step.space for step in self.steps if step.space not in ("weight", "layer"))
        try:
            for space in spaces if self.world.first else ():
                with self.clock.phase("open"):
                    refuse_unproved(self.store.config, space)
        except SecateurError as error:
            problem = error
        self.world.agree(problem)

    def _step(self, work: Path, store: Store, step: Step, number: int) -> tuple[StepRecord, Path]:
        """One step from a store to a finished checkpoint in its working directory."""
        marker, ready = work / "finished.json", work / "ready"
        if marker.is_file() and ready.is_dir():
            return build(StepRecord, json.loads(marker.read_text()), "step"), ready
        mends = self._text_wanted
        store = prepared(store, step) if mends else store
        begin = self.clock.phases.get(f"step {number + 1}", 0.0)
        with self.clock.phase(f"step {number + 1}"):
            writer = StepWriter(work, store) if self.world.first else None
            self.world.wait()
            writer = writer or StepWriter(work, store)
            stage = Stage(store, step, number, self.conditions())
            if step.goal is not None:
                step = settled(stage, step)
                stage = Stage(store, step, number, self.conditions())
            if step.worse is not None:
                step = self._within(store, step, number)
                stage = Stage(store, step, number, self.conditions())
            sink = BlockSink(writer, number, step.apply or "mask", self.world)
            replay = self.replay.step(number) if self.replay is not None else None
            changes = [word for word in (step.method, step.repair) if word is not None]
            if replay is not None and changes and not mends:
                self.notes.append(
                    f"step {number + 1}: the plan was applied as a plain {step.apply}; {' and '.join(changes)}'s "
                    "weight updates are recomputed only when calibration text is named (--text)"
                )
            found = searched(stage, work) if replay is None and stage.parts.budget.searches else None
            if found is not None:
                replay = found.settle(stage)
                self.notes.append(found.note)
            outcome = stage.run(sink, replay, mends)
            if outcome.fits:
                self.notes.append(f"step {number + 1}: {fits_said(outcome.fits)}")
            self.world.wait()
            if self.world.first:
                writer.write_rest(stage.model)
                change = ConfigChange()
                if step.apply == "cut":
                    change = updated_config(store.config, outcome.anatomy, keeps_of(outcome.plan))
                files: dict[str, bytes | Path] = {}
                earlier = store.origin.path / PLAN if number and store.origin is not None else None
                merged = Plan.merged([Plan.open(earlier)] if earlier and earlier.is_file() else [])
                Plan.merged([merged, outcome.plan]).save(work / PLAN)
                files[PLAN] = work / PLAN
                words = {"recipe": self.recipe.to_words(), "inputs": self._inputs, "lineage": self._lineage()}
                kept = [i for i in range(store.blocks) if i not in outcome.dropped]
                writer.finish(outcome_of(outcome.anatomy, change, store.sizes, words, files), kept)
        seconds = self.clock.phases[f"step {number + 1}"] - begin
        record = step_record(step, stage.parts, outcome, seconds, self.how.only_plan)
        record = replace(record, search=found.record) if found is not None else record
        if self.world.first:
            with writing(marker):
                temporary = marker.with_suffix(".part")
                temporary.write_text(json.dumps(plain(record)))
                temporary.replace(marker)
        self.world.wait()
        return record, ready

    def _within(self, store: Store, step: Step, number: int) -> Step:
        """The step at the largest sparsity whose perplexity stays within its bound."""
        found = within_bound(self, store, step, number)
        self.curves.append(found.curve)
        self.notes += found.notes
        return found.step

    def _result(self, ready: Path, records: tuple[StepRecord, ...]) -> dict[str, Any]:
        """Measure, write report and card into the finished checkpoint, and say what came of it."""
        models, against = self._measured(ready)
        for path in sorted(ready.glob("*.safetensors")):
            with self.clock.phase("hash"):
                self.hashes[path.name] = file_hash(path)
        sizes = json.loads((ready / RECORD).read_text()).get("sizes")
        page = Report(
            model=self.recipe.model,
            out=str(self.out),
            recipe=self.recipe.to_words(),
            steps=records,
            measurements=tuple(models),
            comparison=against[-1] if against else None,
            curves=tuple(self.curves),
            predictions=predictions(self.forecast, models, sum(self.clock.phases.values())),
            provenance=provenance(self.recipe, self.clock, self.hashes),
            loader="secateur.load" if sizes or self.recipe.pack else self._loader(ready),
            notes=tuple(self.notes),
        )
        page.write(ready)
        with writing(ready / "README.md"):
            (ready / "README.md").write_text(card(page, base_model_of(self.recipe.model)), encoding="utf-8")
        out: dict[str, Any] = {"out": str(self.out), "report": str(self.out / "report.html")}
        if self.how.only_plan:
            out = {"out": str(self.out), "plan": str(self.out / PLAN)}
        kept = [
            {"step": n + 1, "space": r.space, "method": r.method, "kept": k, "of": t, "apply": r.apply}
            for n, r in enumerate(records)
            for k, t in [(sum(s.kept for s in r.sites), sum(s.total for s in r.sites))]
        ]
        out["steps"] = kept
        if models:
            out |= measured(models, against)
        return out | ({"notes": list(self.notes)} if self.notes else {})

    def _measured(self, ready: Path) -> tuple[list[Measurement], list[Comparison]]:
        if not (self.how.measure and self.recipe.measure) or self.how.only_plan:
            self.notes.append("not measured: --no-measure was given")
            return [], []
        tokenizer = self.tokenizer
        if tokenizer is None:
            self.notes.append("quality was not measured: the model has no tokenizer")
        options = self.measure_options()
        path = self.origin.path / self.origin.gguf_file if self.origin.gguf_file else self.origin.path
        made = replace(self.origin, given=str(ready), kind="directory", path=ready, gguf_file=None)
        dense = Subject(f"{self.recipe.model} (dense)", lambda: _loaded(self.store, self.device), tokenizer, path)
        pruned = Subject(str(self.out), lambda: _whole(made, self.device), tokenizer, ready, made.trust_remote_code)
        with self.clock.phase("measure"):
            return measure_subjects([dense, pruned], options, _shares(self.progress))

    def measure_options(self) -> MeasureOptions:
        """The short measurement, on the builtin test text."""
        return MeasureOptions.short()

    def _loader(self, ready: Path) -> str:
        words = json.loads((ready / "config.json").read_text())
        names = words.get("architectures") or [""]
        for auto, reference in words.get("auto_map", {}).items():
            if str(reference).rpartition(".")[2] == names[0]:
                return str(auto)
        return (
            "AutoModelForMaskedLM"
            if "MaskedLM" in names[0]
            else ("AutoModelForCausalLM" if "CausalLM" in names[0] or "LMHead" in names[0] else "AutoModel")
        )

    def _only_plan(self, ready: Path) -> Path:
        """A directory with nothing but the plan, the record and the report."""
        place = ready.parent / "plan"
        with writing(place):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            for name in (PLAN, RECORD, "report.json", "report.html"):
                shutil.copyfile(ready / name, place / name)
        return place

    def _lineage(self) -> dict[str, Any]:
        from secateur import __version__

        return {"secateur": __version__, "base_model": self.recipe.model, "seed": self.recipe.seed}

    def conditions(self) -> Conditions:
        """What every stage of this run shares."""
        last: dict[str, Any] = {"phase": "", "done": 0}

        def tick(phase: str, done: int, total: int) -> None:
            if phase != last["phase"]:
                self.progress.phase(phase, total)
                last["phase"], last["done"] = phase, 0
            self.progress.advance(done - last["done"])
            last["done"] = done

        return Conditions(
            batches=self.batches,
            seed=self.recipe.seed,
            device=self.device,
            dtype=DTYPES[self.recipe.dtype],
            spill=self._spill,
            world=self.world,
            tick=tick,
        )

    @property
    def _spill(self) -> Path | None:
        """Where activations and gradients go when they would take more than a quarter of the memory that is free."""
        import psutil

        from secateur.engine.write import work_dir

        text, parts = self.recipe.text, [parts_of(step) for step in self.steps]
        window = text.length * self._hidden_size * 4
        needed = max(p.held for p in parts) * text.samples * window // self.world.size
        backwards = {probe for p in parts for probe in (*p.needs, *p.survey_needs) if probe.kind == "gradient"}
        if backwards and self._hidden_size:
            needed = max(needed, (self.store.blocks + 1) * min(GROUP, text.samples) * window)
        if Gradient in backwards and self._hidden_size:
            needed = max(needed, 4 * self.store.parameters)
        if needed <= psutil.virtual_memory().available // 4:
            return None
        return work_dir(self.out) / f"activations-{self.world.rank}"  # processes keep theirs apart

    @property
    def _hidden_size(self) -> int:
        store = getattr(self, "store", None)
        return hidden_size(store.config) if store is not None else 0

    @property
    def _text_wanted(self) -> bool:
        return self.replay is None or self.how.plan_text

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        """What this run reads beside its words."""
        return inputs_of(self.recipe, self.origin, self.how)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return read_tokenizer(self.origin)

    def batches(self) -> list[Tensor]:
        """Calibration batches of token ids, in order."""
        return batches_of(self._windows, self.recipe.batch_size)

    @cached_property
    def _windows(self) -> Tensor:
        """Calibration windows [samples, length]; checked not to be the test text."""
        text, tokenizer = self.recipe.text, self.tokenizer
        if tokenizer is None:
            raise SecateurError(
                "this step reads calibration text, and the model has no tokenizer",
                received=self.recipe.model,
                works="put the tokenizer's files beside config.json, or use a score that needs no text (magnitude)",
            )
        limit = getattr(self.store.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and 0 < limit < text.length:
            raise SecateurError(
                f"the model takes at most {limit} tokens", received=f"length {text.length}", works=f"--length {limit}"
            )
        if text.source == "self":
            windows = self_text(_loaded(self.store, self.device), tokenizer, text)
        else:
            windows = calibration(text, tokenizer)
            self._check_ids(windows)
        if self.recipe.measure and self.how.measure and text.source not in ("self", "builtin"):
            options = self.measure_options()
            test = test_windows(packed_text(tokenizer, documents("builtin", "test")), options.windows, options.length)
            check_disjoint(windows, test, (text.source, "the builtin test text"))
        self.hashes["calibration tokens"] = tensor_hash(windows)
        return windows


def _loaded(store: Store, device: torch.device) -> nn.Module:
    """The store's model whole, in the dtype its files have."""
    assert store.origin is not None
    if store.origin.kind == "directory":
        return _whole(store.origin, device)
    model = store.skeleton()
    store.load_whole(model, device)
    return model.eval()


def _whole(origin: Origin, device: torch.device) -> nn.Module:
    """A model whole, dense or pruned: what is compared is loaded alike, down to its rotary tables."""
    path = origin.path / origin.gguf_file if origin.gguf_file else origin.path
    return load(path, trust_remote_code=origin.trust_remote_code).to(device)


def hidden_size(config: Any) -> int:
    """Width of the residual stream, 0 if the config does not say."""
    return int(getattr(config.get_text_config(), "hidden_size", 0) or 0)


def base_model_of(given: str) -> str | None:
    """The hub id of a model for a card's front matter; None for files and directories."""
    if given == PACKAGED:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return None if Path(given).exists() else given


def _device(word: str) -> torch.device:
    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if word.startswith("cuda") and not torch.cuda.is_available():
        raise SecateurError("no CUDA device is available here", received=f"--device {word}", works="--device cpu")
    return torch.device(word)


def _threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)


def _shares(progress: Progress) -> Callable[[str, float], None]:
    """`measure` tells shares of named phases; progress counts steps of a hundred."""
    state: dict[str, Any] = {"phase": None, "done": 0}

    def tell(phase: str, share: float) -> None:
        if phase != state["phase"]:
            progress.phase(phase, 100)
            state.update(phase=phase, done=0)
        done = int(100 * share)
        progress.advance(max(0, done - state["done"]))
        state["done"] = max(done, state["done"])

    return tell
