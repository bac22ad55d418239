"""Gemma: Llama's names; norms before and after each part, whose weights are added to one."""

from secateur.anatomy.llama import LLAMA

FAMILIES = dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "vaultgemma"), LLAMA)
