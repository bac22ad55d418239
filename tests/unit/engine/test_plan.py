"""A plan is booleans: exact counts, set operations, the same bytes twice, and no file that lies."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.engine import plan as plan_module
from secateur.engine.plan import Plan
from secateur.errors import SecateurError


def some(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "0/weight/model.layers.0.mlp.up_proj.weight": torch.rand(7, 13, generator=g) > 0.4,
        "0/ffn/model.layers.0": torch.rand(3, 5, generator=g) > 0.5,
        "1/layer/model": torch.rand(9, generator=g) > 0.2,
    }


def test_reads_back_what_was_put_in_and_counts_exactly() -> None:
    masks = some(0)
    plan = Plan(masks)
    for key, mask in masks.items():
        assert torch.equal(plan[key], mask)
        assert plan.kept(key) == int(mask.sum())
        assert plan.total(key) == mask.numel()


def test_set_operations_are_those_of_booleans() -> None:
    a, b = some(1), some(2)
    pa, pb = Plan(a), Plan(b)
    for key in a:
        assert torch.equal((pa & pb)[key], a[key] & b[key])
        assert torch.equal((pa | pb)[key], a[key] | b[key])
        assert torch.equal((pa - pb)[key], a[key] & ~b[key])
    assert pa.diff(pb) == {k: int((a[k] ^ b[k]).sum()) for k in a if (a[k] ^ b[k]).any()}
    assert pa.diff(Plan(a)) == {}


def test_save_and_load_and_same_bytes(tmp_path) -> None:
    plan = Plan(some(3))
    plan.save(tmp_path / "a.safetensors")
    Plan(dict(reversed(list(some(3).items())))).save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert Plan.open(tmp_path / "a.safetensors").diff(plan) == {}


def test_plans_of_other_sites_or_shapes_do_not_combine() -> None:
    plan = Plan(some(4))
    with pytest.raises(SecateurError, match="different sites"):
        plan & plan.step(0)
    other = some(4) | {"1/layer/model": torch.ones(8, dtype=torch.bool)}
    with pytest.raises(SecateurError, match="differ in shape"):
        plan & Plan(other)


def test_a_plan_that_lies_is_refused(tmp_path) -> None:
    path = tmp_path / "p.safetensors"
    Plan(some(5)).save(path)
    tensors = load_file(path)
    shapes = {k: list(v.shape) for k, v in some(5).items()}
    for wrong in (
        shapes | {"1/layer/model": [900]},
        shapes | {"1/layer/model": [-9]},
        {k: v for k, v in shapes.items() if k[0] == "0"},
    ):
        save_file(tensors, path, metadata={"secateur": json.dumps({"plan": 1, "shapes": wrong})})
        with pytest.raises(SecateurError):
            Plan.open(path)
    save_file(tensors, path)
    with pytest.raises(SecateurError, match="not a plan"):
        Plan.open(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(SecateurError, match="cannot be read"):
        Plan.open(path)
    with pytest.raises(SecateurError, match="no such plan"):
        Plan.open(tmp_path / "absent")


def test_an_open_plan_leaves_its_bits_in_the_file(tmp_path, monkeypatch) -> None:
    """Open, count, merge and save: no two sites of a plan in a file are ever in memory together."""
    path, alive, most = tmp_path / "p.safetensors", weakref.WeakSet(), [0]
    Plan(some(6)).save(path)
    real = plan_module._read

    def counted(*args):
        alive.add(value := real(*args))
        most[0] = max(most[0], len(alive))
        return value

    monkeypatch.setattr(plan_module, "_read", counted)
    opened = Plan.open(path)
    assert not alive  # looking at a plan's padding keeps nothing
    both = Plan.merged([Plan({"2/layer/model": torch.ones(3, dtype=torch.bool)}), opened])
    assert {k: both.kept(k) for k in opened} == {k: int(v.sum()) for k, v in some(6).items()}
    both.save(tmp_path / "q.safetensors")
    assert most == [1] and not alive
    opened.step(0).save(tmp_path / "r.safetensors")
    assert Plan.open(tmp_path / "r.safetensors").diff(Plan(some(6)).step(0)) == {}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SecateurError, match="shorter than it was"):
        [opened[key] for key in opened]
