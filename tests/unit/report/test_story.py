"""What the report says in words, against cases one can check by hand."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import yaml

from secateur.measure.types import Interval
from secateur.report import Curve, CurvePoint, Report, SiteRecord, StepRecord, card, page
from secateur.report.curves import advice, reach
from secateur.report.numbers import change, count, fraction, percent, perplexity, seconds, short, times
from secateur.report.story import lead, ledger, title
from secateur.report.svg import log_ticks, nice_ticks


def step(space: str, kept: int, total: int, apply: str) -> StepRecord:
    return StepRecord(space, "x", "x", apply, sites=(SiteRecord("s", 0, "ffn", kept, total, total),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ((), "Nothing was pruned."),
        ((step("weight", 500, 1000, "mask"),), "Half of the weights are zero."),
        ((step("weight", 625, 1000, "mask"),), "37.5 % of the weights are zero."),
        ((step("ffn", 750, 1000, "mask"),), "A quarter of the FFN neurons are silenced."),
        ((step("kv_group", 60, 90, "cut"),), "A third of the KV groups are gone."),
        ((step("layer", 22, 30, "cut"),), "8 of 30 layers are gone."),
        ((step("layer", 29, 30, "cut"),), "1 of 30 layers is gone."),
        ((step("weight", 10, 10, "mask"),), "All weights stay."),
        ((step("weight", 500, 1000, "plan"),), "Half of the weights would go."),
        (
            (step("ffn", 750, 1000, "cut"), step("weight", 500, 1000, "mask")),
            "A quarter of the FFN neurons are gone. Half of the weights are zero.",
        ),
    ],
)
def test_title(steps: tuple[StepRecord, ...], says: str) -> None:
    assert title(Report("m", "o", steps=steps)) == says


def test_a_mask_claims_no_speed_and_no_smaller_file(masked: Report) -> None:
    said = " ".join(lead(masked))
    assert "as large as before" in said
    assert "does not decode faster" in said
    gains = {e.what for e in ledger(masked) if e.kind == "gain"}
    assert gains == {"Non-zero parameters"}
    assert {"Perplexity", "Same next token", "Multiple choice"} == {e.what for e in ledger(masked) if e.kind == "loss"}


def test_a_cut_claims_what_was_measured(cut: Report) -> None:
    said = " ".join(lead(cut))
    assert "It decodes ×1.17 and reads a prompt ×1.17 as fast" in said
    assert "(−14.8 %)" in said  # 1 - 114,608,448 / 134,515,008 = 0.14799
    gains = {e.what for e in ledger(cut) if e.kind == "gain"}
    assert {"Parameters", "File", "MACs a token", "Decoding, a token"} <= gains


def test_an_interval_that_holds_one_is_no_loss(masked: Report) -> None:
    assert masked.comparison
    wide = dataclasses.replace(masked.comparison, perplexity_ratio=Interval(1.01, 0.98, 1.04))
    entry = next(e for e in ledger(dataclasses.replace(masked, comparison=wide)) if e.what == "Perplexity")
    assert entry.kind == "same"


def test_tasks_are_judged_by_their_standard_errors(masked: Report) -> None:
    dense, pruned = masked.measurements
    before = {"a/acc": 0.6, "a/acc_stderr": 0.02, "w/word_perplexity": 20.0, "b/acc@x": 0.5, "b/acc_stderr@x": 0.01}
    after = {"a/acc": 0.56, "a/acc_stderr": 0.02, "w/word_perplexity": 18.0, "b/acc@x": 0.4, "b/acc_stderr@x": 0.01}
    pair = (dataclasses.replace(dense, tasks=before), dataclasses.replace(pruned, tasks=after))
    found = {e.what: e.kind for e in ledger(dataclasses.replace(masked, measurements=pair)) if "/" in e.what}
    # 0.04 is within 2 x sqrt(2) x 0.02; 0.1 is not within 2 x sqrt(2) x 0.01; a lower perplexity is better
    assert found == {"a/acc": "same", "b/acc@x": "loss", "w/word_perplexity": "gain"}


def test_a_plan_claims_nothing(masked: Report) -> None:
    steps = tuple(dataclasses.replace(s, apply="plan") for s in masked.steps)
    report = dataclasses.replace(masked, steps=steps, measurements=(), comparison=None)
    assert lead(report) == ("This is a plan: it says what would stay, and no weight was touched.",)
    assert "from_pretrained" not in page(report)


def test_reach_is_exact_on_an_exponential() -> None:
    points = tuple(CurvePoint(s / 10, 20 * math.exp(3 * s / 10)) for s in range(8))
    curve = Curve("c", points)
    for ratio in (1.1, 1.5, 2.0, 7.0):
        assert reach(curve, ratio) == pytest.approx(math.log(ratio) / 3)
    assert reach(curve, 100) is None
    assert reach(Curve("c", points[::-1]), 2.0) == pytest.approx(math.log(2) / 3)


def test_reach_stops_before_an_overflow() -> None:
    curve = Curve("c", (CurvePoint(0, 20), CurvePoint(0.5, 21), CurvePoint(0.6, math.inf)))
    assert reach(curve, 2.0) == 0.5
    assert "At about 50 % it has doubled" in advice(curve)


@pytest.mark.parametrize("exponent", range(14))
@pytest.mark.parametrize("digits", [1.0, 1.2345, 5.555, 9.9949, 9.996])
def test_short_numbers_are_near_the_number(exponent: int, digits: float) -> None:
    n = round(digits * 10**exponent)
    number, _, prefix = short(n).partition(" ")
    scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[prefix]
    assert float(number) * scale == pytest.approx(n, rel=6e-3 if n >= 1000 else 1e-9)
    assert len(number) <= 5


def test_number_words() -> None:
    assert count(134515008) == "134,515,008"
    assert short(538_090_408, "B") == "538.1 MB"
    assert percent(0.375) == "37.5 %"
    assert percent(0.5) == "50 %"
    assert percent(0.3, 0) == "30 %"
    assert change(100, 80) == "−20 %"
    assert change(80, 100) == "+25 %"
    assert change(5, 5) == "unchanged"
    assert change(0, 5) == "—"
    assert perplexity(25.169) == "25.17"
    assert perplexity(12345.6) == "12,346"
    assert perplexity(math.inf) == "∞"
    assert times(1.626) == "×1.63"
    assert seconds(0.0213) == "21.3 ms"
    assert seconds(3.214) == "3.21 s"
    assert seconds(245) == "4 min 05 s"
    assert seconds(4320) == "1 h 12 min"
    assert fraction(0.3333) == "a third"
    assert fraction(0.3) == "30 %"


@pytest.mark.parametrize("high", [0.7, 1, 3.54, 99, 1e6, 3.2e9])
def test_ticks_are_inside(high: float) -> None:
    ticks = nice_ticks(high, 4)
    assert ticks[0] == 0
    assert high * 0.5 < ticks[-1] <= high * (1 + 1e-9)
    assert len(ticks) <= 5
    logs = log_ticks(high, high * 300, 6)
    assert 2 <= len(logs) <= 6
    assert all(high <= t <= high * 300 for t in logs)


def test_card(masked: Report) -> None:
    text = card(masked, base_model="someone/a-model")
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])  # type: ignore[index]
    assert front["base_model"] == "someone/a-model"
    assert front["library_name"] == "transformers"
    assert {"secateur", "pruned"} <= set(front["tags"])
    for m in masked.measurements:
        assert f"{m.size.nonzero:,}" in text
        assert m.perplexity
        assert f"{m.perplexity.value:.2f}" in text
    assert "AutoModelForCausalLM.from_pretrained" in text
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert block
    assert yaml.safe_load(block[1]) == masked.recipe


def test_card_keeps_paths_and_markup_out(cut: Report) -> None:
    report = dataclasses.replace(cut, model="/home/someone/models/a|b<i>", loader="secateur.load")
    text = card(report, base_model=report.model)
    assert "base_model" not in text
    assert "/home" not in text
    assert "# a\\|b\\<i\\>, pruned" in text
    assert "secateur.load(" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
