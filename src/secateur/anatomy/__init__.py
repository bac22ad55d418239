"""What there is: the anatomy of a model, declared by its family or derived from its parallel plans."""

from __future__ import annotations

from secateur.anatomy import bert, cohere, falcon, gemma, gpt2, llama, mixtral, neox, opt, phi3
from secateur.anatomy.derive import derive
from secateur.anatomy.family import Family, build
from secateur.anatomy.types import Anatomy, Block, Matrix, Port, Skeleton, Space
from secateur.errors import SecateurError

__all__ = ["FAMILIES", "Anatomy", "Block", "Matrix", "Port", "Skeleton", "Space", "anatomy_of"]

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **gemma.FAMILIES,
    **cohere.FAMILIES,
    **phi3.FAMILIES,
    **gpt2.FAMILIES,
    **neox.FAMILIES,
    **falcon.FAMILIES,
    **opt.FAMILIES,
    **bert.FAMILIES,
    **mixtral.FAMILIES,
}


def anatomy_of(skeleton: Skeleton) -> Anatomy:
    """The anatomy of a model: its family's own description, or one derived from its parallel plans.

    Raises:
        SecateurError: if the family is neither declared nor has plans to derive from.
    """
    if skeleton.family in FAMILIES:
        return build(FAMILIES[skeleton.family], skeleton, "declared")
    guess = derive(skeleton)
    if guess is not None:
        return build(guess, skeleton, "derived")
    raise SecateurError(
        f"the architecture {skeleton.family!r} is not declared and has no parallel plan to derive an anatomy from",
        works="docs/architectures.md lists proved families; another is declared in ten lines (anatomy/llama.py)",
    )
