"""A decoding step of our own for Llama-like models: static cache, products that read the same input in one.

Inside the host a token of a small model costs more in Python than in arithmetic, and pruning does not shrink that.
Here a token is one call into the library. What is known of the host is kept small: the families below, whose layers
are x + o(attention(rope(q, k), v)) and x + down(act(gate) * up) with RMS norms before them. Anything else is refused
with the reason, and so is a model of which the step and the host's own forward pass disagree on a few tokens: every
`FastDecoder` is checked on the very weights that it will run. The prompt is read by the host.

Activations of the step are fp32 whatever the weights are in: that is as fast and rounds less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.decoders import Decoder, HostDecoder
from secateur.engine.fusing import beside, product_of, to_kernels
from secateur.engine.host.cache import cached
from secateur.errors import SecateurError
from secateur.sparse.kernels import available, why_missing
from secateur.sparse.linear import PackedLinear
from secateur.sparse.step import Heads, Layer, Step, Text, ready

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
ROPES = frozenset({"default", "linear", "llama3", "yarn"})  # those whose angles do not depend on the text's length
ACTS = {
    "SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh", "ReLU": "relu",
}  # fmt: skip
TOLERANCE = 1e-3  # of the largest logit, everything in fp32
COARSE = 2e-2  # with int8 matrices, whose products round their inputs
PROMPT, STEPS = 5, 3  # tokens of the check


class NotFast(SecateurError):
    """This model has to run in the host's own forward pass; says why."""


class FastDecoder(Decoder):
    """Decoding with a step of our own; the host reads the prompt.

    Packed matrices run on the kernels that skip zeros, all others on our dense kernel, in the host's forward pass as
    well. Matrices that read the same input are laid side by side in memory, and the model's own become views of that:
    nothing is held twice.

    Args:
        model: in eval mode, on the CPU.

    Raises:
        NotFast: the family is not one of ours, or the two disagree.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._limit = _refuse(model)
        to_kernels(model)
        inner: Any = self.model.model
        head: Any = self.model.lm_head
        layers = [_layer(block) for block in inner.layers]
        self._step = Step(layers, product_of(head), _fp32(inner.norm.weight), float(inner.norm.variance_epsilon))
        self._text: Text | None = None
        self._at = 0
        self.how = f"own step, {available()} kernels, static cache"
        with torch.inference_mode():
            self._check()

    def begin(self, ids: Tensor, room: int, exact: bool = False) -> Tensor:
        """As in `Decoder`; ``exact``: the host reads the prompt in fp32 whatever the model is in."""
        length, size = ids.shape[1], ids.shape[1] + room
        if self._limit is not None and size > self._limit:
            raise SecateurError(
                "this model looks back at a window of tokens, and our step at all of them",
                received=f"{size} tokens",
                works=f"at most {self._limit} tokens in all",
            )
        host = HostDecoder(self.model, exact)
        logits = host.begin(ids, room)
        caches = []
        for pair in cached(host.cache):
            roomy = [torch.zeros(*t.shape[:2], size, t.shape[3]) for t in pair]
            for kept, found in zip(roomy, pair, strict=True):
                kept[:, :, :length] = found
            caches.append((roomy[0], roomy[1]))
        self._text = Text(caches, _angles(self.model.model.rotary_emb, size))
        self._step.fit(self._text)
        self._at = length
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        assert self._text is not None, "begin comes first"
        logits = self._step(self.model.model.embed_tokens(tokens).float(), self._text, self._at)
        self._at += 1
        return logits

    def _check(self) -> None:
        """Refuse to run what the host computes differently: the last tokens of a short text, in fp32.

        Embedded text in fp32 makes the host compute in fp32: a check in bf16 could not tell rounding from error.
        """
        embed = self.model.get_input_embeddings()
        ids = torch.randint(0, embed.num_embeddings, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
        wanted = self.model(inputs_embeds=embed(ids).float(), use_cache=False).logits[:, PROMPT:]
        self.begin(ids[:, :PROMPT], STEPS, exact=True)
        found = torch.stack([self.step(ids[:, PROMPT + i]) for i in range(STEPS)], 1)
        self._text = None
        error = float((found - wanted).abs().max() / wanted.abs().max())
        int8 = any(isinstance(m, PackedLinear) and m.dtype == torch.int8 for m in self.model.modules())
        bound = COARSE if int8 else TOLERANCE
        if not error <= bound:
            raise NotFast(
                "our decoding step and the model's own forward pass disagree",
                received=f"{error:.2g} of the largest logit",
                works=f"at most {bound:g} would do; it runs inside Transformers",
            )


def _refuse(model: nn.Module) -> int | None:
    """The longest text for which full attention is right (None: any), if the step can be used at all."""
    config: Any = model.config
    works = "it runs inside Transformers"
    if config.model_type not in FAMILIES:
        raise NotFast("no decoding step of our own for this family", received=config.model_type, works=works)
    if not ready():
        missing = why_missing() or "they were built for another version; install secateur again"
        raise NotFast(f"our decoding step needs our kernels: {missing}", works=works)
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise NotFast("our decoding step runs on the CPU", received=str(device), works=works)
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in ROPES:
        raise NotFast("no decoding step of our own for this rotary embedding", received=rope, works=works)
    whole: Any = model
    acts = {type(block.mlp.act_fn).__name__ for block in whole.model.layers}
    if not acts <= ACTS.keys():
        raise NotFast("no decoding step of our own for this activation", received=sorted(acts), works=works)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = window is not None if kinds is None else any(kind != "full_attention" for kind in kinds)
    return window if slides else None


def _layer(block: Any) -> Layer:
    attention, ffn = block.self_attn, block.mlp
    before, after = block.input_layernorm, block.post_attention_layernorm
    own = [getattr(attention, n) for n in ("q_norm", "k_norm") if hasattr(attention, n)]
    size = int(attention.head_dim)
    queries, groups = (getattr(attention, n).out_features // size for n in ("q_proj", "k_proj"))
    return Layer(
        qkv=beside(attention, ("q_proj", "k_proj", "v_proj")),
        o=product_of(attention.o_proj),
        gate_up=beside(ffn, ("gate_proj", "up_proj")),
        down=product_of(ffn.down_proj),
        before_attention=_fp32(before.weight),
        before_ffn=_fp32(after.weight),
        eps=float(before.variance_epsilon),
        heads=Heads(
            queries=queries,
            groups=groups,
            size=size,
            scale=float(attention.scaling),
            eps=float(own[0].variance_epsilon) if own else 0.0,
            norms=(_fp32(own[0].weight), _fp32(own[1].weight)) if own else None,
        ),
        act=ACTS[type(ffn.act_fn).__name__],
    )


def _angles(rotary: Any, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines fp32 [size, head] of every position, from the host's own table."""
    cos, sin = rotary(torch.zeros(1), torch.arange(size)[None])
    return cos[0].contiguous(), sin[0].contiguous()


def _fp32(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()
