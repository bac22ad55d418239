"""What a budget brings, all else equal: python benchmarks/allocation.py [OUT.json]

Evidence is gathered once, on the dense model's own activations; every budget then decides from it, the model is masked,
measured on held-out builtin text (8 windows of 512 tokens) and restored. Pruned block by block, each block fed by
the pruned ones before it, the figures differ; between budgets it is the same comparison. Rows that OUT has are left.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

from secateur.cliff import Dial
from secateur.engine.host.origin import read_tokenizer, resolve
from secateur.engine.probes import Fisher, Gram, InputNorm
from secateur.engine.store import Store
from secateur.engine.text import TextSource, calibration, documents, pack, test_windows
from secateur.engine.walk import batches_of
from secateur.methods.base import MatrixSite
from secateur.methods.sites import matrix_sites
from secateur.parts import parts_of
from secateur.stage import Conditions
from secateur.step import Step

WEIGHTS = Step("weight", score="wanda", sparsity=0.6)
TILES = Step("weight", score="output_error", grain="tile:16x16", sparsity=0.3)
SLOPES = ("uniform", "atp", "rate_distortion", "rate_distortion:by=output", "rate_distortion:by=score")
ROWS: Mapping[str, tuple[Step, tuple[str, ...]]] = {
    "wanda 60 %": (WEIGHTS, (*SLOPES, "owl", "atp:rise=0.22")),
    "fisher 60 %": (replace(WEIGHTS, score="fisher"), SLOPES),
    "tiles 16x16 30 %": (TILES, SLOPES),
    "tiles 16x16 30 % by fisher": (replace(TILES, score="fisher"), SLOPES),
}


def main(out: Path) -> None:
    """Measure every row and write the file after each."""
    torch.set_num_threads(1)
    origin = resolve("smollm2")
    store = Store.open(origin)
    tokenizer = read_tokenizer(origin)
    text = calibration(TextSource("builtin", samples=16, length=256), tokenizer)
    windows = test_windows(pack(tokenizer, documents("builtin", "test")), 8, 512)
    conditions = Conditions(lambda: batches_of(text, 4))
    rows: dict[str, float] = json.loads(out.read_text("utf-8"))["perplexity"] if out.is_file() else {}
    for name, (step, every) in ROWS.items():
        budgets = tuple(b for b in every if f"{name}, {b}" not in rows)
        if not budgets:
            continue
        dial = Dial(store, step, 0, conditions, windows)
        rows.setdefault("dense", dial.perplexity(Decimal(0)))
        told, needs = dial.stage.whole.tell((Fisher,)), (Gram, InputNorm)
        dial._visits = list(dial.stage.visits(needs, "dense evidence", dense=True, told=told))
        seen = surveyed(dial, budgets)
        for budget in budgets:
            dial.restore()
            keep = step.amount
            assert keep is not None
            counts = parts_of(replace(step, budget=budget)).budget.allot(dial.stage.infos, keep, seen[budget])
            for visit in dial._visits:
                dial.stage.prune_block(visit, counts, None)
            rows[f"{name}, {budget}"] = round(dial._measure(), 2)
            out.write_text(json.dumps({"conditions": __doc__, "perplexity": rows}, indent=1) + "\n", encoding="utf-8")


def surveyed(dial: Dial, budgets: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What each budget sees of the dense model."""
    infos, blocks = {i.name: i for i in dial.stage.infos}, len(dial.stage.anatomy.blocks)
    seen: dict[str, dict[str, Any]] = {budget: {} for budget in budgets}
    for visit in dial._visits:
        for site in matrix_sites(visit, visit.block.matrices, blocks, 0):
            for budget in budgets:
                observe(seen[budget], dial, replace(dial.step, budget=budget), site, visit.evidence, infos)
    return seen


def observe(
    seen: dict[str, Any],
    dial: Dial,
    step: Step,
    site: MatrixSite,
    evidence: Mapping[str, Any],
    infos: Mapping[str, Any],
) -> None:
    """One site as one budget sees it."""
    parts = parts_of(step)
    if parts.budget.surveys:
        scores = parts.grain.unit_scores(parts.ranking.score(site, evidence[site.name]))  # type: ignore[union-attr]
        seen[site.name] = parts.budget.observe(infos[site.name], scores.reshape(-1))


if __name__ == "__main__":
    here = Path(__file__).resolve().parent / "results" / "allocation.json"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else here)
