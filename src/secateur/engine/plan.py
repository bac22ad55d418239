"""Plan: what stays, as data. Booleans per site, one bit each, True means kept.

Keys are ``step/space/site``: ``0/ffn/model.layers.3`` for units (``[size]``, or ``[copies, size]``),
``0/weight/model.layers.3.mlp.up_proj.weight`` for weights (the tensor's stored shape), ``0/layer/model`` for
layers. On disk a plan is one safetensors file of packed bits (least significant bit first) whose header
gives the shapes. There the bits can stay: `Plan.open` reads a site when it is asked for, and saving copies site by
site, so a plan of a large model (a gigabyte at 7B) is never in memory as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.engine.headers import Entry, read_header
from secateur.engine.write import stream_tensors
from secateur.errors import SecateurError

WORKS = "give the plan.safetensors that `secateur plan` or `secateur prune` wrote"


@dataclass(frozen=True)
class Bits:
    """Packed booleans and the shape they unfold to.

    Attributes:
        held: uint8 [ceil(n/8)], or where these bytes lie in a file.
    """

    held: Tensor | Entry
    shape: tuple[int, ...]

    @classmethod
    def of(cls, mask: Tensor) -> Bits:
        flat = np.packbits(mask.detach().cpu().reshape(-1).numpy(), bitorder="little")
        return cls(torch.from_numpy(flat), tuple(mask.shape))

    @property
    def packed(self) -> Tensor:
        """The bytes, uint8 [ceil(n/8)]; read now if they lie in a file.

        Raises:
            SecateurError: the file is no longer what it was.
        """
        if isinstance(self.held, Tensor):
            return self.held
        return _read(self.held)

    @property
    def size(self) -> int:
        """Number of booleans."""
        return int(np.prod(self.shape, dtype=np.int64))

    def mask(self) -> Tensor:
        """The booleans, unpacked."""
        flat = np.unpackbits(self.packed.numpy(), count=self.size, bitorder="little")
        return torch.from_numpy(flat.view(np.bool_)).reshape(self.shape)

    def kept(self) -> int:
        """How many are True (padding bits are zero)."""
        return int(np.bitwise_count(self.packed.numpy()).sum(dtype=np.int64))


class Plan(Mapping[str, Tensor]):
    """What stays at each site. Reading a key unpacks it; nothing else is ever held unpacked."""

    def __init__(self, masks: Mapping[str, Tensor | Bits] | None = None) -> None:
        self._bits: dict[str, Bits] = {}
        for key, mask in (masks or {}).items():
            self[key] = mask

    def __setitem__(self, key: str, mask: Tensor | Bits) -> None:
        if key.count("/") < 2:
            raise SecateurError(
                "a plan's keys are step/space/site", received=key, works="0/ffn/model.layers.3, as Secateur writes them"
            )
        if not isinstance(mask, Bits):
            if mask.dtype != torch.bool:
                raise SecateurError(
                    f"a plan holds booleans at {key!r}",
                    received=str(mask.dtype),
                    works="torch.bool, True is kept",
                )
            mask = Bits.of(mask)
        self._bits[key] = mask

    def __getitem__(self, key: str) -> Tensor:
        return self._bits[key].mask()

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def bits(self, key: str) -> Bits:
        """The packed booleans of one site."""
        return self._bits[key]

    def kept(self, key: str) -> int:
        """Exact number of units (or weights) that stay at a site."""
        return self._bits[key].kept()

    def total(self, key: str) -> int:
        """Number of units (or weights) at a site."""
        return self._bits[key].size

    def step(self, number: int) -> Plan:
        """The sites of one step."""
        return Plan({k: b for k, b in self._bits.items() if k.split("/", 1)[0] == str(number)})

    def _with(self, other: Plan, combine: Callable[[Tensor, Tensor], Tensor]) -> Plan:
        if self.keys() != other.keys():
            odd = sorted(self.keys() ^ other.keys())[0]
            raise SecateurError(
                "two plans of different sites cannot be combined",
                received=f"only one has {odd!r}",
                works="plans of the same steps on models of the same shape",
            )
        out = Plan()
        for key, mine in self._bits.items():
            theirs = other._bits[key]
            if mine.shape != theirs.shape:
                raise SecateurError(
                    f"two plans differ in shape at {key!r}",
                    received=f"{mine.shape} and {theirs.shape}",
                    works="plans of the same steps on models of the same shape",
                )
            out._bits[key] = Bits(combine(mine.packed, theirs.packed), mine.shape)
        return out

    def __and__(self, other: Plan) -> Plan:
        """Kept by both."""
        return self._with(other, torch.bitwise_and)

    def __or__(self, other: Plan) -> Plan:
        """Kept by either."""
        return self._with(other, torch.bitwise_or)

    def __sub__(self, other: Plan) -> Plan:
        """Kept here and not there."""
        return self._with(other, lambda a, b: torch.bitwise_and(a, torch.bitwise_not(b)))

    def __xor__(self, other: Plan) -> Plan:
        """Where the two differ."""
        return self._with(other, torch.bitwise_xor)

    def diff(self, other: Plan) -> dict[str, int]:
        """Number of differing booleans per site, where any differ."""
        both = self ^ other
        return {k: n for k in both if (n := both.kept(k))}

    def save(self, path: Path) -> None:
        """Write atomically, one site in memory at a time. Same plan, same bytes."""
        shapes = {k: list(b.shape) for k, b in sorted(self._bits.items())}
        header = {"secateur": json.dumps({"plan": 1, "shapes": shapes}, sort_keys=True)}
        table = {k: (torch.uint8, ((b.size + 7) // 8,)) for k, b in self._bits.items()}
        stream_tensors(path, table, lambda key: self._bits[key].packed, header)

    @classmethod
    def open(cls, path: Path) -> Plan:
        """Read a plan, its bits left in the file, which must stay as it is for as long as the plan is used.

        Raises:
            SecateurError: no such file, not a plan, or bits that do not match their shape.
        """
        if not path.is_file():
            raise SecateurError("there is no such plan file", received=str(path), works=WORKS)
        plan = cls()
        try:
            header = read_header(path)
            meta = json.loads(header.metadata.get("secateur", "null"))
        except (SecateurError, ValueError, RecursionError) as error:
            wrong = error.wrong if isinstance(error, SecateurError) else error
            raise SecateurError(f"the plan file cannot be read: {wrong}", received=str(path), works=WORKS) from error
        if not isinstance(meta, dict) or meta.get("plan") != 1 or not isinstance(meta.get("shapes"), dict):
            raise SecateurError("this safetensors file is not a plan", received=str(path), works=WORKS)
        if header.tensors.keys() != meta["shapes"].keys():
            raise SecateurError("the plan's header does not list the sites it holds", received=str(path), works=WORKS)
        for key, entry in header.tensors.items():
            bits = Bits(entry, _shape(key, meta["shapes"][key]))
            if entry.dtype != torch.uint8 or entry.shape != ((bits.size + 7) // 8,) or _spare(bits):
                raise SecateurError(
                    f"the plan's bits at {key!r} do not fit its shape", received=list(bits.shape), works=WORKS
                )
            plan[key] = bits
        return plan

    @classmethod
    def merged(cls, plans: Iterable[Plan]) -> Plan:
        """One plan of the sites of several."""
        out = cls()
        for plan in plans:
            out._bits.update(plan._bits)
        return out


def _shape(key: str, said: object) -> tuple[int, ...]:
    """A shape as a plan's header gives it."""
    if not isinstance(said, list) or not all(type(n) is int and 0 <= n < 1 << 40 for n in said):
        raise SecateurError(f"the plan's header gives {key!r} an impossible shape", received=said, works=WORKS)
    return tuple(said)


def _read(entry: Entry) -> Tensor:
    """The bytes of a site in a plan's file."""
    try:
        flat = np.fromfile(entry.file, dtype=np.uint8, count=entry.end - entry.begin, offset=entry.begin)
    except OSError as error:
        raise SecateurError(
            f"the plan file cannot be read: {error.strerror or error}", received=str(entry.file), works=WORKS
        ) from error
    if len(flat) != entry.end - entry.begin:
        raise SecateurError("the plan file is shorter than it was", received=str(entry.file), works=WORKS)
    return torch.from_numpy(flat)


def _spare(bits: Bits) -> bool:
    """Whether bits beyond the last boolean are set (looks at the last byte alone)."""
    if not (spare := -bits.size % 8):
        return False
    assert isinstance(bits.held, Entry)
    last = Entry(bits.held.file, torch.uint8, (1,), bits.held.end - 1, bits.held.end)
    return int(Bits(last, (8,)).packed[0]) >> (8 - spare) != 0


def keeps_of(plan: Plan) -> dict[str, dict[str, Tensor]]:
    """A step's plan of units as `apply` takes it: booleans by block name (``model`` for layers) and space."""
    keeps: dict[str, dict[str, Tensor]] = {}
    for key in plan:
        _, space, site = key.split("/", 2)
        if space != "weight":
            keeps.setdefault(site, {})[space] = plan[key]
    return keeps
