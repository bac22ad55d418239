"""Writing text, end to end: what a user has today beside packed models, with the perplexity of each.

    .venv/bin/python benchmarks/decode.py --calibration c4.jsonl --test wikitext2-test.txt --work out/decode \\
        [--llama OTHER_VENV/bin/python] [--threads 2] [--rounds 7] [--windows 16] [--method sparsegpt]

Contenders take turns, round by round, each with the same prompt of 128 tokens and 32 new ones, batch 1: Transformers
in fp32 and bf16 (eager, growing cache), torch's dynamic int8, llama.cpp's Q8_0 and Q4_1 (in a process each, told when
it is its turn; times are taken there), the dense model on our dense kernel, and pruned models packed. Pruned models
are made in the work folder when they are not there yet. Perplexity is that of the same windows for all; llama.cpp
computes its own. The packaged model comes from a Q4_1 file, so that
row loses nothing: a model published in bf16 would.
Results go to benchmarks/results/decode.json after every stage.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from secateur.account import cpu_name
from secateur.engine.decoders import Decoder, HostDecoder
from secateur.engine.host.origin import read_tokenizer, resolve
from secateur.engine.packed import pack_checkpoint
from secateur.engine.running import decoder_of
from secateur.engine.text import documents, pack, test_windows
from secateur.measure.bench import once
from secateur.measure.perplexity import perplexity
from secateur.sparse.kernels import status

MODEL, PROMPT, NEW = "smollm2", 128, 32
RESULTS = Path(__file__).parent / "results" / "decode.json"


@dataclass
class Contender:
    """One row: how it is timed, and how its perplexity is found."""

    name: str
    time: Callable[[Tensor], tuple[float, float, float]]
    quality: Callable[[Tensor], float]
    how: str
    sparsity: float = 0.0
    bytes: int = 0
    rounds: list[tuple[float, float, float]] = field(default_factory=list)


def ours(name: str, model: nn.Module, decoder: Decoder, sparsity: float = 0.0) -> Contender:
    """A model in this process."""
    size = sum(t.nbytes for t in {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values())
    return Contender(
        name,
        lambda ids: once(decoder, ids, NEW),
        lambda windows: perplexity(model, windows, batch_size=4).value,
        decoder.how,
        sparsity,
        size,
    )


def llama(python: str, kind: str, threads: int, work: Path) -> Contender:
    """llama.cpp in a process of its own, which waits until it is asked."""
    source = resolve(MODEL)
    assert source.gguf_file is not None
    script = str(Path(__file__).with_name("decode_llama.py"))
    process = subprocess.Popen(
        [python, script, str(source.path / source.gguf_file), kind, str(threads), str(work)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip

    def ask(order: dict[str, Any]) -> Any:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the llama.cpp process ended ({kind})")
        return json.loads(line)

    def time(ids: Tensor) -> tuple[float, float, float]:
        prompt, first, each = ask({"time": [ids[0].tolist(), NEW]})
        return prompt, first, each

    return Contender(
        f"llama.cpp {kind}", time, lambda windows: math.exp(ask({"perplexity": windows.tolist()})), "llama.cpp"
    )


def int8_dynamic(dense: nn.Module) -> nn.Module:
    """torch's own dynamic quantisation of every Linear."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), {nn.Linear}, dtype=torch.qint8)


def pruned(args: argparse.Namespace, sparsity: float, dtype: str) -> Path:
    """A pruned and packed model, made once."""
    plain = args.work / f"{args.method}-{sparsity:g}"
    packed = args.work / f"{plain.name}-{dtype}"
    if not plain.exists():
        step = secateur.Step("weight", method=args.method, sparsity=sparsity)
        text = secateur.TextSpec(args.calibration, samples=args.samples, length=1024)
        recipe = secateur.Recipe(MODEL, steps=(step,), text=text, measure=False, threads=args.threads)
        secateur.prune(recipe, plain)
    if not packed.exists():
        pack_checkpoint(resolve(plain), packed, dtype)
    return packed


def contenders(args: argparse.Namespace) -> list[Contender]:
    """All rows, in the order they are printed."""
    fp32 = secateur.load(MODEL, torch.float32)
    bf16 = secateur.load(MODEL, torch.bfloat16)
    quick = int8_dynamic(fp32)
    rows = [
        ours("Transformers fp32", fp32, HostDecoder(fp32)),
        ours("Transformers bf16", bf16, HostDecoder(bf16)),
        ours("torch int8 dynamic", quick, HostDecoder(quick)),
    ]
    if args.llama:
        rows += [llama(args.llama, kind, args.threads, args.work) for kind in ("Q8_0", "Q4_1")]
    own = copy.deepcopy(bf16)
    rows.append(ours("own dense kernel bf16", own, decoder_of(own, own_kernel=True)))
    for sparsity, dtype in ((0.5, "bf16"), (0.7, "bf16"), (0.5, "int8")):
        model = secateur.load(pruned(args, sparsity, dtype))
        rows.append(ours(f"packed {sparsity:.0%} {dtype}", model, decoder_of(model), sparsity))
    return rows


def main() -> None:
    """Time, then measure perplexity, writing as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--work", type=Path, default=Path("out/decode"))
    parser.add_argument("--llama", help="a Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--windows", type=int, default=16, help="of perplexity; 0 leaves it out")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    rows = contenders(args)
    ids = torch.randint(0, 40_000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    for turn in range(args.rounds + 1):
        for row in rows if turn % 2 else reversed(rows):
            seconds = row.time(ids)
            if turn:
                row.rounds.append(seconds)
    write(args, rows, {})
    quality: dict[str, float] = {}
    if args.windows:
        tokens = pack(read_tokenizer(resolve(MODEL)), documents(args.test, "test"))
        windows = test_windows(tokens, args.windows, 1024)
        for row in rows:
            quality[row.name] = row.quality(windows)
            write(args, rows, quality)
    print(table(rows, quality))


def figures(row: Contender) -> dict[str, float]:
    """Medians and quartiles in milliseconds."""
    prompt, first, each = (sorted(1e3 * x for x in column) for column in zip(*row.rounds, strict=True))
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else (each[0],) * 3
    return {
        "decode_ms_per_token": middle,
        "decode_low": low,
        "decode_high": high,
        "prefill_ms": statistics.median(prompt),
        "first_token_ms": statistics.median(first),
    }


def write(args: argparse.Namespace, rows: list[Contender], quality: dict[str, float]) -> None:
    """Everything found so far."""
    found = {row.name: figures(row) for row in rows}
    stock, own = (found[n]["decode_ms_per_token"] for n in ("Transformers bf16", "own dense kernel bf16"))
    data = {
        "model": MODEL, "prompt_tokens": PROMPT, "new_tokens": NEW, "batch": 1, "threads": args.threads,
        "rounds": args.rounds, "windows": args.windows, "method": args.method, "cpu": cpu_name(), "kernels": status(),
        "rows": [
            {
                "name": row.name, "runs_on": row.how, "sparsity": row.sparsity, "tensor_bytes": row.bytes or None,
                **found[row.name],
                "ratio_to_stock_bf16": stock / found[row.name]["decode_ms_per_token"],
                "ratio_to_own_dense": own / found[row.name]["decode_ms_per_token"],
                "perplexity": quality.get(row.name),
            }
            for row in rows
        ],
    }  # fmt: skip
    if not args.llama:
        data["left_out"] = "llama.cpp: no --llama was given"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def table(rows: list[Contender], quality: dict[str, float]) -> str:
    """The table of the README."""
    found = {row.name: figures(row) for row in rows}
    stock, own = (found[n]["decode_ms_per_token"] for n in ("Transformers bf16", "own dense kernel bf16"))
    lines = ["| | ms/token (quartiles) | x stock bf16 | x own dense | prompt of 128, ms | perplexity |"]
    lines.append("|---|---|---|---|---|---|")
    for name, f in found.items():
        ms = f["decode_ms_per_token"]
        spread = f"{ms:.1f} ({f['decode_low']:.1f} to {f['decode_high']:.1f})"
        ppl = f"{quality[name]:.2f}" if name in quality else "–"
        lines.append(f"| {name} | {spread} | {stock / ms:.2f} | {own / ms:.2f} | {f['prefill_ms']:.0f} | {ppl} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
