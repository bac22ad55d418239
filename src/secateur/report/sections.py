"""The page's sections, top to bottom. Each takes a report and returns markup, or None when it has nothing to say."""

from __future__ import annotations

from types import MappingProxyType

from secateur.measure.types import Generation, Measurement
from secateur.report import curves, plots_measured, plots_where
from secateur.report.markup import Child, Markup, el
from secateur.report.model import Report, StepRecord
from secateur.report.numbers import change, count, percent, perplexity, seconds, short, times
from secateur.report.story import VERBS, Entry, lead, ledger, overlap, removed, title, units
from secateur.report.tables import table

HATCH = Markup(
    '<svg width="0" height="0" aria-hidden="true" class="unseen"><defs>'
    '<pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<line x1="0" y1="0" x2="0" y2="5" class="hatch-line"/></pattern></defs></svg>'
)
MARK = Markup(
    '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M12 22V12"/><path d="M12 15C7 15 5 12 5 8c4 0 7 2 7 7z"/>'
    '<path class="snip" d="M14 9l6-6M15 3.5l5 5"/></svg>'
)

GONE = MappingProxyType({"cut": "removed", "mask": "set to zero", "plan": "to go"})


def top(report: Report) -> Markup:
    """The brand, and the way from the model to the result."""
    route = [report.model, " → ", report.out]
    if report.provenance.date:
        route.append(f", {report.provenance.date[:10]}")
    brand = el("span", {"class": "brand"}, MARK, "Secateur")
    return el("header", {"class": "top"}, brand, el("span", {"class": "route"}, route))


def hero(report: Report) -> Markup:
    """The headline, what it cost and brought, and the numbers to remember."""
    chips = [
        el("ul", {"class": "chips"}, [el("li", None, f"{slot} ", el("b", None, part)) for slot, part in parts])
        for parts in ((("space", s.space), *(s.chain or {"method": s.method}).items()) for s in report.steps)
    ]
    return el(
        "div",
        {"class": "hero"},
        el("h1", None, _tight(title(report))),
        el("p", {"class": "lead"}, _tight(" ".join(lead(report)))),
        chips,
    )


def _tight(words: str) -> str:
    """Keeps a number and its percent sign on one line."""
    return words.replace(" %", "\u00a0%")


def tiles(report: Report) -> Markup | None:
    """Large numbers with their units."""
    out: list[Markup] = []
    for step in report.steps:
        gone, total = removed(step)
        if total:
            word = (
                VERBS[step.apply].removeprefix("are ") if step.apply != "mask" or step.space == "weight" else "silenced"
            )
            share = percent(gone / total)
            out.append(_tile(f"{units(step.space)} {word}", share, f"{count(gone)} of {count(total)}"))
    dense, pruned = report.dense, report.pruned
    if pruned:
        out += _measured_tiles(report, dense, pruned)
    columns = next((n for n in (6, 5, 4, 3) if len(out) % n == 0), 4) if len(out) > 2 else max(len(out), 1)
    return el("div", {"class": "tiles", "style": f"--columns:{columns}"}, out) if out else None


def _tile(label: str, figure: str, note: str) -> Markup:
    number, _, unit = figure.partition(" ")
    small = el("small", None, unit) if unit else None
    return el("div", {"class": "tile"}, el("span", None, label), el("b", None, number, small), el("span", None, note))


def _measured_tiles(report: Report, dense: Measurement | None, pruned: Measurement) -> list[Markup]:
    out = []
    ratio = report.comparison.perplexity_ratio if report.comparison else None
    size, was = pruned.size, dense.size if dense else pruned.size
    if pruned.perplexity:
        note = "held-out text"
        if dense and dense.perplexity:
            a, b = dense.perplexity.value, pruned.perplexity.value
            note = f"dense {perplexity(a)}, {times(ratio.value if ratio else b / a)}"
        out.append(_tile("perplexity", perplexity(pruned.perplexity.value), note))
    if pruned.divergence:
        kl = f"KL {pruned.divergence.kl:.3f} nats a token"
        out.append(_tile("same next token", percent(pruned.divergence.top1), kl))
    if pruned.choices:
        note = f"dense {percent(dense.choices.accuracy_norm)}" if dense and dense.choices else pruned.choices.source
        out.append(_tile("multiple choice", percent(pruned.choices.accuracy_norm), note))
    zeros = f"{short(size.nonzero)} non-zero"
    note = zeros if was.parameters == size.parameters else f"{change(was.parameters, size.parameters)}; {zeros}"
    out.append(_tile("parameters", short(size.parameters), note))
    out.append(_tile("file", short(size.bytes, "B"), change(was.bytes, size.bytes)))
    if pruned.latency:
        note = f"on {pruned.latency.threads} threads" if pruned.latency.device == "cpu" else pruned.latency.device
        if dense and dense.latency:
            slow, quick = dense.latency.decode_per_token, pruned.latency.decode_per_token
            note = f"{times(slow.median / quick.median)} as fast" + (", within spread" if overlap(slow, quick) else "")
        out.append(_tile("decoding, a token", seconds(pruned.latency.decode_per_token.median), note))
    return out


def balance(report: Report) -> Markup | None:
    """Gains, losses, and what did not change."""
    entries = ledger(report)
    if not entries:
        return None
    columns = [
        el("div", {"class": kind}, el("h3", None, head), el("ul", None, [_entry(e) for e in entries if e.kind == kind]))
        for kind, head in (("loss", "What it cost"), ("gain", "What it brought"), ("same", "What stayed the same"))
        if any(e.kind == kind for e in entries)
    ]
    intro = "Every measured difference. Where the interval or the spread allows for none, it counts as the same."
    return _section("The balance", el("p", None, intro), el("div", {"class": "ledger"}, columns))


def _entry(entry: Entry) -> Markup:
    detail = el("i", None, entry.detail) if entry.detail else None
    return el("li", None, el("span", None, entry.what), el("b", None, entry.figure), detail)


def where(report: Report) -> Markup | None:
    """Where the weights went, layer by layer, for each step."""
    if not any(s.sites for s in report.steps):
        return None
    parts = [
        _where(s, f"Step {i}. " if len(report.steps) > 1 else "") for i, s in enumerate(report.steps, 1) if s.sites
    ]
    return _section("Where the weights went", parts, _untouched(report))


def _untouched(report: Report) -> Markup | None:
    """The parameters that no step could choose, so that shares of the weights are not read as shares of the model."""
    first = next(s for s in report.steps if s.sites)
    if report.dense is None or first is not report.steps[0]:
        return None
    rest = report.dense.size.parameters - sum(s.parameters for s in first.sites)
    if rest <= 0:
        return None
    share = percent(rest / report.dense.size.parameters)
    words = "The first step" if len(report.steps) > 1 else "This"
    return el("p", None, f"{words} leaves the model's other {count(rest)} parameters ({share}) as they are.")


def _where(step: StepRecord, number: str) -> Markup:
    gone, total = removed(step)
    share = plots_where.even(step)
    rows = len(plots_where.by_kind(step))
    said = f"{count(total - gone)} of {count(total)} {units(step.space)} stay"
    said += f", the same share everywhere: {percent(share, 2)}." if share is not None else ", chosen unevenly."
    names = [n for n in plots_where.COMPONENTS if any(n in p for p in plots_where.by_layer(step).values())]
    keys = [el("li", None, el("span", {"class": n}), f"{plots_where.WORDS[n]}, kept") for n in names]
    gone_word = GONE[step.apply]
    keys.append(el("li", None, el("span", {"class": "gone"}), gone_word))
    out: list[Child] = [
        el("p", None, number, said),
        el("p", {"class": "words"}, el("code", None, step.words)) if step.words else None,
        el("figure", None, plots_where.layers(step), el("ul", {"class": "key"}, keys)),
    ]
    if rows > 1 and share is None:
        caption = "Share kept for each kind of matrix. The stronger the colour, the more stayed."
        out.append(el("figure", None, plots_where.kinds(step), el("figcaption", None, caption)))
    body = [
        [str(block), *[f"{count(round(k))} of {count(round(t))}" for k, t in parts.values()]]
        for block, parts in plots_where.by_layer(step).items()
    ]
    heads = ["layer", *[f"{plots_where.WORDS[n]} parameters" for n in names]]
    if all(len(row) == len(heads) for row in body):
        out.append(_numbers(table(heads, body)))
    return el("div", {"class": "step"}, out)


def quality(report: Report) -> Markup | None:
    """Window by window, and the curve with its cliff."""
    dense, pruned = report.dense, report.pruned
    parts: list[Child] = []
    if dense and pruned and dense.perplexity and pruned.perplexity and pruned.perplexity.window_nll:
        p = pruned.perplexity
        how = f"{p.windows} windows of {count(p.length)} tokens of {p.text}, run in {p.dtype}; lower is better."
        key = el(
            "ul",
            {"class": "key"},
            el("li", None, el("span", {"class": "dense"}), f"dense, {perplexity(dense.perplexity.value)} over all"),
            el("li", None, el("span", {"class": "c0"}), f"pruned, {perplexity(p.value)} over all"),
        )
        parts.append(el("p", None, how))
        parts.append(el("figure", None, plots_measured.windows(dense.perplexity, p), key))
    for curve in report.curves:
        if curve.points:
            parts.append(_curve(curve))
    return _section("Quality", *parts) if parts else None


def _curve(curve: curves.Curve) -> list[Child]:
    rows = [[percent(p.sparsity), perplexity(p.perplexity)] for p in curve.points]
    caption = " ".join(w for w in (curve.note, "The axis is logarithmic.") if w)
    return [
        el("h3", {"style": "margin-top:34px"}, f"Perplexity against sparsity: {curve.label}"),
        el("p", None, curves.advice(curve)),
        el("figure", None, curves.plot((curve,)), el("figcaption", None, caption)),
        _numbers(table(["removed", "perplexity"], rows)),
    ]


def cost(report: Report) -> Markup | None:
    """Sizes and times, dense beside pruned."""
    dense, pruned = report.dense, report.pruned
    if dense is None or pruned is None:
        return None
    parts = [el("div", None, el("h3", None, "Size"), el("figure", None, plots_measured.sizes(dense.size, pruned.size)))]
    if dense.latency and pruned.latency:
        t = pruned.latency
        caption = (
            f"Batch of {t.batch} on {t.device}, {t.threads} threads, {t.dtype}; {t.new_tokens} tokens decoded after a "
            f"prompt of {count(t.prompt_tokens)}. Median of {t.decode_per_token.repeats} interleaved repeats; "
            "the whisker is the middle half."
        )
        plot = plots_measured.speeds(dense.latency, t)
        figure = el("figure", None, plot, el("figcaption", None, caption))
        parts.append(el("div", None, el("h3", None, "Speed"), figure))
    return _section("Size and speed", el("div", {"class": "two", "style": "margin-top:18px"}, parts))


def generations(report: Report) -> Markup | None:
    """What the two models say to the same prompts."""
    dense, pruned = report.dense, report.pruned
    if pruned is None or not pruned.generations:
        return None
    others = {g.prompt: g for g in dense.generations} if dense else {}
    intro = "Greedy continuations of the same prompts. What both say before they part is grey."
    return _section("Side by side", el("p", None, intro), [_pair(others.get(g.prompt), g) for g in pruned.generations])


def _pair(dense: Generation | None, pruned: Generation) -> Markup:
    columns = []
    shared = _shared(dense.text, pruned.text) if dense else len(pruned.text)
    if dense and dense.text == pruned.text:
        columns.append(el("div", None, el("h3", None, "dense and pruned, word for word"), _said(pruned.text, shared)))
    else:
        for name, g in (("dense", dense), ("pruned", pruned)):
            if g:
                columns.append(el("div", None, el("h3", None, name), _said(g.text, shared)))
    prompt = el("p", {"class": "prompt"}, f"“{pruned.prompt}”")
    return el("div", {"class": "pair"}, prompt, el("div", {"class": "two"}, columns))


def _shared(a: str, b: str) -> int:
    """Characters that two texts have in common from their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _said(text: str, shared: int) -> Markup:
    both = el("span", None, text[:shared].lstrip()) if shared else None
    return el("p", {"class": "said"}, both, text[shared:] if shared else text.lstrip())


def _numbers(content: Markup) -> Markup:
    return el("details", None, el("summary", None, "The numbers"), el("div", {"class": "scroll"}, content))


def _section(head: str, *children: Child) -> Markup:
    return el("section", None, el("h2", None, head), *children)
