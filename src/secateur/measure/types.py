"""Numbers with their units and conditions. `measure` returns these; `report` turns them into pages."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per predicted token.

    Attributes:
        value: the perplexity; inf if it overflows.
        window_nll: mean nats per token of each window, for paired intervals.
        windows, length, stride: how the text was cut (stride = length: windows do not overlap).
        tokens: predicted positions counted.
        dtype, text: what the model ran in, and the name of the text.
    """

    value: float
    window_nll: tuple[float, ...]
    windows: int
    length: int
    stride: int
    tokens: int
    dtype: str
    text: str


@dataclass(frozen=True)
class Interval:
    """A difference (or ratio) with its paired bootstrap interval at ``level``."""

    value: float
    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the dense one on the same windows: mean KL(dense || model) in nats per token,
    and the share of positions whose most likely next token agrees."""

    kl: float
    top1: float
    kl_interval: Interval
    top1_interval: Interval


@dataclass(frozen=True)
class Generation:
    """Greedy continuation of one prompt."""

    prompt: str
    text: str
    new_tokens: int


@dataclass(frozen=True)
class Choices:
    """Multiple choice by length-normalised log-likelihood (and unnormalised)."""

    accuracy_norm: float
    accuracy: float
    items: int
    correct_norm: tuple[bool, ...]
    source: str


@dataclass(frozen=True)
class Size:
    """What the model weighs. MACs are per token at the stated context length; KV bytes per token in ``dtype``."""

    parameters: int
    nonzero: int
    bytes: int
    macs_per_token: int
    kv_bytes_per_token: int
    context: int
    dtype: str


@dataclass(frozen=True)
class Timing:
    """Median seconds and the spread (first and third quartile) of repeated interleaved runs."""

    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class Latency:
    """Prefill of ``prompt_tokens`` tokens and decode per token, one batch; peak resident bytes of a process
    that does only this."""

    prefill: Timing
    decode_per_token: Timing
    prompt_tokens: int
    new_tokens: int
    batch: int
    threads: int
    device: str
    dtype: str
    peak_rss: int | None = None


@dataclass(frozen=True)
class Measurement:
    """Everything measured of one model."""

    model: str
    size: Size
    perplexity: Perplexity | None = None
    divergence: Divergence | None = None
    choices: Choices | None = None
    tasks: dict[str, float] = field(default_factory=dict)
    generations: tuple[Generation, ...] = ()
    latency: Latency | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A model against the first (dense) one, with paired bootstrap intervals. Ratios are model / dense."""

    perplexity_ratio: Interval | None = None
    choices_difference: Interval | None = None
    prefill_speedup: float | None = None
    decode_speedup: float | None = None
