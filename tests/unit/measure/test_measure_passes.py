"""Perplexity, KL divergence and agreement against the host's own loss, plain loops and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from measure_toys import VOCABULARY, Fixed, bert, divergence, gpt2, llama, mixtral
from torch import nn

from secateur.errors import SecateurError
from secateur.measure import passes
from secateur.measure.passes import is_causal, losses, positions, scored
from secateur.measure.perplexity import perplexity


def windows(count: int = 5, length: int = 24) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_perplexity_is_exp_of_the_hosts_own_loss(make: Callable[[], nn.Module], batch_size: int | None) -> None:
    model, w = make(), windows()
    with torch.no_grad():
        want = [float(model(input_ids=row[None], labels=row[None]).loss) for row in w]
    got = perplexity(model, w, batch_size=batch_size, text="noise")
    assert got.window_nll == pytest.approx(want, rel=1e-4)
    assert got.value == pytest.approx(math.exp(sum(want) / 5), rel=1e-3)
    assert (got.windows, got.length, got.stride, got.tokens) == (5, 24, 24, 5 * 23)
    assert (got.dtype, got.text) == ("float32", "noise")


def test_a_stride_scores_every_token_once_with_the_context_before_it() -> None:
    model, length, stride = llama(), 16, 6
    ids = windows(1, 40)[0]
    w = ids.unfold(0, length, stride)
    total, count = 0.0, 0
    with torch.no_grad():
        for number in range(len(w)):
            start = number * stride
            first = 1 if number == 0 else length - stride
            logits = model(input_ids=w[number][None]).logits[0].log_softmax(-1)
            for t in range(first, length):
                total -= float(logits[t - 1, ids[start + t]])
                count += 1
    got = perplexity(model, w, stride=stride)
    assert got.tokens == count == (len(w) - 1) * stride + length - 1
    assert got.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert scored(3, 16, 16) == [15, 15, 15]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    models, w = [llama(0), llama(1)], windows()
    whole = losses(models, w)
    monkeypatch.setattr(passes, "CHUNK_BYTES", 4 * VOCABULARY * 7)
    for a, b in zip(whole, losses(models, w), strict=True):
        assert a.nll == pytest.approx(b.nll, rel=1e-6)
        assert (a.kl or [0]) == pytest.approx(b.kl or [0], rel=1e-6)
        assert a.top1 == b.top1


def test_divergence_of_two_known_distributions() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.2, 0.5, 0.3])
    w = torch.zeros(4, 10, dtype=torch.long)
    got = divergence(Fixed(p.log() + 3), Fixed(q.log() - 1), w)
    want = 0.5 * math.log(0.5 / 0.2) + 0.25 * math.log(0.25 / 0.5) + 0.25 * math.log(0.25 / 0.3)
    assert got.kl == pytest.approx(want, rel=1e-5)
    assert got.top1 == 0
    assert got.kl_interval.low == pytest.approx(want, rel=1e-5) == pytest.approx(got.kl_interval.high)
    assert perplexity(Fixed(q.log()), w).value == pytest.approx(1 / 0.2, rel=1e-5)


def test_divergence_is_a_sum_over_tokens_and_vocabulary() -> None:
    dense, model, w = llama(0), llama(1), windows(3)
    with torch.no_grad():
        p, q = (m(input_ids=w).logits[:, :-1].log_softmax(-1).double() for m in (dense, model))
    got = divergence(dense, model, w)
    assert got.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert got.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert divergence(dense, dense, w).kl == 0
    assert divergence(dense, dense, w).top1 == 1


def test_tokens_the_host_forbids_count_for_nothing() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.75, 0.0]).log()
    w = torch.zeros(1, 4, dtype=torch.long)
    want = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(Fixed(p), Fixed(q), w).kl == pytest.approx(want, rel=1e-5)
    assert divergence(Fixed(p), Fixed(torch.tensor([0.0, -math.inf, 0.0])), w).kl == math.inf


def test_logits_that_are_not_finite_give_infinity() -> None:
    model, w = llama(), windows()
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    got = perplexity(model, w)
    assert got.value == math.inf
    assert set(got.window_nll) == {math.inf}
    assert perplexity(Fixed(torch.tensor([-5000.0, 0.0])), torch.zeros(2, 5, dtype=torch.long)).value == math.inf


def test_vocabularies_that_do_not_fit() -> None:
    _, other = losses([Fixed(torch.zeros(3)), Fixed(torch.zeros(4))], torch.zeros(1, 5, dtype=torch.long))
    assert (other.kl, other.top1) == (None, None)
    with pytest.raises(SecateurError, match="id 300, 300 embeddings"):
        perplexity(llama(), torch.full((1, 4), VOCABULARY))


def test_what_predicts_the_next_token() -> None:
    assert all(is_causal(make()) for make in (llama, gpt2, mixtral))
    assert not is_causal(bert())
    assert not is_causal(bert().bert)
    assert not is_causal(llama().model)
    assert (positions(gpt2()), positions(bert()), positions(Fixed(torch.zeros(2)))) == (64, 64, None)
