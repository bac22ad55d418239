"""Frozen dataclasses to JSON values and back, exactly: what was written is what is read.

JSON has no infinity and no NaN, so floats that are not finite are written as the words ``inf``, ``-inf`` and
``nan``. Fields that are absent take their defaults (a report without a measurement is a report); unknown
fields and wrong types are refused with the path of the value.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from secateur.errors import SecateurError, unknown

T = TypeVar("T")
WORDS = types.MappingProxyType({"inf": math.inf, "-inf": -math.inf, "nan": math.nan})


def plain(value: object) -> Any:
    """A value as JSON can say it: dataclasses and mappings become objects, tuples and lists arrays."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise AssertionError(f"a report holds plain data, not {type(value).__name__}: {value!r}")


def build(kind: type[T], value: object, at: str) -> T:
    """The dataclass ``kind`` from a JSON object.

    Args:
        kind: a dataclass whose fields are scalars, dataclasses, ``X | None``, ``tuple[X, ...]``,
            ``dict[str, X]``, ``Literal`` or ``Any``.
        value: what the JSON parser returned.
        at: where the value stands, for messages (``report.steps[0]``).

    Raises:
        SecateurError: a wrong type, an unknown field, or a required field that is missing.
    """
    if not isinstance(value, dict):
        raise _wrong(at, "an object", value)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    for name in value:
        if name not in fields:
            raise unknown(f"field in {at}", name, fields)
    hints = typing.get_type_hints(kind)
    found = {name: _read(hints[name], item, f"{at}.{name}") for name, item in value.items()}
    for name, f in fields.items():
        if name not in found and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise SecateurError(f"{at}.{name} is missing", works=f"{at} needs {name!r}")
    return kind(**found)


def _read(hint: Any, value: object, at: str) -> Any:
    """One value of the type ``hint``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in args:
            return None
        (inner,) = (a for a in args if a is not types.NoneType)
        return _read(inner, value, at)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(at, "a list", value)
        return tuple(_read(args[0], item, f"{at}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(at, "an object", value)
        return {key: _read(args[1], item, f"{at}.{key}") for key, item in value.items()}
    if origin is typing.Literal:
        if value not in args or not isinstance(value, str):
            raise _wrong(at, "one of " + ", ".join(map(repr, args)), value)
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, at)
    return _scalar(hint, value, at)


def _scalar(hint: Any, value: object, at: str) -> Any:
    if hint is float:
        if isinstance(value, str) and value in WORDS:
            return WORDS[value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value  # as it came: 3 stays 3
        raise _wrong(at, "a number (or 'inf', '-inf', 'nan')", value)
    names = {int: "a whole number", str: "a text", bool: "true or false"}
    if (hint is int and isinstance(value, bool)) or not isinstance(value, hint):
        raise _wrong(at, names[hint], value)
    return value


def _wrong(at: str, expected: str, value: object) -> SecateurError:
    return SecateurError(f"{at} must be {expected}", received=value, works="put back the report.json that prune wrote")
