"""Block reconstruction: the survivors of a whole block are fitted by gradient to what the dense model's block answered.

    minimise over the kept weights    mean over tokens of  |B(x; W') - B(d; W)|^2 / (|B(d; W)|^2 + median)
    x what the pruned blocks before give, d what the dense model has in the same place

so a block also makes up for what the blocks before it lost, which a fit of each sub-layer to its own dense answer on x
cannot. Steps, step lengths and what is kept are those of `local_reconstruction`; the walk carries the dense model's
activations beside those of the pruned one (one more forward pass). With ``--fit-on dense``, x is d.

Source: arXiv 2102.05426 (BRECQ: reconstruction block by block, there for quantisation). Deviations: towards the dense
model's own activations, and Adam on the survivors instead of rounding. On SmolLM2 at 60 % it lowers held-out errors of
a block's output several times as much as fits of attention and FFN to their own dense answers do in as many passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from secateur.methods.repairs.local_reconstruction import LocalReconstruction


@dataclass(frozen=True)
class BlockReconstruction(LocalReconstruction):
    """Adam on the survivors of each block, towards what the dense model has behind it.

    Attributes:
        passes, rate, products: as for ``local_reconstruction``.
    """

    whole = True
