"""The one error a user sees: what is wrong, what was received, what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """Bad input, said in one sentence. The command line prints it and exits with 2.

    Args:
        wrong: what is wrong, in the user's words.
        received: what was given, quoted as it came.
        works: what would work instead.
    """

    def __init__(self, wrong: str, *, received: object = None, works: str = "") -> None:
        self.wrong, self.received, self.works = wrong, received, works
        text = wrong.rstrip(".")
        if received is not None:
            text += f" (received: {_quote(received)})"
        if works:
            text += f"; {works.rstrip('.')}"
        super().__init__(text + ".")


def is_text(value: str) -> bool:
    """Whether a text can be written to files and given to the system: no NUL, nothing that UTF-8 cannot say."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def unknown(kind: str, word: object, known: Iterable[str]) -> SecateurError:
    """The error for a word that is not in a table, with the nearest known word first."""
    words = sorted(known)
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return SecateurError(f"unknown {kind}", received=word, works=f"{hint}known are {', '.join(words)}")


def _quote(value: object) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 200 else text[:197] + "..."
