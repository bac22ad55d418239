"""What is measured, and of what: the models (subjects) and the options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from secateur.errors import SecateurError, unknown
from secateur.measure.generation import PROMPTS
from secateur.measure.latency import LatencyOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: what the report calls it.
        model: in memory, or a callable that loads it; loaded ones are let go as soon as they are measured, so that
            at most two are in memory.
        tokenizer: None: nothing is measured on text.
        path: its files, for their size and for peak memory.
        trust_remote_code: whether the process that looks at peak memory may run code that comes with the model.
    """

    name: str
    model: nn.Module | Callable[[], nn.Module]
    tokenizer: Any = None
    path: Path | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured.

    Attributes:
        text: a source as in `secateur.engine.text` (``builtin`` is its test half); None skips what needs text.
        windows, length, stride: how the text is cut; fewer windows if the text is shorter (and a note says so).
        batch_size: windows per forward pass; None chooses by memory.
        dtype: fp32, bf16 or fp16; None runs each model in its own.
        choices: a JSONL file of multiple-choice items.
        tasks: names of lm-eval tasks.
        prompts, new_tokens: greedy generations; no prompts, no generations.
        latency: what is timed, or None.
        seed: of the bootstrap.
    """

    text: str | None = "builtin"
    windows: int = 64
    length: int = 1024
    stride: int | None = None
    batch_size: int | None = None
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    choices: Path | None = None
    tasks: tuple[str, ...] = ()
    prompts: tuple[str, ...] = PROMPTS
    new_tokens: int = 48
    latency: LatencyOptions | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        for word, least in (("windows", 1), ("length", 2), ("stride", 1), ("batch_size", 1), ("new_tokens", 1)):
            value = getattr(self, word)
            if value is not None and value < least:
                raise SecateurError(f"measure {word} is too small", received=value, works=f"at least {least}")
        if self.stride is not None and self.stride > self.length:
            raise SecateurError(
                "a stride longer than the windows leaves text out", received=self.stride, works=f"at most {self.length}"
            )

    @classmethod
    def short(cls) -> MeasureOptions:
        """What `prune` ends with: about half a minute for two 135M models on two cores."""
        return cls(
            windows=8,
            length=512,
            prompts=PROMPTS[:2],
            new_tokens=24,
            latency=LatencyOptions(prompt_tokens=128, new_tokens=12, repeats=3, rss=False),
        )
