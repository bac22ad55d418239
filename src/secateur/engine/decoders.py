"""Token after token, as an object: `begin` reads the prompts, `step` adds one token to each.

`HostDecoder` is untouched Transformers with its growing cache: what a user has who installs nothing else.
`CompiledDecoder` is the same model with a cache of fixed size, its one-token step through torch.compile.
`secateur.engine.fast` has the step of our own, and `secateur.engine.running` chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.decode import Pick, accepted, greedy
from secateur.engine.host.cache import static_cache
from secateur.errors import SecateurError


class Decoder(ABC):
    """A causal language model that continues a batch of prompts of equal length.

    Attributes:
        how: what runs, in a few words.
        notes: why not something faster, where there is a reason.
    """

    how: str = ""
    notes: tuple[str, ...] = ()

    @abstractmethod
    def begin(self, ids: Tensor, room: int) -> Tensor:
        """Forget everything, read prompts int64 [batch, length], and make room for this many more tokens.

        Returns:
            logits [batch, vocabulary] of the next token.
        """

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Add tokens int64 [batch]; logits [batch, vocabulary] of the tokens after them."""


class HostDecoder(Decoder):
    """Untouched Transformers: eager, with its own growing cache (a model that keeps none reads everything again).

    Args:
        model: in eval mode.
        exact: feed it text that is embedded and in fp32, which makes most families compute in fp32.
    """

    how = "Transformers, eager, growing cache"

    def __init__(self, model: nn.Module, exact: bool = False) -> None:
        self.model, self.exact = model, exact
        self.cache: Any = None
        self._ids = torch.empty(0)

    def begin(self, ids: Tensor, room: int) -> Tensor:
        self.cache, self._ids = None, ids
        return self._forward(ids)

    def step(self, tokens: Tensor) -> Tensor:
        self._ids = torch.cat([self._ids, tokens[:, None]], 1)
        return self._forward(self._ids if self.cache is None else tokens[:, None])

    def _forward(self, ids: Tensor) -> Tensor:
        embed: Any = self.model.get_input_embeddings() if self.exact else None  # type: ignore[operator]
        text = {"inputs_embeds": embed(ids).float()} if self.exact else {"input_ids": ids}
        words = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        out = self.model(**text, **accepted(self.model, words))
        self.cache = getattr(out, "past_key_values", None)
        return out.logits[:, -1]


class CompiledDecoder(Decoder):
    """The host's forward pass with a cache of fixed size; the one-token step is compiled by torch.

    The first step of a new batch size or room compiles, which takes from half a minute to minutes.
    """

    how = "Transformers, torch.compile, static cache"

    def __init__(self, model: nn.Module) -> None:
        if not getattr(model, "_can_compile_fullgraph", False):
            raise SecateurError(
                "Transformers does not compile this family with a cache of fixed size",
                received=type(model).__name__,
                works="run it without --compile",
            )
        self.model = model
        self._compiled = torch.compile(model.forward, dynamic=False)
        self._cache: Any = None
        self._shape, self._at = (0, 0), 0

    def begin(self, ids: Tensor, room: int) -> Tensor:
        shape = (len(ids), ids.shape[1] + room)
        if shape != self._shape:
            self._cache, self._shape = static_cache(self.model, shape[1]), shape
        else:
            self._cache.reset()
        self._at = ids.shape[1]
        return self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        place = torch.full((len(tokens), 1), self._at, device=tokens.device)
        self._at += 1
        out = self._compiled(
            input_ids=tokens[:, None], position_ids=place, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1]


@torch.inference_mode()
def continued(decoder: Decoder, ids: Tensor, steps: int, pick: Pick = greedy) -> Iterator[Tensor]:
    """Continue prompts of equal length, yielding the new tokens [batch] of every step.

    Args:
        decoder: of a model in eval mode.
        ids: int64 [batch, length].
        steps: tokens to add. The first costs the prefill, each other one decoding step.
        pick: chooses tokens [batch] from logits [batch, vocabulary].
    """
    if steps < 1:
        return
    tokens = pick(decoder.begin(ids, steps)).to(ids.device)
    yield tokens
    for _ in range(steps - 1):
        tokens = pick(decoder.step(tokens)).to(ids.device)
        yield tokens
