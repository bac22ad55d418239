"""A small, strict YAML: plain data only, no tags, no aliases, no surprises.

PyYAML's defaults read ``grain: 2:4`` as the number 124 (base sixty) and ``no`` as false; here they are words.
Tags and aliases are refused, so a recipe can neither build objects nor grow when it is read.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import yaml

from secateur.errors import SecateurError

LARGEST = 256 * 1024
DEEPEST = 12
T = TypeVar("T", dict, list)


class _Loader(yaml.SafeLoader):
    """SafeLoader with JSON's idea of scalars, which counts depth and refuses tags, aliases and repeated keys."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML's own shape; filled once below
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.YAMLError("anchors and aliases are not used in recipes")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"the tag {event.tag} is not used in recipes")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.YAMLError("a key is not a word")
                if keys.count(key.value) > 1:
                    raise yaml.YAMLError(f"the word {key.value} is given twice")
        return node


for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9][0-9]{0,17})", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]{1,3})?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|nan)", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def read_yaml(text: str, name: str, kind: type[T] = dict) -> T:
    """Plain data from YAML text.

    Args:
        text: at most 256 KiB.
        name: what it is, for the message.
        kind: what the document must be, a mapping or a list.

    Raises:
        SecateurError: not YAML, with tags, aliases, a repeated key, or not of this kind.
    """
    if len(text) > LARGEST:
        raise SecateurError(f"{name} is larger than {LARGEST // 1024} KiB")
    try:
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise SecateurError(f"{name} cannot be read: {_reason(error)}") from None
    if not isinstance(data, kind):
        wanted = "a mapping of words" if kind is dict else "a list"
        raise SecateurError(f"{name} is not {wanted}", received=data)
    return data


def write_yaml(data: dict[str, Any]) -> str:
    """YAML text that `read_yaml` reads back as the same data."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    return f"{problem}, line {mark.line + 1}" if mark is not None and problem else text
