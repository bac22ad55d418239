"""Output error: how far the matrix's output moves, squared and summed over tokens, if something goes alone.

    a weight                     S_ij = w_ij^2 ||x_j||_2^2           (the square of Wanda's score)
    a tile, rows R, columns C    S_RC = tr(W_RC G_CC W_RC^T)         G = X^T X
    a unit                       sum of S_ij over the columns that read it

The tile's error is exact; a neuron's, too (it has one column), but of a head the products between its columns are
left out. Ranks tiles on their own, and is what `--budget rate_distortion:by=output` adds up. In a mixture of experts
weights and units are weighted by the router, as Wanda's; G of tiles is not.

Source: for weights Sun et al. 2023 (Wanda), arXiv 2306.11695, section 3; for tiles the same least-squares argument
written out: ||W X - W' X||^2 where W' lacks the tile. G of other tiles' columns does not enter, since only this tile's
columns change.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.engine.probes import Evidence, Gram, InputNorm
from secateur.methods.base import MatrixSite, Score
from secateur.methods.grains import Grain, Row, Tile


@dataclass(frozen=True)
class OutputError(Score):
    """Squared error of the matrix's output if a weight, tile or unit goes alone; folds over ``read`` ports."""

    needs = (InputNorm,)
    roles = ("read",)
    grain: Grain = field(default_factory=Row)

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", (Gram,) if isinstance(self.grain, Tile) else (InputNorm,))

    def score(self, site: MatrixSite, evidence: Evidence) -> Tensor:
        w = site.weight
        # inputs that never fire (an expert that no token reached) come last, by magnitude instead of all equal
        if isinstance(self.grain, Tile):
            errors = tile_errors(w, evidence[Gram].gram.to(w.device), self.grain)
            return self.grain.spread(torch.where(errors == 0, 1e-24 * self.grain.unit_scores(w.square()), errors))
        return (w * evidence[InputNorm].norm.clamp_min(1e-12).to(w.device)).square()


def tile_errors(weight: Tensor, gram: Tensor, tile: Tile) -> Tensor:
    """tr(W_RC G_CC W_RC^T) of every tile: fp64 [out / rows, in / columns]."""
    out, inn = weight.shape
    tile.check((out, inn))
    n, c = inn // tile.columns, tile.columns
    blocks = gram.reshape(n, c, n, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [n, c, c]
    w = weight.reshape(out, n, c).transpose(0, 1)  # [n, out, c]
    rows = (w.bmm(blocks) * w).double().sum(2)  # [n, out]
    return rows.reshape(n, out // tile.rows, tile.rows).sum(2).T.clamp_min(0)
