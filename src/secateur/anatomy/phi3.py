"""Phi-3 and GLM: fused matrices, queries then keys then values, gates then ups."""

from secateur.anatomy.attention import Attention
from secateur.anatomy.family import Family
from secateur.anatomy.ffn import Ffn

FUSED = Ffn(("mlp.gate_up_proj",), "mlp.down_proj", fused=2)
PHI3 = Family((Attention(q="qkv_proj", fused="parts", forward_config=("num_attention_heads",)),), (FUSED,))
GLM = Family((Attention(),), (FUSED,))
FAMILIES = {"phi3": PHI3, "phi4_multimodal": PHI3, "glm": GLM, "glm4": GLM}
