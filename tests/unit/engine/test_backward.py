"""Gradients block by block against autograd over the whole model; the Fisher information has a file of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertModel

from secateur.anatomy import anatomy_of
from secateur.engine.backward import GROUP, Backward
from secateur.engine.distribute import World
from secateur.engine.ear import site_name
from secateur.engine.gradients import gradients, room
from secateur.engine.host.build import describe_skeleton
from secateur.engine.probes import Gradient, Probe
from secateur.engine.store import Store
from secateur.engine.walk import batches_of
from secateur.errors import SecateurError
from whole_toys import CONFIGS, make, tokens

NEXT = ["llama", "gpt2", "gemma2", "opt", "mixtral", "falcon", "gpt_neox"]
# by how many tokens a model's answer is ahead of what it reads
AHEAD = dict.fromkeys(NEXT, 1) | {"bert": 0, "eurobert": 0}


def back_through(model: Any, spill: Path | None = None, **more: Any) -> Backward:
    store = Store.of_model(model, torch.float32)
    skeleton = store.skeleton()
    store.load_rest(skeleton)
    return Backward(skeleton, anatomy_of(describe_skeleton(skeleton)), store, spill=spill, **more)


def found(model: Any, windows: Tensor, spill: Path | None = None) -> dict[str, Probe]:
    return gradients(back_through(model, spill), batches_of(windows, 2), World())


@pytest.mark.parametrize(("family", "ahead"), AHEAD.items())
def test_gradients_are_those_of_a_plain_loop(family: str, ahead: int) -> None:
    windows = tokens(GROUP + 3)  # more than go there and back together
    probes = found(make(family), windows)
    plain = make(family)
    for ids in windows:
        logits = plain(input_ids=ids[None]).logits[0].float()
        torch.nn.functional.cross_entropy(logits[: len(ids) - ahead], ids[ahead:]).backward()
    checked = 0
    for block in anatomy_of(describe_skeleton(plain)).blocks:
        for m in block.matrices:
            grad = plain.get_submodule(block.name).get_parameter(m.tensor).grad / len(windows)
            assert grad.abs().max() > 0
            for e in range(m.experts) if m.experts else [None]:
                probe = probes[site_name(block, m.tensor, e)]
                assert isinstance(probe, Gradient)
                torch.testing.assert_close(probe.gradient, m.view(grad, e or 0), rtol=1e-3, atol=1e-6)
                checked += 1
    assert checked == len(probes)


def test_one_block_is_there_at_a_time() -> None:
    """Blocks are on the meta device before and after, and only the one whose gradients are told is not."""
    told: list[tuple[int, int]] = []
    back = back_through(make("llama"), tick=lambda done, total: told.append((done, total)))
    blocks = back.model.get_submodule(back.anatomy.path)
    seen: list[int] = []
    for turn in back.turns([tokens(1)] * (GROUP + 1), lambda number, logits: logits.square().sum()):
        there = [i for i, b in enumerate(blocks) if any(p.device.type != "meta" for p in b.parameters())]
        assert there == [turn.block.index]
        seen.append(turn.block.index)
    assert seen == [2] * GROUP + [1] * GROUP + [0] * GROUP + [2, 1, 0]
    assert all(p.device.type == "meta" for p in blocks.parameters())
    assert told == [(i, 12) for i in range(13)]


def test_spilled_is_the_same_and_leaves_nothing(tmp_path: Path) -> None:
    model, windows = make("mixtral"), tokens(3)
    kept, spilled = found(model, windows), found(model, windows, tmp_path / "there")
    assert kept.keys() == spilled.keys()
    assert all(torch.equal(kept[n].sums["gradient"], spilled[n].sums["gradient"]) for n in kept)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_full_disk_is_met_before_the_first_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SecateurError, match="No space left on device"):
        room(torch.Size([2, 3]), tmp_path)


def test_an_encoder_without_a_head_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(SecateurError, match=r"BertModel gives no probabilities of tokens"):
        found(BertModel(CONFIGS["bert"]()).eval(), tokens(2))
