"""A first guess for a family that nobody declared: from its parallel plans, then from the usual names.

A tensor-parallel plan says ``q_proj: colwise, o_proj: rowwise``, which is exactly who makes units and who
reads them. Plans often leave parts out (latent attention, experts); those are guessed from names that many
families share. A guess is proved or refuted by `secateur inspect MODEL --check`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from secateur.anatomy.attention import Attention, Latent
from secateur.anatomy.family import Family
from secateur.anatomy.ffn import Experts, Ffn
from secateur.anatomy.types import Skeleton, TensorInfo

T = TypeVar("T")
OUTPUTS = ("o_proj", "out_proj", "dense", "Wo", "wo", "c_proj")
FUSED = {"qkv_proj": "parts", "Wqkv": "parts", "c_attn": "parts", "query_key_value": "groups"}
GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("proj_up_gate", "proj_up", "proj_down"))
PLAIN = (
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("gate_up_proj", "down_proj"),
    ("Wi", "Wo"),
)
STACKS = (("gate_up_proj", "down_proj"), ("up_proj", "down_proj"))
ROUTERS = ("gate", "router", "router.gate", "router.layer", "router.classifier", "gate.wg")
MIXERS = (
    "linear_attn.out_proj",
    "linear_attn.o_proj",
    "mamba.out_proj",
    "conv.out_proj",
    "self_attn.o_proj",
    "self_attn.out_proj",
    "temporal_block.linear_out",
    "temporal_block.o_proj",
)
UNSAID = {  # why no config says a model without some of its layers
    "minicpm3": "its residual sums are weighted by the number of layers",
    "hrm_text": "its config counts the layers of two stacks, each as often as it runs",
}


def derive(skeleton: Skeleton) -> Family | None:
    """A family's description guessed from a skeleton and its plans; None where nothing is recognised."""
    blocks = [_Names(tensors) for tensors in skeleton.blocks]
    columns, rows = _planned(skeleton)
    sized = "head_dim" in skeleton.config
    attention = _unique(a for b in blocks for a in b.attention(columns, rows, sized))
    experts = _unique(e for i, b in enumerate(blocks) for e in b.experts(skeleton, i))
    ffn = _unique(f for b in blocks for f in b.ffn(columns, rows))
    if not (ffn or experts):
        return None
    shared = _unique(f.down for f in ffn if "shared" in f.down)
    ffn = tuple(f for f in ffn if "shared" not in f.down)
    known = {a.at(a.o) for a in attention}
    mixers = tuple(m for m in MIXERS if m not in known)
    known_form = bool(skeleton.tp_plan or skeleton.pp_plan)
    guessed = "" if known_form else "whether a layer that adds nothing is the identity is not known for this family"
    layer = UNSAID.get(skeleton.family, guessed)
    return Family(attention, (*experts, *ffn), shared, mixers, layer=layer)


def _planned(skeleton: Skeleton) -> tuple[set[str], set[str]]:
    """Modules that the tensor-parallel plan splits by columns (they make units) and by rows (they read them)."""
    columns: set[str] = set()
    rows: set[str] = set()
    leaf = skeleton.path.rpartition(".")[2]
    for pattern, style in skeleton.tp_plan.items():
        stem, found, name = pattern.partition(".*.")
        if found and stem.rpartition(".")[2] == leaf and "*" not in name:
            if style.startswith("colwise"):
                columns.add(name)
            elif style.startswith("rowwise"):
                rows.add(name)
    return columns, rows


class _Names:
    """The matrices of one block, by the module they belong to."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self.parents: dict[str, list[str]] = {}
        for name, info in tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and len(info.shape) == 2 and info.kind in ("linear", "conv1d"):
                parent, _, last = module.rpartition(".")
                self.parents.setdefault(parent, []).append(last)

    def attention(self, columns: set[str], rows: set[str], sized: bool) -> Iterable[Attention | Latent]:
        for parent, names in self.parents.items():
            if not _is_attention(parent):
                continue
            if "kv_b_proj" in names and "o_proj" in names:
                yield Latent(parent)
                continue
            split = next((row.rpartition(".")[2] for row in rows if row.rpartition(".")[0] == parent), "")
            out = split if split in names else next((n for n in OUTPUTS if n in names), "")
            made = [n for n in names if f"{parent}.{n}" in columns] or names
            heads = {letter: next((n for n in made if n[0].lower() == letter), "") for letter in "qkv"}
            fused = next((n for n in FUSED if n in names), "")
            if out and fused:
                yield Attention(parent, fused, o=out, fused=FUSED[fused], head_dim=sized)
            elif out and all(heads.values()):
                yield Attention(parent, heads["q"], heads["k"], heads["v"], out, head_dim=sized)
        if "attention.self" in self.parents and "attention.output" in self.parents:
            yield Attention("attention", "self.query", "self.key", "self.value", "output.dense", head_dim=False)

    def ffn(self, columns: set[str], rows: set[str]) -> Iterable[Ffn]:
        for parent, names in self.parents.items():
            if _is_attention(parent) or "adapter" in parent or "norm" in parent:
                continue
            at = f"{parent}.".lstrip(".")
            down = [n for n in names if at + n in rows]
            ups = [n for n in names if at + n in columns]
            if len(down) == 1 and len(ups) in (1, 2):
                yield self._ffn(at, ups, down[0])
                continue
            for *ups, last in (*GATED, *PLAIN):
                if {*ups, last} <= set(names):
                    yield self._ffn(at, ups, last)
                    break
        if "intermediate" in self.parents and "output" in self.parents:
            yield Ffn(("intermediate.dense",), "output.dense")

    def _ffn(self, at: str, ups: list[str], down: str) -> Ffn:
        up, last = self.tensors[f"{at}{ups[0]}.weight"], self.tensors[f"{at}{down}.weight"]
        outs, ins = (up.shape[1], last.shape[0]) if up.kind == "conv1d" else (up.shape[0], last.shape[1])
        norm = next((n for n in (f"{at}ffn_sub_norm",) if f"{n}.weight" in self.tensors), "")
        return Ffn(tuple(at + u for u in ups), at + down, 2 if outs == 2 * ins else 1, norm=norm)

    def experts(self, skeleton: Skeleton, index: int) -> Iterable[Experts]:
        for name, info in self.tensors.items():
            module, _, leaf = name.rpartition(".")
            if len(info.shape) != 3 or "shared" in module:
                continue
            found = next((s for s in STACKS if s[0] == leaf and f"{module}.{s[1]}" in self.tensors), None)
            if found is None:
                continue
            parent = module.rpartition(".")[0]
            at = f"{parent}." if parent else ""
            router = next((at + r for r in ROUTERS if f"{at}{r}.weight" in self.tensors), at + ROUTERS[0])
            switches = skeleton.attributes[index]
            hidden = self.tensors[f"{router}.weight"].shape[-1] if f"{router}.weight" in self.tensors else 0
            turned = bool(switches.get(f"{module}.is_transposed", info.shape[1] == hidden != info.shape[2]))
            yield Experts(
                module,
                router,
                *found,
                transposed=turned,
                interleaved=not switches.get(f"{module}.is_concatenated", 1),
            )


def _is_attention(parent: str) -> bool:
    last = parent.rpartition(".")[2].lower()
    crossed = any(word in parent for word in ("encoder_attn", "cross", "linear_attn", "indexer", "shared_transformer"))
    return ("attn" in last or "attention" in last or last in ("mixer", "temporal_block")) and not crossed


def _unique(items: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(items))
