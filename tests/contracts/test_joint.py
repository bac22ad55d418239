"""Promises of every joint method in the table, on sites of three families and carried out on whole toy models."""

from __future__ import annotations

from decimal import Decimal
from itertools import groupby
from typing import Any

import pytest
import torch
from synthetic_sites import LAYERS
from test_promises import same, stepped
from torch import Tensor

from secateur.engine.probes import Evidence, Gram, InputMoments, InputNorm
from secateur.errors import SecateurError
from secateur.methods.base import Amount, Keep, MatrixSite, Method
from secateur.methods.grains import Grain, Tile, parse_grain
from secateur.methods.joint import METHODS

GRAINS = ("row", "matrix", "columns:5", "2:4", "tile:2x2")
REFUSED = {("sparsegpt", "row"), ("obs", "row")} | {
    (m, "tile:2x2") for m in ("sparsegpt", "obs", "sparseswaps", "dsnot")
}
cases = pytest.mark.parametrize(
    ("name", "family", "grain"),
    [(m, f, g) for m in METHODS for f in LAYERS for g in GRAINS if (m, g) not in REFUSED],
)


def built(name: str, grain: str) -> Method:
    make: Any = METHODS[name]
    return make(grain=parse_grain(grain))


def block(family: str, grain: Grain, share: str = "0.5") -> tuple[list[MatrixSite], list[Evidence], list[int]]:
    """All matrices of a block; those that read the same input share their statistics."""
    layer, shared = LAYERS[family](), {}
    sites, evidence, counts = [], [], []
    for tensor in layer.matrices:
        for e, site in enumerate(layer.matrix_sites(tensor)):
            x = layer.inputs[tensor, e].reshape(-1, site.weight.shape[1])
            key = x.sum().item()
            if key not in shared:
                probes = {Gram: Gram(), InputNorm: InputNorm(), InputMoments: InputMoments()}
                for probe in probes.values():
                    probe.update(x)
                shared[key] = probes
            try:
                counts.append(grain.count(tuple(site.weight.shape), Amount(share=Decimal(share))))
            except SecateurError:
                continue  # this matrix is not divided by the grain
            sites.append(site)
            evidence.append(Evidence(site.name, shared[key]))
    assert sites
    return sites, evidence, counts


def weights(site: MatrixSite, keep: Keep) -> Tensor:
    return site.weight * keep.mask if keep.weight is None else keep.weight


@cases
def test_counts_are_exact_and_what_goes_is_plus_zero(name: str, family: str, grain: str) -> None:
    kind = parse_grain(grain)
    sites, evidence, counts = block(family, kind)
    before = [s.weight.clone() for s in sites]
    size = kind.rows * kind.columns if isinstance(kind, Tile) else 1
    for count, keep in zip(counts, built(name, grain).prune_many(sites, evidence, counts), strict=True):
        assert int(keep.mask.sum()) == count * size
        assert torch.equal(kind.select(keep.mask.float(), count), keep.mask), "what competes is what the grain says"
        if keep.weight is not None:
            assert torch.isfinite(keep.weight).all()
            assert not keep.weight[~keep.mask].any() and not torch.signbit(keep.weight[~keep.mask]).any()
    assert all(torch.equal(s.weight, b) for s, b in zip(sites, before, strict=True))


@cases
def test_together_is_one_by_one(name: str, family: str, grain: str) -> None:
    sites, evidence, counts = block(family, parse_grain(grain), "0.5" if ":" in grain else "0.6")
    method = built(name, grain)
    together = method.prune_many(sites, evidence, counts)
    for site, seen, count, keep in zip(sites, evidence, counts, together, strict=True):
        alone = method.prune(site, seen, count)
        assert torch.equal(keep.mask, alone.mask)
        torch.testing.assert_close(weights(site, keep), weights(site, alone), atol=1e-4, rtol=1e-3)
    again = method.prune_many(sites, evidence, counts)
    assert all(torch.equal(weights(s, a), weights(s, b)) for s, a, b in zip(sites, again, together, strict=True))


@cases
def test_keeping_everything_changes_nothing(name: str, family: str, grain: str) -> None:
    sites, evidence, _ = block(family, parse_grain(grain))
    counts = [parse_grain(grain).units(tuple(s.weight.shape)) for s in sites]
    for site, keep in zip(sites, built(name, grain).prune_many(sites, evidence, counts), strict=True):
        assert bool(keep.mask.all())
        assert torch.equal(weights(site, keep), site.weight)


@pytest.mark.parametrize("name", METHODS)
def test_inputs_that_never_fire_and_experts_without_tokens(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(6, 12, generator=g), torch.randn(60, 12, generator=g)
    x[:, [2, 7]] = 0
    site = MatrixSite("w", w, "ffn", 0, 1, torch.Generator())
    method = built(name, "matrix")
    for inputs in (x, torch.zeros(0, 12)):
        seen = Evidence("w", {Gram: Gram(), InputNorm: InputNorm(), InputMoments: InputMoments()})
        for probe in seen.values():
            probe.update(inputs)
        keep = method.prune(site, seen, 36)
        assert int(keep.mask.sum()) == 36 and torch.isfinite(weights(site, keep)).all()
        if len(inputs) and keep.weight is not None:
            assert not keep.weight[:, [2, 7]].any()
        if not len(inputs) and keep.weight is not None:  # the largest stay as they are
            assert torch.equal(keep.mask, parse_grain("matrix").select(w.abs(), 36))
            torch.testing.assert_close(keep.weight, w * keep.mask, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_nonsense_is_refused(name: str) -> None:
    w, x = torch.randn(6, 12), torch.randn(60, 12)
    x[3, 3] = torch.nan
    seen = Evidence("w", {Gram: Gram(), InputNorm: InputNorm(), InputMoments: InputMoments()})
    for probe in seen.values():
        probe.update(x)
    with pytest.raises(SecateurError, match="not finite"):
        built(name, "matrix").prune(MatrixSite("w", w, "ffn", 0, 1, torch.Generator()), seen, 36)


@pytest.mark.parametrize(("name", "grain"), sorted(REFUSED))
def test_grains_without_a_meaning_are_refused(name: str, grain: str) -> None:
    with pytest.raises(SecateurError) as refusal:
        built(name, grain)
    assert f"grain {grain}" in str(refusal.value) and "columns:128" in str(refusal.value)


@pytest.mark.parametrize("name", [m for m in METHODS if m != "sparsegpt"])
@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("words", [{"grain": "matrix", "keep": "0.3"}, {"grain": "2:4", "keep": None}])
def test_carried_out_on_whole_models(name: str, family: str, words: dict[str, Any]) -> None:
    plan, weights_ = first = stepped(family, space="weight", method=name, **words)
    assert same(first, stepped(family, space="weight", method=name, **words))
    share = Decimal(words["keep"] or "0.5")
    for key in plan:
        mask = plan[key]
        copies = mask.reshape(-1, *mask.shape[-2:])  # a stack of experts is one matrix each
        each = Amount(share=share).of(copies[0].numel())
        assert [int(m.sum()) for m in copies] == [each] * len(copies)
    assert all(torch.isfinite(v).all() for v in weights_.values())


def test_the_table_names_each_once() -> None:
    assert all(len(list(same)) == 1 for _, same in groupby(sorted(m.__name__ for m in METHODS.values())))
