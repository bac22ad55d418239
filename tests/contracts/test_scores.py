"""Promises 2 to 6 for every score in the table, in every space and grain where it is legal."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from synthetic_sites import LAYERS, Layer, gpt2, llama
from torch import Tensor

from secateur.engine.probes import Evidence
from secateur.errors import SecateurError
from secateur.methods.base import MatrixSite, Score, UnitScore
from secateur.methods.composed import Composed
from secateur.methods.grains import Unit, parse_grain
from secateur.methods.legal import UNIT_SPACES, check_legal, legal_spaces
from secateur.methods.scores import SCORES
from secateur.methods.scores.magnitude import Magnitude

GRAINS = ("row", "matrix", "columns:5", "2:4", "tile:2x2")
UNIT_CASES = [
    (name, family, space)
    for name, score in SCORES.items()
    for family, make in LAYERS.items()
    for space in (*make().spaces, "layer")
    if space in legal_spaces(score)
]
ELEMENTWISE = [name for name, score in SCORES.items() if "weight" in legal_spaces(score)]
WEIGHT_CASES = [(name, family, grain) for name in ELEMENTWISE for family in LAYERS for grain in GRAINS]
unit_cases = pytest.mark.parametrize(("name", "family", "space"), UNIT_CASES)
weight_cases = pytest.mark.parametrize(("name", "family", "grain"), WEIGHT_CASES)


def elementwise(name: str) -> Score:
    score = SCORES[name]()
    assert isinstance(score, Score)
    return score


def every_site(layer: Layer, seed: int = 0) -> list[tuple[MatrixSite, str, int]]:
    return [(site, t, e) for t in layer.matrices for e, site in enumerate(layer.matrix_sites(t, seed))]


@weight_cases
def test_weights_counts_nesting_and_identity(name: str, family: str, grain: str) -> None:
    layer, method = LAYERS[family](), Composed(elementwise(name), parse_grain(grain))
    for site, tensor, e in every_site(layer):
        shape = tuple(site.weight.shape)
        try:
            method.grain.check(shape)
        except SecateurError:
            continue
        before, evidence = site.weight.clone(), layer.evidence(tensor, e)
        units = method.grain.units(shape)
        counts = [0, 1, units // 3, units // 2, units - 1, units]
        if grain == "2:4":
            counts = [units // 2, units]
        masks = []
        for count in counts:
            site.generator.manual_seed(0)
            kept = method.prune(site, evidence, count)
            assert kept.weight is None
            masks.append(kept.mask)
        assert [int(m.sum()) for m in masks] == [c * method.grain.cost(shape) for c in counts]
        assert all(bool((more | ~less).all()) for less, more in pairwise(masks))
        assert bool(masks[-1].all())
        assert torch.equal(site.weight, before)


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("name", [n for n in ELEMENTWISE if n != "random"])
def test_weights_follow_their_rows_and_columns(name: str, family: str) -> None:
    """Rows and columns of a matrix in another order: the same scores in that order."""
    layer, score = LAYERS[family](), elementwise(name)
    for tensor, m in layer.matrices.items():
        rows, columns = torch.randperm(m.shape[0]), torch.randperm(m.shape[1])
        for e, site in enumerate(layer.matrix_sites(tensor)):
            want = score.score(site, layer.evidence(tensor, e))
            assert want.shape == m.shape
            moved = m.view(layer.tensors[tensor].clone(), e)[rows][:, columns]
            grad = m.view(layer.grads[tensor], e)[rows][:, columns]
            alone = type(m)(tensor, m.module, m.shape, experts=0)
            other = Layer(
                {tensor: alone},
                {},
                {tensor: moved},
                {tensor: grad},
                {(tensor, 0): layer.inputs[tensor, e][..., columns]},
                layer.gates,
                layer.routed,
                layer.before,
                layer.after,
            )
            if m.experts:  # the gate stays with the tokens
                other = Layer(
                    {tensor: type(m)(tensor, m.module, m.shape, experts=1)},
                    {},
                    {tensor: moved.unsqueeze(0)},
                    {tensor: grad.unsqueeze(0)},
                    other.inputs,
                    {0: layer.gates[e]},
                    layer.routed,
                    layer.before,
                    layer.after,
                )
            got = score.score(other.matrix_sites(tensor)[0], other.evidence(tensor))
            torch.testing.assert_close(got, want[rows][:, columns], rtol=1e-5, atol=1e-6)


@unit_cases
def test_units_counts_nesting_and_identity(name: str, family: str, space: str) -> None:
    layer, method = LAYERS[family](), Composed(SCORES[name](), Unit())
    shape = layer.unit_site(space).space.shape
    copies = shape[0] if len(shape) == 2 else 1
    masks = []
    for each in range(shape[-1] + 1):
        kept = method.prune_units(layer.unit_site(space), each * copies)
        assert kept.mask.shape == shape
        assert kept.mask.reshape(copies, -1).sum(1).tolist() == [each] * copies
        masks.append(kept.mask)
    assert all(bool((more | ~less).all()) for less, more in pairwise(masks))


@pytest.mark.parametrize(("name", "family", "space"), [c for c in UNIT_CASES if c[0] != "random"])
def test_units_permute_with_their_scores(name: str, family: str, space: str) -> None:
    layer, score = LAYERS[family](), SCORES[name]()
    want = score.units(layer.unit_site(space))
    if space == "layer":  # one unit: where it stands must not matter
        moved = Layer(**{**vars(layer), "index": 3})
        torch.testing.assert_close(score.units(moved.unit_site(space)), want)
        return
    shape = layer.spaces[space].shape
    copies = layer.spaces[space].copies
    order = torch.stack([torch.randperm(shape[-1]).roll(1) for _ in range(copies)])
    if shape[-1] > 1:
        order[0] = torch.arange(shape[-1]).roll(1)  # at least one copy really moves
    got = score.units(layer.permuted(space, order).unit_site(space))
    torch.testing.assert_close(got.reshape(copies, -1), want.reshape(copies, -1).gather(1, order))
    assert want.unique().numel() == want.numel()  # otherwise nothing was shown


@unit_cases
def test_units_same_seed_same_plan(name: str, family: str, space: str) -> None:
    def scores(seed: int) -> Tensor:
        return SCORES[name]().units(LAYERS[family]().unit_site(space, seed))

    assert torch.equal(scores(7), scores(7))
    assert torch.equal(scores(7), scores(8)) == (name != "random")


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_weights_same_seed_same_plan(name: str) -> None:
    def scores(seed: int) -> Tensor:
        layer = llama()
        return elementwise(name).score(layer.matrix_sites("q.weight", seed)[0], layer.evidence("q.weight"))

    assert torch.equal(scores(7), scores(7))
    assert torch.equal(scores(7), scores(8)) == (name != "random")


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_refused_where_they_mean_nothing(name: str) -> None:
    score = SCORES[name]()
    for space in ("weight", *UNIT_SPACES):
        if space in legal_spaces(score):
            check_legal(score, space)
        else:
            with pytest.raises(SecateurError, match=rf"in space {space}'\).*space {legal_spaces(score)[0]}"):
                check_legal(score, space)


def test_legal_spaces_are_as_promised() -> None:
    units = set(UNIT_SPACES)
    want = dict.fromkeys(SCORES, {"weight"} | units)
    want |= {"contribution": {"weight", "ffn", "kv_group", "head"}, "taylor_block": {"weight"}}
    want |= {"taylor_vector": units, "activation_norm": units, "block_influence": {"layer"}, "router_mass": {"expert"}}
    assert {name: set(legal_spaces(score)) for name, score in SCORES.items()} == want


@pytest.mark.parametrize("name", [name for name, score in SCORES.items() if score.needs])
def test_missing_evidence_is_named(name: str) -> None:
    score = SCORES[name]()
    space = legal_spaces(score)[-1]
    layer = LAYERS["mixtral" if space == "expert" else "llama"]()
    if isinstance(score, Score) and space == "weight":
        with pytest.raises(SecateurError, match=r"no \w+ evidence was gathered"):
            score.score(layer.matrix_sites("q.weight")[0], Evidence("q.weight", {}))
        return
    site = layer.unit_site(space)
    site.evidence = {n: type(e)(n, {}) for n, e in site.evidence.items()}
    site.block_evidence = type(site.block_evidence)("block", {})
    with pytest.raises(SecateurError, match=r"no \w+ evidence was gathered"):
        score.units(site)


def test_a_unit_score_cannot_rank_single_weights() -> None:
    layer = llama()
    for score in SCORES.values():
        if issubclass(score, UnitScore):
            with pytest.raises(SecateurError, match="ranks whole units"):
                Composed(score(), parse_grain("row")).prune(
                    layer.matrix_sites("q.weight")[0], layer.evidence("q.weight"), 6
                )


def test_wide_units_add_up_all_their_entries() -> None:
    """KV groups, heads across groups, heads in a fused tensor stored [in, out], and whole layers, slice by slice."""
    score = Magnitude()
    t = {n.removesuffix(".weight"): w.abs() for n, w in llama().tensors.items()}
    groups = [
        t["q"][6 * u : 6 * u + 6].sum()
        + t["k"][3 * u : 3 * u + 3].sum()
        + t["v"][3 * u : 3 * u + 3].sum()
        + t["o"][:, 6 * u : 6 * u + 6].sum()
        for u in range(2)
    ]
    torch.testing.assert_close(score.units(llama().unit_site("kv_group")), torch.stack(groups))
    heads = [t["q"][3 * h : 3 * h + 3].sum() + t["o"][:, 3 * h : 3 * h + 3].sum() for h in range(4)]
    torch.testing.assert_close(score.units(llama().unit_site("head")), torch.stack(heads).reshape(2, 2))
    attn, proj = (gpt2().tensors[n].abs() for n in ("attn.weight", "proj.weight"))
    fused = [
        sum(attn[:, at + 3 * h : at + 3 * h + 3].sum() for at in (0, 12, 24)) + proj[3 * h : 3 * h + 3].sum()
        for h in range(4)
    ]
    torch.testing.assert_close(score.units(gpt2().unit_site("head")), torch.stack(fused))
    total = torch.stack([w.sum() for w in t.values()]).sum()
    torch.testing.assert_close(score.units(llama().unit_site("layer")), total.reshape(1))
