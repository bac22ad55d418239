"""What travels with the weights: tokenizer, chat template, generation config; and the config with its new sizes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from secateur.engine.host.origin import Origin, read_tokenizer

TRAVELS = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "special_tokens_map.json",
    "added_tokens.json", "generation_config.json", "chat_template*", "*processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def carry_along(origin: Origin | None, config: Any, target: Path) -> None:
    """Copy a directory's other files; for a GGUF file, write its tokenizer out."""
    if origin is None:
        return
    if origin.kind == "gguf":
        tokenizer = read_tokenizer(origin)
        if tokenizer is not None:
            try:
                tokenizer.save_pretrained(target)
            except BaseException as error:  # tokenizers raises the bare class, with the system's number in its words
                number = re.search(r"\(os error ([0-9]+)\)", str(error))
                if type(error) is not Exception or number is None:
                    raise
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        return
    for path in sorted(origin.path.iterdir()):
        code = origin.trust_remote_code and path.suffix == ".py"
        if path.is_file() and (code or any(fnmatch(path.name, pattern) for pattern in TRAVELS)):
            shutil.copyfile(path, target / path.name)
    folder = origin.path / "chat_templates"
    if folder.is_dir():
        shutil.copytree(folder, target / "chat_templates")


def merged_config(
    raw: Mapping[str, Any], config: Any, fields: Mapping[str, Any], per_layer: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """A config.json with new sizes, everything else as it was.

    Args:
        raw: the config as it came.
        config: Transformers' object of it, which knows the words' aliases (``n_inner`` for GPT-2).
        fields: new values by attribute name.
        per_layer: values by layer index, in Transformers' ``per_layer_config`` schema; plain loading then
            fails on an ambiguous size rather than loading wrongly.
    """
    out = dict(raw)
    if not out.get("architectures") and config.architectures:
        out["architectures"] = list(config.architectures)
    text = config.get_text_config()
    for name, value in fields.items():
        nested = next((k for k, sub in out.items() if isinstance(sub, dict) and getattr(config, k, None) is text), None)
        if nested is not None:
            out[nested] = dict(out[nested])
        part = out[nested] if nested is not None else out
        word = dict(getattr(type(text), "attribute_map", {})).get(name, name)
        if word != name:
            part.pop(name, None)
        part[word] = value
    if per_layer and text is config:  # the schema knows no nested text config: there plain loading fails on shapes
        width = len(str(max(per_layer)))
        out["per_layer_config"] = {str(i).zfill(width): dict(per_layer[i]) for i in sorted(per_layer)}
    return out
