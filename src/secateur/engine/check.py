"""Prove an anatomy on a toy copy of a config: mask, cut and reloaded give the same logits, space by space.

The check is made so that it can fail. All parameters of the toy are random, blocks keep different numbers of
units where the space allows it, and a cut must differ from the dense model by at least a thousand times the
error that is tolerated between cut and mask, so that nothing is proved by doing nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy import anatomy_of
from secateur.anatomy.types import Anatomy, Space
from secateur.engine.apply import cut, get_tensor, mask, updated_config
from secateur.engine.host.build import build_model, changed_config, describe_skeleton, skeleton_model
from secateur.engine.host.toy import toy_config, toy_model
from secateur.errors import SecateurError

TOLERANCE = 1e-4  # of the largest logit
CONTRAST = 1000  # a cut differs from the dense model by this many times the error
LENGTH = 12
BROKEN = (
    SecateurError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class CheckResult:
    """What was proved.

    Attributes:
        proved: per space of the anatomy, whether mask, cut and reloaded agree.
        reasons: why not, for each space that is not proved, and for those the anatomy refuses.
        origin: ``declared`` or ``derived``.
        plain: per proved space, True if a uniform cut of it loads with plain ``from_pretrained``.
    """

    proved: Mapping[str, bool] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""
    plain: Mapping[str, bool] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """All spaces proved, ``ffn`` or ``expert`` among them."""
        units = self.proved.get("ffn", False) or self.proved.get("expert", False)
        return bool(self.proved) and all(self.proved.values()) and units


class Refuted(Exception):
    """A space is not what the anatomy says; the text says how it showed."""


def check(config: Any, spaces: tuple[str, ...] | None = None, anatomy: Anatomy | None = None) -> CheckResult:
    """Prove or refute the anatomy of a config on a toy copy of it.

    Args:
        config: a Transformers config; only its structure counts.
        spaces: those to check; all that the anatomy lists if None.
        anatomy: to be checked instead of the family's own (made for the toy copy).

    Raises:
        SecateurError: if no toy copy can be made, or the family has no anatomy.
    """
    whole = anatomy_of(describe_skeleton(skeleton_model(config))) if anatomy is None else anatomy
    try:
        subject = _Subject.of(config, anatomy, own_head_dim=True)
    except SecateurError:
        subject = _Subject.of(config, anatomy, own_head_dim=False)
    anatomy = subject.anatomy
    proved: dict[str, bool] = {}
    plain: dict[str, bool] = {}
    reasons = dict(anatomy.refused)
    for name in whole.spaces() if spaces is None else spaces:
        try:
            _covered(whole, anatomy, name)
            plain[name] = _PROOFS.get(name, _prove_units)(subject, name)
            proved[name] = True
        except Refuted as refuted:
            proved[name], reasons[name] = False, str(refuted)
        except BROKEN as error:
            proved[name], reasons[name] = False, f"the cut model does not run ({_first(error)})"
    return CheckResult(proved, reasons, anatomy.origin, plain)


def refuse_unproved(config: Any, space: str) -> None:
    """Refuse to prune units that are not proved; the proof is made once in a process.

    Raises:
        SecateurError: mask and cut differ on a toy copy of the config, or there is none.
    """
    reason = _refutation(_Asked(type(config), config.to_json_string(use_diff=False), space, config))
    if reason is not None:
        raise SecateurError(
            f"units of {config.model_type} models are not proved to be what they are taken for: {reason}",
            received=f"--space {space}",
            works="a space that secateur inspect MODEL --check proves, or weight",
        )


@dataclass(frozen=True)
class _Asked:
    """A config and a space, equal to all that say the same."""

    kind: type
    words: str
    space: str
    config: Any = field(compare=False)


@cache
def _refutation(asked: _Asked) -> str | None:
    return check(asked.config, (asked.space,)).reasons.get(asked.space)


def _covered(whole: Anatomy, toy: Anatomy, name: str) -> None:
    """What is proved on the toy copy holds for the model only if the toy has a layer of every kind.

    Raises:
        Refuted: if the model has a tensor in this space that the toy has not.
    """
    if name == "layer" and toy.layer is None:
        raise Refuted(f"the toy copy's layers cannot be removed: {toy.refused.get('layer', 'there are too few')}")
    here, there = _tensors(whole, name), _tensors(toy, name)
    if here - there:
        raise Refuted(f"the toy copy has no layer of the kind that holds {min(here - there)[0]}")


def _tensors(anatomy: Anatomy, name: str) -> set[tuple[str, int]]:
    """Tensors (and axes) that a space lives in, anywhere in the model."""
    if name == "weight":
        return {(m.tensor, 0) for b in anatomy.blocks for m in b.matrices}
    if name == "layer":
        return {(t, 0) for b in anatomy.blocks for t in b.outputs}
    return {(p.tensor, p.axis) for b in anatomy.blocks if name in b.spaces for p in b.spaces[name].ports}


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


@dataclass(frozen=True)
class _Subject:
    """A toy model, its text, its logits, and whether its own cache agrees with no cache."""

    model: nn.Module
    anatomy: Anatomy
    text: Tensor
    dense: Tensor
    cached: bool
    generator: torch.Generator

    @classmethod
    def of(cls, config: Any, anatomy: Anatomy | None, *, own_head_dim: bool) -> _Subject:
        toy = toy_config(config, own_head_dim=own_head_dim)
        try:
            model = toy_model(toy)
            anatomy = anatomy or anatomy_of(describe_skeleton(model))
            generator = torch.Generator().manual_seed(1)
            text = torch.randint(3, 61, (2, LENGTH), generator=generator)
            dense = _dense(model, text)
        except BROKEN as error:
            if isinstance(error, SecateurError):
                raise
            raise SecateurError(
                f"no toy copy of this config runs: {_first(error)}",
                received=toy.model_type,
                works="a family whose anatomy can be proved (docs/architectures.md)",
            ) from error
        if not bool(dense.isfinite().all()):
            raise SecateurError(
                "the toy copy's logits are not finite",
                received=toy.model_type,
                works="a family whose anatomy can be proved (docs/architectures.md)",
            )
        return cls(model, anatomy, text, dense, _cache_works(model, text, dense), generator)


def _dense(model: nn.Module, text: Tensor) -> Tensor:
    """Logits in fp64, or in fp32 where the model insists on it. The model stays in that dtype."""
    try:
        return _logits(model.double(), text)
    except BROKEN:
        return _logits(model.float(), text)


@torch.no_grad()
def _logits(model: nn.Module, text: Tensor) -> Tensor:
    out = model(input_ids=text, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))
    found = getattr(out, "logits", None)
    return out.last_hidden_state if found is None else found


@torch.no_grad()
def _decoded(model: nn.Module, text: Tensor) -> Tensor:
    """Logits of the last tokens, one at a time through the KV cache."""
    start = LENGTH - 4
    out = model(input_ids=text[:, :start], use_cache=True)
    logits = [out.logits[:, -1]]
    for at in range(start, LENGTH):
        out = model(input_ids=text[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def _cache_works(model: nn.Module, text: Tensor, dense: Tensor) -> bool:
    try:
        return _error(_decoded(model, text), dense[:, -5:]) < TOLERANCE
    except BROKEN:
        return False


def _error(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise Refuted(f"logits have shape {list(a.shape)}, not {list(b.shape)}")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def _prove_units(subject: _Subject, name: str) -> bool:
    """Ragged and uniform cuts of one space. Returns whether the uniform one loads plainly."""
    ragged = _compare(subject, _choose(subject, name, ragged=True), f"{name}, a size per layer")
    del ragged
    return _compare(subject, _choose(subject, name, ragged=False), f"{name}, one size")


def _choose(subject: _Subject, name: str, *, ragged: bool) -> dict[str, dict[str, Tensor]]:
    keeps: dict[str, dict[str, Tensor]] = {}
    holders = [b for b in subject.anatomy.blocks if name in b.spaces]
    smallest = min(b.spaces[name].size for b in holders)
    for number, block in enumerate(holders):
        space = block.spaces[name]
        if space.size <= space.minimum:
            raise Refuted(f"the toy copy has only {space.size} units per layer")
        most = space.size - 1
        count = max(space.minimum, (smallest + 1) // 2)
        if ragged:
            count = max(space.minimum, min(most, count - 1 + number % 3))
        keeps[block.name] = {name: _pick(space, min(count, most), subject.generator)}
    return keeps


def _pick(space: Space, count: int, generator: torch.Generator) -> Tensor:
    rows = []
    for _ in range(space.copies):
        row = torch.zeros(space.size, dtype=torch.bool)
        row[torch.randperm(space.size, generator=generator)[:count]] = True
        if bool(row[:count].all()):  # the first units are kept by a cut that ignores the choice
            row = row.roll(1)
        rows.append(row)
    return torch.stack(rows).reshape(space.shape)


def _compare(subject: _Subject, keeps: Mapping[str, Mapping[str, Tensor]], what: str) -> bool:
    """Hold mask, cut and reloaded against each other. Returns whether the cut loads plainly."""
    masked, smaller = copy.deepcopy(subject.model), copy.deepcopy(subject.model)
    mask(masked, subject.anatomy, keeps)
    before = sum(p.numel() for p in smaller.parameters())
    cut(smaller, subject.anatomy, keeps)
    if sum(p.numel() for p in smaller.parameters()) >= before:
        raise Refuted(f"{what}: the cut removes nothing")
    a, b = _logits(masked, subject.text), _logits(smaller, subject.text)
    error, contrast = _error(b, a), _error(b, subject.dense)
    if not error < TOLERANCE:
        raise Refuted(f"{what}: masked and cut logits differ by {error:.1e} of the largest")
    if not contrast > CONTRAST * max(error, 1e-12):
        raise Refuted(f"{what}: the cut changes the logits by only {contrast:.1e}, the error is {error:.1e}")
    if subject.cached:
        error = _error(_decoded(smaller, subject.text), b[:, -5:])
        if not error < TOLERANCE:
            raise Refuted(f"{what}: with the KV cache the cut model's logits differ by {error:.1e}")
    change = updated_config(subject.model.config, subject.anatomy, keeps)
    if "model" in keeps and not change.uniform:
        raise Refuted(f"{what}: {change.reason}")
    error = _error(_logits(_reloaded(subject, smaller, change, keeps), subject.text), b)
    if not error < TOLERANCE:
        raise Refuted(f"{what}: the reloaded model's logits differ by {error:.1e}")
    return change.uniform


def _reloaded(subject: _Subject, smaller: nn.Module, change: Any, keeps: Mapping[str, Any]) -> nn.Module:
    """The cut model rebuilt from its config and its tensors by name: plainly, or by cutting a dense one."""
    config = copy.deepcopy(subject.model.config)
    if change.uniform:
        config = changed_config(config, change.fields)
    fresh = build_model(config, attention="eager")
    if hasattr(fresh, "set_experts_implementation"):
        fresh.set_experts_implementation("eager")
    if not change.uniform:
        cut(fresh, subject.anatomy, keeps)
    fresh.to(next(smaller.parameters()).dtype).load_state_dict(smaller.state_dict(), strict=True)
    return fresh.eval()


def _prove_weights(subject: _Subject, name: str) -> bool:
    """Every matrix is one, is heard by its module, and counts: zeroing half of it changes the logits."""
    for block in subject.anatomy.blocks:
        for matrix in block.matrices:
            module = subject.model.get_submodule(block.name)
            stored = get_tensor(module, matrix.tensor)
            if tuple(matrix.view(stored).shape) != matrix.shape:
                raise Refuted(f"{matrix.tensor} is {list(stored.shape)}, not {list(matrix.shape)}")
    _listen(subject)
    keeps = {}
    for block in subject.anatomy.blocks:
        module = subject.model.get_submodule(block.name)
        given = {}
        for matrix in block.matrices:
            shape = get_tensor(module, matrix.tensor).shape
            given[matrix.tensor] = torch.rand(shape, generator=subject.generator) < 0.5
        keeps[block.name] = {"weight": given}
    masked = copy.deepcopy(subject.model)
    mask(masked, subject.anatomy, keeps)
    for block in subject.anatomy.blocks:
        for tensor, kept in keeps[block.name]["weight"].items():
            now = get_tensor(masked.get_submodule(block.name), tensor)
            if not torch.equal(now != 0, kept):
                raise Refuted(f"{block.name}.{tensor} is not zero exactly where it was masked")
    logits = _logits(masked, subject.text)
    if not _error(logits, subject.dense) > CONTRAST * 1e-7:
        raise Refuted("masking half of all weights does not change the logits")
    return True


def _listen(subject: _Subject) -> None:
    """Run the model once and see that every matrix's module is called, with inputs as wide as the matrix."""
    heard: dict[str, int] = {}
    hooks = []
    for block in subject.anatomy.blocks:
        for name in {m.module for m in block.matrices}:
            full = f"{block.name}.{name}" if name else block.name

            def hear(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], full: str = full) -> None:
                first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
                heard[full] = 0 if first is None else first.shape[-1]

            hooks.append(subject.model.get_submodule(full).register_forward_pre_hook(hear, with_kwargs=True))
    try:
        _logits(subject.model, subject.text)
    finally:
        for hook in hooks:
            hook.remove()
    for block in subject.anatomy.blocks:
        for matrix in block.matrices:
            full = f"{block.name}.{matrix.module}" if matrix.module else block.name
            if matrix.module and not matrix.tensor.startswith(matrix.module + "."):
                raise Refuted(f"{matrix.tensor} does not belong to {matrix.module}")
            if full not in heard:
                raise Refuted(f"{full} never runs, so that {matrix.tensor} does nothing")
            if not matrix.experts and heard[full] != matrix.shape[1]:
                raise Refuted(f"{full} reads {heard[full]} inputs, its matrix has {matrix.shape[1]}")


def _prove_layers(subject: _Subject, name: str) -> bool:
    """Drop the first layer, a middle one, and half of them."""
    n = len(subject.anatomy.blocks)
    plain = True
    for dropped in ({0}, {n - 1} if n == 2 else {n // 2}, set(range(0, n, 2))):
        keep = torch.tensor([i not in dropped for i in range(n)])
        if bool(keep.any()):
            what = f"layer, without {', '.join(map(str, sorted(dropped)))}"
            plain = _compare(subject, {"model": {"layer": keep}}, what) and plain
    return plain


_PROOFS = {"weight": _prove_weights, "layer": _prove_layers}
