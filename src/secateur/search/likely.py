"""KL divergence to remembered answers: the likeliest tokens one by one, all others as one.

    KL = sum over the K likeliest tokens  p (log p - log q)  +  p_rest (log p_rest - log q_rest)

K tokens in the place of a vocabulary: 4 KB a position instead of 200, so answers can be kept for all of a text. Lumping
outcomes together never raises a KL divergence, so this is a lower bound, and exact where the vocabulary has at most K
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 512
LEAST = 1e-12  # probability below which the rest is nothing
CHUNK = 2**20  # logits looked at together


@dataclass(frozen=True)
class Likely:
    """Predictions at T positions.

    Attributes:
        tokens: int32 [T, K], the likeliest.
        log: fp32 [T, K], their log-probabilities.
        rest: fp32 [T], log-probability of all others together (-inf where there are none).
    """

    tokens: Tensor
    log: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, top: int = TOP) -> Likely:
        """The predictions of logits [T, vocabulary]."""
        k, parts = min(top, logits.shape[-1]), []
        for part in logits.split(max(1, CHUNK // logits.shape[-1])):
            log = part.float().log_softmax(-1)
            best, at = log.topk(k)
            parts.append((at.int().cpu(), best.cpu(), _others(log, best, k).cpu()))
        return cls(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def divergence(self, logits: Tensor) -> Tensor:
        """KL(these || those of logits [T or fewer, vocabulary]) in nats, fp64 [positions]; the first ones count."""
        out = []
        step = max(1, CHUNK // logits.shape[-1])
        for start in range(0, len(logits), step):
            part = logits[start : start + step].float()
            at = slice(start, start + len(part))
            p, p_rest = self.log[at].to(part.device).double(), self.rest[at].to(part.device).double()
            log = part.log_softmax(-1)
            q = log.gather(-1, self.tokens[at].to(part.device).long())
            q_rest = _others(log, q, self.tokens.shape[-1]).double()
            listed = torch.where(p > -torch.inf, p.exp() * (p - q.double()), 0.0).sum(-1)
            out.append((listed + torch.where(p_rest > -torch.inf, p_rest.exp() * (p_rest - q_rest), 0.0)).cpu())
        return torch.cat(out).clamp_min(0)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"tokens": self.tokens, "log": self.log, "rest": self.rest}


def _others(log: Tensor, listed: Tensor, k: int) -> Tensor:
    """Log-probability of what is not listed, fp32 [T]."""
    if k == log.shape[-1]:
        return log.new_full(log.shape[:-1], -torch.inf)
    left = 1 - listed.double().exp().sum(-1)
    return left.clamp_min(LEAST).log().float()
