"""OPT and other decoders of its time: LayerNorm, biases, learned positions; both FFN matrices in the layer itself."""

from dataclasses import replace

from secateur.anatomy.attention import ALIBI, Attention
from secateur.anatomy.family import Family
from secateur.anatomy.ffn import Ffn

PLAIN = Ffn(("fc1",), "fc2")
OPT = Family((Attention(o="out_proj", head_dim=False),), (PLAIN,))
# bart's kin: the norm comes after the sum, so that a layer which adds nothing still changes what passes through
POST_NORM = "its norms come after the residual sum: a zero output is not the identity"
BART = replace(OPT, layer=POST_NORM)
OPT_350M = replace(BART, layer_when=lambda config: config.get("do_layer_norm_before") is False)
WIDE = "its attention reshapes to the hidden size, whatever the number of heads"
TROCR = Family((Attention(o="out_proj", head_dim=False, positional=WIDE),), (PLAIN,), layer=POST_NORM)
IN_MLP = (Ffn(("mlp.fc_in",), "mlp.fc_out"),)
GPTJ = Family((Attention("attn", o="out_proj", head_dim=False),), IN_MLP)
QUARTERS = "its fused projection interleaves queries, values and keys in four quarters"
CODEGEN = Family(
    (Attention("attn", "qkv_proj", o="out_proj", fused="parts", head_dim=False, positional=QUARTERS),), IN_MLP
)
NEO = Family((Attention("attn.attention", o="out_proj", head_dim=False),), (Ffn(("mlp.c_fc",), "mlp.c_proj"),))
MPT = Family(
    (Attention("attn", "Wqkv", o="out_proj", fused="parts", head_dim=False, positional=ALIBI),),
    (Ffn(("ffn.up_proj",), "ffn.down_proj", fields=()),),
)
PHI = Family((Attention(o="dense"),), (Ffn(("mlp.fc1",), "mlp.fc2"),))
STARCODER2 = Family((Attention(),), (Ffn(("mlp.c_fc",), "mlp.c_proj"),))

FAMILIES = {
    "opt": OPT_350M,
    **dict.fromkeys(("biogpt", "xglm", "mbart", "pegasus", "bigbird_pegasus", "blenderbot", "whisper"), OPT),
    **dict.fromkeys(("bart", "mvp", "plbart", "marian", "blenderbot-small"), BART),
    "trocr": TROCR,
    "gptj": GPTJ,
    "codegen": CODEGEN,
    "gpt_neo": NEO,
    "mpt": MPT,
    "phi": PHI,
    "starcoder2": STARCODER2,
}
