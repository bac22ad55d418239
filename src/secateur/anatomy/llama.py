"""Llama and the many that kept its names: q, k, v, o under ``self_attn``; gate, up, down under ``mlp``."""

from secateur.anatomy.attention import Attention
from secateur.anatomy.family import Family
from secateur.anatomy.ffn import Ffn

GATED = Ffn(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
LLAMA = Family((Attention(),), (GATED,))

FAMILIES = dict.fromkeys(
    ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "granite", "olmo", "olmo2", "olmo3", "helium"), LLAMA
)
