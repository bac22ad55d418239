"""Cohere: attention and FFN beside each other, and query and key norms with a weight for each head."""

from secateur.anatomy.llama import LLAMA

FAMILIES = dict.fromkeys(("cohere", "cohere2"), LLAMA)
