"""Time and memory of weight methods on square random layers of growing width, and the exponent of growth.

    python benchmarks/method_cost.py --out benchmarks/results/method_cost.json

Each width is one matrix [width, width] with the X^T X of correlated random inputs; half of the weights stay. The
exponent is fitted over the widths (log CPU seconds against log width): n^3 is what factorising X^T X and products of
[n, n] matrices cost, n^4 would be cubic work for every row. ``--large`` prunes the two shapes of a 7B model's FFN
(11008 x 4096 and 4096 x 11008, outputs x inputs), each in a process of its own, and reports its peak resident memory
beside what weights and X^T X took before it began. What is in the file already and is not asked for stays there.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from secateur.account import cpu_name, peak_rss
from secateur.engine.probes import Evidence, Gram, InputMoments, InputNorm
from secateur.methods.base import MatrixSite, Method
from secateur.methods.composed import Composed
from secateur.methods.grains import parse_grain
from secateur.methods.joint import METHODS
from secateur.methods.least_squares import refit
from secateur.methods.scores import SCORES

WIDTHS = (576, 1536, 4096)
LARGE = ((11008, 4096), (4096, 11008))  # outputs, inputs: gate_proj and down_proj of a 7B Llama
NAMES = ("wanda", "sparsegpt", "obs", "admm", "alps", "sparseswaps", "dsnot", "least squares")
GRAINS = {"wanda": "row", "sparseswaps": "row", "dsnot": "row", "admm": "matrix", "alps": "matrix"}


def layer(rows: int, columns: int) -> tuple[MatrixSite, Evidence]:
    """A random matrix, and what 2 tokens per input channel say of correlated inputs."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=g).mul_(torch.logspace(0, -1, columns)) / columns**0.5
    probes = {Gram: Gram(), InputNorm: InputNorm(), InputMoments: InputMoments()}
    for _ in range(4):
        x = torch.randn(columns // 2, columns, generator=g) @ mix.T + 0.02
        for probe in probes.values():
            probe.update(x)
    weight = torch.randn(rows, columns, generator=g) / columns**0.5
    return MatrixSite(f"{rows} x {columns}", weight, "ffn", 0, 1, g), Evidence("w", probes)


def built(name: str, grain: str | None) -> Method:
    grain_ = parse_grain(grain or GRAINS.get(name, "columns:128"))
    if name in SCORES:
        return Composed(SCORES[name](), grain_)
    make: Any = METHODS[name]
    return make(grain=grain_)


def run(name: str, site: MatrixSite, evidence: Evidence, grain: str | None = None) -> dict[str, float]:
    """Seconds, and the relative error |X (w - w')|^2 / |X w|^2."""
    begin, cpu = time.perf_counter(), time.process_time()
    if name == "least squares":
        keep = built("wanda", grain).prune(site, evidence, site.weight.numel() // 2)
        new = refit(evidence[Gram].gram, site.weight, keep.mask)
    else:
        keep = built(name, grain).prune(site, evidence, site.weight.numel() // 2)
        new = site.weight * keep.mask if keep.weight is None else keep.weight
    spent = {"wall": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
    gram = evidence[Gram].gram
    lost, whole = (float(((v @ gram) * v).sum()) for v in (new - site.weight, site.weight))
    return spent | {"error": lost / whole, "kept": int(keep.mask.sum()) / keep.mask.numel()}


def alone(name: str, rows: int, columns: int, grain: str | None) -> dict[str, float]:
    """`run` with resident bytes before it began, and at its peak; in a process of its own."""
    site, evidence = layer(rows, columns)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux): making X^T X took more
    before = peak_rss()
    return run(name, site, evidence, grain) | {"before": before, "peak": peak_rss()}


def write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")


def exponent(seconds: dict[int, float]) -> float:
    """Slope of log seconds over log width, by least squares."""
    x = torch.tensor([math.log(w) for w in seconds], dtype=torch.float64)
    y = torch.tensor([math.log(s) for s in seconds.values()], dtype=torch.float64)
    x -= x.mean()
    return float((x * y).sum() / (x * x).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("method_cost.json"))
    parser.add_argument("--methods", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS)
    parser.add_argument("--grain", help="for all methods; by default each method's own")
    parser.add_argument("--large", action="store_true", help="both shapes of a 7B model's FFN, a process per method")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        name, rows, columns = args.one[0], int(args.one[1]), int(args.one[2])
        print(json.dumps(alone(name, rows, columns, args.grain)))
        return
    old: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    old["conditions"] = {"cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__}
    if args.large:
        for shape in LARGE:
            for name in args.methods:
                words = [sys.executable, __file__, "--one", name, *map(str, shape), "--threads", str(args.threads)]
                words += ["--grain", args.grain] if args.grain else []
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                own = old.setdefault("large", {}).setdefault("{} x {}".format(*shape), {})
                own[name] = json.loads(done.stdout)
                write(args.out, old)
                print(*shape, name, own[name], flush=True)
        return
    square: dict[str, Any] = old.setdefault("square", {})
    for width in args.widths:
        site, evidence = layer(width, width)
        for name in args.methods:
            square.setdefault(name, {})[str(width)] = run(name, site, evidence, args.grain)
            spent = {n: {int(w): f["cpu"] for w, f in own.items()} for n, own in square.items()}
            old["exponents"] = {n: exponent(seconds) for n, seconds in spent.items() if len(seconds) > 1}
            write(args.out, old)
            print(width, name, square[name][str(width)], flush=True)
    for name, power in old["exponents"].items():
        print(f"{name}: width to the {power:.2f}")


if __name__ == "__main__":
    main()
