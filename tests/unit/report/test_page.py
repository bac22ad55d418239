"""The page: complete, self-contained, valid, safe to show, and readable."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import re
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest

from secateur.measure.types import Measurement, Perplexity
from secateur.report import Report, SiteRecord, StepRecord, page
from secateur.report.markup import Markup, el
from secateur.report.plots_where import by_kind, kinds
from secateur.report.tables import measured

VOID = {"meta", "br", "hr", "link", "img", "input", "col", "circle", "path", "line"}
HOSTILE = "</title></style></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;`${x}`\x00\ud800"
# Fields whose words choose a drawing rather than appear in one.
STRUCTURE = {"apply", "component", "unit", "loader", "space"}


class Tags(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} repeats an attribute: {names}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.setdefault(self.open[-1] if self.open else "", []).append(data)

    @property
    def text(self) -> str:
        """Everything a reader can see."""
        hidden = {"script", "style"}
        return " ".join(w for tag, words in self.words.items() if tag not in hidden for w in words)


def replaced(value: Any, words: str, name: str = "") -> Any:
    """The same data with every text replaced, keys of free-form objects included."""
    if isinstance(value, str):
        return value if name in STRUCTURE else words
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: replaced(getattr(value, f.name), words, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {words + str(i): replaced(v, words) for i, v in enumerate(value.values())}
    if isinstance(value, list | tuple):
        return type(value)(replaced(v, words) for v in value)
    return value


def test_pages_are_balanced(masked: Report, cut: Report) -> None:
    for report in (masked, cut, Report("model", "out"), dataclasses.replace(masked, measurements=())):
        assert page(report).startswith("<!DOCTYPE html>\n<html lang=")
        assert "nan" not in Tags(page(report)).text.lower().split()


def test_the_numbers_are_there(masked: Report, cut: Report) -> None:
    text = Tags(page(masked)).text
    dense, pruned = masked.measurements
    for m in (dense, pruned):
        assert m.perplexity
        assert m.latency
        expected = [m.size.parameters, m.size.nonzero, m.size.bytes, m.size.macs_per_token, m.size.kv_bytes_per_token]
        for number in expected:
            assert f"{number:,}" in text
        assert f"{m.perplexity.value:.2f}" in text
    for words in ("Half of the weights are zero.", "×1.63", "×1.58 to ×1.68", "71.13 %", "0.4172", "53,084,160"):
        assert words in text
    for p in masked.curves[0].points:
        assert f"{p.perplexity:.2f}" in text
    for words in (*masked.provenance.versions.values(), *masked.provenance.hashes.values(), *masked.notes):
        assert words in text
    assert masked.provenance.command in text
    assert "samples: 64" in text
    for g in pruned.generations:
        assert g.prompt in text
    assert "A quarter of the FFN neurons are gone." in Tags(page(cut)).text


def test_the_loader_is_explained(masked: Report, cut: Report) -> None:
    assert "plain Transformers is enough" in Tags(page(cut)).text
    assert "sizes of their own" in Tags(page(dataclasses.replace(cut, loader="secateur.load"))).text
    packed = dataclasses.replace(masked, loader="secateur.load", recipe=masked.recipe | {"pack": "bf16"})
    text = Tags(page(packed)).text
    assert "weights are packed" in text and "sizes of their own" not in text


def test_every_layer_has_its_tip(masked: Report) -> None:
    titles = Tags(page(masked)).words["title"]
    for block in range(30):
        assert any(t.startswith(f"Layer {block}\n") and "442,368 of 884,736" in t for t in titles)


def test_hostile_text_changes_no_tag(masked: Report) -> None:
    calm, hostile = page(replaced(masked, "word")), page(replaced(masked, HOSTILE))
    a, b = Tags(calm), Tags(hostile)
    assert a.tags == b.tags
    assert [(tag, name) for tag, name, _ in a.attributes] == [(tag, name) for tag, name, _ in b.attributes]
    assert b.tags.count("script") == 1
    assert b.words["script"] == Tags(page(masked)).words["script"]
    assert "<script>alert(1)</script>" in b.text  # shown, not run
    hostile.encode()  # no lone surrogate is left
    assert "\x00" not in hostile


def test_nothing_is_fetched_and_nothing_else_may_run(masked: Report) -> None:
    text = page(masked)
    parsed = Tags(text)
    assert not re.search(r"https?:|//[a-z]|@import", text.replace("// Native", ""))
    assert set(re.findall(r"url\([^)]*\)", text)) <= {"url(#hatch)"}
    assert not {name for _, name, _ in parsed.attributes} & {"src", "href", "srcset", "action", "data"}
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    script = "".join(parsed.words["script"])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(
        v for tag, name, v in parsed.attributes if tag == "meta" and name == "content" and "default-src" in (v or "")
    )
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_plots_are_named_and_reachable_by_keyboard(masked: Report) -> None:
    for svg in re.findall(r"<svg [^>]*>", page(masked)):
        assert 'aria-hidden="true"' in svg or ('aria-label="' in svg and 'tabindex="0"' in svg)


def test_bars_show_the_shares(masked: Report, cut: Report) -> None:
    for report, share in ((masked, 0.5), (cut, 0.75)):
        plot = page(report).split("Parameters kept and removed in each layer")[1].split("</svg>")[0]
        bars = re.findall(r'<rect [^>]*height="([\d.]+)"[^>]*class="(kept|gone)', plot)
        heights = {kind: sum(float(h) for h, k in bars if k == kind) for kind in ("kept", "gone")}
        assert heights["kept"] / (heights["kept"] + heights["gone"]) == pytest.approx(share, abs=2e-3)


def test_overflow_and_a_single_measurement_are_drawn(masked: Report) -> None:
    last: Measurement = masked.measurements[-1]
    assert last.perplexity
    burst = Perplexity(math.inf, tuple(1e4 for _ in last.perplexity.window_nll), 24, 512, 512, 1, "float16", "text")
    report = dataclasses.replace(
        masked, measurements=(masked.measurements[0], dataclasses.replace(last, perplexity=burst)), comparison=None
    )
    assert "to ∞" in Tags(page(report)).text
    alone = dataclasses.replace(masked, measurements=(last,), comparison=None)
    assert "not measured against the dense model" in Tags(page(alone)).text


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, WCAG 2.1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", [0, 1])
def test_text_has_contrast_in_both_modes(mode: int) -> None:
    css = files("secateur.report").joinpath("assets", "page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(blocks) == 2
    colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[mode]))
    for back in ("paper", "card"):
        for front in ("ink", "soft", "gain", "loss", "green", "rust", "amber"):
            low, high = sorted((luminance(colour[back]), luminance(colour[front])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{front} on {back}"
        for shape in ("sage", "other", "grey"):  # WCAG 1.4.11, shapes one must see; sage borders on darker green
            low, high = sorted((luminance(colour[back]), luminance(colour[shape])))
            assert (high + 0.05) / (low + 0.05) >= (3.0 if shape != "sage" else 2.2), f"{shape} on {back}"


def test_markup_escapes_text_and_attributes() -> None:
    built = el("p", {"title": '"><b x="', "hidden": True, "lang": None}, "<i>", Markup("<br>"), ["&", 3, None])
    assert built == '<p title="&quot;&gt;&lt;b x=&quot;" hidden>&lt;i&gt;<br>&amp;3</p>'
    assert el("rect", {"x": 1.5, "y": 2.0, "width": 0.333}) == '<rect x="1.5" y="2" width="0.33"></rect>'


def test_the_table_has_every_number_in_its_row(masked: Report) -> None:
    rows = {row[0]: row[1:] for row in measured(masked)}
    assert rows["Bytes on disk"] == ["538,090,408", "538,090,408", "unchanged"]
    assert rows["Parameters"] == ["134,515,008", "134,515,008", "unchanged"]
    assert rows["Non-zero parameters"] == ["134,515,001", "81,430,841", "−39.5 %"]
    assert rows["MACs a token"][0] == "162,826,560"
    assert rows["KV-cache bytes a token"][1] == "46,080"
    assert rows["Multiple choice, length-normalised"] == ["68.4 %", "63.1 %", "−5.3 points"]
    assert rows["Multiple choice, plain"] == ["67.1 %", "62.8 %", "−4.3 points"]
    assert rows["Same next token"] == ["—", "71.13 %", "—"]
    assert rows["Prefill"][0] == "812.0 ms"
    assert rows["Decoding, a token"][0] == "21.3 ms"


def test_the_map_adds_experts_up_and_darkens_with_the_share() -> None:
    sites = tuple(
        SiteRecord(f"model.layers.{b}.mlp.experts.{e}.up.weight", b, "ffn", 10 * b + e, 100, 100)
        for b in range(8)
        for e in range(3)
    )
    step = StepRecord("weight", "x", "0.4", "mask", sites=sites)
    assert by_kind(step) == {"mlp.experts.up": {b: (30 * b + 3, 300) for b in range(8)}}
    drawn = kinds(step)
    cells = re.findall(
        r"<title>Layer (\d), mlp.experts.up\n(\d+) of 300 stay [^<]*</title><rect [^>]*heat h(\d)", drawn
    )
    assert {(int(b), int(k)) for b, k, _ in cells} == {(b, 30 * b + 3) for b in range(8)}
    levels = [int(level) for _, _, level in cells[:8]]
    assert levels == sorted(levels)
    assert levels[0] < levels[-1]
