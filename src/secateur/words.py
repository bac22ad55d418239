"""How the recipe's short words are read: amounts, targets, names with options, protected layers.

Numbers are read as exact decimals, never through binary floats: ``0.55`` of 100 is 55. Each reader takes what
YAML, Python or the command line gives, and refuses the rest in one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from secateur.errors import SecateurError, unknown
from secateur.methods.base import Amount

Value = bool | int | float | str
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,15}")
_PARAMS = {"": 0, "k": 3, "m": 6, "g": 9, "b": 9, "t": 12}
_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


def decimal(value: object, word: str) -> tuple[Decimal, bool]:
    """A finite number as an exact decimal, and whether it was a bare integer. ``75%`` is 0.75.

    Raises:
        SecateurError: not a number, NaN or infinite, or longer than 40 characters.
    """
    works = "a number such as 0.75, 75% or 1152 works"
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise SecateurError(f"{word} is not a number", received=value, works=works)
    text = (repr(value) if isinstance(value, float) else str(value)).strip()
    percent = text.endswith("%")
    number = text.removesuffix("%").strip()
    if len(text) > 40 or not _NUMBER.fullmatch(number):
        raise SecateurError(f"{word} is not a number", received=value, works=works)
    exact = Decimal(number)
    return (exact / 100 if percent else exact), not percent and _INTEGER.fullmatch(number) is not None


def read_keep(value: object) -> Amount:
    """What stays: a bare integer is a count, a number with a decimal point or ``%`` is a share of (0, 1]."""
    number, bare = decimal(value, "keep")
    if bare:
        if number < 1:
            raise SecateurError("keep leaves nothing", received=value, works="a count of at least 1, or a share, works")
        return Amount(count=int(number))
    if not 0 < number <= 1:
        raise SecateurError(
            "keep is a share outside (0, 1]",
            received=value,
            works="0.75 keeps three quarters; a bare integer is a count",
        )
    return Amount(share=number)


def read_sparsity(value: object) -> Amount:
    """What goes, as a share of [0, 1): ``keep = 1 - s``."""
    number, _ = decimal(value, "sparsity")
    if not 0 <= number < 1:
        raise SecateurError(
            "sparsity is a share outside [0, 1)", received=value, works="0.5 or 50% removes half; keep may be a count"
        )
    return Amount(share=1 - number)


def amount_word(amount: Amount) -> int | float | str:
    """The shortest word that `read_keep` reads back as exactly this amount."""
    if amount.count is not None:
        return amount.count
    assert amount.share is not None
    as_float = float(amount.share)
    return as_float if Decimal(repr(as_float)) == amount.share else format(amount.share, "f")


@dataclass(frozen=True)
class Target:
    """A keep said in what the user pays for: the whole model's parameters, bytes or multiply-accumulates per token,
    absolute or as a change.

    Attributes:
        of: ``params``, ``bytes`` or ``macs``.
        at_most: the largest allowed number, or None when ``change`` is given.
        change: relative to the model as given; -0.2 is a fifth less.
    """

    of: Literal["params", "bytes", "macs"]
    at_most: int | None = None
    change: Decimal | None = None

    def limit(self, now: int) -> int:
        """The largest allowed number for a model that has ``now``."""
        return self.at_most if self.at_most is not None else int(now * (1 + (self.change or 0)))


def read_target(value: object) -> Target:
    """``params=100M``, ``params=-20%``, ``bytes=90MB``, ``macs=-30%``."""
    works = "params=100M, params=-20%, bytes=90MB or macs=-30% work"
    match = (
        re.fullmatch(r"(params|bytes|macs)\s*=\s*([+-]?[0-9.]+)\s*(%|[A-Za-z]*)", value.strip())
        if isinstance(value, str)
        else None
    )
    if match is None:
        raise SecateurError("target is not understood", received=value, works=works)
    of, digits, suffix = match.group(1), match.group(2), match.group(3).lower()
    number, _ = decimal(digits, "target")
    kind: Literal["params", "bytes", "macs"] = "params" if of == "params" else "bytes" if of == "bytes" else "macs"
    if suffix == "%":
        if not -100 < number <= 0 or not digits.startswith("-"):
            raise SecateurError("target in % says how much goes, from -0% to -99%", received=value, works=works)
        return Target(kind, change=number / 100)
    if kind != "bytes" and suffix in _PARAMS:
        size = number.scaleb(_PARAMS[suffix])
    elif kind == "bytes" and suffix in _BYTES:
        size = number * _BYTES[suffix]
    else:
        raise SecateurError("target has an unknown unit", received=value, works=works)
    if size < 1:
        raise SecateurError("target leaves nothing", received=value, works=works)
    return Target(kind, at_most=int(size))


@dataclass(frozen=True)
class Choice:
    """A name from a table (or ``my.module:MyScore``) with its options, in the order given."""

    name: str
    options: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        words = ",".join(f"{k}={_word(v)}" for k, v in self.options)
        return f"{self.name}:{words}" if words else self.name


def read_choice(value: object, word: str) -> Choice:
    """``owl``, ``owl:M=5,lambda=0.08``, ``my.module:MyScore:p=1`` or ``{name: owl, M: 5}``."""
    if isinstance(value, Choice):
        return value
    if isinstance(value, Mapping):
        if not isinstance(value.get("name"), str):
            raise SecateurError(f"{word} has no name", received=dict(value), works="{name: owl, M: 5} works")
        options = tuple((str(k), _plain(v, word)) for k, v in value.items() if k != "name")
        return Choice(value["name"], options)
    if not isinstance(value, str) or not value.strip():
        raise SecateurError(f"{word} is not a name", received=value, works="a name such as wanda or owl:M=5 works")
    name, options = value.strip(), ()
    head, colon, tail = name.rpartition(":")
    if colon and "=" in tail:
        pairs = [part.partition("=") for part in tail.split(",")]
        if any(not k.strip() or not v.strip() for k, _, v in pairs):
            raise SecateurError(
                f"{word} has a malformed option", received=value, works="name:option=value,option=value works"
            )
        name, options = head, tuple((k.strip(), _scalar(v.strip())) for k, _, v in pairs)
    if len({k for k, _ in options}) < len(options):
        raise SecateurError(f"{word} gives an option twice", received=value, works="give each option once")
    return Choice(name, options)


def read_protect(value: object) -> tuple[int, int]:
    """``first:2,last:1``: how many layers at each end are left whole."""
    counts = {"first": 0, "last": 0}
    parts = value.split(",") if isinstance(value, str) else []
    for part in parts:
        end, _, number = part.strip().partition(":")
        if end not in counts:
            raise unknown("end to protect", end, counts)
        if not re.fullmatch(r"[0-9]{1,6}", number):
            raise SecateurError("protect needs a count after the colon", received=value, works="first:2,last:1 works")
        counts[end] = int(number)
    if not parts:
        raise SecateurError("protect is not understood", received=value, works="first:2,last:1 works")
    return counts["first"], counts["last"]


def read_worse(value: object) -> Decimal:
    """``5%``, ``0.05``: the largest relative rise of perplexity that is accepted."""
    number, _ = decimal(value, "at_most_worse")
    if not 0 < number <= 100:
        raise SecateurError("at_most_worse is not above 0 and at most 10000%", received=value, works="5% or 0.05 works")
    return number


def _scalar(text: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def _plain(value: object, word: str) -> Value:
    if not isinstance(value, bool | int | float | str):
        raise SecateurError(
            f"an option of {word} is not a number or a word", received=value, works="{name: owl, m: 5} works"
        )
    if isinstance(value, str) and not re.fullmatch(r"[^\s,=:]+", value):
        raise SecateurError(
            f"an option of {word} is not one word", received=value, works="no spaces, commas, colons or = inside it"
        )
    return value


def _word(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
