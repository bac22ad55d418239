"""One block of a step: choose what stays (or replay it), mend the survivors, apply."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.anatomy.types import Matrix
from secateur.engine.apply import cut_block, mask_block
from secateur.engine.plan import Plan
from secateur.engine.probes import Evidence
from secateur.engine.silence import Silence
from secateur.engine.walk import Visit
from secateur.methods.base import Keep, MatrixRepair, MatrixSite, PartRepair
from secateur.methods.composed import Composed
from secateur.methods.fitting import fitted
from secateur.methods.mending import Fitted, Fitter, entries_left, mend_readers, mend_weights
from secateur.methods.sites import block_matrices, matrix_sites, stored, unit_site
from secateur.parts import Parts
from secateur.step import Step


class Pruner:
    """What a step does to every block.

    Args:
        step, parts: what it says and what that is made of.
        number: its place in the recipe, for the plan's keys.
        blocks: how many the model has.
        seed: the recipe's.

    Attributes:
        reweigh: compute weight updates of a joint method and of a repair (off: a replay without text).
        silenced: routers silenced by masks of experts.
        fits: what fits of sub-layers came to.
    """

    def __init__(self, step: Step, parts: Parts, number: int, blocks: int, seed: int) -> None:
        self.step, self.parts, self.number, self.blocks, self.seed = step, parts, number, blocks, seed
        self.reweigh = True
        self.silenced: list[Silence] = []
        self.fits: list[Fitted] = []

    def block(self, visit: Visit, counts: Mapping[str, int], replay: Plan | None) -> Plan:
        """Decide about one block, mend, apply.

        Args:
            visit: the block, its evidence complete; changed in place.
            counts: units kept by site name; sites that are not named stay as they are.
            replay: booleans decided elsewhere instead.

        Returns:
            The block's part of the plan.
        """
        if self.step.space == "layer":
            assert replay is not None
            keep = replay[f"{self.number}/layer/model"][visit.block.index]
            if self.step.apply == "mask":
                mask_block(visit.module, visit.block, {"layer": keep})
            return Plan()
        repair, fitter = self.parts.repair if self.reweigh else None, None
        if isinstance(repair, PartRepair) and visit.stream is not None:
            fitter = Fitter(repair, visit, self.parts.fit_on.name == "dense", self.seed)
        prune = self._prune_weights if self.step.space == "weight" else self._prune_units
        plan, left = prune(visit, counts, replay)
        if fitter is not None:
            self.fits += fitter.fit(left)
        return plan

    def _prune_units(
        self, visit: Visit, counts: Mapping[str, int], replay: Plan | None
    ) -> tuple[Plan, dict[str, Tensor]]:
        """The block's part of the plan, and per pruned matrix which of its entries are left."""
        space = visit.block.spaces.get(self.step.space)
        key = f"{self.number}/{self.step.space}/{visit.block.name}"
        if space is None or (replay is None and visit.block.name not in counts) or (replay and key not in replay):
            return Plan(), {}
        if replay is not None:
            mask = replay[key]
        else:
            assert isinstance(self.parts.method, Composed)
            site = unit_site(visit, space, self.blocks, self.seed)
            mask = self.parts.method.prune_units(site, counts[visit.block.name]).mask.cpu()
        if self.reweigh and isinstance(self.parts.repair, MatrixRepair):
            mend_readers(self.parts.repair, visit, space, mask, self.seed)
        change = cut_block if self.step.apply == "cut" else mask_block
        self.silenced += change(visit.module, visit.block, {self.step.space: mask}) or []
        left = entries_left(visit.block, visit.module, space, mask, cut=self.step.apply == "cut")
        return Plan({key: mask}), left

    def _prune_weights(
        self, visit: Visit, counts: Mapping[str, int], replay: Plan | None
    ) -> tuple[Plan, dict[str, Tensor]]:
        """The block's part of the plan, and per pruned matrix which of its entries are left."""
        matrices = block_matrices(visit.block, self.step.include, self.step.exclude)
        if replay is not None:
            matrices = [m for m in matrices if self._key(visit, m) in replay]
        sites = {m: list(matrix_sites(visit, [m], self.blocks, self.seed)) for m in matrices}
        kept = self._replayed(visit, sites, replay) if replay is not None else self._decided(visit, sites, counts)
        if self.reweigh and isinstance(self.parts.repair, MatrixRepair):
            kept = mend_weights(self.parts.repair, visit, sites, kept)
        plan, left = Plan(), {}
        for m in matrices:
            decisions = [kept[s.name] for s in sites[m]]
            if any(d.weight is not None for d in decisions):
                new = [s.weight if d.weight is None else d.weight for s, d in zip(sites[m], decisions, strict=True)]
                visit.module.get_parameter(m.tensor).data.copy_(stored(m, new))
            mask = stored(m, [d.mask for d in decisions])
            mask_block(visit.module, visit.block, {"weight": {m.tensor: mask}})
            plan[self._key(visit, m)] = mask.cpu()
            if not bool(mask.all()):
                left[m.tensor] = mask
        return plan, left

    def _decided(
        self, visit: Visit, sites: Mapping[Matrix, list[MatrixSite]], counts: Mapping[str, int]
    ) -> dict[str, Keep]:
        """Decisions by site name; sites that keep everything are not touched by any method."""
        out, open_sites = {}, []
        for m, parts in sites.items():
            for s in parts:
                if counts[s.name] == self.parts.grain.units(m.shape):
                    out[s.name] = Keep(torch.ones(m.shape, dtype=torch.bool, device=s.weight.device))
                else:
                    open_sites.append(s)
        evidence = [visit.evidence.get(s.name, Evidence(s.name)) for s in open_sites]
        aims = self._aims(open_sites, evidence)
        kept = self.parts.method.prune_many(aims, evidence, [counts[s.name] for s in open_sites])
        for s, a, k in zip(open_sites, aims, kept, strict=True):
            out[s.name] = Keep(k.mask, a.weight) if k.weight is None and a is not s else k
        return out

    def _aims(self, sites: list[MatrixSite], evidence: list[Evidence]) -> list[MatrixSite]:
        """The sites as a joint method sees them: with the weights to aim at where both streams were walked."""
        return fitted(sites, evidence) if self.parts.joint else sites

    def _replayed(self, visit: Visit, sites: Mapping[Matrix, list[MatrixSite]], replay: Plan) -> dict[str, Keep]:
        out, open_sites = {}, []
        for m, parts in sites.items():
            mask = replay[self._key(visit, m)].to(parts[0].weight.device)
            for e, s in enumerate(parts):
                out[s.name] = Keep(m.view(mask, e))
                if self.reweigh and self.parts.joint and not bool(out[s.name].mask.all()):
                    open_sites.append(s)
        evidence = [visit.evidence.get(s.name, Evidence(s.name)) for s in open_sites]
        aims = self._aims(open_sites, evidence)
        found = self.parts.method.reweigh_many(aims, evidence, [out[s.name].mask for s in open_sites])
        for s, a, new in zip(open_sites, aims, found, strict=True):
            out[s.name].weight = a.weight if new is None and a is not s else new
        return out

    def _key(self, visit: Visit, m: Matrix) -> str:
        return f"{self.number}/weight/{visit.block.name}.{m.tensor}"
