"""A small, strict YAML: plain data only, no tags, no aliases, no surprises.

PyYAML's defaults read ``grain: 2:4`` as the number 124 (base sixty) and ``no`` as false; here they are words.
Tags and aliases are refused, so a recipe can neither build objects nor grow when it is read.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from secateur.errors import SecateurError, is_text

LARGEST = 256 * 1024
DEEPEST = 12
WORKS = "plain words, numbers, lists and mappings work, as in `model: smollm2`"


class _Loader(yaml.SafeLoader):
    """SafeLoader with JSON's idea of scalars, which counts depth and refuses tags, aliases and repeated keys."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML's own shape; filled once below
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.YAMLError("anchors and aliases are not used in recipes")
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise yaml.YAMLError(f"the tag {tag} is not used in recipes")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and not is_text(node.value):
            raise yaml.YAMLError(f"{node.value!r} holds NUL or what is no Unicode text")
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.YAMLError("a key is not a word")
                if keys.count(key.value) > 1:
                    raise yaml.YAMLError(f"the word {key.value} is given twice")
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes the words that only `_Loader` takes for numbers (``0E0``)."""


for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9][0-9]{0,17})", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]{1,3})?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|nan)", list("-+.")),
):
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def read_yaml(text: str, name: str) -> dict[str, Any]:
    """A mapping of plain data from YAML text.

    Args:
        text: at most 256 KiB.
        name: what it is, for the message.

    Raises:
        SecateurError: not YAML, with tags, aliases or a repeated key, or not a mapping.
    """
    data = _read(text, name)
    if not isinstance(data, dict):
        raise SecateurError(f"{name} is not a mapping of words", received=_said(data), works=WORKS)
    return data


def read_yaml_list(text: str, name: str) -> list[Any]:
    """A list of plain data from YAML text; otherwise as `read_yaml`."""
    data = _read(text, name)
    if not isinstance(data, list):
        raise SecateurError(f"{name} is not a list", received=_said(data), works="[{match: ffn, keep: 0.5}] works")
    return data


def _read(text: str, name: str) -> Any:
    if len(text) > LARGEST:
        raise SecateurError(f"{name} is larger than {LARGEST // 1024} KiB", works="a recipe is a page at most")
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise SecateurError(f"{name} cannot be read: {_reason(error)}", works=WORKS) from None


def write_yaml(data: dict[str, Any]) -> str:
    """YAML text that `read_yaml` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _said(data: object) -> object:
    return "nothing" if data is None else data


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    return f"{problem}, line {mark.line + 1}" if mark is not None and problem else text
