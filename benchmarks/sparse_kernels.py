"""Kernels that skip zeros against our own dense kernel and torch: microseconds, ratios, and the byte limit of each.

    python benchmarks/sparse_kernels.py                        everything; half an hour on two quiet cores
    python benchmarks/sparse_kernels.py --shapes 4096x4096 --tokens 1 --rounds 5

Weights are random and the pattern is random (2:4: two random of four): speed only depends on how many stay. Every
variant has as many copies as exceed the caches and a round runs all variants one after another, so that each reads
cold weights and a drift of the machine touches all alike. Times are medians over rounds. "limit" is dense bytes over
packed bytes in the same dtype: the ratio to the own dense kernel that bandwidth alone would give. Results go to
benchmarks/results/sparse_kernels.json, plot and tables to docs/sparse-kernels.svg and .md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from secateur.account import cpu_name
from secateur.sparse import pack
from secateur.sparse.formats import DTYPES, Packed
from secateur.sparse.kernels import Handle, available, status

ROOT = Path(__file__).parent.parent
SHAPES = "576x576,1536x576,576x1536,49152x576,4096x4096,11008x4096"
COLD = 96 << 20  # bytes of copies of one variant
Call = Callable[[], object]


def sparse(w: Tensor, share: str) -> Tensor:
    """The weight with a share of random zeros, or two of four."""
    noise = torch.rand(w.shape)
    if share == "2:4":
        ranks = noise.view(-1, 4).argsort(1).argsort(1)
        return torch.where((ranks < 2).view(w.shape), w, 0)
    return torch.where(noise >= float(share), w, 0)


def copies(packed: Packed) -> list[Handle]:
    """As many handles on memory of their own as do not fit the caches."""
    n = max(1, min(400, COLD // max(packed.bytes, 1)))
    copied = [{name: part.clone() for name, part in packed.parts.items()} for _ in range(n)]
    return [Handle(Packed(packed.kind, packed.shape, packed.dtype, parts, packed.tile)) for parts in copied]


def variants(w: Tensor, x: Tensor, shares: list[str]) -> dict[str, tuple[list[Call], int]]:
    """Name to (calls that do the same work on different copies, bytes of the weights)."""
    made: dict[str, tuple[list[Call], int]] = {}
    for word in ("fp32", "bf16"):
        dtype = DTYPES[word]
        size = w.numel() * dtype.itemsize
        weights = [w.to(dtype, copy=True) for _ in range(max(1, min(400, COLD // size)))]
        inputs = x.to(dtype)
        made[f"torch {word}"] = [lambda a=a, i=inputs: torch.nn.functional.linear(i, a) for a in weights], size
    for word, dtype in DTYPES.items():
        if word == "fp16":
            continue
        # bf16 weights run with fp32 activations and, where the CPU multiplies bf16 pairs, with bf16 ones.
        for activation in ("fp32", "bf16") if word == "bf16" else ("fp32",):
            inputs = x.to(DTYPES[activation])
            for share in shares:
                kind = "dense" if share == "0" else "bitmask"
                packed = pack(w if share == "0" else sparse(w, share), dtype, kind)
                name = f"{word} weights, {activation} inputs, {share}"
                calls: list[Call] = [lambda h=h, i=inputs: h.direct(i) for h in copies(packed)]
                made[name] = calls, packed.bytes
    return made


def timed(calls: list[Call]) -> float:
    """Microseconds of one call, over all copies."""
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls) * 1e6


def measure(shape: tuple[int, int], tokens: int, threads: int, arguments: argparse.Namespace) -> list[dict]:
    """One cell of the table: every variant, interleaved."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    w, x = torch.randn(shape), torch.randn(tokens, shape[1])
    made = variants(w, x, arguments.shares.split(","))
    times: dict[str, list[float]] = {name: [] for name in made}
    flush = torch.ones(COLD // 4)
    for round_ in range(arguments.rounds + 1):
        for name, (calls, _) in made.items():
            if len(calls) < 3:
                flush.sum()
            took = timed(calls)
            if round_:
                times[name].append(took)
    rows = []
    for name, (_, size) in made.items():
        row = {"shape": list(shape), "tokens": tokens, "threads": threads, "variant": name, "bytes": size}
        row["us"], row["us_least"] = statistics.median(times[name]), min(times[name])
        row["over_torch_fp32"] = statistics.median(times["torch fp32"]) / row["us"]
        row["over_torch_bf16"] = statistics.median(times["torch bf16"]) / row["us"]
        own = name.rsplit(", ", 1)[0] + ", 0"
        if own in made and "weights" in name:
            row["over_own_dense"] = statistics.median(times[own]) / row["us"]
            row["byte_limit"] = made[own][1] / size
        rows.append(row)
        show(row)
    return rows


def show(row: dict) -> None:
    """One line of the table."""
    own = f"{row['over_own_dense']:5.2f} (limit {row['byte_limit']:4.2f})" if "over_own_dense" in row else " " * 18
    shape = f"{row['shape'][0]}x{row['shape'][1]}"
    print(
        f"{shape:>11} N={row['tokens']:<3} T={row['threads']} {row['variant']:<34} {row['us']:9.1f} us"
        f"   own dense {own}   torch fp32 {row['over_torch_fp32']:5.2f}   torch bf16 {row['over_torch_bf16']:5.2f}",
        flush=True,
    )


def activations(arguments: argparse.Namespace) -> list[dict]:
    """Zero inputs skipped: columns against the bitmask of the same weights (half of them zero), by share of zeros."""
    rows = []
    w = sparse(torch.randn(4096, 4096), "0.5")
    by_row, by_column = copies(pack(w, torch.bfloat16, "bitmask")), copies(pack(w, torch.bfloat16, "columns"))
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        for share in (0.0, 0.25, 0.5, 0.75, 0.9, 0.97):
            x = torch.randn(1, 4096) * (torch.rand(1, 4096) >= share)
            both: dict[str, list[float]] = {"bitmask": [], "columns": []}
            for _ in range(arguments.rounds):
                both["bitmask"].append(timed([lambda h=h, i=x: h.direct(i) for h in by_row]))
                both["columns"].append(timed([lambda h=h, i=x: h.direct(i) for h in by_column]))
            row = {"zero_inputs": share, "threads": threads} | {k: statistics.median(v) for k, v in both.items()}
            rows.append(row)
            took = f"bitmask {row['bitmask']:.0f} us, columns {row['columns']:.0f} us"
            print(f"zero inputs {share:4.0%} T={threads}: {took}", flush=True)
    return rows


def limits(arguments: argparse.Namespace) -> list[dict]:
    """Up to how many tokens calibration keeps the packed kernel, and a check of it: times on both ways."""
    from secateur.sparse.calibrate import calibrated

    rows = []
    torch.set_num_threads(int(arguments.threads.split(",")[-1]))
    for word, share in itertools.product(("fp32", "bf16"), ("0.5", "0.7", "0.9")):
        handle = Handle(pack(sparse(torch.randn(4096, 4096), share), DTYPES[word], "bitmask"))
        limit = calibrated(handle, DTYPES[word])
        rows.append({"dtype": word, "inputs": word, "zeros": share, "limit": limit})
        print(f"calibrated limit, 4096x4096 {word} weights and inputs at {share}: {limit} tokens")
    return rows


def plot(rows: list[dict]) -> str:
    """Speed over the own dense kernel against the share of zeros, one line per dtype, and the line where dense wins."""
    width, height, left, bottom = 640, 400, 60, 350
    shown = [r for r in rows if "over_own_dense" in r and r["tokens"] == 1 and r["variant"].split(", ")[2] != "2:4"]
    shape = max((tuple(r["shape"]) for r in shown), key=lambda s: s[0] == 4096, default=None)
    threads = max((r["threads"] for r in shown), default=1)
    shown = [r for r in shown if tuple(r["shape"]) == shape and r["threads"] == threads]
    top = max([2.0, *(max(r["over_own_dense"], r["byte_limit"]) for r in shown)])

    def at(share: float, ratio: float) -> tuple[float, float]:
        return left + share * 560, bottom - ratio / top * 310

    title = f"One token, {shape} weights, {threads} threads: times as fast as our own dense kernel"
    box = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20">{title}</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, _ = at(share, 0)
        parts.append(f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{share:.0%}</text>')
    for ratio in range(int(top) + 1):
        _, y = at(0, ratio)
        stroke = "#c33" if ratio == 1 else "#ddd"
        parts.append(f'<line x1="{left}" x2="620" y1="{y:.0f}" y2="{y:.0f}" stroke="{stroke}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{ratio}</text>')
    caption = "zeros; below the red line dense is faster; dashed: byte limit"
    parts.append(f'<text x="340" y="{bottom + 38}" text-anchor="middle">{caption}</text>')
    colours = {
        "fp32 weights, fp32": "#1b6",
        "bf16 weights, fp32": "#27c",
        "bf16 weights, bf16": "#824",
        "int8 weights, fp32": "#b70",
    }
    for i, (start, colour) in enumerate(colours.items()):
        line = sorted((float(r["variant"].rsplit(", ", 1)[1]), r) for r in shown if r["variant"].startswith(start))
        for key, dash in (("over_own_dense", ""), ("byte_limit", ' stroke-dasharray="4 4" opacity="0.5"')):
            points = " ".join("{:.1f},{:.1f}".format(*at(share, r[key])) for share, r in line if share)
            parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"{dash}/>')
        parts.append(f'<text x="{left + 10}" y="{50 + 16 * i}" fill="{colour}">{start} inputs</text>')
        cross = crossover(line)
        if cross is not None:
            x, y = at(cross, 1)
            tip = f"<title>dense wins below {cross:.0%}</title>"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">{tip}</circle>')
    return "\n".join([*parts, "</svg>\n"])


def markdown(result: dict) -> str:
    """The page of tables: times as fast as our own dense kernel, the byte limit in brackets, and torch beside it."""
    lines = [
        "# Kernels that skip zeros",
        "",
        "<!-- Written by benchmarks/sparse_kernels.py; do not edit. -->",
        "",
        "How many times as fast as our own dense kernel in the same dtypes, and in brackets the ratio of their bytes,",
        f"which is what memory alone would give. {result['kernels']} on {result['cpu']}, torch {result['torch']};",
        f"medians of {result['rounds']} interleaved rounds on cold weights with random patterns. The last two columns",
        "compare 50 % zeros with what torch takes for the dense product.",
        "",
        "![speed against sparsity](sparse-kernels.svg)",
    ]
    shares = ("0.25", "0.5", "0.7", "0.9", "2:4")
    cells = {(*r["shape"], r["tokens"], r["threads"], r["variant"]): r for r in result["rows"]}
    for tokens in sorted({r["tokens"] for r in result["rows"]}):
        heads = " | ".join(s if ":" in s else f"{float(s):.0%}" for s in shares)
        lines += ["", f"## {tokens} token{'s' * (tokens > 1)} at once", ""]
        lines += [f"| matrix | threads | weights, inputs | {heads} | torch fp32 | torch bf16 |", "|---" * 10 + "|"]
        groups = {
            (*key[:4], key[4].rpartition(", ")[0]): None for key in cells if key[2] == tokens and "weights" in key[4]
        }
        for rows, columns, _, threads, kind in groups:
            found = [cells[rows, columns, tokens, threads, f"{kind}, {share}"] for share in shares]
            ratios = " | ".join(f"{r['over_own_dense']:.2f} ({r['byte_limit']:.2f})" for r in found)
            torches = f"{found[1]['over_torch_fp32']:.2f} | {found[1]['over_torch_bf16']:.2f}"
            kind = kind.replace(" weights", "").replace(" inputs", "")
            lines.append(f"| {rows} x {columns} | {threads} | {kind} | {ratios} | {torches} |")
    return "\n".join(lines) + "\n"


def crossover(line: list[tuple[float, dict]]) -> float | None:
    """The share of zeros at which the packed kernel is as fast as the dense one, between two measured shares."""
    points = [(share, r["over_own_dense"]) for share, r in line if share]
    for (a, low), (b, high) in itertools.pairwise(points):
        if low < 1 <= high:
            return a + (1 - low) / (high - low) * (b - a)
    return None


def main() -> None:
    """Measures, prints, and writes the JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--shares", default="0,0.1,0.25,0.5,0.7,0.9,2:4")
    parser.add_argument("--tokens", default="1,4,16,128")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sparse_kernels.json")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "sparse-kernels.svg")
    parser.add_argument("--no-extras", action="store_true", help="only the table")
    arguments = parser.parse_args()
    if available() is None:
        raise SystemExit(status())
    print(status())
    rows: list[dict] = []
    for shape, tokens in itertools.product(arguments.shapes.split(","), map(int, arguments.tokens.split(","))):
        out, width = map(int, shape.split("x"))
        for threads in map(int, arguments.threads.split(",")):
            rows += measure((out, width), tokens, threads, arguments)
    result = {"cpu": cpu_name(), "torch": torch.__version__, "kernels": available()}
    result |= {"rounds": arguments.rounds, "rows": rows}
    if not arguments.no_extras:
        result |= {"zero_inputs": activations(arguments), "limits": limits(arguments)}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    arguments.svg.write_text(plot(rows))
    arguments.svg.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
