"""What a budget that searches will take: passes of whole models over text, the model it turns, and levels on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.evopress.evolving import options_of
from secateur.measure.passes import LOGIT_BYTES
from secateur.methods.base import MatrixRepair
from secateur.methods.budgets.evopress import EvoPress
from secateur.parts import Parts, parts_of
from secateur.search.likely import TOP
from secateur.stage import Stage
from secateur.step import Step

if TYPE_CHECKING:
    from secateur.run import _Run

PACKED = 2 + 1 / 8  # bytes of a value that stays, with its bit


def searching(run: _Run, step: Step) -> EvoPress | None:
    """The options of a step's search, if it will search."""
    return options_of(parts_of(step).budget) if run.replay is None else None


def tokens_read(options: EvoPress, text: int) -> int:
    """Tokens that all candidates of a search read together, on a text of so many."""
    entered, each = options.offspring, 0
    for number, (survivors, tokens) in enumerate(zip(options.kept, options.read, strict=True), 1):
        entered += number == len(options.kept)
        each += entered * min(tokens, text)
        entered = survivors
    return options.generations * each + 2 * text


def passes(run: _Run, options: EvoPress) -> int:
    """Tokens that whole models read: the dense one the text, the candidates theirs."""
    text = run.recipe.text.samples * run.recipe.text.length
    return text + tokens_read(options, text)


def changes(parts: Parts) -> bool:
    """Whether levels hold values beside booleans."""
    return parts.joint or isinstance(parts.repair, MatrixRepair)


def level_bytes(first: Stage, step: Step, options: EvoPress) -> list[int]:
    """Bytes of every block's levels, packed."""
    if step.space == "layer":
        return [0] * len(first.anatomy.blocks)
    parts, amount = parts_of(step), step.amount
    share = float(amount.share) if amount is not None and amount.share is not None else 0.5
    each = 1 / 8 + (share * PACKED if changes(parts) else 0.0)
    levels = 2 * options.levels + 1
    if step.space != "weight":
        units = [sum(s.size * s.copies for n, s in b.spaces.items() if n == step.space) for b in first.anatomy.blocks]
        if not changes(parts):
            return [levels * n // 8 for n in units]
    return [round(levels * each * sum(m.numel for m in b.matrices)) for b in first.anatomy.blocks]


def disk(run: _Run, first: Stage) -> int:
    """Bytes that the largest search keeps beside the output while it runs."""
    sizes = [0]
    for step in run.steps:
        if (options := searching(run, step)) is not None:
            answers = run.recipe.text.samples * run.recipe.text.length * (8 * min(TOP, _vocabulary(run)) + 4)
            sizes.append(answers + sum(level_bytes(first, step, options)))
    return max(sizes)


def memory(run: _Run, first: Stage, step: Step, blocks: list[int], outside: int) -> list[dict[str, int]]:
    """What a search holds, phase by phase.

    Args:
        blocks: fp32 bytes of every block.
        outside: of everything else.
    """
    options = searching(run, step)
    if options is None:
        return []
    store, window = run.store, run.recipe.text.length * _vocabulary(run) * 4
    made = {"one block": max(blocks), "its dense copy": max(blocks)}
    made["its levels"] = max(level_bytes(first, step, options))
    turned = {
        "model to turn": sum(blocks) + outside,
        "its dense weights": sum(store.bytes_of_block(i) for i in range(store.blocks)) if step.space != "layer" else 0,
        "logits": window * max(1, LOGIT_BYTES // max(window, 1)),
    }
    return [made, turned]


def _vocabulary(run: _Run) -> int:
    return int(getattr(run.store.config.get_text_config(), "vocab_size", 0) or 0)
