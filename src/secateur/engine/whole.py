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
from secateur.engine.distribute import World
from secateur.engine.fisher import fisher
from secateur.engine.gradients import gradients
from secateur.engine.probes import Fisher, Gradient, Probe
from secateur.engine.store import Store
from secateur.engine.walk import WalkSettings

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
        text, name = self.batches(), kind.__name__.lower()
        if kind is Gradient:
            return gradients(self.store, self.anatomy, text, self.world, partial(self.tick, name))
        assert kind is Fisher
        done, total = 0, 2 * len(self.anatomy.blocks)

        def tick(n: int) -> None:
            nonlocal done
            done += n
            self.tick(name, done, total)

        tick(0)
        how = WalkSettings(device=self.device, spill=self.spill, world=self.world, tick=tick)
        return fisher(self.model, self.anatomy, self.store, text, how, self.seed)
