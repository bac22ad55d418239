"""How long a prompt and a token take, models taking turns; and the memory a process needs that does only this.

Prefill is the time from prompt to first token (only the last position's logits are computed where the host
allows it, as serving does), decode the mean time of the tokens after it. Every round runs all models one after
the other, so that a slow moment of the machine hits all alike; the first round warms up and is not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from secateur.engine.decode import decode
from secateur.errors import SecateurError
from secateur.measure.types import Latency, Timing


@dataclass(frozen=True)
class LatencyOptions:
    """What is timed: tokens in the prompt, new tokens, sequences at once, rounds counted, and whether fresh
    processes are started to measure peak memory."""

    prompt_tokens: int = 256
    new_tokens: int = 32
    batch: int = 1
    repeats: int = 5
    rss: bool = True

    def __post_init__(self) -> None:
        for word, least in (("prompt_tokens", 1), ("new_tokens", 2), ("batch", 1), ("repeats", 1)):
            if getattr(self, word) < least:
                raise SecateurError(
                    f"latency {word} is too small", received=getattr(self, word), works=f"at least {least}"
                )


def latency(
    models: Sequence[nn.Module], options: LatencyOptions, progress: Callable[[float], None] | None = None
) -> list[Latency]:
    """Time all models on random tokens of the same shape; peak memory is left open (see `peak_rss`).

    Args:
        models: causal language models in eval mode, on their devices.
        options: what is timed.
        progress: told the share done.
    """
    rounds: list[list[tuple[float, float]]] = [[] for _ in models]
    total = (options.repeats + 1) * len(models)
    for turn in range(options.repeats + 1):
        for number, model in enumerate(models):
            seconds = _once(model, options)
            if turn:
                rounds[number].append(seconds)
            if progress is not None:
                progress((turn * len(models) + number + 1) / total)
    out = []
    for model, seen in zip(models, rounds, strict=True):
        parameter = next(model.parameters())
        out.append(
            Latency(
                prefill=timing([a for a, _ in seen]),
                decode_per_token=timing([b for _, b in seen]),
                prompt_tokens=options.prompt_tokens,
                new_tokens=options.new_tokens,
                batch=options.batch,
                threads=torch.get_num_threads(),
                device=_device_name(parameter.device),
                dtype=str(parameter.dtype).removeprefix("torch."),
            )
        )
    return out


def timing(seconds: Sequence[float]) -> Timing:
    """Median and quartiles (linear interpolation)."""
    low, median, high = (
        torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    )
    return Timing(median, low, high, len(seconds))


def peak_rss(path: Path, options: LatencyOptions, dtype: str, trust_remote_code: bool = False) -> int:
    """Peak resident bytes of a fresh process that loads the checkpoint, reads one prompt and writes a few tokens.

    Raises:
        SecateurError: the process failed; its last words are passed on.
    """
    words = {"path": str(path), "dtype": dtype, "threads": torch.get_num_threads(), "options": asdict(options)}
    order = json.dumps({**words, "trust_remote_code": trust_remote_code})
    done = subprocess.run(
        [sys.executable, "-m", "secateur.measure.rss", order], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SecateurError(
            f"the process that measures memory failed: {last[-1]}",
            received=str(path),
            works="a model that fits into the free memory a second time",
        )
    return int(done.stdout.strip().splitlines()[-1])


def _once(model: nn.Module, options: LatencyOptions) -> tuple[float, float]:
    """Seconds of one prefill, and per decoded token after it."""
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (options.batch, options.prompt_tokens), generator=generator).to(device)
    steps = decode(model, ids, options.new_tokens)
    _wait(device)
    start = time.perf_counter()
    next(steps)
    _wait(device)
    first = time.perf_counter()
    for _ in steps:
        pass
    _wait(device)
    return first - start, (time.perf_counter() - first) / (options.new_tokens - 1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
