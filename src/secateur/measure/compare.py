"""Measure several models beside the first one: the same windows, the same prompts, taking turns on the clock.

Perplexity, KL divergence and top-1 agreement come out of one pass of every model over the windows. What a model
cannot do (no tokenizer, no causal head, another vocabulary) becomes a note, not an error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from secateur.engine.host.convert import cast
from secateur.engine.text import documents, pack, test_windows
from secateur.errors import SecateurError
from secateur.measure import divergence, perplexity
from secateur.measure.bootstrap import interval, safe_exp
from secateur.measure.choices import Item, choices, read_items
from secateur.measure.generation import generate
from secateur.measure.latency import LatencyOptions, latency, peak_rss
from secateur.measure.options import DTYPES, MeasureOptions, Subject
from secateur.measure.passes import is_causal, losses, positions, scored
from secateur.measure.size import file_bytes, size
from secateur.measure.tasks import known, tasks
from secateur.measure.types import Comparison, Measurement

Progress = Callable[[str, float], None]


@dataclass
class _Guest:
    """A subject whose model is in memory, and what has been found of it so far."""

    subject: Subject
    model: nn.Module
    found: Measurement
    windows: Tensor | None = None  # its test text, [windows, length]; None: nothing is measured on text
    notes: list[str] = field(default_factory=list)

    def add(self, **values: object) -> None:
        self.found = replace(self.found, **values)  # type: ignore[arg-type]


def measure(
    subjects: Sequence[Subject], options: MeasureOptions, progress: Progress | None = None
) -> tuple[list[Measurement], list[Comparison]]:
    """Measure models, the first one being what the others are compared with.

    Args:
        subjects: the models; the first is the reference (dense).
        options: what is measured.
        progress: told the name of a phase and the share of it that is done.

    Returns:
        One measurement per subject, in order; one comparison per subject but the first.

    Raises:
        SecateurError: unreadable text or choices, a text shorter than one window, an unknown task.
    """
    items = read_items(options.choices) if options.choices is not None else []
    docs = documents(options.text, "test") if options.text is not None else []
    if options.tasks:
        known(options.tasks)
    tell = progress or (lambda phase, share: None)
    first, *others = subjects
    groups = [others] if _fit_together(subjects) or not others else [[s] for s in others]
    measured: list[Measurement] = []
    compared: list[Comparison] = []
    with _opened(first, options) as dense:
        for group in groups:
            found, against = _beside(dense, group, options, docs, items, tell)
            measured += found[1:] if measured else found
            compared += against
    return measured, compared


def _beside(
    dense: _Guest,
    group: Sequence[Subject],
    options: MeasureOptions,
    docs: Sequence[str],
    items: Sequence[Item],
    tell: Progress,
) -> tuple[list[Measurement], list[Comparison]]:
    """The dense model and a group of others, which are let go on return."""
    with ExitStack() as stack:
        guests = [dense, *(stack.enter_context(_opened(s, options)) for s in group)]
        _measure(guests, options, docs, items, tell)
        found = [replace(g.found, notes=tuple(g.notes)) for g in guests]
        return found, [_compare(found[0], f, guests, options) for f in found[1:]]


def _fit_together(subjects: Sequence[Subject]) -> bool:
    """Whether all models may be in memory at once, which saves running the first one again for each other one:
    they are there already, or their files, unpacked to fp32, take less than half of the free memory."""
    unpacked = {".gguf": 8}  # from four bits and more; half-precision files double
    need = 0
    for subject in subjects:
        if isinstance(subject.model, nn.Module):
            continue
        if subject.path is None:
            return False
        need += file_bytes(subject.path) * unpacked.get(subject.path.suffix, 2)
    return need < psutil.virtual_memory().available / 2


@contextmanager
def _opened(subject: Subject, options: MeasureOptions) -> Iterator[_Guest]:
    """The subject's model in memory, in the dtype asked for and in eval mode; as it was before on exit."""
    given = isinstance(subject.model, nn.Module)
    model = subject.model if isinstance(subject.model, nn.Module) else subject.model()
    dtype = DTYPES[options.dtype] if options.dtype else None
    if dtype is not None and any(p.is_floating_point() and p.dtype != dtype for p in model.parameters()):
        model = copy.deepcopy(model) if given else model  # casting back would not restore the weights
        cast(model, dtype)
    training = model.training
    model.eval()
    try:
        path = subject.path
        weight = size(model, path, options.length)
        guest = _Guest(subject, model, Measurement(subject.name, weight))
        if path is not None and path.suffix == ".gguf":
            guest.notes.append(f"bytes are those of its GGUF file, which is quantised; run here in {weight.dtype}")
        yield guest
    finally:
        model.train(training)


def _measure(
    guests: Sequence[_Guest], options: MeasureOptions, docs: Sequence[str], items: Sequence[Item], tell: Progress
) -> None:
    """Everything that was asked for, for guests that are in memory together."""
    causal = [g for g in guests if _able(g)]
    if docs:
        _windows(causal, options, docs)
        _passes(guests[0], causal, options, lambda share: tell("perplexity", share))
    spoken = [g for g in causal if g.subject.tokenizer is not None]
    for number, guest in enumerate(spoken):
        name, tokenizer = guest.subject.name, guest.subject.tokenizer
        if items and guest.found.choices is None:
            source = options.choices.name if options.choices is not None else ""
            found = choices(guest.model, tokenizer, items, source, lambda s, n=name: tell(f"choices, {n}", s))  # type: ignore[misc]
            guest.add(choices=found)
        if options.prompts and not guest.found.generations:
            guest.add(generations=generate(guest.model, tokenizer, options.prompts, options.new_tokens))
            tell("generations", (number + 1) / len(spoken))
        if options.tasks and not guest.found.tasks:
            guest.add(tasks=tasks(guest.model, tokenizer, options.tasks))
            tell("tasks", (number + 1) / len(spoken))
    if options.latency is not None and causal:
        _clock(causal, options.latency, lambda share: tell("latency", share))


def _able(guest: _Guest) -> bool:
    """Whether the guest is a causal language model; a note says so (once) if not."""
    able = is_causal(guest.model)
    if not able:
        _note(guest, "not a causal language model: perplexity, generations and latency are not defined for it")
    elif guest.subject.tokenizer is None:
        _note(guest, "no tokenizer: nothing was measured on text")
    return able


def _windows(guests: Sequence[_Guest], options: MeasureOptions, docs: Sequence[str]) -> None:
    """Cut the test text with each guest's own tokenizer."""
    limits = [p for g in guests if (p := positions(g.model)) is not None]
    length = min([options.length, *limits])
    stride = min(options.stride, length) if options.stride else None
    for guest in guests:
        if guest.subject.tokenizer is None or guest.windows is not None:
            continue
        guest.windows = test_windows(pack(guest.subject.tokenizer, docs), options.windows, length, stride)
        if length < options.length:
            _note(
                guest,
                f"windows of {length} tokens: the longest text the models allow ({options.length} were asked for)",
            )
        if (have := len(guest.windows)) < options.windows:
            _note(guest, f"the text has {have} windows of {length} tokens ({options.windows} were asked for)")


def _passes(first: _Guest, guests: Sequence[_Guest], options: MeasureOptions, tell: Callable[[float], None]) -> None:
    """Perplexity of all, and divergence from the first, in one pass over each distinct set of windows."""
    waiting = [g for g in guests if g.windows is not None]
    while waiting:
        lead = waiting[0]
        assert lead.windows is not None
        same = [g for g in waiting if g.windows is not None and torch.equal(g.windows, lead.windows)]
        waiting = [g for g in waiting if g not in same]
        length = lead.windows.shape[1]
        stride = min(options.stride, length) if options.stride else None
        results = losses(
            [g.model for g in same], lead.windows, stride=stride, batch_size=options.batch_size, progress=tell
        )
        for guest, result in zip(same, results, strict=True):
            dtype, text = guest.found.size.dtype, options.text or ""
            guest.add(perplexity=perplexity.summarise(result, lead.windows, stride, dtype, text))
            if lead is first and guest is not lead:
                guest.add(divergence=divergence.summarise(result, lead.windows, stride, options.seed))
                if result.kl is None:
                    _note(guest, "another vocabulary than the first model's: no KL divergence")
            if broken := sum(math.isinf(x) for x in result.nll):
                _note(guest, f"logits were not finite in {broken} of {len(result.nll)} windows")
        if lead is not first:
            for guest in same:
                _note(guest, "another tokenizer than the first model's: perplexities do not compare")


def _clock(guests: Sequence[_Guest], options: LatencyOptions, tell: Callable[[float], None]) -> None:
    """Latency of all, taking turns; then peak memory, one fresh process each."""
    limits = [p for g in guests if (p := positions(g.model)) is not None]
    if limits and options.prompt_tokens + options.new_tokens > min(limits):
        new = max(2, min(options.new_tokens, min(limits) // 2))
        options = replace(options, new_tokens=new, prompt_tokens=max(1, min(limits) - new))
        for guest in guests:
            _note(guest, f"timed with a prompt of {options.prompt_tokens} tokens, as long as the models allow")
    for guest, found in zip(guests, latency([g.model for g in guests], options, tell), strict=True):
        guest.add(latency=replace(found, peak_rss=_peak(guest, guest.subject.path, options)))


def _peak(guest: _Guest, path: Path | None, options: LatencyOptions) -> int | None:
    if not options.rss:
        return None
    if guest.found.latency is not None:  # measured in an earlier group
        return guest.found.latency.peak_rss
    if path is None or not path.is_dir():
        _note(guest, "peak memory is measured for checkpoint directories only")
        return None
    try:
        return peak_rss(path, options, guest.found.size.dtype, guest.subject.trust_remote_code)
    except SecateurError as error:
        _note(guest, str(error))
        return None


def _note(guest: _Guest, text: str) -> None:
    if text not in guest.notes:
        guest.notes.append(text)


def _compare(dense: Measurement, found: Measurement, guests: Sequence[_Guest], options: MeasureOptions) -> Comparison:
    """Differences of one model from the dense one, paired."""
    ratio = difference = prefill = decode = None
    (a, b), windows = (dense.perplexity, found.perplexity), guests[0].windows
    same_text = any(
        g.found.model == found.model
        and g.windows is not None
        and windows is not None
        and torch.equal(g.windows, windows)
        for g in guests[1:]
    )
    if a is not None and b is not None and same_text and math.isfinite(a.value):
        gaps = [y - x for x, y in zip(a.window_nll, b.window_nll, strict=True)]
        weights = scored(a.windows, a.length, a.stride)
        ratio = interval(gaps, weights, transform=safe_exp, seed=options.seed)
    if dense.choices is not None and found.choices is not None:
        pairs = zip(dense.choices.correct_norm, found.choices.correct_norm, strict=True)
        difference = interval([float(y) - float(x) for x, y in pairs], seed=options.seed)
    if dense.latency is not None and found.latency is not None:
        prefill = dense.latency.prefill.median / found.latency.prefill.median
        decode = dense.latency.decode_per_token.median / found.latency.decode_per_token.median
    return Comparison(ratio, difference, prefill, decode)
