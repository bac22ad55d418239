"""GPT-2: matrices stored [in, out], queries, keys and values side by side, biases everywhere."""

from dataclasses import replace

from secateur.anatomy.attention import Attention
from secateur.anatomy.family import Family
from secateur.anatomy.ffn import Ffn

GPT2 = Family(
    (Attention("attn", q="c_attn", o="c_proj", fused="parts", head_dim=False),),
    (Ffn(("mlp.c_fc",), "mlp.c_proj"),),
)
GROUPED = Attention(  # without multi_query the same matrix holds, head by head, a query, a key and a value
    "attn",
    q="c_attn",
    o="c_proj",
    fused="groups",
    head_dim=False,
    when=lambda look: look.config.get("multi_query") is False,
)
FAMILIES = {
    "gpt2": GPT2,
    "gpt-sw3": GPT2,
    "gpt_bigcode": replace(GPT2, attention=(GROUPED, *GPT2.attention)),
    "openai-gpt": replace(GPT2, layer="its norms come after the residual sum: a zero output is not the identity"),
}
