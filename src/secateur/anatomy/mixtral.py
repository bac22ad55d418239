"""Mixtral and its kin: Llama's attention, experts in 3-D stacks, a router under ``mlp.gate``."""

from dataclasses import replace

from secateur.anatomy.attention import Attention
from secateur.anatomy.family import Family
from secateur.anatomy.ffn import Experts
from secateur.anatomy.llama import GATED

MIXTRAL = Family((Attention(),), (Experts(), GATED))
FAMILIES = {
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), MIXTRAL),
    "minimax": replace(MIXTRAL, layer="its residual sums are weighted by constants"),
}
