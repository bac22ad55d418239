"""The verbs that run models: `run` writes text, `bench` times models side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from secateur.engine.decoders import continued
from secateur.engine.host.origin import read_tokenizer, resolve
from secateur.engine.running import Opening, Running, opened
from secateur.engine.text import check_ids, check_room
from secateur.errors import SecateurError
from secateur.measure.bench import BenchOptions, Residence, Shape, residence
from secateur.measure.bench import bench as timed
from secateur.measure.generation import stops
from secateur.measure.residence import resident
from secateur.progress import Progress, Silent
from secateur.recipe import check_count, check_threads, check_type


@dataclass(frozen=True)
class RunRequest:
    """What `run` is asked: one model, one prompt."""

    opening: Opening
    prompt: str
    max_new_tokens: int = 64
    threads: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise SecateurError("the prompt is empty", works='--prompt "The capital of France is"')
        check_type("prompt", self.prompt, str)
        check_count("max_new_tokens", self.max_new_tokens, 1)
        check_threads(self.threads)


@dataclass(frozen=True)
class BenchRequest:
    """What `bench` is asked: models in order, the first is what the others are compared with.

    Attributes:
        own_kernel: also time the first plain model on our dense kernel, as a row of its own at the end.
        memory: start a process per model to see what it takes.
    """

    models: tuple[str, ...]
    options: BenchOptions = field(default_factory=BenchOptions)
    dtype: str | None = None
    threads: int | None = None
    own_kernel: bool = False
    compiled: bool = False
    memory: bool = True
    trust_remote_code: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        check_threads(self.threads)

    def openings(self) -> list[Opening]:
        """One per model, in order."""
        words = (self.trust_remote_code, self.revision)
        return [Opening(model, self.dtype, False, self.compiled, *words) for model in self.models]


def run(request: RunRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Continue a prompt greedily, and say how long it took.

    Raises:
        SecateurError: a model or prompt that cannot be used.
    """
    tell = progress or Silent()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    how = request.opening
    tokenizer = read_tokenizer(resolve(how.model, how.revision, how.trust_remote_code))
    if tokenizer is None:
        raise SecateurError(
            "the model has no tokenizer", received=how.model, works="put the tokenizer's files beside config.json"
        )
    running = opened(how)
    start = time.perf_counter()
    ids = torch.tensor([tokenizer(request.prompt)["input_ids"]], dtype=torch.long)
    check_ids(ids, running.vocabulary)
    room = _room(running, ids.shape[1], request.max_new_tokens)
    stop = stops(running.model, tokenizer)
    new: list[int] = []
    moments = []
    tell.phase("run", room)
    for token in continued(running.decoder, ids, room):
        moments.append(time.perf_counter())
        tell.advance(1)
        if int(token) in stop:
            break
        new.append(int(token))
    seconds = moments[-1] - moments[0]
    return {
        "model": how.model,
        "prompt": request.prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "runs_on": running.decoder.how,
        "dtype": running.dtype,
        "threads": torch.get_num_threads(),
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "first_token_ms": 1e3 * (moments[0] - start),
        "decode_ms_per_token": 1e3 * seconds / (len(moments) - 1) if len(moments) > 1 else None,
        "decode_tokens_per_second": (len(moments) - 1) / seconds if len(moments) > 1 else None,
        "rss_bytes": resident(),
        "notes": list(running.decoder.notes),
    }


def _room(running: Running, prompt: int, wanted: int) -> int:
    limit = running.positions
    if limit is None or prompt + wanted <= limit:
        return wanted
    if prompt >= limit:
        raise SecateurError(
            "the prompt is as long as the longest text the model reads",
            received=f"{prompt} tokens",
            works=f"{limit - 1}",
        )
    return limit - prompt


def bench(request: BenchRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Time models side by side; plain data in the words of ``--json``.

    Raises:
        SecateurError: a model that cannot be used, or shapes longer than a model's longest text.
    """
    tell = progress or Silent()
    check_room(max(request.options.batches), max(request.options.prompts))
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    openings = request.openings()
    tell.phase("open", len(openings))
    runs = []
    for opening in openings:
        runs.append(opened(opening))
        tell.advance(1)
    if request.own_kernel:
        plain = next((n for n, running in enumerate(runs) if not running.packed), None)
        if plain is None:
            raise SecateurError(
                "--own-kernel runs a dense model on our dense kernel, and every model given is packed",
                received=", ".join(request.models),
                works="give the dense model as well",
            )
        openings.append(replace(openings[plain], own_kernel=True, compiled=False))
        runs.append(opened(openings[-1]))
    longest = max(request.options.prompts) + request.options.new_tokens
    for opening, running in zip(openings, runs, strict=True):
        if running.positions is not None and longest > running.positions:
            raise SecateurError(
                f"{opening.model} reads at most {running.positions} tokens",
                received=f"prompts and new tokens of {longest}",
                works="a shorter --prompt-tokens or --new-tokens",
            )
    tell.phase("bench", 100)
    shares = [0.0]

    def share(done: float) -> None:
        tell.advance(int(100 * done) - int(100 * shares[0]))
        shares[0] = done

    found = timed([r.decoder for r in runs], min(r.vocabulary for r in runs), request.options, share)
    own = found[-1] if request.own_kernel else None
    memory: list[Residence | None] = [None for _ in openings]
    if request.memory:
        tell.phase("memory", len(openings))
        for number, opening in enumerate(openings):
            memory[number] = residence(asdict(opening), request.options)
            tell.advance(1)
    rows = zip(openings, runs, found, memory, strict=True)
    return {"models": [_row(*row, found[0], own) for row in rows]}


def _row(
    opening: Opening,
    running: Running,
    shapes: Sequence[Shape],
    memory: Residence | None,
    first: Sequence[Shape],
    own: Sequence[Shape] | None,
) -> dict[str, Any]:
    """One model's entry: the headline, then every shape."""
    head = shapes[0]
    row: dict[str, Any] = {
        "model": opening.model + (" (own dense kernel)" if opening.own_kernel else ""),
        "runs_on": running.decoder.how,
        "dtype": running.dtype,
        "threads": torch.get_num_threads(),
        "batch": head.batch,
        "prompt_tokens": head.prompt_tokens,
        "decode_ms_per_token": 1e3 * head.decode_per_token.median,
        "decode_tokens_per_second": head.decode_rate,
        "prefill_ms": 1e3 * head.prefill.median,
        "prefill_tokens_per_second": head.prefill_rate,
        "first_token_ms": 1e3 * head.first_token.median,
    }
    if memory is not None:
        row |= {"rss_bytes": memory.rss, "peak_rss_bytes": memory.peak, "bare_rss_bytes": memory.bare}
    row |= _ratios(head, first[0], own[0] if own else None)
    row["shapes"] = [
        {
            "batch": s.batch,
            "prompt_tokens": s.prompt_tokens,
            "prefill_ms": _spread(s.prefill),
            "first_token_ms": _spread(s.first_token),
            "decode_ms_per_token": _spread(s.decode_per_token),
            "prefill_tokens_per_second": s.prefill_rate,
            "decode_tokens_per_second": s.decode_rate,
            **_ratios(s, first[n], own[n] if own else None),
        }
        for n, s in enumerate(shapes)
    ]
    if running.decoder.notes:
        row["notes"] = list(running.decoder.notes)
    return row


def _ratios(shape: Shape, first: Shape, own: Shape | None) -> dict[str, float]:
    """How many times as fast as the first model, and as the one on our dense kernel."""
    out = {
        "decode_ratio": first.decode_per_token.median / shape.decode_per_token.median,
        "prefill_ratio": first.prefill.median / shape.prefill.median,
    }
    if own is not None:
        out["decode_ratio_to_own_kernel"] = own.decode_per_token.median / shape.decode_per_token.median
    return out


def _spread(timing: Any) -> dict[str, Any]:
    return {
        "median": 1e3 * timing.median, "low": 1e3 * timing.low, "high": 1e3 * timing.high, "rounds": timing.repeats
    }  # fmt: skip
