"""Falcon: one fused matrix, of all queries and one key and value (7B), or of groups (40B and later)."""

from secateur.anatomy.attention import Attention
from secateur.anatomy.family import Family
from secateur.anatomy.look import Look
from secateur.anatomy.neox import FFN


def _grouped(look: Look) -> bool:
    return look.on("new_decoder_architecture") or not look.on("multi_query")


FALCON = Family(
    (
        Attention("self_attention", "query_key_value", o="dense", fused="groups", head_dim=False, when=_grouped),
        Attention("self_attention", "query_key_value", o="dense", fused="parts", head_dim=False),
    ),
    (FFN,),
)
FAMILIES = {"falcon": FALCON}
