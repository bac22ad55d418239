"""BERT and its kin: encoders (some with a causal head), norms after the residual sum."""

from dataclasses import replace

from secateur.anatomy.attention import Attention
from secateur.anatomy.family import Family
from secateur.anatomy.ffn import Ffn
from secateur.anatomy.opt import POST_NORM

FFN = Ffn(("intermediate.dense",), "output.dense")
ATTENTION = Attention("attention", "self.query", "self.key", "self.value", "output.dense", head_dim=False)
BERT = Family((ATTENTION,), (FFN,), layer=POST_NORM)
BLOCK_SPARSE = "its attention reshapes to the hidden size, whatever the number of heads"
BIG_BIRD = replace(BERT, attention=(replace(ATTENTION, positional=BLOCK_SPARSE),))
FAMILIES = {
    **dict.fromkeys(
        ("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "rembert", "roberta"), BERT
    ),
    **dict.fromkeys(("roc_bert", "roformer", "xlm-roberta", "xmod"), BERT),
    **dict.fromkeys(("roberta-prelayernorm", "xlm-roberta-xl", "megatron-bert"), replace(BERT, layer="")),
    "big_bird": BIG_BIRD,
}
