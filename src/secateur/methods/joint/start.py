"""Masks to start from: whatever ranks or chooses single weights, by its name."""

from __future__ import annotations

from secateur.errors import unknown
from secateur.methods.base import Method
from secateur.methods.composed import Composed
from secateur.methods.grains import Grain
from secateur.methods.joint.admm import ADMM
from secateur.methods.joint.alps import ALPS
from secateur.methods.joint.obs import SetOBS
from secateur.methods.joint.sparsegpt import SparseGPT
from secateur.methods.legal import legal_spaces
from secateur.methods.scores import SCORES


def start_from(name: str, grain: Grain) -> Method:
    """The method whose mask is improved: a score of single weights with this grain, or a joint method.

    Raises:
        SecateurError: no such score or method, or one that cannot choose by this grain.
    """
    scores = {n: s for n, s in SCORES.items() if "weight" in legal_spaces(s)}
    if name in scores:
        return Composed(scores[name](), grain)
    if name == "sparsegpt":
        return SparseGPT(grain)
    if name == "obs":
        return SetOBS(grain)
    if name == "admm":
        return ADMM(grain)
    if name == "alps":
        return ALPS(grain)
    raise unknown("start", name, [*scores, "sparsegpt", "obs", "admm", "alps"])
