"""Magnitude, Wanda and SparseGPT on a real model: perplexity, exact zeros, time in dense passes, generated text.

    .venv/bin/python benchmarks/weights.py --calibration c4.jsonl --test wikitext2-test.txt --out weights.json

Protocol: 64 x 1,024 calibration tokens (documents joined by EOS, random offsets, seed 0), perplexity on the first 64
windows of 1,024 tokens in bf16. The unit of time, fwd, is one dense fp32 pass of the decoder blocks over the
calibration text in the same process with the same threads (CPU seconds; wall seconds beside them). Passes are
timed before the first and after every fourth run; the unit is their median. Results are written after every
row, so an interrupted run keeps what it has, and goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from secateur.account import cpu_name, peak_rss
from secateur.cliff import Dial
from secateur.engine.host.capture import capture, hidden_of, run_block
from secateur.engine.host.origin import read_tokenizer, resolve
from secateur.engine.store import Store
from secateur.engine.text import TextSource, calibration, documents, pack, test_windows
from secateur.engine.walk import batches_of, running_as
from secateur.measure.generation import generate
from secateur.measure.perplexity import perplexity
from secateur.stage import Conditions, Nowhere, Stage
from secateur.step import Step

PROMPT = "The capital of France is"
GPT = {"method": "sparsegpt:polish=0"}  # as published
ROWS: tuple[tuple[str, dict[str, Any], str], ...] = (
    *((f"{m} {s}", {**how, "sparsity": s}, "fp32") for s in ("50%",) for m, how in (
        ("wanda", {"score": "wanda"}), ("sparsegpt:polish=0", GPT), ("sparsegpt", {"method": "sparsegpt"}))),
    ("wanda 50% bf16", {"score": "wanda", "sparsity": "50%"}, "bf16"),
    ("sparsegpt:polish=0 50% bf16", {**GPT, "sparsity": "50%"}, "bf16"),
    ("sparsegpt 50% bf16", {"method": "sparsegpt", "sparsity": "50%"}, "bf16"),
    ("magnitude 50%", {"score": "magnitude", "grain": "matrix", "sparsity": "50%"}, "fp32"),
    ("magnitude 60%", {"score": "magnitude", "grain": "matrix", "sparsity": "60%"}, "fp32"),
    ("magnitude 70%", {"score": "magnitude", "grain": "matrix", "sparsity": "70%"}, "fp32"),
    ("magnitude 2:4", {"score": "magnitude", "grain": "2:4"}, "fp32"),
    ("wanda 60%", {"score": "wanda", "sparsity": "60%"}, "fp32"),
    ("sparsegpt:polish=0 60%", {**GPT, "sparsity": "60%"}, "fp32"),
    ("sparsegpt 60%", {"method": "sparsegpt", "sparsity": "60%"}, "fp32"),
    ("wanda 2:4", {"score": "wanda", "grain": "2:4"}, "fp32"),
    ("sparsegpt:polish=0 2:4", {**GPT, "grain": "2:4"}, "fp32"),
    ("sparsegpt 2:4", {"method": "sparsegpt", "grain": "2:4"}, "fp32"),
    ("wanda 70%", {"score": "wanda", "sparsity": "70%"}, "fp32"),
    ("sparsegpt:polish=0 70%", {**GPT, "sparsity": "70%"}, "fp32"),
    ("sparsegpt 70%", {"method": "sparsegpt", "sparsity": "70%"}, "fp32"),
)  # fmt: skip


def dense_pass(dial: Dial, batches: list[torch.Tensor]) -> dict[str, float]:
    """CPU and wall seconds of one fp32 pass of all blocks over the batches (embedding and head left out)."""
    captured = capture(dial.model, dial.stage.anatomy.path, batches)
    cpu, wall = time.process_time(), time.perf_counter()
    with torch.no_grad():
        for x, calls in zip(captured.inputs, captured.calls, strict=True):
            for block, call in zip(dial.stage.blocks, calls, strict=True):
                x = hidden_of(run_block(block, x, call))
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", type=Path, default=Path("weights.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4, help="windows per forward pass")
    parser.add_argument("--order", type=int, help="seed of another order of the same windows: only rounding differs")
    parser.add_argument("--only", nargs="*", help="rows such as 'sparsegpt 2:4'; all by default")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    origin = resolve(args.model)
    tokenizer, store = read_tokenizer(origin), Store.open(origin)
    text = calibration(TextSource(args.calibration, 64, 1024, 0), tokenizer)
    test = test_windows(pack(tokenizer, documents(args.test, "test")), 64, 1024)
    if args.order is not None:
        text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(args.order))]
    batches = batches_of(text, args.batch_size)
    start = Step(space="weight", score="magnitude", keep="1.0")
    dial = Dial(store, start, 0, Conditions(batches=lambda: batches), test)
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"passes": [], "rows": {}}
    found["conditions"] = {
        "cpu": cpu_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "batch": args.batch_size,
        "order": args.order,
    }

    def note() -> None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")

    def quality() -> dict[str, Any]:
        with running_as(dial.model, torch.bfloat16):
            value = perplexity(dial.model, test).value
        return {"perplexity": value, "text": generate(dial.model, tokenizer, (PROMPT,), 24)[0].text}

    if "dense" not in found["rows"]:
        found["rows"]["dense"] = quality()
    for number, (name, words, dtype) in enumerate(ROWS):
        if name in found["rows"] or (args.only and name not in args.only):
            continue
        if number % 4 == 0 or not found["passes"]:
            found["passes"].append(dense_pass(dial, batches))
        conditions = replace(dial.stage.at, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
        stage = Stage(dial.stage.store, Step(space="weight", **words), 0, conditions)
        cpu, wall = time.process_time(), time.perf_counter()
        plan = stage.run(Nowhere()).plan
        row: dict[str, Any] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "forward": dtype}
        kept, total = sum(plan.kept(k) for k in plan), sum(plan.total(k) for k in plan)
        zeros = sum(int((p == 0).sum()) for b, a in zip(dial.stage.blocks, dial.stage.anatomy.blocks, strict=True)
                    for p in (b.get_parameter(m.tensor) for m in a.matrices))  # fmt: skip
        row |= {"kept": kept, "of": total, "zeros": zeros, **quality(), "peak_rss": peak_rss()}
        found["rows"][name] = row
        dial.restore()
        note()
    found["passes"].append(dense_pass(dial, batches))
    note()
    unit = {k: statistics.median(p[k] for p in found["passes"]) for k in ("cpu", "wall")}
    print("| method | perplexity | fwd (CPU) | fwd (wall) | greedy text |\n|---|---|---|---|---|")
    for name, row in found["rows"].items():
        times = [f"{row[k] / unit[k]:.2f}" if k in row else "" for k in ("cpu", "wall")]
        print(f"| {name} | {row['perplexity']:.1f} | {times[0]} | {times[1]} | {row['text'][:70]!r} |")


if __name__ == "__main__":
    main()
