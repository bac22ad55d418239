"""GPT-NeoX and its kin: for each head its query, key and value in turn, in one matrix."""

from secateur.anatomy.attention import ALIBI, Attention
from secateur.anatomy.family import Family
from secateur.anatomy.ffn import Ffn

FFN = Ffn(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")
NEOX = Family((Attention("attention", "query_key_value", o="dense", fused="groups", head_dim=False),), (FFN,))
PERSIMMON = Family((Attention("self_attn", "query_key_value", o="dense", fused="groups", head_dim=False),), (FFN,))
BLOOM = Family(
    (Attention("self_attention", "query_key_value", o="dense", fused="groups", head_dim=False, positional=ALIBI),),
    (FFN,),
    layer="what its layers add to comes out of a norm: a zero output is not the identity",
    layer_when=lambda config: config.get("apply_residual_connection_post_layernorm") is True,
)
FAMILIES = {"gpt_neox": NEOX, "persimmon": PERSIMMON, "fuyu": PERSIMMON, "bloom": BLOOM}
