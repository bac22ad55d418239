"""Around a step's repair: biases to write into where it writes some, and what to tell of its fits."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from secateur.anatomy import anatomy_of
from secateur.engine.biases import with_biases
from secateur.engine.host.build import describe_skeleton
from secateur.engine.store import Store
from secateur.methods.mending import Fitted, bias_of, read_matrices
from secateur.methods.sites import block_matrices, selected
from secateur.parts import repair_of
from secateur.step import Step


def prepared(store: Store, step: Step) -> Store:
    """The store that a step prunes: the same weights, with biases of zero where its repair will put values.

    A step that keeps everything gets the store as it is.

    Raises:
        SecateurError: a matrix that is pruned has no bias and cannot be given one.
    """
    repair = repair_of(step)
    whole = step.amount is not None and step.amount.share == 1 and not step.map
    if repair is None or not repair.biases or whole:
        return store
    names = []
    for block in anatomy_of(describe_skeleton(store.skeleton())).blocks:
        if step.space == "weight":
            matrices = block_matrices(block, step.include, step.exclude)
        elif step.space in block.spaces and selected(block.name, step.include, step.exclude):
            matrices = read_matrices(block, block.spaces[step.space])
        else:
            matrices = []
        names += [f"{block.name}.{bias_of(m)}" for m in matrices]
    return with_biases(store, names)


def fits_said(fits: Sequence[Fitted]) -> str:
    """One sentence on the fits of a step's sub-layers or blocks."""
    better = sum(fit.after < fit.before for fit in fits)
    before, after = fmean(fit.before for fit in fits), fmean(fit.after for fit in fits)
    return (
        f"{better} of {len(fits)} parts were fitted to the dense outputs with less error, the others left as they "
        f"were: a token's relative squared error on the calibration text from {before:.4g} to {after:.4g} on average"
    )
