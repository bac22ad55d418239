"""The report in plain words: what was cut, what it cost, what it brought, and what did not change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from secateur.measure.types import Latency, Measurement, Size, Timing
from secateur.report.model import Report, StepRecord
from secateur.report.numbers import change, count, fraction, percent, perplexity, seconds, short, times

UNITS = MappingProxyType(
    {
        "weight": "weights",
        "ffn": "FFN neurons",
        "kv_group": "KV groups",
        "head": "query heads",
        "expert": "experts",
        "layer": "layers",
    }
)

VERBS = MappingProxyType({"cut": "are gone", "mask": "are zero", "plan": "would go"})
LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "nll")
UNSURE = "_stderr"  # lm-eval's suffix of a standard error


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: a gain, a loss, or something that stayed as it was."""

    kind: Literal["gain", "loss", "same"]
    what: str
    figure: str
    detail: str = ""


def units(space: str) -> str:
    """What the units of a space are called."""
    return UNITS.get(space, f"{space} units")


def removed(step: StepRecord) -> tuple[int, int]:
    """Units that went, and units that there were, over all sites of a step."""
    total = sum(s.total for s in step.sites)
    return total - sum(s.kept for s in step.sites), total


def title(report: Report) -> str:
    """What was cut, in one sentence a step: ``Half of the weights are zero.``"""
    return " ".join(_sentence(step) for step in report.steps) or "Nothing was pruned."


def lead(report: Report) -> tuple[str, ...]:
    """What it cost and what it brought, each a sentence, the honest ones about masks included."""
    dense, pruned = report.dense, report.pruned
    if any(step.apply == "plan" for step in report.steps):
        return ("This is a plan: it says what would stay, and no weight was touched.",)
    if dense is None or pruned is None:
        return ("The result was not measured against the dense model, so what this cost is not known.",)
    said = [_quality(report, dense, pruned), _weight(dense.size, pruned.size, _masked(report))]
    if dense.latency and pruned.latency:
        said.append(_speed(dense.latency, pruned.latency, _masked(report)))
    return tuple(s for s in said if s)


def ledger(report: Report) -> tuple[Entry, ...]:
    """Every measured difference, losses beside gains; empty without two measurements."""
    dense, pruned = report.dense, report.pruned
    if dense is None or pruned is None:
        return ()
    return (
        *_quality_entries(report, dense, pruned),
        *_size_entries(dense.size, pruned.size, _masked(report)),
        *_speed_entries(dense.latency, pruned.latency, _masked(report)),
    )


def overlap(a: Timing, b: Timing) -> bool:
    """Whether the middle halves of two timings overlap, so that their difference may be noise."""
    return a.low <= b.high and b.low <= a.high


def _sentence(step: StepRecord) -> str:
    gone, total = removed(step)
    name = units(step.space)
    if not gone:
        return f"All {name} stay."
    verb = VERBS[step.apply] if step.apply != "mask" or step.space == "weight" else "are silenced"
    if step.space == "layer" or total < 20:
        verb = verb.replace("are", "is", 1) if gone == 1 else verb
        return f"{count(gone)} of {count(total)} {name} {verb}."
    share = fraction(gone / total)
    return f"{share[0].upper()}{share[1:]} of the {name} {verb}."


def _masked(report: Report) -> bool:
    """Whether nothing became smaller: all steps put zeros."""
    return all(step.apply == "mask" for step in report.steps)


def _quality(report: Report, dense: Measurement, pruned: Measurement) -> str:
    if dense.perplexity is None or pruned.perplexity is None:
        return ""
    a, b = dense.perplexity.value, pruned.perplexity.value
    how = "rises" if b > a else "falls" if b < a else "stays"
    ratio = report.comparison.perplexity_ratio if report.comparison else None
    inside = f" ({times(b / a)})"
    if ratio:
        inside = f" ({times(ratio.value)}, {percent(ratio.level)} interval {times(ratio.low)} to {times(ratio.high)})"
    if how == "stays":
        return f"Perplexity stays at {perplexity(a)}."
    return f"Perplexity {how} from {perplexity(a)} to {perplexity(b)}{inside}."


def _weight(a: Size, b: Size, masked: bool) -> str:
    if a.bytes == b.bytes and a.parameters == b.parameters:
        why = ": zeros stay in the file like any other number" if masked and b.nonzero < a.nonzero else ""
        return f"The file is as large as before, {short(b.bytes, 'B')}{why}."
    return (
        f"Parameters go from {short(a.parameters)} to {short(b.parameters)} ({change(a.parameters, b.parameters)}), "
        f"the file from {short(a.bytes, 'B')} to {short(b.bytes, 'B')} ({change(a.bytes, b.bytes)})."
    )


def _speed(a: Latency, b: Latency, masked: bool) -> str:
    before, after = a.decode_per_token.median, b.decode_per_token.median
    if overlap(a.decode_per_token, b.decode_per_token):
        why = ", because ordinary kernels multiply zeros too" if masked else " that this measurement can tell"
        return f"It does not decode faster{why} ({times(before / after)}, within the spread)."
    note = ". Zeros alone should not change that, so take it as noise of the machine" if masked else ""
    return (
        f"It decodes {times(before / after)} and reads a prompt {times(a.prefill.median / b.prefill.median)} as fast "
        f"({seconds(before)} to {seconds(after)} a token){note}."
    )


def _quality_entries(report: Report, dense: Measurement, pruned: Measurement) -> list[Entry]:
    out: list[Entry] = []
    comparison = report.comparison
    if dense.perplexity and pruned.perplexity:
        a, b = dense.perplexity.value, pruned.perplexity.value
        ratio = comparison.perplexity_ratio if comparison else None
        kind: Literal["gain", "loss", "same"] = "loss" if b > a else "gain" if b < a else "same"
        if ratio and ratio.low <= 1 <= ratio.high:
            kind = "same"
        spread = f"{percent(ratio.level)} interval {times(ratio.low)} to {times(ratio.high)}" if ratio else ""
        out.append(Entry(kind, "Perplexity", f"{perplexity(a)} → {perplexity(b)}", spread))
    if pruned.divergence:
        d = pruned.divergence
        kl = f"KL divergence {d.kl:.3f} nats a token"
        kind = "same" if d.top1 == 1 and d.kl == 0 else "loss"
        out.append(Entry(kind, "Same next token", percent(d.top1), f"of positions; {kl}"))
    if dense.choices and pruned.choices:
        a, b = dense.choices.accuracy_norm, pruned.choices.accuracy_norm
        kind = "gain" if b > a else "loss" if b < a else "same"
        detail = f"{count(pruned.choices.items)} items of {pruned.choices.source}"
        difference = comparison.choices_difference if comparison else None
        if difference:
            if difference.low <= 0 <= difference.high:
                kind = "same"
            low, high = (f"{v * 100:+.1f}".replace("-", "−") for v in (difference.low, difference.high))
            detail += f"; difference {low} to {high} points ({percent(difference.level)} interval)"
        out.append(Entry(kind, "Multiple choice", f"{percent(a)} → {percent(b)}", detail))
    shared = sorted(dense.tasks.keys() & pruned.tasks.keys())
    return out + [_task(t, dense.tasks, pruned.tasks) for t in shared if UNSURE not in t]


def _task(task: str, dense: Mapping[str, float], pruned: Mapping[str, float]) -> Entry:
    """A task of the harness; within two joint standard errors (unpaired, so on the safe side) it is the same."""
    a, b = dense[task], pruned[task]
    worse = b > a if any(word in task for word in LOWER_IS_BETTER) else b < a
    name, at, chosen = task.partition("@")
    error = f"{name}{UNSURE}{at}{chosen}"
    kind: Literal["gain", "loss", "same"] = "same" if a == b else "loss" if worse else "gain"
    if error not in dense or error not in pruned:
        return Entry(kind, task, f"{a:.4g} → {b:.4g}", "no interval")
    spread = math.hypot(dense[error], pruned[error])
    kind = "same" if abs(b - a) <= 2 * spread else kind
    return Entry(kind, task, f"{a:.4g} → {b:.4g}", f"standard error of the difference {spread:.2g}")


def _size_entries(a: Size, b: Size, masked: bool) -> list[Entry]:
    rows = (
        ("Parameters", a.parameters, b.parameters, short(a.parameters), short(b.parameters), ""),
        ("Non-zero parameters", a.nonzero, b.nonzero, short(a.nonzero), short(b.nonzero), ""),
        ("File", a.bytes, b.bytes, short(a.bytes, "B"), short(b.bytes, "B"), "zeros are stored" if masked else ""),
        (
            "MACs a token",
            a.macs_per_token,
            b.macs_per_token,
            short(a.macs_per_token),
            short(b.macs_per_token),
            f"context of {count(b.context)}" + ("; zeros are multiplied" if masked else ""),
        ),
        (
            "KV cache a token",
            a.kv_bytes_per_token,
            b.kv_bytes_per_token,
            short(a.kv_bytes_per_token, "B"),
            short(b.kv_bytes_per_token, "B"),
            f"in {b.dtype}",
        ),
    )
    out = []
    for what, before, after, old, new, note in rows:
        if before == after:
            out.append(Entry("same", what, new, note))
        else:
            kind: Literal["gain", "loss"] = "gain" if after < before else "loss"
            out.append(Entry(kind, what, f"{old} → {new}", change(before, after)))
    return out


def _speed_entries(a: Latency | None, b: Latency | None, masked: bool) -> list[Entry]:
    if a is None or b is None:
        return []
    out = []
    kind: Literal["gain", "loss"]
    for what, before, after in (
        (f"Prefill of {count(b.prompt_tokens)} tokens", a.prefill, b.prefill),
        ("Decoding, a token", a.decode_per_token, b.decode_per_token),
    ):
        figure = f"{seconds(before.median)} → {seconds(after.median)}"
        ratio = times(before.median / after.median)
        if overlap(before, after):
            out.append(Entry("same", what, figure, f"{ratio} as fast; the spreads overlap"))
        else:
            kind = "gain" if after.median < before.median else "loss"
            out.append(Entry(kind, what, figure, f"{ratio} as fast"))
    if a.peak_rss and b.peak_rss:
        old, new = short(a.peak_rss, "B"), short(b.peak_rss, "B")
        if abs(b.peak_rss / a.peak_rss - 1) < 0.01:
            out.append(Entry("same", "Peak memory", new, "to within one percent"))
        else:
            kind = "gain" if b.peak_rss < a.peak_rss else "loss"
            out.append(Entry(kind, "Peak memory", f"{old} → {new}", change(a.peak_rss, b.peak_rss)))
    return out
