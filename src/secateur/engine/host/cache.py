"""Transformers' caches: reading the keys and values of a growing one, and making one of fixed size."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import StaticCache


def cached(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer of a dynamic cache, each [batch, key/value heads, positions, head size]."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def static_cache(model: nn.Module, positions: int) -> Any:
    """A cache with room for so many positions from the start: the shapes of a decoding step never change."""
    return StaticCache(config=model.config, max_cache_len=positions)
