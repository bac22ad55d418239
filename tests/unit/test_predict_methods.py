"""The dry run's count of what methods hold, against every storage that is really alive while they decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.engine.probes import CrossGram, DenseMean, Evidence, Gram, InputMoments, InputNorm
from secateur.methods.base import Keep, MatrixRepair, MatrixSite
from secateur.methods.fitting import fitted
from secateur.parts import Parts, parts_of
from secateur.predict.memory import share_of
from secateur.predict.methods import Group, Work, deciding_bytes, method_work, refit_work
from secateur.step import Step

ROWS, COLUMNS = (160, 96), 192
WEIGHTS = COLUMNS * sum(ROWS)


class Watch(TorchDispatchMode):
    """Counts the bytes of storages that operators made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {v.untyped_storage()._cdata for v in tree_leaves((args, kwargs or {})) if torch.is_tensor(v)}
        out = func(*args, **(kwargs or {}))
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        for value in tree_leaves(out):
            if torch.is_tensor(value):
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in given:
                    self.alive[key] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return out


def case(mix: bool) -> tuple[list[MatrixSite], list[Evidence]]:
    """Two matrices of one input, and what is known of it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, COLUMNS, generator=g) @ torch.randn(COLUMNS, COLUMNS, generator=g) / COLUMNS**0.5 + 0.1
    probes: dict[Any, Any] = {Gram: Gram(), InputNorm: InputNorm(), InputMoments: InputMoments()}
    for probe in probes.values():
        probe.update(x)
    if mix:
        probes |= {CrossGram: CrossGram(), DenseMean: DenseMean()}
        for probe in (probes[CrossGram], probes[DenseMean]):
            probe.update(x, None, x + 0.1 * torch.randn(x.shape, generator=g))
    seen = Evidence("w", probes)
    sites = [MatrixSite(f"m{r}", torch.randn(r, COLUMNS, generator=g), "ffn", 0, 1, g) for r in ROWS]
    return sites, [seen, seen]


def decided(parts: Parts, sites: list[MatrixSite], evidence: list[Evidence]) -> list[Keep]:
    """What a step does about a block: aims, decisions, mended values."""
    counts = [s.weight.numel() // 2 for s in sites]
    kept = parts.method.prune_many(fitted(sites, evidence) if parts.joint else sites, evidence, counts)
    if isinstance(parts.repair, MatrixRepair):
        mended = parts.repair.mend_many(sites, evidence, kept)
        kept = [Keep(k.mask, k.weight if m.weight is None else m.weight) for k, m in zip(kept, mended, strict=True)]
    return kept


@pytest.mark.parametrize(
    "words",
    [
        {"score": "wanda"},
        {"method": "sparsegpt"},
        {"method": "sparsegpt", "fit_on": "mix"},
        {"method": "obs"},
        {"method": "admm"},
        {"method": "alps"},
        {"method": "sparseswaps"},
        {"method": "dsnot"},
        {"score": "wanda", "repair": "least_squares"},
        {"score": "wanda", "repair": "least_squares", "fit_on": "mix"},
        {"score": "wanda", "repair": "mean_bias"},
    ],
    ids=lambda words: " ".join(words.values()),
)
def test_bytes_of_deciding_are_those_that_are_alive(words: dict[str, str]) -> None:
    step = Step("weight", sparsity="0.5", **words)  # type: ignore[arg-type]
    parts = parts_of(step)
    sites, evidence = case(parts.fit_on.name == "mix")
    with Watch() as watch:
        kept = decided(parts, sites, evidence)
    assert sum(int(k.mask.sum()) for k in kept) == WEIGHTS // 2
    told = deciding_bytes(parts, [Group(ROWS, COLUMNS)], share_of(step))
    assert 0.9 < told / watch.peak < 1.4


def test_groups_of_a_block_add_up() -> None:
    """What is decided of every group stays; the largest group's work comes on top."""
    parts = parts_of(Step("weight", sparsity="0.5", method="sparsegpt"))
    small, large = Group((8,), 16), Group((32, 32), 64, count=3)
    both = deciding_bytes(parts, [small, large], 0.5)
    assert both == deciding_bytes(parts, [large], 0.5) + 5 * small.weights
    assert deciding_bytes(parts, [], 0.5) == 0


def test_work_is_counted_from_the_formulas() -> None:
    """Where every pass is known beforehand: SparseGPT's sweep, ADMM's iterations, one shared system."""
    rows, n = 10.0, 64.0
    sweep = method_work(parts_of(Step("weight", sparsity="0.5", method="sparsegpt:polish=0")).method, 10, 64, 0.5)
    assert sweep == Work(rows * n * n / 2, n**3 / 3, columns=n)
    polished = method_work(parts_of(Step("weight", sparsity="0.5", method="sparsegpt")).method, 10, 64, 0.5)
    assert polished.products == sweep.products + 12 * rows * n * n  # the right side, the residual, ten steps
    words = "admm:iterations=7,gradual=5,polish=2"
    admm = method_work(parts_of(Step("weight", sparsity="0.5", method=words)).method, 10, 64, 0.5)
    assert admm.products == rows * n * n * (1 + 7 + 2) and admm.chosen == rows * n * 5
    assert refit_work(10, 64, 0.5, alike=True) == Work(rows * 32**2, 32**3 / 3)
    start = parts_of(Step("weight", sparsity="0.5", method="dsnot:start=sparsegpt", grain="matrix")).method
    assert method_work(start, 10, 64, 0.5).products == polished.products
    assert sweep.times(3) == sweep + sweep + sweep
