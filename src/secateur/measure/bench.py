"""How fast models run beside one another: prompt, first token and each token after it, at several shapes.

Every round runs all models one after the other, each reading the same random prompts and writing the same number of
tokens; every other round goes backwards, so that neither a slow moment of the machine nor the order favours anyone. The
first round warms up and is not counted. What is reported is the median over rounds with the quartiles beside it.

Memory is that of a fresh process per model that loads it, reads one prompt and writes a few tokens: what is resident
then (`rss_bytes`) and the most that ever was (`peak_rss_bytes`). Both contain Python and torch themselves, which
`bare_rss_bytes` has alone. Memory that the allocator holds but nobody uses is given back before looking.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from secateur.engine.decode import greedy
from secateur.engine.decoders import Decoder
from secateur.errors import SecateurError
from secateur.measure.latency import timing
from secateur.measure.types import Timing


@dataclass(frozen=True)
class BenchOptions:
    """What is timed.

    Attributes:
        batches: sequences at once; 1, whose numbers are the headline, is always among them.
        prompts: tokens in each prompt; the headline is of the first.
        new_tokens: tokens written after it, the first one included.
        rounds: counted rounds.
    """

    batches: tuple[int, ...] = (1, 4)
    prompts: tuple[int, ...] = (64, 256)
    new_tokens: int = 24
    rounds: int = 5

    def __post_init__(self) -> None:
        if not self.batches or not self.prompts:
            raise SecateurError("bench needs a batch size and a prompt length", works="--batch 1,4 --prompt-tokens 64")
        for word, least in (("new_tokens", 2), ("rounds", 1)):
            if getattr(self, word) < least:
                raise SecateurError(
                    f"bench {word} is too small", received=getattr(self, word), works=f"at least {least}"
                )
        for word in ("batches", "prompts"):
            if min(getattr(self, word)) < 1:
                raise SecateurError(f"bench {word} is too small", received=min(getattr(self, word)), works="at least 1")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(batch, prompt) in the order they are timed: the headline first."""
        return tuple(product(dict.fromkeys((1, *self.batches)), dict.fromkeys(self.prompts)))


@dataclass(frozen=True)
class Shape:
    """One model at one shape. Seconds; tokens per second count the whole batch."""

    batch: int
    prompt_tokens: int
    prefill: Timing
    first_token: Timing
    decode_per_token: Timing

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.batch * self.prompt_tokens / self.prefill.median

    @property
    def decode_rate(self) -> float:
        """New tokens per second."""
        return self.batch / self.decode_per_token.median


@dataclass(frozen=True)
class Residence:
    """Resident bytes of a process of its own: at the end, at most, and before a model was loaded."""

    rss: int
    peak: int
    bare: int


def bench(
    decoders: Sequence[Decoder],
    vocabulary: int,
    options: BenchOptions,
    progress: Callable[[float], None] | None = None,
) -> list[tuple[Shape, ...]]:
    """Time models taking turns; one entry per model, in order, with a `Shape` per shape, the headline first.

    Args:
        decoders: the models.
        vocabulary: random prompts hold ids below this, which all models must know.
        options: what is timed.
        progress: told the share done.
    """
    seen: list[list[Shape]] = [[] for _ in decoders]
    total, done = len(options.shapes) * (options.rounds + 1) * len(decoders), 0
    for batch, prompt in options.shapes:
        ids = torch.randint(0, vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0))
        rounds: list[list[tuple[float, float, float]]] = [[] for _ in decoders]
        for turn in range(options.rounds + 1):
            order = list(enumerate(decoders))
            for number, decoder in order if turn % 2 else reversed(order):
                seconds = once(decoder, ids, options.new_tokens)
                if turn:
                    rounds[number].append(seconds)
                done += 1
                if progress is not None:
                    progress(done / total)
        for shapes, found in zip(seen, rounds, strict=True):
            shapes.append(Shape(batch, prompt, *(timing(column) for column in zip(*found, strict=True))))
    return [tuple(shapes) for shapes in seen]


@torch.inference_mode()
def once(decoder: Decoder, ids: torch.Tensor, new_tokens: int) -> tuple[float, float, float]:
    """Seconds until the prompt is read, until the first token is known, and of each token after it (mean)."""
    start = time.perf_counter()
    logits = decoder.begin(ids, new_tokens)
    read = time.perf_counter()
    tokens = greedy(logits)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        tokens = greedy(decoder.step(tokens))
    return read - start, first - start, (time.perf_counter() - first) / (new_tokens - 1)


def residence(order: dict[str, Any], options: BenchOptions) -> Residence:
    """Memory of a fresh process that opens this model and runs the headline shape once.

    Args:
        order: the fields of a `secateur.engine.running.Opening`.
        options: the first prompt length and the number of new tokens count.

    Raises:
        SecateurError: the process failed; its last words are passed on.
    """
    words = {"opening": order, "options": asdict(options), "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "secateur.measure.residence", json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SecateurError(
            f"the process that measures memory failed: {said[-1]}",
            received=order.get("model"),
            works="a model that fits into the free memory a second time",
        )
    return Residence(**json.loads(done.stdout.strip().splitlines()[-1]))
