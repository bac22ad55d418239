"""From a config to a model without weights, and from such a model to plain data that anatomies are made from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from secateur.anatomy.types import Skeleton, TensorInfo
from secateur.engine.host.own_code import BROKEN, NAMES, ORDER, own_classes
from secateur.errors import SecateurError, unknown

CONFIG_ERRORS = (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, AssertionError)
SWITCHES = ("is_transposed", "is_concatenated")  # how a stack of experts is stored


def skeleton_model(config: PreTrainedConfig) -> nn.Module:
    """The model a config describes, on the meta device: shapes and code, no weights.

    A config that names its class in ``architectures`` gets that class; otherwise causal, then masked language
    model, then plain encoder.

    Raises:
        SecateurError: if Transformers cannot build it.
    """
    with torch.device("meta"):
        return build_model(config)


def build_model(config: PreTrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """The same with memory of its own, on the current default device, with Transformers' initial values."""
    options = {"attn_implementation": attention} if attention else {}
    own = own_classes(config)
    for auto in _autos(config):
        if auto.__name__ not in own if own else type(config) not in auto._model_mapping:
            continue
        try:
            return own[auto.__name__]._from_config(config, **options) if own else auto.from_config(config, **options)
        except BROKEN as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SecateurError(
                f"Transformers cannot build a {config.model_type} model from this config: {first}",
                received=type(config).__name__,
                works="a config that the installed Transformers builds",
            ) from error
    raise SecateurError(
        "Transformers has no language model for this kind of config",
        received=config.model_type,
        works="a causal language model, a masked language model or a plain encoder",
    )


def _autos(config: PreTrainedConfig) -> tuple[Any, ...]:
    named = (config.architectures or [""])[0] or ""
    own = own_classes(config)
    if own:  # the class it names, whatever it is called
        return tuple(sorted(ORDER, key=lambda auto: getattr(own.get(auto.__name__), "__name__", "") != named))
    if "MaskedLM" in named:
        return (AutoModelForMaskedLM, AutoModel)
    if named and "For" not in named and "LMHead" not in named:
        return (AutoModel,)
    return ORDER


def causal_families() -> tuple[str, ...]:
    """The ``model_type`` of every causal language model of the installed Transformers."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def default_config(family: str) -> PreTrainedConfig:
    """A family's config with the values it has when nothing is said.

    Raises:
        SecateurError: if there is no such family, or its own defaults are not valid.
    """
    if family not in CONFIG_MAPPING:
        raise unknown("family", family, causal_families())
    try:
        return CONFIG_MAPPING[family]()
    except CONFIG_ERRORS as error:
        reason = error.__cause__ or error
        first = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        raise SecateurError(
            f"the default config of {family} is not valid: {first}",
            received=family,
            works="give a model directory with a config.json of this family",
        ) from error


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The text part of a nested config; the config itself where there is no other.

    Raises:
        SecateurError: if it has several.
    """
    try:
        return config.get_text_config()
    except ValueError as error:
        raise SecateurError(
            "this config has several text parts",
            received=config.model_type,
            works="a language model alone, or a model with one of them",
        ) from error


def changed_config(config: PreTrainedConfig, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A config with other values of some (text) fields, as it comes back from its own JSON.

    Raises:
        SecateurError: if the config's class does not accept them.
    """
    words = copy.deepcopy(config.to_dict())
    text = text_config(config)
    inner = next((k for k, v in vars(config).items() if v is text), None) if text is not config else None
    (words if inner is None else words[inner]).update(fields)
    try:
        return type(config).from_dict(words)
    except CONFIG_ERRORS as error:
        reason = error.__cause__ or error
        first = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        raise SecateurError(
            f"a {config.model_type} config cannot say this: {first}",
            received=dict(fields),
            works="another number of units, or mask instead of cut",
        ) from error


def describe_skeleton(model: nn.Module) -> Skeleton:
    """What a model is made of, as plain data: the list of blocks, their tensors, modules and integer attributes.

    Sizes come from the tensors themselves, so a model that was already cut is described as it is.

    Raises:
        SecateurError: if no list of blocks is found.
    """
    config: Any = model.config
    text = text_config(config)
    path = _blocks_path(model, text)
    blocks: Any = model.get_submodule(path)
    prefix = path.rpartition(".")[0]
    owners: dict[int, int] = {}
    shared = set()
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if owners.setdefault(id(parameter), index) != index:
                shared.add(name)
    return Skeleton(
        family=text.model_type or config.model_type,
        config=_plain(text.to_dict()),
        path=path,
        blocks=tuple(_tensors(block) for block in blocks),
        attributes=tuple(_attributes(block) for block in blocks),
        modules=tuple({n: type(m).__name__ for n, m in block.named_modules() if n} for block in blocks),
        tp_plan=dict(getattr(text, "base_model_tp_plan", None) or {}),
        pp_plan=dict(getattr(text, "base_model_pp_plan", None) or {}),
        prefix=prefix,
        causal=_causal(model, text),
        shared=tuple(sorted(shared)),
    )


def _causal(model: nn.Module, text: PreTrainedConfig) -> bool:
    name = type(model).__name__
    own = own_classes(text)
    if own:
        return own.get(NAMES[0]) is type(model)
    return ("CausalLM" in name or "LMHead" in name or name.endswith("ForConditionalGeneration")) and bool(
        getattr(text, "is_decoder", True) or type(text) in AutoModelForCausalLM._model_mapping
    )


def _blocks_path(model: nn.Module, text: PreTrainedConfig) -> str:
    """The outermost list of modules with most parameters whose length is the config's number of layers."""
    found: dict[str, tuple[bool, int]] = {}
    layers = getattr(text, "num_hidden_layers", None)
    base = getattr(model, "base_model_prefix", "")
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(outer + ".") for outer in found):
            continue
        if len(module) == 0 or not any(True for _ in module.parameters()):
            continue
        parameters = sum(p.numel() for p in module.parameters())
        found[name] = (len(module) == layers, parameters)
    if not found:
        raise SecateurError(
            "no list of blocks was found in this model",
            received=type(model).__name__,
            works=f"a model with its layers in one nn.ModuleList (as {base or 'model'}.layers)",
        )
    return max(found, key=lambda name: found[name])


def _tensors(block: nn.Module) -> dict[str, TensorInfo]:
    out = {}
    for prefix, module in block.named_modules():
        named = [*module.named_parameters(recurse=False)]
        named += [(n, b) for n, b in module.named_buffers(recurse=False) if b is not None and b.dim()]
        parameters = set(module._parameters)
        for leaf, tensor in named:
            kind: Any = _kind(module) if leaf in parameters else "buffer"
            out[f"{prefix}.{leaf}" if prefix else leaf] = TensorInfo(tuple(tensor.shape), kind, type(module).__name__)
    return out


def _kind(module: nn.Module) -> Any:
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return "linear"
    if name == "Conv1D":
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "norm" if "norm" in name.lower() else "parameter"


def _attributes(block: nn.Module) -> dict[str, int]:
    out = {}
    for prefix, module in block.named_modules():
        for name, value in vars(module).items():
            counts = isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_")
            if counts or name in SWITCHES:
                out[f"{prefix}.{name}" if prefix else name] = value
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def differences(wanted: nn.Module, found: nn.Module, path: str) -> str:
    """The first difference between two skeletons: tensors by name and shape, and what the modules of the
    blocks know of themselves (numbers, words, switches). Empty if there is none."""
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (wanted, found)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            return f"{name} is {shapes[1].get(name)}, not {shapes[0].get(name)}"
    pairs = zip(wanted.get_submodule(path).named_modules(), found.get_submodule(path).named_modules(), strict=False)
    for (name, a), (_, b) in pairs:
        if type(a) is not type(b):
            return f"{name} is a {type(b).__name__}, not a {type(a).__name__}"
        for key, value in vars(a).items():
            if isinstance(value, bool | int | float | str) and not key.startswith("_") and vars(b).get(key) != value:
                return f"{name}.{key} is {vars(b).get(key)!r}, not {value!r}"
    return ""
