"""A realistic report: thirty layers, two steps or one, with and without measurements. Its numbers are invented."""

from __future__ import annotations

import math
import random

import pytest

from secateur.measure.types import (
    Choices,
    Comparison,
    Divergence,
    Generation,
    Interval,
    Latency,
    Measurement,
    Perplexity,
    Size,
    Timing,
)
from secateur.report import Curve, CurvePoint, Prediction, Provenance, Report, SiteRecord, StepRecord

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def weight_step(uneven: bool = False) -> StepRecord:
    """Half of every matrix, or between 40 and 60 percent if uneven."""
    sites = []
    for block in range(30):
        for kind, (rows, columns) in SHAPES.items():
            total = rows * columns
            share = 0.5 + (0.1 * math.sin(block / 4) * (1.2 if "mlp" in kind else 0.6) if uneven else 0)
            sites.append(
                SiteRecord(
                    site=f"model.layers.{block}.{kind}.weight",
                    block=block,
                    component="ffn" if "mlp" in kind else "attention",
                    kept=round(total * share),
                    total=total,
                    parameters=total,
                    kind=kind,
                )
            )
    budget = "owl" if uneven else "uniform"
    return StepRecord(
        space="weight",
        method="sparsegpt",
        keep="0.5",
        apply="mask",
        words="space: weight, method: sparsegpt, sparsity: 0.5" + (", budget: owl" if uneven else ""),
        chain={"method": "sparsegpt", "grain": "columns:128", "budget": budget},
        sites=tuple(sites),
        seconds=61.25,
    )


def ffn_step() -> StepRecord:
    """Three quarters of the neurons of each FFN."""
    sites = tuple(
        SiteRecord(f"model.layers.{b}", b, "ffn", 1152, 1536, 1536 * 1728, kind="ffn neurons") for b in range(30)
    )
    return StepRecord(
        space="ffn",
        method="wanda",
        keep="0.75",
        apply="cut",
        words="space: ffn, score: wanda, keep: 0.75",
        chain={"score": "wanda", "grain": "unit", "budget": "uniform"},
        sites=sites,
        seconds=24.5,
    )


def measurement(name: str, factor: float, size: Size, speed: float) -> Measurement:
    """Numbers that hang together: perplexity from windows, times with quartiles."""
    rng = random.Random(7)
    nll = tuple(math.log(25.17) + rng.gauss(0, 0.35) + math.log(factor) * rng.uniform(0.7, 1.3) for _ in range(24))
    dense = factor == 1
    prompts = {
        "The capital of France is": (
            " Paris. It is the largest city in France and the second largest in the European Union.",
            " Paris. It is the capital of the French Republic, and the capital of the",
        ),
        "To make a good cup of tea,": (
            " you need to use the right tea leaves. The best tea leaves are those grown in the shade.",
            " you need to know how to make a good cup of tea.\n\nThe first step is to make",
        ),
    }
    return Measurement(
        model=name,
        size=size,
        perplexity=Perplexity(
            math.exp(sum(nll) / len(nll)), nll, 24, 512, 512, 24 * 511, "float32", "the built-in test text"
        ),
        divergence=None
        if dense
        else Divergence(0.4172, 0.7113, Interval(0.4172, 0.401, 0.433), Interval(0.7113, 0.702, 0.72)),
        choices=Choices(
            0.684 if dense else 0.631,
            0.671 if dense else 0.628,
            500,
            tuple(i % 3 > 0 for i in range(500)),
            "piqa.jsonl",
        ),
        generations=tuple(Generation(p, texts[0 if dense else 1], 18) for p, texts in prompts.items()),
        latency=Latency(
            prefill=Timing(0.812 / speed, 0.804 / speed, 0.83 / speed, 9),
            decode_per_token=Timing(0.0213 / speed, 0.0209 / speed, 0.0221 / speed, 9),
            prompt_tokens=512,
            new_tokens=32,
            batch=1,
            threads=2,
            device="cpu",
            dtype="float32",
            peak_rss=1_214_000_000,
        ),
    )


DENSE = Size(134_515_008, 134_515_001, 538_090_408, 162_826_560, 46_080, 1024, "float32")
MASKED = Size(134_515_008, 81_430_841, 538_090_408, 162_826_560, 46_080, 1024, "float32")
CUT = Size(114_608_448, 114_608_441, 458_464_168, 142_920_000, 46_080, 1024, "float32")


@pytest.fixture
def masked() -> Report:
    return sample()


@pytest.fixture
def cut() -> Report:
    return sample_cut()


def sample(uneven: bool = False) -> Report:
    """Half of the weights, with everything a report can hold."""
    curve = Curve(
        "Wanda, row by row",
        tuple(
            CurvePoint(s / 100, p)
            for s, p in (
                (0, 24.9),
                (10, 25.0),
                (20, 25.6),
                (30, 27.4),
                (40, 33.2),
                (50, 54.6),
                (60, 171.0),
                (70, 912.5),
            )
        ),
        note="All points are from one set of statistics of the dense model, not block after block.",
        chosen=0.5,
    )
    return Report(
        model="smollm2",
        out="out/demo/weights",
        recipe={
            "model": "smollm2",
            "text": {"source": "builtin", "samples": 64, "length": 1024, "seed": 0},
            "steps": [{"space": "weight", "method": "sparsegpt", "sparsity": 0.5, "grain": "columns:128"}],
        },
        steps=(weight_step(uneven),),
        measurements=(measurement("smollm2", 1.0, DENSE, 1.0), measurement("out/demo/weights", 1.63, MASKED, 1.01)),
        comparison=Comparison(Interval(1.63, 1.58, 1.68), Interval(-0.053, -0.081, -0.022), 1.01, 1.01),
        curves=(curve,),
        predictions=(
            Prediction("Peak memory", "bytes", 1.41e9, 1.52e9),
            Prediction("Parameters", "parameters", 134_515_008, 134_515_008),
            Prediction("File", "bytes", 538_090_408, 538_090_408),
            Prediction("Time", "seconds", 84.0, None),
        ),
        provenance=Provenance(
            date="2026-11-24T08:10:00+00:00",
            command="secateur prune smollm2 -o out/demo/weights --space weight --method sparsegpt --sparsity 0.5",
            seed=0,
            device="cpu",
            threads=2,
            cpu="An ordinary processor",
            versions={"secateur": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
            hashes={"text": "9f2c" * 16, "model.safetensors": "01ab" * 16},
            phases={"calibrate and prune": 61.25, "measure": 38.5},
            peak_rss=1_520_000_000,
        ),
        notes=("Weights that stay were updated by SparseGPT, so the result is more than a mask.",),
    )


def sample_cut() -> Report:
    """A quarter of the neurons, cut, with nothing optional but the measurements."""
    return Report(
        model="smollm2",
        out="out/demo/ffn",
        steps=(ffn_step(),),
        measurements=(measurement("smollm2", 1.0, DENSE, 1.0), measurement("out/demo/ffn", 1.45, CUT, 1.17)),
        comparison=Comparison(Interval(1.45, 1.41, 1.5), None, 1.17, 1.17),
        loader="AutoModelForCausalLM",
    )
