"""One block of a skeleton, looked at by name: sizes of matrices and the ports through them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from secateur.anatomy.types import ConfigRule, Port, Role, TensorInfo


class Unfit(Exception):
    """A part of the family's description does not fit this block; the text says why in one clause."""


@dataclass(frozen=True)
class Look:
    """A block's tensors, attributes and modules, and the config as plain data."""

    tensors: Mapping[str, TensorInfo]
    attributes: Mapping[str, int]
    modules: Mapping[str, str]
    config: Mapping[str, object]

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self.tensors[tensor].shape

    def has(self, *modules: str) -> bool:
        """True if every name is a module with a 2-D weight."""
        return all(f"{m}.weight" in self.tensors and len(self.shape(f"{m}.weight")) == 2 for m in modules)

    def out_axis(self, module: str) -> int:
        """Axis of a matrix's outputs: 0, or 1 where it is stored [in, out]."""
        return 1 if self.tensors[f"{module}.weight"].kind == "conv1d" else 0

    def outs(self, module: str) -> int:
        """Number of outputs of a matrix."""
        return self.shape(f"{module}.weight")[self.out_axis(module)]

    def ins(self, module: str) -> int:
        """Number of inputs of a matrix."""
        return self.shape(f"{module}.weight")[1 - self.out_axis(module)]

    def writes(self, module: str, width: int = 1, start: int = 0, copy_stride: int = 0) -> tuple[Port, ...]:
        """Ports of units that a matrix makes: its output axis, and its bias where it has one."""
        made = [(f"{module}.weight", self.out_axis(module))]
        if f"{module}.bias" in self.tensors:
            made.append((f"{module}.bias", 0))
        return tuple(Port(t, axis, "write", width, start, copy_stride=copy_stride) for t, axis in made)

    def reads(self, module: str, width: int = 1, copy_stride: int = 0) -> tuple[Port, ...]:
        """Port of units that a matrix uses: its input axis."""
        return (Port(f"{module}.weight", 1 - self.out_axis(module), "read", width, copy_stride=copy_stride),)

    def outputs(self, module: str) -> tuple[str, ...]:
        """A matrix's weight, and its bias where it has one: what to zero so that it returns nothing."""
        return tuple(t for t in (f"{module}.weight", f"{module}.bias") if t in self.tensors)

    def number(self, *fields: str) -> int | None:
        """The first of these config fields that is an integer."""
        for name in fields:
            value = self.config.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    def _owned(self, module: str, name: str) -> list[str]:
        """Keys of the attributes called ``name`` of a module and of those inside it (the block: only its own)."""
        if not module:
            return [name] if name in self.attributes else []
        return [k for k in self.attributes if k.startswith(module + ".") and k.rpartition(".")[2] == name]

    def attribute(self, module: str, names: Iterable[str]) -> int | None:
        """The first of these integer attributes that the module, or one inside it, has."""
        return next((self.attributes[k] for n in names for k in self._owned(module, n)), None)

    def sizes(self, module: str, numbers: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Attributes of a module that count units, by dotted name: ``numbers`` maps an attribute's name to
        the value it has now and the number per unit."""
        found = {k: (v, per_unit) for n, (v, per_unit) in numbers.items() for k in self._owned(module, n)}
        return {k: per_unit for k, (v, per_unit) in found.items() if self.attributes[k] == v}

    def field(self, names: Iterable[str], per_unit: int = 1) -> dict[str, ConfigRule]:
        """The rule for the first of these fields that the config has (``n_inner: null`` counts)."""
        for name in names:
            if name in self.config:
                return {name: ConfigRule(per_unit)}
        return {}

    def on(self, *path: str) -> bool:
        """True if a switch of the (nested) config is on."""
        value: object = self.config
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value is True

    def norm(self, module: str, full: int, rows: int, width: int, per_head: int = 0) -> tuple[Port, ...]:
        """Ports of a norm over ``full`` entries in ``rows`` heads: none if it is shared by all heads.

        Args:
            module: the norm's name; one that is absent has no ports.
            full: entries of all heads together.
            rows: heads.
            width: entries per unit, where the norm runs over all heads at once.
            per_head: entries it normalises per head, where that is not all that a head writes (a gate beside it).

        Raises:
            Unfit: if it takes the mean over all heads, so that zeros are not the same as absence.
        """
        ports: list[Port] = []
        written = full // rows
        for leaf in ("weight", "bias"):
            name = f"{module}.{leaf}"
            if name not in self.tensors:
                continue
            shape, owner = self.shape(name), self.tensors[name].owner
            if shape == (full,) and rows > 1:
                if "RMS" not in owner and "Rms" not in owner and not owner.endswith("L2Norm"):
                    raise Unfit(f"{module} subtracts a mean over all heads")
                ports.append(Port(name, 0, role_of(leaf), width))
            elif shape == (rows, written) and rows > 1:
                ports.append(Port(name, 0, "write", width // written))
            elif shape not in ((per_head or written,), (1,)):
                raise Unfit(f"{module} has an unexpected shape {list(shape)}")
        return tuple(ports)


def role_of(leaf: str) -> Role:
    """Role of a norm's tensor whose axis carries units: its weight is rescaled, its bias only gathered."""
    return "norm" if leaf == "weight" else "write"
