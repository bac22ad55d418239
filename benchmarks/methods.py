"""Every way to prune weights without training, and every effort: quality, time and memory, a process per row.

    .venv/bin/python benchmarks/methods.py --calibration c4.jsonl --test wikitext2-test.txt --choices piqa-dev.jsonl \\
        --out methods.json [--rows 'alps 60%' 'wanda 60% budget=owl' 'sparsegpt 2:4 bf16 seed=1']

Protocol: 64 x 1,024 calibration tokens (documents joined by EOS, random offsets, seed 0), perplexity on the first 64
windows of 1,024 tokens in bf16, KL divergence to the dense model (nats per token) on the first 16, the first 500
items of the choices file by length-normalised likelihood. The unit of time, fwd, is one dense fp32 pass of the
decoder blocks over the calibration text (CPU seconds): an eighth of one is timed before and after the pruning, in
the same process. Peak memory is that of pruning alone. Rows that are in the file already are left as they are. With
fewer ``--samples`` and ``--windows`` it is a quick look (`benchmarks/ablation.sh`), comparable with itself only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.account import cpu_name, peak_rss
from secateur.cliff import Dial
from secateur.effort import CHAINS
from secateur.engine.host.origin import read_tokenizer, resolve
from secateur.engine.store import Store
from secateur.engine.text import TextSource, calibration, documents, pack, test_windows
from secateur.engine.walk import batches_of, running_as
from secateur.measure.choices import choices, read_items
from secateur.measure.generation import generate
from secateur.measure.passes import losses
from secateur.measure.perplexity import exp_mean
from secateur.stage import Conditions, Nowhere, Stage
from secateur.step import Step
from weights import PROMPT, dense_pass

LEVELS = ("50%", "60%", "70%", "2:4")
WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {"score": "magnitude", "grain": "matrix"},
    "wanda": {"score": "wanda"},
    "ria": {"score": "ria", "grain": "matrix"},  # as its authors do
    "wanda+ls": {"score": "wanda", "repair": "least_squares"},
    "dsnot": {"method": "dsnot"},
    "sparsegpt": {"method": "sparsegpt"},
    "obs": {"method": "obs"},
    "swaps+ls": {"method": "sparseswaps", "repair": "least_squares"},
    "admm": {"method": "admm"},
    "alps": {"method": "alps"},
    "fisher": {"score": "fisher"},
    "output_error": {"score": "output_error"},
    "taylor_block": {"score": "taylor_block"},
}


def chained(words: Mapping[str, str], level: str) -> str:
    """An effort's chain as a row."""
    return " ".join([words["method"], level, *(f"{k}={words[k]}" for k in sorted(words) if k != "method")])


PLAIN = ("magnitude", "wanda", "ria", "wanda+ls", "sparsegpt", "admm", "alps", "dsnot", "obs", "swaps+ls")
MORE = [
    *(f"{way} 4:8" for way in ("wanda", "sparsegpt", "alps")),
    chained(CHAINS["balanced"][1], "4:8"),
]
KL_WINDOWS, ITEMS = 16, 500


def every_row() -> list[str]:
    """Every plain way and every effort at every level, then n:m of eights; tiles are `ablation.sh`'s."""
    rows = [f"{way} {level}" for way in PLAIN for level in LEVELS]
    for free, fixed in CHAINS.values():
        rows += [chained(fixed if ":" in level else free, level) for level in LEVELS]
    return list(dict.fromkeys([*rows, *MORE]))


def words_of(row: str) -> tuple[dict[str, Any], dict[str, str]]:
    """``WAY[:OPTIONS] LEVEL [word=value ...] [seed=N] [text=SOURCE] [batch=N] [bf16]`` as the step's words and, apart,
    what it runs under: seed, text, windows per forward pass and the dtype of the passes. A level is a sparsity or n:m;
    options are those of the way's method or score."""
    way, level, *more = row.split()
    way, colon, options = way.partition(":")
    words = {**WAYS[way], ("sparsity" if level.endswith("%") else "grain"): level}
    chosen = "method" if "method" in words else "score"
    words[chosen] += colon + options
    under = {"dtype": "fp32"}
    for word in more:
        key, _, value = word.partition("=")
        if word == "bf16":
            under["dtype"] = word
        elif key in ("seed", "text", "batch"):
            under[key] = value
        else:
            words[key] = value
    return words, under


def one(args: argparse.Namespace, row: str) -> dict[str, Any]:
    """Prune by one row's words in this process, and measure."""
    torch.set_num_threads(args.threads)
    origin = resolve(args.model)
    tokenizer, store = read_tokenizer(origin), Store.open(origin)
    words, under = words_of(row)
    seed, dtype = int(under.get("seed", args.seed)), under["dtype"]
    text = calibration(TextSource(under.get("text", args.calibration), args.samples, 1024, seed), tokenizer)
    test = test_windows(pack(tokenizer, documents(args.test, "test")), args.windows, 1024)
    batches = batches_of(text, int(under.get("batch", args.batch_size)))
    at = Conditions(batches=lambda: batches, seed=seed, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    dial = Dial(store, Step(space="weight", score="magnitude", keep="1.0"), 0, at, test)
    dial.dense.clear()  # nothing is restored here
    some = batches[: max(1, len(batches) // 8)]
    passes = [dense_pass(dial, some)]
    stage = Stage(dial.stage.store, Step(space="weight", **words), 0, at)
    cpu, wall = time.process_time(), time.perf_counter()
    plan = stage.run(Nowhere()).plan
    cpu, wall, peak = time.process_time() - cpu, time.perf_counter() - wall, peak_rss()
    passes.append(dense_pass(dial, some))
    unit = {k: sum(p[k] for p in passes) / 2 * len(batches) / len(some) for k in ("cpu", "wall")}
    dense: Any = store.skeleton()
    store.load_whole(dense, torch.device("cpu"))
    with running_as(dial.model, torch.bfloat16), running_as(dense, torch.bfloat16):
        _, near = losses([dense, dial.model], test[:KL_WINDOWS])
        rest = losses([dial.model], test[KL_WINDOWS:])[0].nll if len(test) > KL_WINDOWS else []
        assert near.kl is not None
        value = exp_mean(near.nll + rest, [1] * len(test))  # windows of one length
        found: dict[str, Any] = {"perplexity": value, "kl": sum(near.kl) / len(near.kl)}
        if args.choices:
            found["accuracy"] = choices(dial.model, tokenizer, read_items(args.choices)[:ITEMS]).accuracy_norm
        found["text"] = generate(dial.model, tokenizer, (PROMPT,), 24)[0].text
    kept, total = sum(plan.kept(k) for k in plan), sum(plan.total(k) for k in plan)
    return found | {
        "fwd": cpu / unit["cpu"], "fwd_wall": wall / unit["wall"], "peak_rss": peak, "kept": kept, "of": total,
        "words": {k: str(v) for k, v in words.items()}, "forward": dtype, "unit": unit, "threads": args.threads,
    }  # fmt: skip


def table(rows: dict[str, Any]) -> str:
    lines = ["| | perplexity | KL | PIQA | fwd | peak GB | greedy text |", "|---|---|---|---|---|---|---|"]
    for name, r in rows.items():
        cells = f"{r['perplexity']:.1f} | {r['kl']:.3f} | {r.get('accuracy', float('nan')):.3f} | {r['fwd']:.1f}"
        lines.append(f"| {name} | {cells} | {r['peak_rss'] / 1e9:.1f} | {r['text'][:60]!r} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--choices", type=Path)
    parser.add_argument("--out", type=Path, default=Path("methods.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4, help="windows per forward pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=64, help="test windows")
    parser.add_argument("--rows", nargs="*", help="rows such as 'alps 60%%'; all by default")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(one(args, args.row)))
        return
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": {}}
    at = {"cpu": cpu_name(), "torch": torch.__version__, "batch": args.batch_size}
    text = {"samples": args.samples, "windows": args.windows, "calibration": Path(args.calibration).name}
    found["conditions"] = at | {"seed": args.seed} | text
    for row in args.rows or every_row():
        if row in found["rows"]:
            continue
        ran = subprocess.run([sys.executable, *sys.argv, "--row", row], stdout=subprocess.PIPE, text=True, check=False)
        if ran.returncode:
            print(f"{row}: failed", flush=True)
            continue
        found["rows"][row] = json.loads(ran.stdout)
        print(table({row: found["rows"][row]}).splitlines()[-1], flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["rows"]))


if __name__ == "__main__":
    main()
