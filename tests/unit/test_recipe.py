"""Recipes: the issue's words, exact amounts, YAML that holds no surprises, refusals in one sentence."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secateur.errors import SecateurError
from secateur.methods.base import Amount
from secateur.recipe import MeasureRequest, Recipe, Step, TextSpec, diff, override, read_map, read_recipe
from secateur.step import MapRule
from secateur.words import Choice, Target, amount_word, read_choice, read_keep, read_protect, read_sparsity, read_target
from secateur.yamlfile import read_yaml

EXAMPLE = """
model: smollm2                                    # a recipe, in the same words
text: {source: builtin, samples: 64, length: 1024, seed: 0}
steps:
  - {space: ffn, score: wanda, grain: unit, keep: 0.75, apply: cut}
  - {space: weight, method: sparsegpt, sparsity: 0.5}
"""
WANDA = {"space": "weight", "score": "wanda"}


def words(**step: Any) -> dict[str, Any]:
    return {"model": "smollm2", "steps": [{**WANDA, **step}]}


def test_the_example_of_the_manual_reads_as_it_says() -> None:
    recipe = Recipe.from_yaml(EXAMPLE)
    first, second = recipe.steps
    assert recipe.model == "smollm2" and recipe.text == TextSpec("builtin", 64, 1024, 0)
    assert (first.space, first.score, first.grain, first.apply) == ("ffn", "wanda", "unit", "cut")
    assert first.amount == Amount(share=Decimal("0.75"))
    assert (second.method, second.grain, second.apply) == ("sparsegpt", "columns:128", "mask")
    assert second.amount == Amount(share=Decimal("0.5"))


def test_defaults_follow_the_kind_of_pruning() -> None:
    assert Step("weight", score="wanda", keep=0.5).grain == "row"
    assert Step("weight", method="sparsegpt", keep=0.5).grain == "columns:128"
    assert Step("kv_group", score="wanda", keep=2).grain == "unit"
    assert Step("weight", score="wanda", keep=0.5).apply == "mask"
    assert Step("layer", score="block_influence", keep=24).apply == "cut"


@pytest.mark.parametrize(
    ("given_", "amount"),
    [
        ("0.75", Amount(share=Decimal("0.75"))),
        ("75%", Amount(share=Decimal("0.75"))),
        (" 75 % ", Amount(share=Decimal("0.75"))),
        (0.1, Amount(share=Decimal("0.1"))),
        (1.0, Amount(share=Decimal(1))),
        ("1.", Amount(share=Decimal(1))),
        ("1", Amount(count=1)),
        (1, Amount(count=1)),
        ("1152", Amount(count=1152)),
        ("5e-1", Amount(share=Decimal("0.5"))),
        ("100%", Amount(share=Decimal(1))),
    ],
)
def test_keep_is_a_count_only_as_a_bare_integer(given_: object, amount: Amount) -> None:
    assert read_keep(given_) == amount


@given(st.integers(0, 10**6), st.integers(1, 5000))
def test_counts_are_exact_in_decimal_not_in_binary(millionths: int, n: int) -> None:
    share = Fraction(millionths, 10**6)
    if millionths < 10**6:
        kept = read_sparsity(f"{Decimal(millionths) / 10**6:f}").of(n)
        exact = (1 - share) * n
        assert kept == int(exact + Fraction(1, 2))  # half goes up
    if millionths:
        assert read_keep(f"0.{millionths:06d}" if millionths < 10**6 else "1.0").of(n) == int(
            share * n + Fraction(1, 2)
        )


@given(st.decimals(min_value=Decimal("1e-9"), max_value=1, places=9))
def test_an_amount_survives_being_written_down(share: Decimal) -> None:
    amount = read_keep(f"{share:f}")
    text = yaml.safe_dump({"keep": amount_word(amount)})
    again = read_keep(read_yaml(text, "it")["keep"])
    assert again == amount


@pytest.mark.parametrize(
    "bad",
    [
        "1.5",
        "-0.1",
        "0",
        "0.0",
        "nan",
        "inf",
        "",
        "half",
        "1/2",
        "٥",
        "0x1",
        True,
        [1],
        float("nan"),
        "1_0.5",
        "9" * 50,
    ],
)
def test_a_keep_that_is_none_is_refused_with_what_was_received(bad: object) -> None:
    with pytest.raises(SecateurError) as error:
        read_keep(bad)
    assert str(bad)[:20] in str(error.value) and ";" in str(error.value)


@pytest.mark.parametrize("bad", ["1.5", "1", "100%", "-0.5", "nan", "two"])
def test_a_sparsity_that_is_none_is_refused(bad: str) -> None:
    with pytest.raises(SecateurError, match="sparsity"):
        read_sparsity(bad)


@pytest.mark.parametrize(
    ("text", "target", "limit"),
    [
        ("params=100M", Target("params", at_most=100_000_000), 100_000_000),
        ("params=1.5B", Target("params", at_most=1_500_000_000), 1_500_000_000),
        ("params=-20%", Target("params", change=Decimal("-0.2")), 107_612_006),
        ("bytes=90MB", Target("bytes", at_most=90_000_000), 90_000_000),
        ("bytes=90MiB", Target("bytes", at_most=94_371_840), 94_371_840),
    ],
)
def test_targets(text: str, target: Target, limit: int) -> None:
    assert read_target(text) == target
    assert read_target(text).limit(134_515_008) == limit


@pytest.mark.parametrize(
    "bad",
    [
        "100M",
        "params=",
        "params=20%",
        "params=-100%",
        "params=-200%",
        "params=90MB",
        "bytes=1.2.3",
        "speed=2x",
        "params=0",
        5,
    ],
)
def test_targets_refused(bad: object) -> None:
    with pytest.raises(SecateurError, match=r"target|number"):
        read_target(bad)


def test_a_name_carries_its_options() -> None:
    owl = Choice("owl", (("M", 5), ("lambda", 0.08)))
    assert (
        read_choice("owl:M=5,lambda=0.08", "budget")
        == owl
        == read_choice({"name": "owl", "M": 5, "lambda": 0.08}, "budget")
    )
    assert read_choice(str(owl), "budget") == owl
    assert read_choice("my.module:MyScore", "score") == Choice("my.module:MyScore")
    assert read_choice("my.module:MyScore:p=2,deep=true", "score") == Choice(
        "my.module:MyScore", (("p", 2), ("deep", True))
    )
    for bad in (
        "owl:M=",
        "owl:=5",
        "owl:M=5,M=6",
        "",
        5,
        {"M": 5},
        {"name": "owl", "M": [1]},
        {"name": "owl", "M": "a,b"},
    ):
        with pytest.raises(SecateurError):
            read_choice(bad, "budget")


def test_protected_ends() -> None:
    assert read_protect("first:2,last:1") == (2, 1) and read_protect("last:3") == (0, 3)
    for bad in ("first", "first:-1", "middle:2", "2", 2, ""):
        with pytest.raises(SecateurError):
            read_protect(bad)


CONTRADICTIONS = [
    (words(keep=0.5, sparsity=0.4), "keep and sparsity disagree"),
    (words(sparsity=1.5), "outside"),
    (words(keep=0.5, target="params=100M"), "more than once"),
    (words(keep=0.5, at_most_worse="5%"), "more than once"),
    (words(), "not said"),
    (words(grain="2:4", keep=0.6), "contradicts n:m"),
    (words(grain="4:2"), "n:m keeps n"),
    (words(grain="2:4", budget="owl"), "fixes the count"),
    (words(grain="unit", keep=0.5), "no units"),
    (words(grain="rows", keep=0.5), "grain"),
    (words(apply="cut", keep=0.5), "cannot be cut"),
    (words(apply="slice", keep=0.5), "did you mean|known are"),
    (words(method="sparsegpt", keep=0.5), "both say"),
    ({"model": "m", "steps": [{"space": "weight", "keep": 0.5}]}, "neither score nor method"),
    ({"model": "m", "steps": [{"space": "ffn", "method": "sparsegpt", "keep": 0.5}]}, "joint method"),
    ({"model": "m", "steps": [{"space": "ffn", "score": "wanda", "grain": "row", "keep": 0.5}]}, "whole units"),
    ({"model": "m", "steps": [{"space": "expert", "score": "wanda", "keep": 4, "apply": "mask"}]}, "cannot be saved"),
    ({"model": "m", "steps": [{"space": "neurons", "score": "wanda", "keep": 0.5}]}, "unknown space"),
    ({"model": "m", "steps": [{"score": "wanda", "keep": 0.5}]}, "no space"),
    ({"model": "m", "steps": []}, "no steps"),
    ({"model": "m"}, "no steps"),
    ({"model": "m", "steps": "wanda"}, "not a list"),
    ({"model": "m", "steps": ["wanda"]}, "mapping"),
    ({"steps": [{**WANDA, "keep": 0.5}]}, "no model"),
    ({"model": 5, "steps": [{**WANDA, "keep": 0.5}]}, "model is not text"),
    ({"model": "", "steps": [{**WANDA, "keep": 0.5}]}, "empty"),
    (words(keep=0.5, map=[{"match": "ffn", "keep": 1.5}]), "outside"),
    (words(map=[{"match": "ffn"}]), "map rule"),
    (words(map="ffn"), "list of rules"),
    (words(map=[{"match": "ffn", "keep": 0.5}], budget="owl"), "already says"),
    (words(keep=0.5, include=[1]), "pattern"),
    (words(keep=0.5, protect="middle:1"), "end to protect"),
    ({**words(keep=0.5), "dtype": "fp8"}, "unknown dtype"),
    ({**words(keep=0.5), "device": "tpu"}, "unknown device"),
    ({**words(keep=0.5), "threads": 0}, "threads"),
    ({**words(keep=0.5), "batch_size": 2.5}, "batch_size"),
    ({**words(keep=0.5), "seed": -1}, "seed"),
    ({**words(keep=0.5), "measure": "no"}, "true or false"),
    ({**words(keep=0.5), "text": {"samples": 0}}, "samples"),
    ({**words(keep=0.5), "text": {"samples": "many"}}, "samples"),
    ({**words(keep=0.5), "text": {"sample": 8}}, "did you mean 'samples'"),
    ({**words(keep=0.5), "text": [1]}, "mapping"),
    ({**words(keep=0.5), "modle": "x"}, "did you mean 'model'"),
    (words(keep=0.5, sparcity=0.5), "did you mean 'sparsity'"),
    ({"model": "m", "steps": [{**WANDA, "at_most_worse": "5%"}, {**WANDA, "keep": 0.5}]}, "one step"),
]


@pytest.mark.parametrize(("bad", "says"), CONTRADICTIONS, ids=[says for _, says in CONTRADICTIONS])
def test_contradictions_are_refused_in_one_sentence(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(SecateurError, match=says) as error:
        Recipe.from_words(bad)
    assert "\n" not in str(error.value)


def test_what_agrees_is_not_refused() -> None:
    assert Recipe.from_words(words(keep=0.5, sparsity=0.5)).steps[0].amount == Amount(share=Decimal("0.5"))
    assert Recipe.from_words(words(grain="2:4", sparsity=0.5)).steps[0].pattern == (2, 4)
    assert Recipe.from_words(words(grain="1:3", keep=0.333)).steps[0].pattern == (1, 3)
    mapped = Recipe.from_words(words(map=[{"match": "attention", "keep": "80%"}])).steps[0]
    assert mapped.map == (MapRule("attention", 0.8),) and mapped.amount == Amount(share=Decimal(1))
    assert Recipe.from_words({"model": "m", "plan": "plan.safetensors"}).steps == ()


def test_the_second_step_is_named_when_it_is_wrong() -> None:
    with pytest.raises(SecateurError, match=r"step 2: .*outside"):
        Recipe.from_words({"model": "m", "steps": [{**WANDA, "keep": 0.5}, {**WANDA, "keep": 1.5}]})


def test_one_seed_sets_the_other() -> None:
    assert Recipe.from_words({**words(keep=0.5), "seed": 7}).text.seed == 7
    assert Recipe.from_words({**words(keep=0.5), "text": {"seed": 7}}).seed == 7
    both = Recipe.from_words({**words(keep=0.5), "seed": 1, "text": {"seed": 2}})
    assert (both.seed, both.text.seed) == (1, 2)


GRAIN = st.sampled_from(["row", "matrix", "columns:64", "tile:16x8"])
STEP = st.builds(
    lambda grain, keep, budget, protect, include: {
        **WANDA, "grain": grain, "keep": keep, "budget": budget, "include": include, "protect": protect,
    },
    GRAIN,
    st.decimals(min_value=Decimal("0.000001"), max_value=1, places=6).map(lambda d: f"{d:f}"),
    st.sampled_from(["uniform", "owl:M=5,lambda=0.08", "pooled:over=layer"]),
    st.sampled_from([None, "first:2,last:1"]),
    st.lists(st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=8), max_size=2),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@example([{**WANDA, "keep": 0.5, "include": ["1e5"]}], 0, "0E0")
@given(
    st.lists(STEP, min_size=1, max_size=3),
    st.integers(0, 2**40),
    st.text(st.characters(exclude_categories=["C"]), min_size=1),
)
def test_a_recipe_survives_yaml(steps: list[dict[str, Any]], seed: int, model: str) -> None:
    recipe = Recipe.from_words({"model": model, "steps": steps, "seed": seed})
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert diff(recipe, Recipe.from_yaml(recipe.to_yaml())) == []


def test_saved_recipe_says_every_default() -> None:
    said = read_yaml(Recipe.from_yaml(EXAMPLE).to_yaml(), "it")
    assert said["steps"][1] == {
        "space": "weight", "method": "sparsegpt", "keep": 0.5, "grain": "columns:128", "budget": "uniform",
        "fit_on": "pruned", "apply": "mask",
    }  # fmt: skip
    assert said["dtype"] == "fp32" and said["device"] == "auto" and said["seed"] == 0


def test_diff_names_the_changed_words_and_ignores_what_changes_no_byte() -> None:
    a = Recipe.from_yaml(EXAMPLE)
    b = Recipe.from_words(override(read_yaml(EXAMPLE, "it"), {"keep": "0.5", "seed": 3, "measure": False, "out": "x"}))
    changed = {line.split(":")[0] for line in diff(a, b)}
    assert changed == {"steps[0].keep", "text.seed", "seed"}
    assert "steps[0].keep: 0.75 -> 0.5" in diff(a, b)


def test_options_override_a_recipe() -> None:
    base = read_yaml(EXAMPLE, "it")
    over = Recipe.from_words(override(base, {"keep": "60%", "text": {"samples": 8}, "model": "other"}))
    assert [s.keep for s in over.steps] == [0.6, 0.6] and over.text.samples == 8 and over.text.length == 1024
    assert over.model == "other"
    one = {"model": "m", "steps": [{"space": "weight", "method": "sparsegpt", "sparsity": 0.5}]}
    swapped = Recipe.from_words(override(one, {"score": "wanda"})).steps[0]
    assert (swapped.method, swapped.score, swapped.grain) == (None, "wanda", "row")
    assert Recipe.from_words(override(one, {"sparsity": "0.7"})).steps[0].amount == Amount(share=Decimal("0.3"))
    assert Recipe.from_words(override({}, {"model": "m", **WANDA, "keep": "0.5"})).steps[0].score == "wanda"
    assert base == read_yaml(EXAMPLE, "it")  # nothing was changed in place


def test_yaml_reads_words_as_words() -> None:
    read = read_yaml(
        "{a: 2:4, b: no, c: 1e-1, d: 012, e: 2001-01-01, f: 0.5, g: 1152, h: ~, i: true, j: 1_000, k: .5, l: -3}", "it"
    )
    assert read == {
        "a": "2:4", "b": "no", "c": 0.1, "d": "012", "e": "2001-01-01", "f": 0.5, "g": 1152, "h": None, "i": True,
        "j": "1_000", "k": 0.5, "l": -3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: !!python/object/apply:os.system ['true']", "tag"),
        ("model: !!python/name:os.system", "tag"),
        ("!!map {model: m}", "tag"),
        ("model: !custom x", "tag"),
        ("a: &a [x]\nb: *a", "anchors"),
        ("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "anchors"),
        ("model: m\nmodel: n", "twice"),
        ("[" * 5000, "deep"),
        ("{a: " * 3000, "deep"),
        ("- a\n- b", "mapping"),
        ("", "mapping"),
        ("model: [unclosed", "line"),
        ("model: \x00", "character"),
        ("? [a]\n: b", "key"),
        ("a: 1\n---\nb: 2", "document"),
        ("x: " + "y" * 300_000, "larger"),
        ("a: '", "line"),
        ("\t- a", "line"),
    ],
)  # fmt: skip
def test_yaml_with_surprises_is_refused(text: str, says: str) -> None:
    with pytest.raises(SecateurError, match=says) as error:
        read_yaml(text, "recipe.yaml")
    assert "\n" not in str(error.value) and "recipe.yaml" in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text("{}[]:,-!&*?|>'\"%@` \n\tabkeep0.5", max_size=60))
def test_no_text_is_anything_but_a_recipe_or_a_refusal(text: str) -> None:
    try:
        Recipe.from_yaml(text)
    except SecateurError as error:
        assert str(error)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("- {match: attention, keep: 0.8}\n- {match: 'layers:0-3', keep: 1.0}\n")
    (tmp_path / "r.yaml").write_text("model: m\nsteps: [{space: weight, score: wanda, map: map.yaml}]\n")
    recipe = Recipe.from_words(read_recipe(tmp_path / "r.yaml"))
    assert [r.match for r in recipe.steps[0].map] == ["attention", "layers:0-3"]
    assert list(recipe.steps[0].map) == read_map(tmp_path / "map.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"model: \xff\xfe")
    for name, says in (("missing.yaml", "No such file"), ("bytes.yaml", "UTF-8"), (".", "directory")):
        with pytest.raises(SecateurError, match=says):
            read_recipe(tmp_path / name)


def test_a_measure_request_checks_its_words() -> None:
    assert MeasureRequest(("a", "b")).windows == 64
    for bad in ({"windows": 0}, {"length": 1}, {"dtype": "int8"}, {"device": "moon"}, {"threads": 0}):
        with pytest.raises(SecateurError):
            MeasureRequest(("a",), **bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "grain"),
    [("sparsegpt", "columns:128"), ("obs", "columns:128"), ("admm", "matrix"), ("alps", "matrix"), ("dsnot", "row")],
)
def test_a_joint_method_brings_its_own_grain(method: str, grain: str) -> None:
    assert Step("weight", method=method, keep=0.5).grain == grain
    assert Step("weight", method=method, keep=0.5, grain="row").grain == "row"
