"""The Fisher information against its definition: every token at every position, weighed by its probability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertModel

import secateur.engine.fisher as module
from secateur.anatomy import anatomy_of
from secateur.engine.backward import Backward
from secateur.engine.distribute import World, seeded
from secateur.engine.fisher import fisher
from secateur.engine.host.build import describe_skeleton
from secateur.engine.probes import Fisher, Probe
from secateur.engine.store import Store
from secateur.errors import SecateurError
from whole_toys import CONFIGS, make, tokens


def estimated(model: Any, batches: list[Tensor], spill: Path | None = None) -> dict[str, Probe]:
    store = Store.of_model(model, torch.float32)
    skeleton = store.skeleton()
    store.load_rest(skeleton)
    anatomy = anatomy_of(describe_skeleton(skeleton))
    return fisher(Backward(skeleton, anatomy, store, spill=spill), batches, World())


def exact(model: Any, ids: Tensor, name: str) -> Tensor:
    """Mean over positions of the expected squared slope of log p(token), by one backward for each of them."""
    weight = model.get_parameter(name).requires_grad_(True)
    logs = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].log_softmax(-1)
    total = torch.zeros_like(weight)
    for at in range(len(ids)):
        for token in range(logs.shape[-1]):
            (slope,) = torch.autograd.grad(logs[at, token], weight, retain_graph=True)
            total += logs[at, token].detach().exp() * slope.square()
    return total / len(ids)


def test_draws_come_to_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FISHER_WINDOWS", 600)
    model, ids = make("llama"), tokens(1, 5)[0]
    found = estimated(model, [ids.unsqueeze(0)] * 600)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        want, probe = exact(model, ids, name), found[name]
        assert isinstance(probe, Fisher)
        # half of the draws' spread over 600 windows
        assert torch.allclose(probe.rows, want.sum(1), rtol=0.25)
        assert float(probe.rows.sum()) == pytest.approx(float(want.sum()), rel=0.06)
        assert float(probe.diagonal.sum()) == pytest.approx(float(want.sum()), rel=0.06)
        assert torch.allclose(probe.diagonal.sum(0), want.sum(0), rtol=0.25)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_block_by_block_is_one_backward(family: str) -> None:
    """The same draws through autograd over the whole model."""
    model, batches = make(family), [tokens(2, 6), tokens(1, 6, seed=2)]
    found = estimated(model, batches)
    rows: dict[str, Tensor] = {}
    for at, window in enumerate(torch.cat(batches)):
        model.zero_grad()
        logits = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0]
        generator = seeded(0, "fisher", str(at))
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for name, weight in model.named_parameters():
            rows[name] = rows.get(name, 0) + (0 if weight.grad is None else weight.grad).square() / 18
    for name, probe in found.items():
        assert isinstance(probe, Fisher)
        tensor, _, expert = name.partition("[")
        want = rows[tensor][int(expert.rstrip("]"))] if expert else rows[tensor]
        want = want.T if family == "gpt2" else want
        assert torch.allclose(probe.rows, want.sum(1), rtol=1e-3, atol=1e-9), name
        assert torch.allclose(
            probe.diagonal, want.sum(1, keepdim=True) * want.sum(0) / want.sum(), rtol=1e-3, atol=1e-9
        )


def test_spilled_is_the_same_and_leaves_nothing(tmp_path: Path) -> None:
    model, batches = make("llama"), [tokens(2, 6)]
    kept, spilled = estimated(model, batches), estimated(model, batches, tmp_path)
    assert all(torch.equal(kept[n].sums[k], spilled[n].sums[k]) for n in kept for k in ("rows", "columns", "tokens"))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("windows", "read"),
    [
        (3, [0, 1, 2]),
        (9, [0, 1, 2, 3, 4, 5, 6, 7]),
        (12, [0, 1, 3, 4, 6, 7, 9, 10]),
        (16, [0, 2, 4, 6, 8, 10, 12, 14]),
        (33, [0, 4, 8, 12, 16, 20, 24, 28]),
    ],
)
def test_few_windows_of_a_long_text_are_read(windows: int, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def noting(seed: int, purpose: str, window: str) -> torch.Generator:
        drawn.append(int(window))
        return seeded(seed, purpose, window)

    monkeypatch.setattr(module, "seeded", noting)
    probe = next(iter(estimated(make("llama"), list(tokens(windows, 6).split(4))).values()))
    assert drawn == read
    assert float(probe.sums["tokens"]) == len(read) * 6


def test_an_encoder_without_a_head_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(SecateurError, match=r"BertModel gives no probabilities of tokens"):
        estimated(BertModel(CONFIGS["bert"]()).eval(), [tokens(2, 6)])
