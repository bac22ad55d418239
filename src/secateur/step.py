"""One step of a recipe: a space, what ranks it, how much stays, and how it is applied."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from decimal import Decimal
from typing import Any, Literal

from secateur.effort import LEFT_OPEN, chain_of
from secateur.errors import SecateurError, unknown
from secateur.methods.base import Amount
from secateur.methods.fitting import FITS
from secateur.methods.grains import parse_grain
from secateur.methods.joint import default_grain
from secateur.words import (
    Choice,
    Target,
    amount_word,
    decimal,
    read_choice,
    read_keep,
    read_protect,
    read_sparsity,
    read_target,
    read_worse,
)

NOFM = r"([0-9]{1,4}):([0-9]{1,4})"
SPACES = ("weight", "ffn", "kv_group", "head", "layer", "expert")


@dataclass(frozen=True)
class MapRule:
    """One line of a map: sites that match keep this much. ``match`` is ``attention``, ``ffn``, ``layers:0-9``
    or a pattern on names (``*.q_proj.weight``)."""

    match: str
    keep: int | float | str

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise SecateurError(
                "a map rule's match is not a word", received=self.match, works="{match: ffn, keep: 0.5} works"
            )
        object.__setattr__(self, "keep", amount_word(read_keep(self.keep)))

    @property
    def amount(self) -> Amount:
        return read_keep(self.keep)


@dataclass(frozen=True)
class Step:
    """One act of pruning. Fields are the recipe's words, normalised; parsed forms are properties.

    How much stays is said once: by ``keep``, ``sparsity`` (becomes keep), ``target``, ``at_most_worse``, ``map``
    or an n:m grain. Budget uniform and fit_on pruned hold where nothing is said.

    Raises:
        SecateurError: on words that are unknown, of the wrong type, or contradict each other.
    """

    space: str
    score: str | None = None
    method: str | None = None
    effort: str | None = None
    keep: int | float | str | None = None
    sparsity: int | float | str | None = None
    target: str | None = None
    at_most_worse: str | float | None = None
    grain: str | None = None
    budget: str | None = None
    repair: str | None = None
    fit_on: str | None = None
    apply: Literal["mask", "cut"] | None = None
    protect: str | None = None
    map: tuple[MapRule, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        put = lambda word, value: object.__setattr__(self, word, value)  # noqa: E731 - frozen, and this is its birth
        if self.space not in SPACES:
            raise unknown("space", self.space, SPACES)
        for word in ("include", "exclude"):
            put(word, _patterns(getattr(self, word), word))
        put("map", read_rules(self.map))
        if self.effort is not None:
            self._settle_effort(put)
        for word, value in LEFT_OPEN.items():
            if getattr(self, word) is None:
                put(word, value)
        if self.score is not None and self.method is not None:
            raise SecateurError(
                "score and method both say what to keep", received=f"{self.score}, {self.method}", works="give one"
            )
        if self.score is None and self.method is None:
            raise SecateurError(
                "neither score nor method is given",
                works="score: magnitude needs no text; method: sparsegpt works on weights; effort: fast chooses",
            )
        for word in ("score", "method", "budget", "repair", "fit_on"):
            if getattr(self, word) is not None:
                put(word, str(read_choice(getattr(self, word), word)))
        if read_choice(self.fit_on, "fit_on").name not in FITS:
            raise unknown("stream to fit on", self.fit_on, FITS)
        self._settle_grain(put)
        self._settle_amount(put)
        if self.protect is not None:
            read_protect(self.protect)

    def _settle_effort(self, put: Any) -> None:
        """The words that the effort stands for, in the place of those that were left out."""
        words = ("space", "score", "method", "budget", "repair", "fit_on")
        given = {word: getattr(self, word) and str(getattr(self, word)) for word in words}
        pattern = isinstance(self.grain, str) and re.fullmatch(NOFM, self.grain.strip()) is not None
        for word, value in chain_of(str(self.effort), given, fixed=pattern or bool(self.map)).items():
            put(word, value)

    def _settle_grain(self, put: Any) -> None:
        units = self.space != "weight"
        joint = self.choice("method")
        default = "unit" if units else default_grain(joint.name) if joint and not self.score else "row"
        grain = default if self.grain is None else str(parse_grain(str(self.grain).strip()))
        put("grain", grain)
        if units and grain != "unit":
            raise SecateurError(
                f"the {self.space} space is pruned by whole units", received=f"grain {grain}", works="grain unit works"
            )
        if not units and grain == "unit":
            raise SecateurError(
                "the weight space has no units",
                received="grain unit",
                works="row, matrix, columns:128, 2:4 or tile:16x16 work",
            )
        if units and self.method is not None:
            raise SecateurError(
                f"a joint method works on weights, not on {self.space}", received=self.method, works="give a score"
            )
        put("apply", self.apply or ("cut" if units else "mask"))
        if self.apply not in ("mask", "cut"):
            raise unknown("way to apply", self.apply, ("mask", "cut"))
        if self.apply == "cut" and not units:
            raise SecateurError(
                "single weights cannot be cut out of a matrix",
                received="apply cut",
                works="apply mask, or prune ffn, kv_group, ... units",
            )

    def _settle_amount(self, put: Any) -> None:
        if self.sparsity is not None:
            amount = read_sparsity(self.sparsity)
            if self.keep is not None and read_keep(self.keep) != amount:
                raise SecateurError(
                    "keep and sparsity disagree",
                    received=f"keep {self.keep}, sparsity {self.sparsity}",
                    works="keep = 1 - sparsity",
                )
            put("keep", amount_word(amount))
            put("sparsity", None)
        elif self.keep is not None:
            put("keep", amount_word(read_keep(self.keep)))
        if self.target is not None:
            read_target(self.target)
        if self.at_most_worse is not None:
            put("at_most_worse", f"{(read_worse(self.at_most_worse) * 100).normalize():f}%")
        given = [w for w in ("keep", "target", "at_most_worse") if getattr(self, w) is not None]
        nm = self.pattern
        if nm is not None:
            n, m = nm
            if self.keep is not None and not _same_share(self.keep, n, m):
                raise SecateurError(
                    "keep contradicts n:m",
                    received=f"keep {self.keep}, grain {self.grain}",
                    works=f"keep = {n}/{m}, or leave it out",
                )
            given = [w for w in given if w != "keep"] + ["grain n:m"]
            put("keep", None)
            if self.budget != "uniform":
                raise SecateurError(
                    "n:m fixes the count of every site", received=f"budget {self.budget}", works="budget uniform works"
                )
        if self.map:
            if self.budget != "uniform" or nm is not None:
                raise SecateurError(
                    "a map already says how much every site keeps",
                    received=f"budget {self.budget}, grain {self.grain}",
                    works="a map with budget uniform and a grain that is not n:m",
                )
            given = [w for w in given if w != "keep"] + ["map"]
        if len(given) > 1:
            raise SecateurError("how much to keep is said more than once", received=", ".join(given), works="give one")
        if not given:
            raise SecateurError(
                "how much to keep is not said",
                works="give keep, sparsity, target, at_most_worse, a map or an n:m grain",
            )

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(n, m) if the grain is n:m."""
        match = re.fullmatch(NOFM, self.grain or "")
        return (int(match[1]), int(match[2])) if match else None

    @property
    def amount(self) -> Amount | None:
        """How much stays at each site (that no rule of a map matches); None if a target or a bound says it."""
        if self.keep is not None:
            return read_keep(self.keep)
        if self.pattern:
            return Amount(share=Decimal(self.pattern[0]) / self.pattern[1])
        return Amount(share=Decimal(1)) if self.map else None

    @property
    def goal(self) -> Target | None:
        return read_target(self.target) if self.target is not None else None

    @property
    def worse(self) -> Decimal | None:
        return read_worse(self.at_most_worse) if self.at_most_worse is not None else None

    @property
    def ends(self) -> tuple[int, int]:
        """Layers left whole at the start and at the end."""
        return read_protect(self.protect) if self.protect is not None else (0, 0)

    def choice(self, word: Literal["score", "method", "budget", "repair", "fit_on"]) -> Choice | None:
        """A named part with its options."""
        value = getattr(self, word)
        return read_choice(value, word) if value is not None else None

    def to_words(self) -> dict[str, Any]:
        """The words that are set, in order, as plain data."""
        words: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "map":
                value = [asdict(rule) for rule in value]
            if value is not None and value not in ((), []):
                words[f.name] = list(value) if isinstance(value, tuple) else value
        return words


def read_rules(rules: object) -> tuple[MapRule, ...]:
    """Rules of a map from plain data: a list of ``{match: ..., keep: ...}``."""
    if not isinstance(rules, list | tuple):
        raise SecateurError(
            "a map is not a list of rules", received=rules, works="[{match: attention, keep: 0.8}] works"
        )
    made = []
    for rule in rules:
        if isinstance(rule, MapRule):
            made.append(rule)
        elif isinstance(rule, Mapping) and set(rule) == {"match", "keep"}:
            made.append(MapRule(rule["match"], rule["keep"]))
        else:
            raise SecateurError(
                "a map rule is not understood", received=rule, works="{match: attention, keep: 0.8} works"
            )
    return tuple(made)


def _patterns(value: object, word: str) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) and p for p in patterns):
        raise SecateurError(
            f"{word} is not a pattern or a list of patterns", received=value, works="'*.q_proj.weight' works"
        )
    return tuple(patterns)


def _same_share(keep: int | float | str, n: int, m: int) -> bool:
    """Whether ``keep`` is n/m, rounded to the digits given (0.333 for 1:3)."""
    number, bare = decimal(keep, "keep")
    return not bare and number == (Decimal(n) / m).quantize(Decimal(1).scaleb(int(number.as_tuple().exponent)))
