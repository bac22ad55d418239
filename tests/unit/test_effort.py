"""Efforts stand for words, and say so where a word contradicts them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from secateur.effort import CHAINS, PASSES
from secateur.engine.probes import Fisher
from secateur.errors import SecateurError
from secateur.parts import parts_of
from secateur.step import MapRule, Step


@pytest.mark.parametrize("effort", sorted(CHAINS))
def test_an_effort_becomes_a_step_that_can_be_carried_out(effort: str) -> None:
    free = Step("weight", effort=effort, sparsity=0.6)
    parts = parts_of(free)
    assert parts.joint and free.method == CHAINS[effort][0]["method"] and free.budget == CHAINS[effort][0]["budget"]
    fixed = Step("weight", effort=effort, grain="2:4", keep=0.5)
    assert parts_of(fixed).joint and fixed.budget == "uniform"
    mapped = Step("weight", effort=effort, map=(MapRule("ffn", 0.5),))
    assert mapped.budget == "uniform" and mapped.method == fixed.method


@pytest.mark.parametrize("effort", sorted(CHAINS))
def test_written_down_and_read_back_it_is_the_same_step(effort: str) -> None:
    step = Step("weight", effort=effort, sparsity=0.6)
    assert Step(**step.to_words()) == step
    assert step.to_words()["effort"] == effort
    assert replace(step, keep=0.5) == Step("weight", effort=effort, keep=0.5)
    fixed = Step("weight", effort=effort, grain="2:4")
    assert Step(**fixed.to_words()) == fixed == Step("weight", effort=effort, grain="2:4", budget="uniform")


def test_what_an_effort_leaves_open_may_be_said() -> None:
    """A chain without a word of its own means the one that holds where nothing is said."""
    said = Step("weight", effort="fast", sparsity=0.6, fit_on="pruned")
    assert said == Step("weight", effort="fast", sparsity=0.6) and said.fit_on == "pruned"
    plain = Step("weight", score="wanda", sparsity=0.6)
    assert (plain.budget, plain.fit_on) == ("uniform", "pruned")
    assert plain == Step("weight", score="wanda", sparsity=0.6, budget="uniform", fit_on="pruned")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"effort": "huge"}, "huge"),
        ({"effort": "fast", "score": "wanda"}, "score wanda"),
        ({"effort": "fast", "method": "sparsegpt"}, "method sparsegpt"),
        ({"effort": "fast", "budget": "owl"}, "budget owl"),
        ({"effort": "best", "fit_on": "dense"}, "fit_on dense"),
        ({"effort": "fast", "budget": "uniform"}, "budget uniform"),
        ({"effort": "fast", "space": "ffn"}, "space ffn"),
    ],
)
def test_what_contradicts_an_effort_is_refused(words: dict[str, str], said: str) -> None:
    with pytest.raises(SecateurError) as refused:
        Step(**{"space": "weight", "sparsity": 0.6, **words})
    assert said in str(refused.value)


def test_more_effort_may_take_longer() -> None:
    assert list(PASSES) == ["fast", "balanced", "best"] == list(CHAINS)
    assert sorted(PASSES.values()) == list(PASSES.values())


def test_where_counts_are_fixed_nothing_is_read_to_allocate_them() -> None:
    for effort in CHAINS:
        free, fixed = (parts_of(Step("weight", effort=effort, **w)) for w in ({"sparsity": 0.6}, {"grain": "2:4"}))
        assert Fisher in free.needs and Fisher in free.survey_needs
        assert Fisher not in fixed.needs and not fixed.survey_needs


FREE = {"method": "alps:rows=root", "budget": "rate_distortion"}
FIXED = {"method": "alps"}
SHORT, LONG = ({"repair": f"block_reconstruction:passes={n}"} for n in (4, 8))
WRITTEN = {"fast": (FREE, FIXED), "balanced": (FREE | SHORT, FIXED | SHORT), "best": (FREE | LONG, FIXED | LONG)}


def test_chains_are_those_that_the_guide_lists() -> None:
    assert {effort: tuple(dict(words) for words in pair) for effort, pair in CHAINS.items()} == WRITTEN
    guide = (Path(__file__).parents[2] / "docs/guide.md").read_text()
    rows = re.findall(r"^`(\w+)` \| (.+?) \| (.+?) \| (\d+) passes$", guide, re.MULTILINE)
    assert {effort: int(passes) for effort, *_, passes in rows} == PASSES
    above = ""
    for effort, chain, fixed, _ in rows:
        free, other = CHAINS[effort]
        if chain.startswith("the same"):
            (passes,) = re.findall(r"passes=\d+", chain)
            assert passes in fixed
            chain = re.sub(r"passes=\d+", passes, above)
        else:
            assert f"`{other['method']}`" in fixed and ("the same" in fixed) == ("repair" in other)
        assert set(re.findall("`(.+?)`", chain)) == set(free.values())
        above = chain
