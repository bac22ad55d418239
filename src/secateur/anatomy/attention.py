"""Attention as ports: separate or fused projections, grouped, multi-query or one KV head per query head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from secateur.anatomy.look import Look, Unfit
from secateur.anatomy.types import ConfigRule, Port, Space

CAUSAL_MASKS = ("attn.bias", "attention.bias", "self_attn.bias")  # buffers of 0 and 1, [1, 1, length, length]
HEAD_DIMS = ("head_dim", "attention_head_size", "head_size", "dim_per_head", "d_head", "dim_heads")
QUERY_FIELDS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
KV_FIELDS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads")
HEAD_DIM_FIELDS = ("head_dim", "attention_head_dim", "attention_head_size")


@dataclass(frozen=True)
class Heads:
    """Numbers of one attention: query heads, KV groups, and entries per head in query, key and value."""

    queries: int
    groups: int
    query: int
    key: int
    value: int

    @property
    def per_group(self) -> int:
        return self.queries // self.groups


@dataclass(frozen=True)
class Attention:
    """Names inside an attention module.

    Attributes:
        module: the attention module.
        q, k, v, o: its projections. With ``fused`` the first names the fused one and k, v are not used.
        fused: ``split`` (three matrices), ``parts`` (all queries, then keys, then values), or ``groups``
            (for each KV group its queries, its key, its value: NeoX, BLOOM, Falcon).
        head_dim: True if the config can say the head size, so that fewer heads have a word.
        norms, out_norms: norms over queries and keys, and over what ``o`` reads.
        positional: the reason why heads are not interchangeable (ALiBi slopes), or "".
        extra: tensors with one entry per query head (sinks), modules with an output per head entry (gates).
        when: a condition on the block and the config, where the tensors' names do not tell.
        forward_config: fields that count query heads and that the forward pass itself reads in its config.
    """

    module: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    fused: str = "split"
    head_dim: bool = True
    positional: str = ""
    norms: tuple[tuple[str, str], ...] = (
        ("q_norm", "k_norm"),
        ("q_layernorm", "k_layernorm"),
        ("query_layernorm", "key_layernorm"),
        ("q_ln", "k_ln"),
    )
    out_norms: tuple[str, ...] = ("attn_sub_norm",)
    extra: tuple[str, ...] = ("sinks", "gate_proj", "g_proj")
    forward_config: tuple[str, ...] = ()
    when: Callable[[Look], bool] | None = None

    def at(self, leaf: str) -> str:
        return f"{self.module}.{leaf}" if self.module else leaf

    def names(self) -> tuple[str, ...]:
        """The matrices that must be there."""
        leaves = (self.q, self.k, self.v, self.o) if self.fused == "split" else (self.q, self.o)
        return tuple(self.at(n) for n in leaves)

    def heads(self, look: Look) -> Heads:
        """Count heads from the tensors' shapes and the head size, which no cut changes.

        Raises:
            Unfit: if the shapes are not whole numbers of heads.
        """
        size = look.attribute(self.module, HEAD_DIMS) or look.number(*HEAD_DIM_FIELDS)
        if not size:
            hidden, count = look.number("hidden_size", "n_embd", "d_model"), look.number(*QUERY_FIELDS)
            if not hidden or not count:
                raise Unfit("its head size is not known")
            size = hidden // count
        ins = look.ins(self.at(self.o))
        if self.fused == "split":
            groups = look.outs(self.at(self.k)) // size
            value = look.outs(self.at(self.v)) // max(groups, 1)
            queries = ins // max(value, 1)
            query = look.outs(self.at(self.q)) // max(queries, 1)
            sizes: tuple[int, ...] = (groups * size, groups * value, queries * value, queries * query)
            found: tuple[int, ...] = (
                *(look.outs(self.at(n)) for n in (self.k, self.v)),
                ins,
                look.outs(self.at(self.q)),
            )
        else:
            queries, value, query = ins // size, size, size
            groups = (look.outs(self.at(self.q)) - ins) // (2 * size)
            sizes = (queries * size, (queries + 2 * groups) * size)
            found = (ins, look.outs(self.at(self.q)))
        if sizes != found or min(groups, queries) < 1 or queries % groups:
            raise Unfit(f"its shapes {list(found)} are not whole numbers of heads of {size}")
        return Heads(queries, groups, query, size, value)

    def spaces(self, look: Look) -> tuple[dict[str, Space], dict[str, str]]:
        """The spaces of heads that this block has, and the reasons for those it has not."""
        try:
            if self.positional:
                raise Unfit(self.positional)
            if look.on("alibi") or look.on("attn_config", "alibi"):
                raise Unfit(ALIBI)
            if look.number("num_kv_shared_layers"):
                raise Unfit("layers share keys and values with each other")
            h = self.heads(look)
            group = self._kv_group(look, h)
            self._complete(look, h, group)
        except Unfit as reason:
            return {}, {"kv_group": str(reason), "head": str(reason)}
        spaces, why = {"kv_group": group}, {}
        try:
            spaces["head"] = self._head(look, h)
        except Unfit as reason:
            why["head"] = str(reason)
        if h.groups == 1 and h.queries > 1:
            del spaces["kv_group"]
            why["kv_group"] = "all query heads share one KV head"
        return spaces, why

    def _complete(self, look: Look, h: Heads, group: Space) -> None:
        """Every tensor of the attention module is a port, or the same for all heads.

        Raises:
            Unfit: if one is neither.
        """
        known = {p.tensor for p in group.ports} | set(look.outputs(self.at(self.o)))
        known |= {tensor for pair in self.norms for n in pair for tensor in look.outputs(self.at(n))}
        for name in look.tensors:
            inside = name.startswith(self.module + ".") if self.module else False
            if inside and name not in known and not any(w in name for w in HARMLESS):
                raise Unfit(f"what {name} holds for each head is not known")

    def _kv_group(self, look: Look, h: Heads) -> Space:
        g = h.per_group
        ports: tuple[Port, ...]
        if self.fused == "split":
            ports = (
                *look.writes(self.at(self.q), g * h.query),
                *look.writes(self.at(self.k), h.key),
                *look.writes(self.at(self.v), h.value),
            )
        elif self.fused == "parts":
            q, k = h.queries * h.query, h.groups * h.key
            ports = (
                *look.writes(self.at(self.q), g * h.query),
                *look.writes(self.at(self.q), h.key, q),
                *look.writes(self.at(self.q), h.value, q + k),
            )
        else:
            ports = look.writes(self.at(self.q), (g + 2) * h.key)
        ports += self._norms(look, h, keys=True) + self._extra(look, h, g)
        ports += look.reads(self.at(self.o), g * h.value)
        numbers = dict.fromkeys(("num_heads", "num_attention_heads", "n_heads", "n_head"), (h.queries, g))
        numbers |= dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), (h.groups, 1))
        if g == 1:
            numbers |= dict.fromkeys(WIDTHS, (h.queries * h.query, h.query))
        config: dict[str, ConfigRule] = {}
        if self.head_dim:
            config = look.field(QUERY_FIELDS, g) | look.field(KV_FIELDS) | self._fixed(look, h)
        sizes = look.sizes(self.module, numbers)
        sizes |= {self.at(f"config.{n}"): g for n in self.forward_config}
        return Space("kv_group", h.groups, ports, sizes=sizes, config=config)

    def _head(self, look: Look, h: Heads) -> Space:
        if h.per_group > 1 and any(f"{self.at(n)}.weight" in look.tensors for n in self.out_norms):
            raise Unfit("a norm over all heads follows, and a head without its queries still has its value")
        if h.per_group == 1:
            group = self._kv_group(look, h)
            return Space("head", h.queries, group.ports, sizes=group.sizes, config=group.config)
        q = self.at(self.q)
        stride = (h.per_group + 2) * h.key if self.fused == "groups" else h.per_group * h.query
        ports = (
            *look.writes(q, h.query, copy_stride=stride),
            *self._norms(look, h, keys=False),
            *self._extra(look, h, 1),
            *look.reads(self.at(self.o), h.value, copy_stride=h.per_group * h.value),
        )
        numbers = dict.fromkeys(("num_heads", "num_attention_heads", "n_heads", "n_head"), (h.queries, h.groups))
        numbers |= dict.fromkeys(("num_key_value_groups", "num_queries_per_kv"), (h.per_group, 1))
        if h.groups == 1:  # multi-query: the fused rows of queries are what these widths count
            numbers |= dict.fromkeys(WIDTHS, (h.queries * h.query, h.query))
        config: dict[str, ConfigRule] = {}
        if self.head_dim:
            config = look.field(QUERY_FIELDS, h.groups) | self._fixed(look, h)
        sizes = look.sizes(self.module, numbers)
        sizes |= {self.at(f"config.{n}"): h.groups for n in self.forward_config}
        return Space("head", h.per_group, ports, copies=h.groups, sizes=sizes, config=config)

    def _norms(self, look: Look, h: Heads, *, keys: bool) -> tuple[Port, ...]:
        ports: tuple[Port, ...] = ()
        for q, k in self.norms:
            width = h.query * (h.per_group if keys else 1)
            found = look.norm(self.at(q), h.queries * h.query, h.queries, width, h.key)
            if not keys and h.groups > 1:
                found = tuple(Port(p.tensor, p.axis, p.role, p.width, copy_stride=h.per_group * p.width) for p in found)
            ports += found
            if keys:
                ports += look.norm(self.at(k), h.groups * h.key, h.groups, h.key)
        for name in self.out_norms:
            found = look.norm(self.at(name), h.queries * h.value, h.queries, h.value * (h.per_group if keys else 1))
            stride = 0 if keys or h.groups == 1 else h.per_group * h.value
            ports += tuple(Port(p.tensor, p.axis, p.role, p.width, copy_stride=stride) for p in found)
        return ports

    def _extra(self, look: Look, h: Heads, per_unit: int) -> tuple[Port, ...]:
        ports: tuple[Port, ...] = ()
        per_copy = h.per_group if per_unit == 1 and h.groups > 1 else 0
        for leaf in self.extra:
            name = self.at(leaf)
            if name in look.tensors and look.shape(name) == (h.queries,):
                ports += (Port(name, 0, "write", per_unit, copy_stride=per_copy),)
            elif look.has(name):
                per_head = look.outs(name) // h.queries
                if per_head * h.queries != look.outs(name):
                    raise Unfit(f"{name} is not a whole number of heads")
                ports += look.writes(name, per_unit * per_head, copy_stride=per_copy * per_head)
        return ports

    def _fixed(self, look: Look, h: Heads) -> dict[str, ConfigRule]:
        name = next((n for n in HEAD_DIM_FIELDS if n in look.config), "head_dim")
        return {name: ConfigRule(fixed=h.key)}


@dataclass(frozen=True)
class Latent:
    """Latent attention (DeepSeek): queries, keys and values of all heads unfolded from shared latents.

    Attributes:
        module: the attention module.
        q: where the queries of all heads come out; the first that is present counts.
        kv, o: where keys and values of all heads come out, and what reads the heads.
        extra: as for `Attention`.
    """

    module: str = "self_attn"
    q: tuple[str, ...] = ("q_b_proj", "q_proj")
    kv: str = "kv_b_proj"
    o: str = "o_proj"
    extra: tuple[str, ...] = ("sinks", "gate_proj", "g_proj")

    def at(self, leaf: str) -> str:
        return f"{self.module}.{leaf}"

    def names(self) -> tuple[str, ...]:
        """The matrices that must be there."""
        return (self.at(self.kv), self.at(self.o))

    def spaces(self, look: Look) -> tuple[dict[str, Space], dict[str, str]]:
        """The ``head`` space; the latent is one for all heads, so there are no KV groups to remove."""
        why = {"kv_group": "all heads share one latent"}
        q = next((self.at(n) for n in self.q if look.has(self.at(n))), None)
        value = look.attribute(self.module, ("v_head_dim",)) or look.number("v_head_dim")
        if q is None or not value or look.ins(self.at(self.o)) % value:
            return {}, why | {"head": "its heads are not known"}
        n = look.ins(self.at(self.o)) // value
        made = [q, self.at(self.kv), *(self.at(e) for e in self.extra if look.has(self.at(e)))]
        if any(look.outs(m) % n for m in made):
            return {}, why | {"head": f"its shapes are not whole numbers of {n} heads"}
        ports: tuple[Port, ...] = ()
        for m in made:
            ports += look.writes(m, look.outs(m) // n)
        for e in self.extra:
            if self.at(e) in look.tensors and look.shape(self.at(e)) == (n,):
                ports += (Port(self.at(e), 0, "write"),)
        ports += look.reads(self.at(self.o), value)
        sizes = look.sizes(self.module, dict.fromkeys(("num_heads", "num_attention_heads", "n_heads"), (n, 1)))
        config = look.field(QUERY_FIELDS) | (look.field(KV_FIELDS) if look.number(*KV_FIELDS) else {})
        return {"head": Space("head", n, ports, sizes=sizes, config=config)}, why


HARMLESS = (
    "rotary_emb",
    "inv_freq",
    "embed_positions",
    ".LayerNorm.",
    ".ln.",
    "_layer_norm.",
    "masked_bias",
    *CAUSAL_MASKS,
)
ALIBI = "ALiBi slopes depend on a head's number"
WIDTHS = ("embed_dim", "split_size", "all_head_size", "inner_dim", "hidden_size")
