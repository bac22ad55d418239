"""What goes with what: said before any weight is read."""

from __future__ import annotations

from secateur.errors import SecateurError
from secateur.methods.base import Score, UnitScore

UNIT_SPACES = ("ffn", "kv_group", "head", "expert", "layer")


def legal_spaces(score: Score | UnitScore | type[Score] | type[UnitScore]) -> tuple[str, ...]:
    """The spaces a score (an instance or a class) can rank."""
    kind = score if isinstance(score, type) else type(score)
    every = UNIT_SPACES if issubclass(kind, UnitScore) else ("weight", *UNIT_SPACES)
    said: tuple[str, ...] = getattr(score, "spaces", ())
    return tuple(space for space in every if not said or space in said)


def check_legal(score: Score | UnitScore, space: str) -> None:
    """Refuse a score that has no meaning in a space.

    Raises:
        SecateurError: with the spaces where it works.
    """
    legal = legal_spaces(score)
    if space not in legal:
        single = space == "weight"
        raise SecateurError(
            "this score ranks whole units, not single weights" if single else f"this score cannot rank {space} units",
            received=f"{type(score).__name__} in space {space}",
            works=f"space {' or '.join(legal)}",
        )
