"""A quarter of the FFN neurons, or one of three KV groups, really cut: plain loading, equality with the mask, speed.

    .venv/bin/python benchmarks/structure.py --calibration c4.jsonl --test wikitext2-test.txt --work out/structure

Per space and score: pruned twice from the same plan, masked and cut; then a fresh process loads both with plain
`AutoModelForCausalLM.from_pretrained`, compares logits on test text, and times cut against dense, interleaved
(prefill of 512 tokens, decode of 24, medians of 7). Perplexity: the first 16 windows of 1,024 tokens, fp32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CASES = tuple(
    (space, score, keep)
    for space, keep in (("ffn", "75%"), ("kv_group", "2"))
    for score in ("wanda", "taylor", "activation_norm")
)


def secateur(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "secateur", *words], check=True, stdout=subprocess.DEVNULL)


def compared(dense: Path, masked: Path, cut: Path, test: Path, threads: int) -> dict[str, Any]:
    """In this (fresh) process: plain loading, logits, perplexity, sizes and speed of a cut beside the dense model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from secateur.engine.text import documents, pack, test_windows
    from secateur.measure.compare import measure
    from secateur.measure.latency import LatencyOptions
    from secateur.measure.options import MeasureOptions, Subject

    torch.set_num_threads(threads)
    models = {p: AutoModelForCausalLM.from_pretrained(p).eval() for p in (dense, masked, cut)}
    tokenizer = AutoTokenizer.from_pretrained(dense)
    ids = test_windows(pack(tokenizer, documents(str(test), "test")), 2, 512)
    with torch.no_grad():
        a, b = models[masked](input_ids=ids).logits, models[cut](input_ids=ids).logits
    subjects = [Subject(p.name, models[p], tokenizer, p) for p in (dense, cut)]
    timed = LatencyOptions(prompt_tokens=512, new_tokens=24, repeats=7, rss=False)
    options = MeasureOptions(text=str(test), windows=16, length=1024, prompts=("The capital of France is",),
                             new_tokens=24, latency=timed)  # fmt: skip
    (first, second), (against,) = measure(subjects, options)
    assert first.perplexity and second.perplexity and second.divergence
    return {
        "logits_difference": float((a - b).abs().max() / a.abs().max()),
        "parameters": [first.size.parameters, second.size.parameters],
        "macs": [first.size.macs_per_token, second.size.macs_per_token],
        "kv_bytes": [first.size.kv_bytes_per_token, second.size.kv_bytes_per_token],
        "perplexity": [first.perplexity.value, second.perplexity.value],
        "kl": second.divergence.kl,
        "prefill_speedup": against.prefill_speedup,
        "decode_speedup": against.decode_speedup,
        "text": second.generations[0].text,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", default="16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compare", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compare:
        print(json.dumps(compared(*args.compare, args.test, args.threads)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    dense, table = args.work / "dense", args.work / "structure.json"
    common = ("--no-measure", "--threads", str(args.threads))
    if not dense.is_dir():  # the model as a plain checkpoint: nothing is pruned
        whole = ("--space", "weight", "--score", "magnitude", "--keep", "1.0")
        secateur("prune", args.model, "-o", str(dense), *whole, *common)
    found = json.loads(table.read_text()) if table.is_file() else {}
    for space, score, keep in CASES:
        name = f"{space} {keep} {score}"
        if name in found:
            continue
        cut, masked = (args.work / f"{space}-{score}-{how}" for how in ("cut", "mask"))
        text = ("--text", args.calibration, "--samples", args.samples, "--length", "1024", "--batch-size", "4")
        step = ("--space", space, "--score", score, "--keep", keep)
        secateur("prune", str(dense), "-o", str(cut), *step, *text, *common, "--overwrite")
        replay = ("--plan", str(cut / "plan.safetensors"), *step, "--apply", "mask")
        secateur("prune", str(dense), "-o", str(masked), *replay, *common, "--overwrite")
        again = [sys.executable, __file__, "--calibration", args.calibration, "--test", str(args.test)]
        again += [
            "--work",
            str(args.work),
            "--threads",
            str(args.threads),
            "--compare",
            str(dense),
            str(masked),
            str(cut),
        ]
        found[name] = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
        table.write_text(json.dumps(found, indent=1) + "\n")
    print(
        "| cut | parameters | perplexity | prefill | decode | mask = cut | greedy text |\n|---|---|---|---|---|---|---|"
    )
    for name, r in found.items():
        share = r["parameters"][1] / r["parameters"][0] - 1
        print(f"| {name} | {share:+.1%} | {r['perplexity'][0]:.1f} to {r['perplexity'][1]:.1f} | "
              f"{r['prefill_speedup']:.2f}x | {r['decode_speedup']:.2f}x | {r['logits_difference']:.0e} | "
              f"{r['text'][:60]!r} |")  # fmt: skip


if __name__ == "__main__":
    main()
