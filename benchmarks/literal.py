"""Magnitude, Wanda and SparseGPT carried out literally, beside Secateur's: same model, text, windows and machine.

    .venv/bin/python benchmarks/literal.py --calibration c4.jsonl --test wikitext2-test.txt --out literal.json

Published numbers were made on other machines, and pruned models of this size amplify rounding: one algorithm gives
2:4 perplexities several per cent apart on two CPUs. So the algorithms are written out here a second time, step by
step as their papers and the authors' programs take them, sharing nothing with `secateur.methods`: one window at a
time, a hook per matrix, thresholds on sorted scores, the inverse by two factorisations, columns one by one. Slow on
purpose.

Sources: Wanda, arXiv 2306.11695, section 3 and algorithm 1; SparseGPT, arXiv 2301.00774, algorithm 1.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.account import cpu_name
from secateur.engine.checkpoint import load
from secateur.engine.host.origin import read_tokenizer, resolve
from secateur.engine.text import TextSource, calibration, documents, pack, test_windows
from secateur.engine.walk import running_as
from secateur.measure.perplexity import perplexity

Group = tuple[int, int] | None  # prune p of every m, or a share of single weights


class Magnitude:
    """Goes: whatever is at most the value at place ``share`` of the sorted matrix (ties go together)."""

    reads = False

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def hear(self, x: Tensor) -> None:
        raise AssertionError("magnitude reads no text")

    def prune(self, share: float, group: Group) -> None:
        w = self.layer.weight.data
        gone = smallest(w.abs(), group) if group else w.abs() <= w.abs().flatten().sort().values[int(w.numel() * share)]
        w[gone] = 0


class Wanda(Magnitude):
    """|W| times the root mean square of each input, row by row."""

    reads = True

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.square, self.seen = torch.zeros(layer.in_features), 0

    def hear(self, x: Tensor) -> None:
        self.square *= self.seen / (self.seen + 1)
        self.seen += 1
        self.square += x.reshape(-1, x.shape[-1]).float().norm(dim=0).square() / self.seen

    def prune(self, share: float, group: Group) -> None:
        w = self.layer.weight.data
        score = w.abs() * self.square.sqrt()
        if group:
            w[smallest(score, group)] = 0
            return
        first = score.sort(dim=1, stable=True).indices[:, : int(w.shape[1] * share)]
        w.scatter_(1, first, 0.0)


class SparseGPT(Magnitude):
    """Column by column, the error spread over the columns not yet visited."""

    reads = True

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.hessian, self.seen = torch.zeros(layer.in_features, layer.in_features), 0

    def hear(self, x: Tensor) -> None:
        self.hessian *= self.seen / (self.seen + 1)
        self.seen += 1
        columns = math.sqrt(2 / self.seen) * x.reshape(-1, x.shape[-1]).T.float()
        self.hessian += columns @ columns.T

    def prune(self, share: float, group: Group, width: int = 128, damping: float = 0.01) -> None:
        w, h = self.layer.weight.data.clone(), self.hessian
        dead = h.diagonal() == 0
        h[dead, dead], w[:, dead] = 1, 0
        h.diagonal().add_(damping * h.diagonal().mean())
        u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
        for a in range(0, w.shape[1], width):
            b = min(a + width, w.shape[1])
            part, block = w[:, a:b].clone(), u[a:b, a:b]
            kept, errors = torch.zeros_like(part), torch.zeros_like(part)
            gone = torch.zeros_like(part, dtype=torch.bool)
            if not group:
                saved = part.square() / block.diagonal().square()
                gone = saved <= saved.flatten().sort().values[int(saved.numel() * share)]
            for i in range(b - a):
                if group and i % group[1] == 0:
                    ahead = slice(i, i + group[1])
                    gone[:, ahead] = smallest(part[:, ahead].square() / block.diagonal()[ahead].square(), group)
                kept[:, i] = part[:, i].masked_fill(gone[:, i], 0)
                errors[:, i] = (part[:, i] - kept[:, i]) / block[i, i]
                part[:, i:] -= errors[:, i : i + 1] @ block[i : i + 1, i:]
            w[:, a:b] = kept
            w[:, b:] -= errors @ u[a:b, b:]
        self.layer.weight.data = w


def smallest(score: Tensor, group: tuple[int, int]) -> Tensor:
    """True at the p smallest of every m neighbours of [rows, columns]; ties as `torch.topk` breaks them."""
    gone = torch.zeros_like(score, dtype=torch.bool)
    for a in range(0, score.shape[1], group[1]):
        gone.scatter_(1, a + score[:, a : a + group[1]].topk(group[0], dim=1, largest=False).indices, True)
    return gone


@torch.no_grad()
def carry_out(model: Any, windows: Tensor, kind: type[Magnitude], share: float, group: Group) -> None:
    """Prune all linear layers of a Llama-like model, layer after layer, each fed by the pruned ones before it."""
    base = model.model
    states = [base.embed_tokens(windows[i : i + 1]) for i in range(len(windows))] if kind.reads else []
    at = torch.arange(windows.shape[1])[None]
    rotary = base.rotary_emb(base.embed_tokens(windows[:1]), at)

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        y = layer(x, attention_mask=None, position_ids=at, position_embeddings=rotary)
        return y[0] if isinstance(y, tuple) else y

    for layer in base.layers:
        linear = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        pruners = [kind(m) for m in linear]
        hooks = [m.register_forward_pre_hook(hearing(p)) for m, p in zip(linear, pruners, strict=True) if kind.reads]
        for x in states:
            run(layer, x)
        for hook in hooks:
            hook.remove()
        for p in pruners:
            p.prune(share, group)
        states = [run(layer, x) for x in states]


def hearing(pruner: Magnitude) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that hands a layer's input to its pruner."""
    return lambda module, args: pruner.hear(args[0].detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", type=Path, default=Path("literal.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="rows such as 'sparsegpt 2:4'; all by default")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = read_tokenizer(resolve(args.model))
    text = calibration(TextSource(args.calibration, 64, 1024, 0), tokenizer)
    test = test_windows(pack(tokenizer, documents(args.test, "test")), 64, 1024)
    model = load(args.model, torch.float32)
    dense = {name: p.data.clone() for name, p in model.named_parameters()}
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": {}}
    found["conditions"] = {"cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__, "batch": 1}
    kinds: dict[str, type[Magnitude]] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}
    levels: dict[str, tuple[float, Group]] = {"50%": (0.5, None), "60%": (0.6, None), "70%": (0.7, None)}
    levels["2:4"] = (0.5, (2, 4))
    rows = args.only or [f"{kind} {level}" for level in levels for kind in kinds]
    for name in rows:
        kind, level = name.split()
        if name in found["rows"]:
            continue
        carry_out(model, text, kinds[kind], *levels[level])
        weights = [m.weight for layer in model.model.layers for m in layer.modules() if isinstance(m, nn.Linear)]
        zeros = sum(int((w == 0).sum()) for w in weights)
        with running_as(model, torch.bfloat16):
            value = perplexity(model, test).value
        found["rows"][name] = {"perplexity": value, "zeros": zeros, "of": sum(w.numel() for w in weights)}
        print(f"{name}: perplexity {value:.1f}, {zeros} zeros", flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        for n, p in model.named_parameters():
            p.data.copy_(dense[n])


if __name__ == "__main__":
    main()
