"""What a model weighs: parameters, non-zeros, bytes, multiply-accumulates, KV cache.

MACs are those of decoding one token with ``context`` tokens in the cache, head included:

    every linear layer         out x in
    experts                    top_k / experts of their weights (routers in full)
    attention, per layer       query heads x (key width + value width) x min(context, window)

Attention and cache are read off one tiny forward pass rather than the config, so models that were cut raggedly
are counted as they are. Normalisations, activations, rotary embeddings and the recurrences of state-space and
linear-attention layers are not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.engine.decode import accepted
from secateur.engine.headers import read_headers, read_index
from secateur.engine.packed_files import INDEX as PACKED_INDEX
from secateur.errors import SecateurError
from secateur.measure.types import Size
from secateur.sparse.linear import PackedLinear

PROBE = 7  # tokens of the tiny forward pass; a length that is no usual head width
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k")
POOL = re.compile(r"(.*\bexperts(?:\.matrices\.\w+)?)\.(\d+)\.")  # experts as modules, the host's or ours
REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)  # what a host's forward pass may raise
WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def size(model: nn.Module, path: Path | None = None, context: int = 1024) -> Size:
    """Weigh a model as it is in memory, and its files if it has any.

    Args:
        model: a Transformers model; on the meta device non-zeros are taken to be all parameters. Matrices that run
            packed count as they would unpacked.
        path: its checkpoint directory or file; None takes the bytes of the state in memory.
        context: tokens in the cache when MACs are counted.
    """
    parameters = list(model.parameters())  # tied tensors come once
    packed = [module.packed for module in model.modules() if isinstance(module, PackedLinear)]
    seen = observe(model)
    return Size(
        parameters=sum(p.numel() for p in parameters) + sum(math.prod(p.shape) for p in packed),
        nonzero=sum(p.numel() if p.is_meta else int(torch.count_nonzero(p)) for p in parameters)
        + sum(p.nonzeros for p in packed),
        bytes=stored_bytes(model, path),
        macs_per_token=linear_macs(model) + sum(a.macs(context) for a in seen.attention),
        kv_bytes_per_token=seen.kv_bytes,
        context=context,
        dtype=str(parameters[0].dtype).removeprefix("torch."),
    )


def stored_bytes(model: nn.Module, path: Path | None) -> int:
    """Bytes of the weight files under ``path`` (or of that file), or of the parameters and saved buffers."""
    if path is not None and (found := file_bytes(path)):
        return found
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def file_bytes(path: Path) -> int:
    """Bytes of a weight file, or of the files of a directory that hold the model; hubs often have the same weights
    beside them in another format. Where no safetensors are read, all weight files count."""
    if path.is_file():
        return path.stat().st_size
    try:
        entries = read_index(path / PACKED_INDEX)[0] if (path / PACKED_INDEX).is_file() else read_headers(path)
        files = {entry.file for entry in entries.values()}
    except SecateurError:
        files = {f for f in path.iterdir() if f.suffix in WEIGHT_FILES and f.name != "plan.safetensors"}
    return sum(f.stat().st_size for f in files)


def linear_macs(model: nn.Module) -> int:
    """MACs per token of every matrix a token meets: linear layers, routers, and the chosen experts.

    A tied head counts (it multiplies), an embedding does not (it is looked up).
    """
    top_k = _top_k(model)
    total = 0
    pools: dict[str, list[int]] = {}  # experts held as separate modules: weights of each pool, by expert
    for name, module in model.named_modules():
        pool = POOL.match(name + ".")
        macs = _macs(module, top_k)
        if pool and macs:
            members = pools.setdefault(pool[1], [])
            members += [0] * (int(pool[2]) + 1 - len(members))
            members[int(pool[2])] += macs
        else:
            total += macs
    return total + sum(sum(m) * min(top_k or len(m), len(m)) // len(m) for m in pools.values())


def chosen_share(model: nn.Module) -> float:
    """The share of its experts that a token meets; 1 without experts."""
    top_k = _top_k(model)
    stacks = [p.shape[0] for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n]
    return min(top_k, stacks[0]) / stacks[0] if top_k and stacks else 1.0


def _top_k(model: nn.Module) -> int | None:
    config = _text_config(model)
    return next((int(k) for name in TOP_K if isinstance(k := getattr(config, name, None), int)), None)


def _macs(module: nn.Module, top_k: int | None) -> int:
    """MACs per token of the matrices that a module itself holds."""
    if isinstance(module, PackedLinear):
        return module.in_features * module.out_features
    total = 0
    for key, weight in module.named_parameters(recurse=False):
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            total += weight.numel() if key == "weight" else 0
        elif weight.dim() == 3 and not isinstance(module, nn.Conv1d):
            total += weight.numel() * min(top_k or weight.shape[0], weight.shape[0]) // weight.shape[0]
        elif weight.dim() == 2 and re.search("Router|Gate", type(module).__name__):
            total += weight.numel()
    return total


@dataclass(frozen=True)
class Attended:
    """One attention: MACs per token and per cached token, and how many tokens it sees at most."""

    per_cached_token: int
    window: int | None = None

    def macs(self, context: int) -> int:
        return self.per_cached_token * min(context, self.window or context)


@dataclass(frozen=True)
class Observed:
    """What a tiny forward pass showed: attentions in order, and bytes one more token takes in the cache."""

    attention: tuple[Attended, ...]
    kv_bytes: int


@torch.inference_mode()
def observe(model: nn.Module) -> Observed:
    """Run a few tokens and look at the attention products and the cache.

    A model whose forward pass cannot run here (some on the meta device) is taken at its config's word.
    """
    device = next(model.parameters()).device
    watch = _Products()
    training = model.training
    model.eval()
    try:
        with _idle_experts(model), watch:
            out: Any = model(
                input_ids=torch.zeros(1, PROBE, dtype=torch.long, device=device), **accepted(model, {"use_cache": True})
            )
    except REFUSALS:
        return _configured(model)
    finally:
        model.train(training)
    layers = getattr(getattr(out, "past_key_values", None), "layers", None) or []
    layers = [x for x in layers if isinstance(getattr(x, "keys", None), Tensor)]
    kv = sum(_per_token(t) for x in layers for t in (x.keys, x.values))
    windows = [getattr(x, "sliding_window", None) for x in layers]
    if len(windows) != len(watch.per_layer):
        windows = [None] * len(watch.per_layer)
    attention = tuple(Attended(n, w) for n, w in zip(watch.per_layer, windows, strict=True))
    return Observed(attention or _configured(model).attention, kv)  # BLOOM's products are fused with its biases


def _per_token(cached: Tensor) -> int:
    """Bytes of one token in [batch, heads, tokens, width]; a short sliding window may hold fewer than were seen."""
    return cached.numel() * cached.element_size() // max(1, cached.shape[-2]) if cached.dim() > 1 else 0


@contextmanager
def _idle_experts(model: nn.Module) -> Iterator[None]:
    """Let experts hand their input through: which expert gets which token is unknown on the meta device, and
    neither attention nor cache depends on it."""
    idle = [m for m in model.modules() if any(p.dim() == 3 for p in m.parameters(recurse=False))]
    idle = [m for m in idle if not isinstance(m, nn.Conv1d)]
    before = [m.__dict__.get("forward") for m in idle]
    try:
        for module in idle:
            module.__dict__["forward"] = lambda hidden, *_, **__: hidden
        yield
    finally:
        for module, forward in zip(idle, before, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


class _Products(TorchFunctionMode):
    """Notes the products of activations with activations: scaled_dot_product_attention, or its two matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.per_layer: list[int] = []
        self._half: int | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, _, v = (args[i] if i < len(args) else kwargs[key] for i, key in enumerate(("query", "key", "value")))
            self.per_layer.append(q.shape[1] * (q.shape[-1] + v.shape[-1]))
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and args[0].dim() == args[1].dim() == 4:
            (a, b), heads = (args[0].shape, args[1].shape), args[0].shape[1]
            if a[-2] == PROBE and b[-1] == PROBE:  # queries times keys
                self._half = heads * a[-1]
            elif a[-2] == a[-1] == PROBE and self._half is not None:  # probabilities times values
                self.per_layer.append(self._half + heads * b[-1])
                self._half = None
        return func(*args, **kwargs)


def _configured(model: nn.Module) -> Observed:
    """What the config says of attention and cache, where no forward pass could be watched."""
    config = _text_config(model)
    layers, heads, hidden = (
        n if isinstance(n := getattr(config, name, 0), int) else 0
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    width = getattr(config, "head_dim", None) or (hidden // heads if heads else 0)
    groups = getattr(config, "num_key_value_heads", None) or heads
    cached = 2 * layers * groups * width * next(model.parameters()).element_size()
    return Observed((Attended(2 * heads * width),) * layers, cached)


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
