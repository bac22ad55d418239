"""Sites: the places a method decides about, made from a block's anatomy, weights and evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Anatomy, Block, Matrix, Space
from secateur.engine.apply import get_tensor
from secateur.engine.distribute import seeded
from secateur.engine.ear import site_name
from secateur.engine.probes import Evidence, Probe
from secateur.engine.walk import Visit
from secateur.methods.base import MatrixSite, SiteInfo, UnitSite
from secateur.methods.grains import Grain

WHOLE = Space("layer", 1, ())
"""A layer as a space of one unit."""


def selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a full tensor (or block) name is in reach: matches an include pattern if there are any, and no
    exclude pattern. Patterns are shell-like; ``*`` also crosses dots."""
    return (not include or any(fnmatchcase(name, p) for p in include)) and not any(
        fnmatchcase(name, p) for p in exclude
    )


def block_matrices(block: Block, include: Sequence[str], exclude: Sequence[str]) -> list[Matrix]:
    """The block's matrices that the patterns select."""
    return [m for m in block.matrices if selected(f"{block.name}.{m.tensor}", include, exclude)]


def weight_infos(
    anatomy: Anatomy, grain: Grain, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[SiteInfo]:
    """What a budget knows of every matrix of the ``weight`` space (one site per expert)."""
    out = []
    for block in anatomy.blocks:
        for m in block_matrices(block, include, exclude):
            for e in range(m.experts) if m.experts else [None]:
                units = grain.units(m.shape)
                out.append(
                    SiteInfo(
                        name=site_name(block, m.tensor, e),
                        kind=m.tensor,
                        component=m.component,
                        block=block.index,
                        blocks=len(anatomy.blocks),
                        units=units,
                        cost=float(grain.cost(m.shape)),
                        groups=grain.groups(m.shape),
                    )
                )
    return out


def unit_cost(block: Block, space: Space, module: nn.Module) -> float:
    """Parameters of one unit of a space of this block: entries of its ports over all tensors (a buffer is none)."""
    total = 0.0
    for port in space.ports:
        tensor = get_tensor(module, port.tensor)
        if port.role != "norm" and isinstance(tensor, nn.Parameter):
            rest = 1
            for axis, n in enumerate(tensor.shape):
                if axis not in (port.axis, port.copy_axis):
                    rest *= n
            total += port.width * rest
    return total


def unit_infos(
    anatomy: Anatomy, name: str, blocks: Sequence[nn.Module], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[SiteInfo]:
    """What a budget knows of a unit space in every block (for ``layer``: one site of as many units as layers).

    Args:
        blocks: the model's blocks; their weights may be on the meta device.
    """
    count = len(anatomy.blocks)
    if name == "layer":
        cost = sum(p.numel() for b in blocks for p in b.parameters()) / max(count, 1)  # the mean, should they differ
        return [SiteInfo("model", "layer", "other", 0, count, count, cost, minimum=1)]
    out = []
    for block, module in zip(anatomy.blocks, blocks, strict=True):
        space = block.spaces.get(name)
        if space is None or not selected(block.name, include, exclude):
            continue
        part = "ffn" if name in ("ffn", "expert") else "attention"
        out.append(
            SiteInfo(
                name=block.name,
                kind=name,
                component=part,  # type: ignore[arg-type]
                block=block.index,
                blocks=count,
                units=space.size * space.copies,
                cost=unit_cost(block, space, module),
                groups=space.copies,
                minimum=space.minimum * space.copies,
            )
        )
    return out


def matrix_sites(visit: Visit, matrices: Sequence[Matrix], blocks: int, seed: int) -> Iterator[MatrixSite]:
    """The block's matrices as sites; weights are views of the module's own (read, do not write)."""
    for m in matrices:
        data = visit.module.get_parameter(m.tensor).data
        for e in range(m.experts) if m.experts else [None]:
            name = site_name(visit.block, m.tensor, e)
            weight = m.view(data, e or 0)
            yield MatrixSite(name, weight, m.component, visit.block.index, blocks, seeded(seed, name))


def unit_site(visit: Visit, space: Space, blocks: int, seed: int) -> UnitSite:
    """A space of the block as a site (`WHOLE` for the layer itself)."""
    touched = {p.tensor for p in space.ports} or {m.tensor for m in visit.block.matrices}
    by_tensor = {m.tensor: m for m in visit.block.matrices}
    matrices: dict[str, list[MatrixSite]] = {}
    for tensor in sorted(touched & by_tensor.keys()):
        matrices[tensor] = list(matrix_sites(visit, [by_tensor[tensor]], blocks, seed))
    empty: dict[type[Probe], Probe] = {}
    names = [s.name for sites in matrices.values() for s in sites]
    return UnitSite(
        name=visit.block.name,
        space=space,
        tensors={t: get_tensor(visit.module, t).data for t in sorted(touched)},
        matrices=matrices,
        evidence={n: visit.evidence.get(n, Evidence(n, empty)) for n in names},
        block_evidence=visit.block_evidence,
        transposed=frozenset(t for t, m in by_tensor.items() if m.transposed),
        block=visit.block.index,
        blocks=blocks,
        generator=seeded(seed, f"{visit.block.name}/{space.name}"),
    )


def stored(matrix: Matrix, parts: Sequence[Tensor]) -> Tensor:
    """[out, in] results of a matrix's sites (several for experts) back in the tensor's stored shape."""
    parts = [p.T for p in parts] if matrix.transposed else list(parts)
    return torch.stack(parts) if matrix.experts else parts[0]
