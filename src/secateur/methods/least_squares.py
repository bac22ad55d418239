"""Masked least squares: the best values of the weights that stay, for any mask and many rows at once.

    minimise over w with w_j = 0 where the mask says so:    |X w - y|^2 + shift * |w - prior|^2
    the survivors S solve:    (G + shift I)_SS w_S = (X^T y + shift * prior)_S,      G = X^T X

Every row of a weight matrix is such a problem of its own, with the same G and another S (the normal equations with a
constraint on the support; METHODS M20 and R3; with y = X w0 and prior = w0 it is the optimal brain surgeon's update of
a whole set, Hassibi and Stork 1993, for all weights that go together).

`masked_least_squares` is exact: survivors are gathered and factorised by Cholesky, rows that keep the same inputs
together, the others in chunks that fit into `BYTES`. Work grows with the cube of what a row keeps, so for wide inputs
`conjugate_gradients` solves all rows together with matrix products; `refit` picks the cheaper of the two.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError

BYTES = 192 << 20  # of gathered systems at a time
WIDE = 512  # above so many survivors in a row, and few rows that share them, `refit` iterates
STEPS = 60  # iterations of conjugate gradients in `refit`
ACCURATE = 1e-4  # residual, as a share of the right side, above which a row is solved again in fp64


def damped(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """G + shift * I and shift, which is ``damping`` times the mean diagonal of the inputs that ever fire."""
    diagonal = gram.diagonal()
    live = diagonal > 0
    shift = damping * float(diagonal[live].double().mean()) if bool(live.any()) else damping
    h = gram.clone()
    h.diagonal().add_(shift)
    return h, shift


def masked_least_squares(
    gram: Tensor, target: Tensor, mask: Tensor, damping: float = 0.01, prior: Tensor | None = None
) -> Tensor:
    """The exact best weights on the survivors of every row.

    Args:
        gram: X^T X, symmetric [in, in], fp32 or fp64.
        target: X^T Y [in, out] (X^T X W^T where the fit is on the inputs that W saw).
        mask: booleans [out, in], True stays; rows may all differ.
        damping: pull towards ``prior``, as a share of the mean diagonal of X^T X.
        prior: [out, in], what weights are pulled towards, 0 by default; give the weights themselves where the target
            is their own output. Inputs that never fire leave a weight at its prior.

    Returns:
        Weights [out, in] in ``gram``'s dtype, exactly 0 where the mask is False.

    Raises:
        SecateurError: shapes that do not belong together, or statistics that are not finite.
    """
    _check(gram, target, mask, damping)
    h, shift = damped(gram, damping)
    right = target.T.to(h.dtype)
    if prior is not None:
        right = right + shift * prior.to(h.dtype)
    dead = h.diagonal() <= 0
    scale = torch.where(dead, 1.0, h.diagonal()).rsqrt()
    h.mul_(scale).mul_(scale.unsqueeze(1))  # unit diagonal: Cholesky in fp32 loses the fewest digits
    h.diagonal().fill_(1.0)  # also for inputs that never fire and are not damped: their right side is 0
    right = right * scale
    out = torch.zeros_like(right)
    first, shared = _alike(mask)
    for rows in shared:  # one factorisation for all rows that keep the same inputs
        at = mask[rows[0]].nonzero().squeeze(1)
        if len(at):
            answer = _solve(h[at][:, at].unsqueeze(0), right[rows][:, at].T.unsqueeze(0))
            out[rows.unsqueeze(1), at] = answer.squeeze(0).T
    for rows, at, real in _chunks(mask, first, h.element_size()):
        system = h[at.unsqueeze(2), at.unsqueeze(1)]
        system.mul_(real.unsqueeze(2)).mul_(real.unsqueeze(1))  # places that only fill up: rows of the identity
        system.diagonal(dim1=1, dim2=2).fill_(1.0)
        answer = _solve(system, (right[rows].gather(1, at) * real).unsqueeze(2)).squeeze(2)
        out[rows] = out[rows].scatter_add_(1, at, answer * real)
    out.mul_(scale).masked_fill_(~mask | dead, 0)
    return out if prior is None else torch.where(mask & dead, prior.to(out.dtype), out)


def _check(gram: Tensor, target: Tensor, mask: Tensor, damping: float) -> None:
    if gram.dim() != 2 or target.dim() != 2 or gram.shape != (len(target),) * 2 or mask.shape != target.T.shape:
        raise SecateurError(
            "these do not belong to one matrix",
            received=f"X^T X {list(gram.shape)}, X^T Y {list(target.shape)}, mask {list(mask.shape)}",
            works="X^T X [in, in], X^T Y [in, out], mask [out, in]",
        )
    if not damping >= 0:
        raise SecateurError("damping must not be negative", received=damping, works="damping: 0.01")
    if not (torch.isfinite(gram.sum()) and torch.isfinite(target.sum())):
        raise SecateurError(
            "the inputs' statistics are not finite",
            works="check weights and text for NaN and Inf, or run the forward passes with --dtype fp32",
        )


def _alike(mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Rows whose mask no other row has, and the others by equal masks."""
    packed = np.ascontiguousarray(np.packbits(mask.cpu().numpy(), axis=1))
    keys = packed.view(np.dtype((np.void, packed.shape[1]))).reshape(-1) if packed.size else np.zeros(len(mask))
    _, group, count = np.unique(keys, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    runs = np.split(order, np.cumsum(count)[:-1])
    single = np.sort(np.array([r[0] for r in runs if len(r) == 1], dtype=np.int64))
    shared = [torch.from_numpy(r).to(mask.device) for r in runs if len(r) > 1]
    return torch.from_numpy(single).to(mask.device), shared


def _chunks(mask: Tensor, rows: Tensor, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows of similar counts together: (rows [b], their survivors [b, k], which of these are real [b, k])."""
    kept = mask[rows].sum(1)
    kept, order = kept.sort(stable=True)
    rows = rows[order]
    chunks, end = [], len(rows)
    while end > 0 and int(kept[end - 1]) > 0:
        k = int(kept[end - 1])
        start = max(0, end - max(1, BYTES // (3 * size * k * k)))
        own = rows[start:end]
        at = mask[own].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :k]
        real = torch.arange(k, device=mask.device) < kept[start:end].unsqueeze(1)
        chunks.append((own, at, real))
        end = start
    return chunks


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """Solutions of positive definite systems [b, k, k] for right sides [b, k, r]: by Cholesky, once refined; again in
    fp64 where that was not accurate; by the pseudo-inverse where a system is singular."""
    lower, info = torch.linalg.cholesky_ex(system)
    answer = torch.cholesky_solve(right, lower)
    answer += torch.cholesky_solve(right - system @ answer, lower)
    error = (right - system @ answer).norm(dim=(1, 2))
    good = (info == 0) & (error <= ACCURATE * right.norm(dim=(1, 2)))  # NaN is not good
    for b in (~good).nonzero().squeeze(1).tolist():
        wide, side = system[b].double(), right[b].double()
        lower, info = torch.linalg.cholesky_ex(wide)
        found = torch.cholesky_solve(side, lower) if int(info) == 0 else torch.full_like(side, torch.nan)
        if not bool(torch.isfinite(found).all()):
            tiny = len(wide) * torch.finfo(system.dtype).eps
            found = torch.linalg.pinv(wide, hermitian=True, rtol=tiny) @ side
        answer[b] = found.to(answer.dtype)
    return answer


def conjugate_gradients(
    h: Tensor, right: Tensor, mask: Tensor, start: Tensor, steps: int = STEPS, tolerance: float = 1e-6
) -> Tensor:
    """Masked least squares by conjugate gradients on all rows at once, preconditioned by the diagonal.

    Every step costs one product [out, in] x [in, in], lowers every row's error, and never leaves the survivors
    (the refinement that ends ALPS, arXiv 2406.07831; one step length per row, as in its released code).

    Args:
        h: X^T X with its damping added (see `damped`), positive definite [in, in].
        right: X^T Y (and shift * prior), one row per output [out, in].
        mask: booleans [out, in].
        start: where to begin [out, in]; entries outside the mask are taken as 0.
        tolerance: a row stops where its preconditioned residual fell to this share of the right side's.

    Returns:
        Weights [out, in], exactly 0 where the mask is False.
    """
    inverse = torch.where(h.diagonal() > 0, h.diagonal(), 1.0).reciprocal()
    x = start.masked_fill(~mask, 0)
    residual = (right - x @ h).masked_fill_(~mask, 0)
    bound = tolerance**2 * (right.masked_fill(~mask, 0).square() * inverse).sum(1)
    direction = residual * inverse
    size = (residual * direction).sum(1)
    for _ in range(steps):
        open_ = size > bound
        if not bool(open_.any()):
            break
        moved = (direction @ h).masked_fill_(~mask, 0)
        bend = (direction * moved).sum(1)
        length = torch.where(open_ & (bend > 0), size / bend, 0.0).unsqueeze(1)
        x.addcmul_(direction, length)
        residual.addcmul_(moved, length, value=-1)
        scaled = residual * inverse
        now = (residual * scaled).sum(1)
        direction.mul_(torch.where(size > 0, now / size, 0.0).unsqueeze(1)).add_(scaled)
        size = now
    return x


def refit(gram: Tensor, weight: Tensor, mask: Tensor, damping: float = 0.01, start: Tensor | None = None) -> Tensor:
    """Survivors of ``weight`` [out, in] that keep its own output best: exact, or by conjugate gradients where rows
    are so wide that factorising each would take longer.

    Args:
        start: values to begin from where it iterates; the weights themselves by default.
    """
    widest = int(mask.sum(1).max()) if len(mask) else 0
    if widest <= WIDE or len(torch.unique(mask[:: max(1, len(mask) // 64)], dim=0)) <= 8:
        return masked_least_squares(gram, gram @ weight.T, mask, damping, weight)
    h, _ = damped(gram, damping)
    return conjugate_gradients(h, weight @ h, mask, weight if start is None else start)
