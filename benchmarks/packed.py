"""SmolLM2 with half of its weights zero, packed beside its dense twin: bytes, memory, load time, greedy text, logits.

    .venv/bin/python benchmarks/packed.py --work out/packed-bench [--new-tokens 32]

Prunes smollm2 (magnitude, 50 % of each matrix), packs it in every dtype and unpacks it again. Every directory is then
loaded in a process of its own, which tells its resident memory after the imports, after loading and after writing
text, the tokens it wrote, and the logits of those prompts. A packed model and its unpacked twin hold the same weights;
they are compared with activations in fp32 and, for 16-bit weights, also in the weights' own dtype: tokens of the greedy
text before the first that differs, and how far each one's logits are from the twin's in fp32. Results go to
benchmarks/results/packed.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
PROMPTS = ("The capital of France is", "Water boils when", "Once upon a time", "def add(a, b):")


def resident() -> dict[str, int]:
    """Resident bytes of this process, now and at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    words = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": int(words["VmRSS"]) * 1024, "peak": int(words["VmHWM"]) * 1024}


def child(path: str, new_tokens: int, dtype: str) -> dict[str, Any]:
    """Load one model and write text with it."""
    from transformers import AutoTokenizer

    import secateur
    from secateur.engine.decode import decode

    secateur.load  # noqa: B018 (its imports do not count as the model's memory)
    tokenizer = AutoTokenizer.from_pretrained(path)
    before = resident()
    start = time.perf_counter()
    model: Any = secateur.load(path, getattr(torch, dtype))
    seconds = time.perf_counter() - start
    loaded = resident()
    written, logits = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        written.append([int(token) for token in decode(model, ids, new_tokens)])
        with torch.inference_mode():
            logits += model(ids).logits[0, -1].float().tolist()
    text = resident()
    return {
        "load_seconds": round(seconds, 2),
        "rss_before": before["now"],
        "rss_loaded": loaded["now"] - before["now"],
        "rss_load_peak": loaded["peak"] - before["now"],
        "rss_writing": text["now"] - before["now"],
        "tokens": written,
        "text": [tokenizer.decode(t) for t in written],
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "logits": logits,
    }


def in_child(path: Path, new_tokens: int, dtype: str) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", str(path), "--new-tokens", str(new_tokens), "--dtype", dtype]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def agree(a: dict[str, Any], b: dict[str, Any]) -> list[int]:
    """For each prompt, how many tokens agree before the first that differs."""
    pairs = [list(zip(p, q, strict=True)) for p, q in zip(a["tokens"], b["tokens"], strict=True)]
    return [next((i for i, (x, y) in enumerate(pair) if x != y), len(pair)) for pair in pairs]


def apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Relative distance of two models' logits."""
    x, y = torch.tensor(a["logits"]).double(), torch.tensor(b["logits"]).double()
    return float((x - y).norm() / y.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("out/packed-bench"))
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "packed.json")
    parser.add_argument("--child", type=str)
    parser.add_argument("--dtype", type=str)
    args = parser.parse_args()
    if args.child:
        sys.stdout.write(json.dumps(child(args.child, args.new_tokens, args.dtype)) + "\n")
        return
    import secateur
    from secateur import Recipe, Step
    from secateur.measure.size import file_bytes

    half = args.work / "half"
    if not half.exists():
        step = Step("weight", score="magnitude", keep=0.5, grain="matrix")
        secateur.prune(Recipe("smollm2", (step,), measure=False), half)
    rows: list[dict[str, Any]] = []
    for word, own in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"), ("int8", "float32")):
        packed, twin = args.work / f"packed-{word}", args.work / f"twin-{word}"
        start = time.perf_counter()
        told = secateur.pack(half, packed, word, overwrite=True)
        between = time.perf_counter()
        secateur.unpack(packed, twin, overwrite=True)
        end = time.perf_counter()
        row: dict[str, Any] = {
            "dtype": word,
            "nonzero_share": told["nonzero"] / told["weights"],
            "matrix_bytes_ratio": (told["bytes"] - _rest(told)) / (told["plain_bytes"] - _rest(told)),
            "file_bytes": {"packed": file_bytes(packed), "twin": file_bytes(twin)},
            "seconds": {"pack": round(between - start, 1), "unpack": round(end - between, 1)},
            "running": [],
        }
        reference = in_child(twin, args.new_tokens, "float32")
        for dtype in dict.fromkeys((own, "float32")):
            a = in_child(packed, args.new_tokens, dtype)
            b = reference if dtype == "float32" else in_child(twin, args.new_tokens, dtype)
            row["running"].append(
                {
                    "activations": dtype,
                    "tokens_in_common": agree(a, b),
                    "logits_from_fp32_twin": {"packed": apart(a, reference), "twin": apart(b, reference)},
                    "packed": {k: v for k, v in a.items() if k != "logits"},
                    "twin": {k: v for k, v in b.items() if k != "logits"},
                }
            )
        rows.append(row)
        sys.stdout.write("\n".join(_lines(row)) + "\n")
        sys.stdout.flush()
    result = {"model": "smollm2", "prompts": PROMPTS, "new_tokens": args.new_tokens, "threads": torch.get_num_threads(),
              "torch": torch.__version__, "rows": rows}  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def _lines(row: dict[str, Any]) -> list[str]:
    """What a person reads of a row."""
    files = row["file_bytes"]
    sizes = f"file {files['packed'] / 1e6:.1f} MB, unpacked {files['twin'] / 1e6:.1f} MB"
    out = [f"{row['dtype']}: {sizes}; matrices {row['matrix_bytes_ratio']:.4f} of their bytes"]
    for run in row["running"]:
        for kind in ("packed", "twin"):
            r = run[kind]
            out.append(
                f"  {kind:6} in {run['activations']}: loaded in {r['load_seconds']} s, resident "
                f"+{r['rss_loaded'] / 1e6:.0f} MB (peak +{r['rss_load_peak'] / 1e6:.0f}), "
                f"logits {run['logits_from_fp32_twin'][kind]:.1e} from the twin in fp32"
            )
        out.append(f"  tokens in common: {run['tokens_in_common']}")
    return out


def _rest(told: dict[str, Any]) -> int:
    """Bytes of what is never packed."""
    width = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}[told["dtype"]]
    return int(told["plain_bytes"] - width * told["weights"])


if __name__ == "__main__":
    main()
