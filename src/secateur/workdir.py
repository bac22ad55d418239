"""The working directory beside the output: what an interrupted run leaves, and how the next one takes it up.

.OUT.secateur-work/
    lock              held while a run is alive
    run.json          the recipe and hashes of what the run reads: what must not change in between
    step-0/           block-00003.safetensors, plan-00003.safetensors, ...; a file that is there is complete
        ready/        the step's finished checkpoint
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from torch import nn

from secateur.account import file_hash
from secateur.engine.apply import cut_block, mask_block
from secateur.engine.distribute import World
from secateur.engine.headers import read_json
from secateur.engine.host.origin import Origin
from secateur.engine.plan import Plan
from secateur.engine.restore import restore_block
from secateur.engine.store import RECORD
from secateur.engine.write import StepWriter, claimed, work_dir, write_json, writing
from secateur.errors import SecateurError
from secateur.recipe import How, Recipe, diff

SPOTS, SPOT = 64, 1 << 16  # pieces of a file that are looked at, and bytes of each
INPUTS = MappingProxyType(
    {
        "model": "the model's files",
        "plan": "the plan",
        "plan_text": "whether a text is named beside the plan (--text)",
        "text": "the text",
        "tokens": "the calibration text's tokens",
    }
)


def fingerprint(origin: Origin) -> str:
    """What identifies a model's files without reading all their weights: sizes, headers, config, code that may run, and
    pieces at even distances, because headers and embeddings are alike in every fine-tune of a model."""
    digest = hashlib.sha256()
    files = [origin.path / origin.gguf_file] if origin.gguf_file else sorted(origin.path.glob("*.safetensors"))
    files += sorted(origin.path.glob("*.py")) if origin.trust_remote_code else []
    for path in [*files, origin.path / "config.json"]:
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as f:
                for spot in range(SPOTS):
                    f.seek(spot * max(SPOT, (size - SPOT) // (SPOTS - 1)))
                    digest.update(f.read(SPOT))
    return digest.hexdigest()


def inputs_of(recipe: Recipe, origin: Origin, how: How) -> dict[str, Any]:
    """What a run reads beside its words: hashes of files, and whether a replay weighs anew."""
    text = Path(recipe.text.source)
    return {
        "model": fingerprint(origin),
        "plan": file_hash(how.plan_file) if how.plan_file else None,
        "plan_text": how.plan_file is not None and how.plan_text,
        "text": file_hash(text) if os.path.isfile(text) and os.access(text, os.R_OK) else None,
    }


@dataclass
class Finished:
    """A result that is already there, made by the same recipe."""

    out: Path


def changed_words(old: dict[str, Any], recipe: Recipe) -> list[str]:
    """Words that differ between a run on record and this recipe."""
    try:
        return diff(Recipe.from_words(old), recipe)
    except SecateurError as error:
        return [f"the recipe on record cannot be read: {error}"]


def changed_input(
    old: Mapping[str, Any], inputs: Mapping[str, Any], recipe: Recipe, since: str
) -> SecateurError | None:
    """Why a run on record cannot be one of these inputs, or None. What is not on record says nothing."""
    for word, value in inputs.items():
        if old.get(word, value) != value:
            received = {"model": recipe.model, "plan": recipe.plan}.get(word, recipe.text.source)
            return SecateurError(
                f"{INPUTS[word]} changed since the {since}",
                received=received,
                works="leave --resume out and add --overwrite to start afresh",
            )
    return None


def same_result(out: Path, recipe: Recipe, inputs: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether a finished result of this recipe was made of these inputs; if not, it may be replaced.

    Raises:
        SecateurError: it was not, and may not be replaced.
    """
    record = read_json(out / RECORD).get("inputs")
    problem = changed_input(record if isinstance(record, dict) else {}, inputs, recipe, "result was made")
    if problem is not None and not overwrite:
        raise problem
    return problem is None


def finished(out: Path, recipe: Recipe, how: How) -> bool:
    """Whether ``out`` holds this recipe's result (a plan alone is none, unless a plan is all that is asked for).

    Where the output may be replaced, an interrupted run that was about to replace it comes first.

    Raises:
        SecateurError: it holds another recipe's.
    """
    record, work = out / RECORD, work_dir(out)
    if not record.is_file() or (how.overwrite and (work / "run.json").is_file()):
        return False
    changes = changed_words(read_json(record).get("recipe", {}), recipe)
    if changes and how.overwrite:
        return False
    if changes:
        raise SecateurError(
            "the output holds the result of another recipe",
            received=changes[0],
            works="repeat the same words with --resume, or give another output (or --overwrite)",
        )
    if not (how.only_plan or any(out.glob("model*.safetensors"))):
        return False
    if _published(work, len(recipe.steps)):
        remove(work)
    return True


def remove(work: Path) -> None:
    """Remove a working directory whose result is in place. What says that it is a run's goes first, so that a kill
    half-way leaves something that is known for what it is."""
    with writing(work):
        (work / "run.json").unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)  # the result stands either way


def _published(work: Path, steps: int) -> bool:
    """Whether a run was killed after its result was moved to the output, with only this directory left to remove, or
    what is left of it."""
    last = work / f"step-{max(steps, 1) - 1}"
    if (work / "run.json").is_file():
        return (last / "finished.json").is_file() and not (last / "ready").exists()
    return work.is_dir() and _idle(work)


def _idle(work: Path) -> bool:
    """Whether no run that is alive holds the directory."""
    try:
        with open(work / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def opened(out: Path, recipe: Recipe, inputs: Mapping[str, Any], how: How, world: World) -> Iterator[Path]:
    """The working directory of ``out``, locked; taken up again with ``how.resume``, otherwise new.

    It stays where it is when the run fails or is interrupted, and is removed by whoever publishes the result.

    Raises:
        SecateurError: another run is alive there; an interrupted run is there and ``how.resume`` is not given; the
            recipe or its inputs changed since.
    """
    work, lock, problem = work_dir(out), None, None
    if world.first:
        try:
            lock = _claimed(out, recipe, inputs, how)
        except SecateurError as error:
            problem = error
    world.agree(problem)
    with lock or nullcontext():
        yield work


def _claimed(out: Path, recipe: Recipe, inputs: Mapping[str, Any], how: How) -> IO[str]:
    """The working directory made ready for this run; its open lock file is held as long as the run lives."""
    work = work_dir(out)
    lock = claimed(work, out)
    state = {"recipe": recipe.to_words(), **inputs}
    run = work / "run.json"
    try:
        if run.is_file():
            _take_up(work, recipe, inputs, how)
        if not run.is_file():
            with writing(work):
                for part in work.glob("step-*"):
                    shutil.rmtree(part)
            write_json(run, json.loads(json.dumps(state)))
    except BaseException:
        lock.close()
        raise
    return lock


def _take_up(work: Path, recipe: Recipe, inputs: Mapping[str, Any], how: How) -> None:
    """Decide about an interrupted run's directory: go on with it (leave it), or start afresh (remove run.json)."""
    try:
        old = read_json(work / "run.json")
    except SecateurError:
        old = {}
    if how.resume:
        changes = changed_words(old.get("recipe", {}), recipe)
        if changes:
            raise SecateurError(
                "the recipe changed since the interrupted run",
                received=changes[0],
                works="repeat its words to resume, or leave --resume out and add --overwrite to start afresh",
            )
        problem = changed_input(old, inputs, recipe, "interrupted run")
        if problem is not None:
            raise problem
        return
    has_work = any(work.glob("step-*/*.safetensors"))
    if has_work and not how.overwrite:
        raise SecateurError(
            "an interrupted run's work is beside this output",
            received=str(work),
            works="add --resume to go on with it, or --overwrite to start afresh",
        )
    (work / "run.json").unlink()


class BlockSink:
    """Finished blocks of one step: their plan first, then their weights, which are the point to resume from."""

    def __init__(self, writer: StepWriter, number: int, step_apply: str, world: World) -> None:
        self.writer, self.number, self.apply, self.world = writer, number, step_apply, world
        count = writer.store.blocks
        self.before = frozenset(i for i in range(count) if writer.done(i) and self._plan(i).is_file())

    def finished(self, index: int) -> bool:
        return index in self.before

    def restore(self, model: nn.Module, index: int) -> Plan:
        """Put a finished block's weights into the model and return its part of the plan."""
        from secateur.anatomy import anatomy_of
        from secateur.engine.host.build import describe_skeleton

        plan = Plan.open(self._plan(index))
        block = anatomy_of(describe_skeleton(model)).blocks[index]
        for key in plan:
            _, space, site = key.split("/", 2)
            if space not in ("weight", "layer") and site == block.name:
                change = cut_block if self.apply == "cut" else mask_block
                change(model.get_submodule(block.name), block, {space: plan[key]})
        restore_block(self.writer.store, model, self.writer.block_file(index))
        return plan

    def write(self, index: int, module: nn.Module, plan: Plan) -> Plan:
        """Write a finished block; returns its part of the plan as it lies in its file, so that what is held does not
        grow with the number of blocks."""
        if self.world.first:
            plan.save(self._plan(index))
            self.writer.write_block(index, module)
        self.world.wait()
        return Plan.open(self._plan(index))

    def _plan(self, index: int) -> Path:
        return self.writer.work / f"plan-{index:05d}.safetensors"
