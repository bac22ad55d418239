"""What only the whole model can tell, made once for all who ask: gradients of its loss, its Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.anatomy.types import Anatomy
from secateur.engine.backward import Backward
from secateur.engine.distribute import World
from secateur.engine.fisher import fisher
from secateur.engine.gradients import gradients
from secateur.engine.probes import Fisher, Gradient, Probe
from secateur.engine.store import Store
from secateur.engine.walk import multiplies_bf16

Told = Mapping[str, Mapping[type[Probe], Probe]]  # by site name and probe class


@dataclass
class Whole:
    """The dense model, as a whole.

    Attributes:
        model: a skeleton whose embedding, norms and head are real when it is asked.
        batches, world, seed, device, spill, tick: of the run; see `stage.Conditions`.
    """

    model: Any
    store: Store
    anatomy: Anatomy
    batches: Callable[[], Sequence[Tensor]]
    world: World
    seed: int
    device: torch.device
    spill: Path | None
    tick: Callable[[str, int, int], None]
    _known: dict[type[Probe], dict[str, Probe]] = field(default_factory=dict)

    def tell(self, needs: Iterable[type[Probe]]) -> Told:
        """Those of these statistics that the whole model is needed for, by site."""
        found: dict[str, dict[type[Probe], Probe]] = {}
        for kind in (k for k in needs if k.kind == "gradient"):
            if kind not in self._known:
                self._known[kind] = self._made(kind)
            for name, probe in self._known[kind].items():
                found.setdefault(name, {})[kind] = probe
        return found

    def _made(self, kind: type[Probe]) -> dict[str, Probe]:
        able = kind is Fisher and multiplies_bf16(self.device)  # it only weighs errors
        back = Backward(
            self.model,
            self.anatomy,
            self.store,
            self.device,
            torch.bfloat16 if able else torch.float32,
            self.spill,
            partial(self.tick, kind.__name__.lower()),
        )
        if kind is Gradient:
            return gradients(back, self.batches(), self.world)
        assert kind is Fisher
        return fisher(back, self.batches(), self.world, self.seed)
