"""A packed checkpoint as a model in memory: matrices stay packed, and are never whole.

In the place of a linear layer whose matrix is packed comes a `PackedLinear`, in the place of a stack of experts a
`SingleExperts` of them. Parts go from the file to the module as they are. What must first be converted
(experts that the files hold one by one and the host fuses) is unpacked, converted and packed again, one stack at a
time. Matrices inside modules that do something of their own with a weight are unpacked and stay so.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from secateur.anatomy import anatomy_of
from secateur.anatomy.types import Block, Matrix
from secateur.engine.host.build import describe_skeleton
from secateur.engine.host.stand_ins import SingleExperts, is_linear, takes_single_matrices
from secateur.engine.packed_files import PackedEntry, packed_dtype
from secateur.engine.reading import Reader
from secateur.engine.store import Store
from secateur.sparse.formats import DTYPES, Packed, pack
from secateur.sparse.linear import PackedLinear


def load_packed(store: Store, model: Any) -> None:
    """Fill a skeleton of a packed checkpoint, on the CPU.

    Args:
        store: of the checkpoint; its dtype is what everything becomes that is not packed.
        model: of `Store.skeleton`.

    Raises:
        SecateurError: the files contradict each other or hold weights that are not finite.
    """
    store.load_rest(model)
    for block in anatomy_of(describe_skeleton(model)).blocks:
        matrices = _packed_in(store, model, block)
        store.load_block(model, block.index, without=tuple(matrices))
        packs = {name: _packs(store, name, matrix) for name, matrix in matrices.items()}
        for module in dict.fromkeys(m.module for m in matrices.values()):
            path = f"{block.name}.{module}"
            mine = {name: m for name, m in matrices.items() if m.module == module}
            model.set_submodule(path, _stand_in(model.get_submodule(path), mine, packs))


def _packed_in(store: Store, model: nn.Module, block: Block) -> dict[str, Matrix]:
    """The matrices of a block that will run packed, by name in memory."""
    found: dict[str, Matrix] = {}
    for m in block.matrices:
        name, module = f"{block.name}.{m.tensor}", model.get_submodule(f"{block.name}.{m.module}")
        runs = takes_single_matrices(module) if m.experts else is_linear(module)
        if runs and store.is_packed(name):
            found[name] = m
    for name in list(found):  # what is converted together stays together
        if not set(store.companions(block.index, [name])) <= found.keys():
            del found[name]
    stacks = {m.module for m in block.matrices if m.experts and f"{block.name}.{m.tensor}" not in found}
    return {name: m for name, m in found.items() if m.module not in stacks}


def _packs(store: Store, name: str, matrix: Matrix) -> list[Packed]:
    """A matrix, or each of a stack."""
    entry = store.entry(name)
    if isinstance(entry, PackedEntry) and (entry.turned, entry.stacked) == (matrix.transposed, matrix.experts > 0):
        with Reader({}) as reader:
            return entry.matrices(reader.read)
    value, dtype = store.read_as_stored(name), DTYPES[packed_dtype(store.raw)]
    return [pack(matrix.view(value, e), dtype) for e in range(max(matrix.experts, 1))]


def _stand_in(module: nn.Module, matrices: dict[str, Matrix], packs: dict[str, list[Packed]]) -> nn.Module:
    """What runs in the place of a linear layer or a stack of experts."""
    if all(m.experts for m in matrices.values()):
        single = {m.tensor.rpartition(".")[2]: [PackedLinear(p) for p in packs[n]] for n, m in matrices.items()}
        return SingleExperts(module, single)
    (name,) = matrices
    bias: Tensor | None = getattr(module, "bias", None)
    return PackedLinear(packs[name][0], bias)
