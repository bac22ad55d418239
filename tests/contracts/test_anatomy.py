"""Every architecture of the zoo is proved space by space, and wrong anatomies are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from zoo import ZOO

from secateur.anatomy import anatomy_of
from secateur.anatomy.types import Anatomy, Port, Skeleton, Space, TensorInfo
from secateur.engine.apply import cut, cut_layers, mask, updated_config
from secateur.engine.check import check
from secateur.engine.checkpoint import load
from secateur.engine.host.build import changed_config, describe_skeleton, skeleton_model
from secateur.engine.host.experts import is_experts, listening
from secateur.engine.host.toy import toy_config, toy_model
from secateur.errors import SecateurError
from whole_toys import written

DENSE = {"weight", "kv_group", "head", "ffn", "layer"}
MIXTURE = DENSE | {"expert"}
EXPECTED: Mapping[str, set[str]] = dict.fromkeys(ZOO, DENSE) | {
    "bert": DENSE - {"layer"},  # norms after the residual sum
    "bloom": DENSE - {"kv_group", "head"},  # ALiBi
    "falcon": DENSE - {"kv_group"},  # one KV head
    "gpt_bigcode": DENSE - {"kv_group"},
    "deepseek_v3": {"weight", "head", "ffn", "layer"},  # one latent, and experts chosen within groups
    "stablelm, a norm per head": {"weight", "ffn"},
    "opt, norms after the sum": DENSE - {"layer"},
    "bloom, sums of norms": {"weight", "ffn"},
    **dict.fromkeys(("gpt_oss", "mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "glm4_moe"), MIXTURE),
}


@pytest.mark.parametrize("family", ZOO)
def test_every_space_is_proved(family: str) -> None:
    result = check(ZOO[family]())
    assert result.passed, result.reasons
    assert set(result.proved) == EXPECTED[family]
    missing = MIXTURE - set(result.proved) - (set() if "expert" in EXPECTED[family] else {"expert"})
    assert all(result.reasons[name] for name in missing), "what is not offered is said, with the reason"


def _toy(family: str) -> tuple[Any, Anatomy]:
    model = toy_model(ZOO[family]())
    return model, anatomy_of(describe_skeleton(model))


# --- wrong anatomies -------------------------------------------------------------------------------------


def _altered(anatomy: Anatomy, space: str, change: Callable[[Space], Space]) -> Anatomy:
    blocks = tuple(
        replace(b, spaces={**b.spaces, space: change(b.spaces[space])}) if space in b.spaces else b
        for b in anatomy.blocks
    )
    return replace(anatomy, blocks=blocks)


def _without(tensor: str, nth: int | None = None) -> Callable[[Space], Space]:
    def change(space: Space) -> Space:
        found = [p for p in space.ports if p.tensor == tensor]
        assert found, f"{tensor} is no port of {space.name}"
        gone = found if nth is None else [found[nth]]
        return replace(space, ports=tuple(p for p in space.ports if p not in gone))

    return change


def _with(tensor: str, nth: int = 0, **values: Any) -> Callable[[Space], Space]:
    def change(space: Space) -> Space:
        target = [p for p in space.ports if p.tensor == tensor][nth]
        return replace(space, ports=tuple(replace(p, **values) if p is target else p for p in space.ports))

    return change


def _swapped(first: str, second: str) -> Callable[[Space], Space]:
    def change(space: Space) -> Space:
        names = {first: second, second: first}
        return replace(space, ports=tuple(replace(p, tensor=names.get(p.tensor, p.tensor)) for p in space.ports))

    return change


def _resized(**sizes: int) -> Callable[[Space], Space]:
    return lambda space: replace(space, sizes=sizes)


WRONG: Mapping[str, tuple[str, str, Callable[[Space], Space]]] = {
    "a bias forgotten": ("llama", "ffn", _without("mlp.up_proj.bias")),
    "up forgotten": ("llama", "ffn", _without("mlp.up_proj.weight")),
    "down forgotten": ("llama", "ffn", _without("mlp.down_proj.weight")),
    "query bias forgotten": ("llama", "kv_group", _without("self_attn.q_proj.bias")),
    "values forgotten": ("llama", "kv_group", _without("self_attn.v_proj.weight")),
    "query and key widths swapped": (
        "llama",
        "kv_group",
        _swapped("self_attn.q_proj.weight", "self_attn.k_proj.weight"),
    ),
    "keys and outputs of other units": ("llama", "kv_group", _with("self_attn.k_proj.weight", start=1)),
    "half a head": ("llama", "kv_group", _with("self_attn.o_proj.weight", width=24)),
    "heads taken across groups": ("llama", "head", _with("self_attn.o_proj.weight", copy_stride=24)),
    "queries per group not said": ("llama", "head", _resized()),
    "wrong start of values": ("gpt2", "kv_group", _with("attn.c_attn.weight", 2, start=0)),
    "a fused bias forgotten": ("gpt2", "kv_group", _without("attn.c_attn.bias", 1)),
    "split size not said": ("gpt2", "kv_group", _resized()),
    "inputs taken for outputs": ("gpt2", "ffn", _with("mlp.c_fc.weight", axis=0)),
    "wrong start of ups": ("phi3", "ffn", _with("mlp.gate_up_proj.weight", 1, start=1)),
    "only gates": ("phi3", "ffn", _without("mlp.gate_up_proj.weight", 1)),
    "interleaved where stacked": ("phi3", "ffn", _with("mlp.gate_up_proj.weight", 0, stride=2)),
    "no rescaled norm": ("olmo2", "kv_group", _with("self_attn.q_norm.weight", role="write")),
    "norm forgotten": ("olmo2", "kv_group", _without("self_attn.k_norm.weight")),
    "stacked where interleaved": ("gpt_oss", "ffn", _with("mlp.experts.gate_up_proj", 1, stride=1)),
    "router row forgotten": ("mixtral", "expert", _without("mlp.gate.weight")),
    "an expert's down forgotten": ("mixtral", "expert", _without("mlp.experts.down_proj")),
    "a speaking router": ("mixtral", "expert", lambda s: replace(s, silence=None)),
    "the same neurons in all experts": ("mixtral", "ffn", _with("mlp.experts.down_proj", start=1)),
    "fused per head, not in parts": ("gpt_neox", "kv_group", _with("attention.query_key_value.weight", width=24)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_anatomy_is_refused(name: str) -> None:
    family, space, change = WRONG[name]
    _, anatomy = _toy(family)
    result = check(ZOO[family](), (space,), _altered(anatomy, space, change))
    assert result.proved == {space: False}
    assert result.reasons[space]


def test_layers_with_an_output_forgotten_are_refused() -> None:
    _, anatomy = _toy("llama")
    blocks = tuple(replace(b, outputs=b.outputs[:-1]) for b in anatomy.blocks)
    result = check(ZOO["llama"](), ("layer",), replace(anatomy, blocks=blocks))
    assert result.proved == {"layer": False}


def test_layers_after_whose_norms_zero_is_not_nothing_are_refused() -> None:
    _, anatomy = _toy("bert")
    names = ("attention.output.dense.weight", "attention.output.dense.bias", "output.dense.weight", "output.dense.bias")
    blocks = tuple(replace(b, outputs=names) for b in anatomy.blocks)
    wrong = replace(anatomy, blocks=blocks, layer=Space("layer", len(blocks), ()))
    assert check(ZOO["bert"](), ("layer",), wrong).proved == {"layer": False}


def test_heads_under_alibi_are_refused() -> None:
    _, anatomy = _toy("bloom")
    width = 3 * 24
    ports = (
        Port("self_attention.query_key_value.weight", 0, "write", width),
        Port("self_attention.query_key_value.bias", 0, "write", width),
        Port("self_attention.dense.weight", 1, "read", 24),
    )
    sizes = {"self_attention.num_heads": 1, "self_attention.hidden_size": 24}
    space = Space("kv_group", 5, ports, sizes=sizes)
    blocks = tuple(replace(b, spaces={**b.spaces, "kv_group": space}) for b in anatomy.blocks)
    assert check(ZOO["bloom"](), ("kv_group",), replace(anatomy, blocks=blocks)).proved == {"kv_group": False}


def test_a_matrix_that_never_runs_is_refused() -> None:
    _, anatomy = _toy("llama")
    block = anatomy.blocks[0]
    wrong = replace(block.matrices[0], module="mlp")
    blocks = (replace(block, matrices=(wrong, *block.matrices[1:])), *anatomy.blocks[1:])
    assert check(ZOO["llama"](), ("weight",), replace(anatomy, blocks=blocks)).proved == {"weight": False}


# --- what mask and cut write -----------------------------------------------------------------------------


def _keep(size: int, *gone: int) -> Tensor:
    return torch.tensor([i not in gone for i in range(size)])


def test_cut_takes_the_slices_a_reshape_would() -> None:
    model, anatomy = _toy("llama")
    before = copy.deepcopy(model)
    name = anatomy.blocks[1].name
    cut(model, anatomy, {name: {"kv_group": _keep(3, 1), "ffn": _keep(53, 0, 52)}})
    old, new = before.get_submodule(name), model.get_submodule(name)
    for leaf, heads in (("q_proj", 2), ("k_proj", 1), ("v_proj", 1)):
        w = getattr(old.self_attn, leaf).weight.reshape(3, heads * 24, 96)[[0, 2]].reshape(-1, 96)
        b = getattr(old.self_attn, leaf).bias.reshape(3, heads * 24)[[0, 2]].reshape(-1)
        assert torch.equal(getattr(new.self_attn, leaf).weight, w)
        assert torch.equal(getattr(new.self_attn, leaf).bias, b)
    assert torch.equal(
        new.self_attn.o_proj.weight, old.self_attn.o_proj.weight.reshape(96, 3, 48)[:, [0, 2]].flatten(1)
    )
    assert torch.equal(new.mlp.up_proj.weight, old.mlp.up_proj.weight[1:-1])
    assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, 1:-1])
    assert (new.mlp.up_proj.out_features, new.mlp.down_proj.in_features, new.mlp.intermediate_size) == (51, 51, 51)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.model.layers[0].parameters(), model.model.layers[0].parameters(), strict=True)
    )


def test_masks_write_positive_zeros_and_nothing_else() -> None:
    model, anatomy = _toy("gpt2")
    before = copy.deepcopy(model)
    neurons = anatomy.blocks[0].spaces["ffn"].size
    mask(model, anatomy, {anatomy.blocks[0].name: {"ffn": _keep(neurons, 3, 7)}})
    block, old = model.transformer.h[0].mlp, before.transformer.h[0].mlp
    for now, was, axis in (
        (block.c_fc.weight, old.c_fc.weight, 1),
        (block.c_fc.bias, old.c_fc.bias, 0),
        (block.c_proj.weight, old.c_proj.weight, 0),
    ):
        gone = now.index_select(axis, torch.tensor([3, 7]))
        assert not gone.any() and not gone.signbit().any()
        kept = [i for i in range(neurons) if i not in (3, 7)]
        assert torch.equal(now.index_select(axis, torch.tensor(kept)), was.index_select(axis, torch.tensor(kept)))
    assert torch.equal(block.c_proj.bias, old.c_proj.bias)


def test_keeping_everything_changes_no_bit() -> None:
    model, anatomy = _toy("mixtral")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    keeps = {b.name: {n: torch.ones(s.shape, dtype=torch.bool) for n, s in b.spaces.items()} for b in anatomy.blocks}
    assert mask(model, anatomy, keeps) == []
    cut(model, anatomy, keeps)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "glm4_moe"])
def test_a_silenced_router_never_chooses_the_dropped_and_speaks_again(family: str) -> None:
    model, anatomy = _toy(family)
    text = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = copy.deepcopy(model)
    block = next(b for b in anatomy.blocks if "expert" in b.spaces)
    space = block.spaces["expert"]
    assert space.silence is not None
    handles = mask(model, anatomy, {block.name: {"expert": _keep(7, 0, 2, 5)}})
    chosen: list[Tensor] = []
    experts = model.get_submodule(block.name).mlp.experts
    hook = experts.register_forward_pre_hook(
        lambda _m, args, kw: chosen.extend(a for a in (*args, *kw.values()) if a.dtype == torch.int64), with_kwargs=True
    )
    with torch.no_grad():
        model(text)
    hook.remove()
    assert chosen and not set(torch.cat([c.flatten() for c in chosen]).tolist()) & {0, 2, 5}
    for handle in handles:
        handle.remove()
    router = model.get_submodule(f"{block.name}.{space.silence}")
    assert not router._forward_hooks and not router._forward_pre_hooks
    with torch.no_grad():  # what the mask zeroed stays zero; everything that was silenced is as before
        for port in space.ports:
            owner, leaf = port.tensor.rpartition(".")[::2]
            if "bias" in leaf and "correction" in leaf:
                mine = getattr(model.get_submodule(f"{block.name}.{owner}"), leaf)
                assert torch.equal(mine, getattr(whole.get_submodule(f"{block.name}.{owner}"), leaf))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe", "qwen2_moe", "olmoe", "glm4_moe", "deepseek_v3"])
def test_experts_that_are_listened_to_answer_as_before(family: str) -> None:
    model, _ = _toy(family)
    text = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    experts = [(name, part) for name, part in model.named_modules() if is_experts(part)]
    calls: list[tuple[str, str]] = []
    with torch.no_grad():
        want = model(text).logits
        with ExitStack() as stack:
            for name, part in experts:
                stack.enter_context(listening(part, lambda tensor, *_, name=name: calls.append((name, tensor))))
            got = model(text).logits
    assert experts and {name for name, _ in calls} == {name for name, _ in experts}
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [NemotronHExperts, MuseSparkExperts])
def test_experts_without_a_gate_or_with_a_norm_answer_as_before(kind: Any) -> None:
    """Two shapes that no family of the zoo has."""
    config = SimpleNamespace(
        n_routed_experts=4, num_local_experts=4, hidden_size=6, moe_hidden_size=6, moe_intermediate_size=5
    )
    config.moe_latent_size, config.mlp_hidden_act, config.hidden_act = None, "silu", "silu"
    config.post_norm_eps, config._experts_implementation = 1e-6, "eager"
    part, g = kind(config), torch.Generator().manual_seed(0)
    assert (part.has_gate, part.has_post_expert_norm) in {(False, False), (True, True)}
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
        x, index = torch.randn(9, 6, generator=g), torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(9)])
        gates, heard = torch.rand(9, 2, generator=g), list[str]()
        want = part(x, index, gates)
        with listening(part, lambda tensor, *_: heard.append(tensor)):
            torch.testing.assert_close(part(x, index, gates), want)
    assert len(set(heard)) == 2


def test_layers_are_renumbered_and_the_config_says_so() -> None:
    model, anatomy = _toy("gemma2")
    kinds = list(model.config.layer_types)
    assert len(set(kinds)) == 2
    keep = _keep(4, 0)
    cut_layers(model, anatomy, keep)
    assert model.config.num_hidden_layers == len(model.model.layers) == 3
    assert model.config.layer_types == kinds[1:]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama4_text", {}),  # moe_layers: [0, 1, 2, 3], as long as the stack
        ("qwen3_moe", {"mlp_only_layers": [0, 2]}),
        ("deepseek_v3", {"first_k_dense_replace": 2}),
    ],
)
def test_layers_of_another_kind_keep_it_under_new_numbers(family: str, words: dict[str, Any], tmp_path: Path) -> None:
    config = changed_config(toy_config(AutoConfig.for_model(family, num_hidden_layers=4)), words)
    for gone in range(4):
        model = toy_model(config)
        anatomy, keeps = anatomy_of(describe_skeleton(model)), {"model": {"layer": _keep(4, gone)}}
        change = updated_config(config, anatomy, keeps)
        assert change.uniform, change.reason
        cut(model, anatomy, keeps)
        model.config = changed_config(config, change.fields)
        model.save_pretrained(tmp_path / str(gone))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(gone), attn_implementation="eager")
        _same(model, again)


def test_layers_that_no_config_leaves_out_are_not_proved() -> None:
    result = check(AutoConfig.for_model("gpt2", scale_attn_by_inverse_layer_idx=True))
    assert result.proved == {"weight": True, "kv_group": True, "head": True, "ffn": True, "layer": False}
    assert "attn.scaling" in result.reasons["layer"]


# --- what the config can say -----------------------------------------------------------------------------


def _uniform(anatomy: Anatomy, name: str, count: int) -> dict[str, dict[str, Tensor]]:
    keeps = {}
    for block in (b for b in anatomy.blocks if name in b.spaces):
        space = block.spaces[name]
        rows = torch.zeros(space.copies, space.size, dtype=torch.bool)
        rows[:, -count:] = True
        keeps[block.name] = {name: rows.reshape(space.shape)}
    return keeps


@pytest.mark.parametrize(
    ("family", "space", "count", "fields"),
    [
        ("llama", "ffn", 40, {"intermediate_size": 40}),
        ("llama", "kv_group", 2, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}),
        ("qwen2", "head", 1, {"num_attention_heads": 3, "head_dim": 16}),
        ("gpt2", "ffn", 40, {"n_inner": 40}),
        ("mixtral", "expert", 4, {"num_local_experts": 4}),
        ("mixtral", "ffn", 30, {"intermediate_size": 30}),
    ],
)
def test_uniform_cuts_load_plainly(family: str, space: str, count: int, fields: dict[str, int], tmp_path: Path) -> None:
    model, anatomy = _toy(family)
    keeps = _uniform(anatomy, space, count)
    change = updated_config(model.config, anatomy, keeps)
    assert change.uniform, change.reason
    assert {k: change.fields[k] for k in fields} == fields
    cut(model, anatomy, keeps)
    model.config = changed_config(model.config, change.fields)
    model.save_pretrained(tmp_path)  # Transformers' own words, not ours
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    _same(model, again)


@pytest.mark.parametrize(
    ("family", "space"), [("gpt2", "kv_group"), ("opt", "head"), ("olmoe", "kv_group"), ("glm4_moe", "ffn")]
)
def test_cuts_without_a_word_are_said_to_have_none(family: str, space: str) -> None:
    model, anatomy = _toy(family)
    count = min(b.spaces[space].size for b in anatomy.blocks if space in b.spaces) - 1
    change = updated_config(model.config, anatomy, _uniform(anatomy, space, count))
    assert not change.uniform and change.reason and not change.fields


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3", "gemma2"])
def test_ragged_cuts_come_back_from_disk(family: str, tmp_path: Path) -> None:
    model, anatomy = _toy(family)
    keeps: dict[str, dict[str, Tensor]] = {}
    for block in anatomy.blocks:
        keeps[block.name] = {}
        for name in ("ffn", "kv_group"):
            space = block.spaces[name]
            rows = torch.zeros(space.copies, space.size, dtype=torch.bool)
            rows[:, : space.size - 1 - block.index % 2] = True
            keeps[block.name][name] = rows.reshape(space.shape)
    change = updated_config(model.config, anatomy, keeps)
    assert change.per_layer and not change.uniform
    written(model, tmp_path / "out", keeps)
    _same(model, load(tmp_path / "out"))


@pytest.mark.parametrize(("count", "plainly"), [(40, True), (36, True), (30, False)])
def test_experts_of_odd_width_run_one_by_one(count: int, plainly: bool, tmp_path: Path) -> None:
    # Transformers' grouped kernel refuses rows that are no multiple of 16 bytes
    config = changed_config(ZOO["mixtral"](), {"intermediate_size": 64, "dtype": "float32"})
    model = AutoModelForCausalLM.from_config(config).eval()
    anatomy = anatomy_of(describe_skeleton(model))
    keeps = _uniform(anatomy, "ffn", count)
    change = updated_config(model.config, anatomy, keeps)
    assert change.uniform == plainly and ("multiple of 4" in change.reason) != plainly
    written(model, tmp_path / "out", keeps)
    text = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(text).logits, load(tmp_path / "out")(text).logits)
    assert model.config._experts_implementation != "eager", "only the experts that need it are told"


def test_a_check_on_a_toy_without_every_kind_of_layer_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("jamba")
    assert check(config, ("kv_group",)).proved == {"kv_group": True}
    short = toy_config(changed_config(config, {"num_hidden_layers": 4}))  # attention comes fifth
    monkeypatch.setattr("secateur.engine.check.toy_config", lambda *_, **__: short)
    assert check(config, ("kv_group",)).proved == {"kv_group": False}


@torch.no_grad()
def _same(one: Any, other: Any) -> None:
    other.set_experts_implementation("eager")  # odd sizes: the grouped kernel wants rows of 16 bytes
    text = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    a, b = one.eval()(text).logits, other.eval()(text).logits
    assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


# --- refusals --------------------------------------------------------------------------------------------


def test_elements_are_not_cut() -> None:
    model, anatomy = _toy("llama")
    name = "mlp.up_proj.weight"
    with pytest.raises(SecateurError, match=r"elements cannot be cut.*mask"):
        cut(model, anatomy, {anatomy.blocks[0].name: {"weight": {name: torch.ones(53, 96, dtype=torch.bool)}}})


@pytest.mark.parametrize(
    ("space", "keep", "said"),
    [
        ("expert", _keep(7, 0, 1, 2, 3, 4, 5), "at least 2 of 7.*received: 1"),
        ("ffn", torch.tensor([[True] * 40 + [False] * 13] * 6 + [[True] * 53]), "the same number.*40 to 53"),
        ("ffn", torch.ones(53, dtype=torch.bool), r"shape \[7, 53\].*received"),
        ("kv_group", torch.zeros(3, dtype=torch.bool), "at least 1 of 3"),
        ("nothing", torch.ones(3, dtype=torch.bool), "no space 'nothing'.*it has"),
    ],
)
def test_impossible_choices_are_refused(space: str, keep: Tensor, said: str) -> None:
    model, anatomy = _toy("mixtral")
    with pytest.raises(SecateurError, match=said):
        cut(model, anatomy, {anatomy.blocks[0].name: {space: keep}})


def test_layers_of_an_encoder_are_refused_with_the_reason() -> None:
    model, anatomy = _toy("bert")
    with pytest.raises(SecateurError, match="after the residual sum"):
        cut_layers(model, anatomy, _keep(4, 1))


def test_an_unknown_architecture_is_refused() -> None:
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=61)
    with pytest.raises(SecateurError, match="'mamba' is not declared"):
        anatomy_of(describe_skeleton(skeleton_model(config)))


# --- derived ---------------------------------------------------------------------------------------------


def test_a_plan_suffices_where_no_name_is_usual() -> None:
    tensors = {
        name: TensorInfo(shape, "linear", "Linear")
        for name, shape in {
            "attention.query_in.weight": (12, 8),
            "attention.key_in.weight": (6, 8),
            "attention.value_in.weight": (6, 8),
            "attention.back.weight": (8, 12),
            "feed.left.weight": (20, 8),
            "feed.right.weight": (20, 8),
            "feed.back.weight": (8, 20),
        }.items()
    }
    plan = {f"stack.*.attention.{n}_in": "colwise" for n in ("query", "key", "value")}
    plan |= {"stack.*.attention.back": "rowwise", "stack.*.feed.back": "rowwise"}
    plan |= {"stack.*.feed.left": "colwise", "stack.*.feed.right": "colwise"}
    skeleton = Skeleton(
        "newcomer",
        {"head_dim": 3, "num_hidden_layers": 2, "intermediate_size": 20},
        "model.stack",
        (tensors, tensors),
        ({"attention.head_dim": 3},) * 2,
        ({},) * 2,
        tp_plan=plan,
    )
    anatomy = anatomy_of(skeleton)
    assert anatomy.origin == "derived"
    group, ffn = anatomy.blocks[0].spaces["kv_group"], anatomy.blocks[0].spaces["ffn"]
    assert (group.size, [(p.tensor, p.axis, p.width, p.role) for p in group.ports]) == (
        2,
        [
            ("attention.query_in.weight", 0, 6, "write"),
            ("attention.key_in.weight", 0, 3, "write"),
            ("attention.value_in.weight", 0, 3, "write"),
            ("attention.back.weight", 1, 6, "read"),
        ],
    )
    assert (ffn.size, [(p.tensor, p.axis) for p in ffn.ports]) == (
        20,
        [("feed.left.weight", 0), ("feed.right.weight", 0), ("feed.back.weight", 1)],
    )
    bare = replace(skeleton, tp_plan={})
    with pytest.raises(SecateurError, match="no parallel plan"):
        anatomy_of(bare)


def test_sizes_come_from_the_tensors_of_a_model_already_cut() -> None:
    model, anatomy = _toy("llama")
    cut(model, anatomy, {anatomy.blocks[2].name: {"ffn": _keep(53, 1), "kv_group": _keep(3, 0)}})
    again = anatomy_of(describe_skeleton(model))
    assert [b.spaces["ffn"].size for b in again.blocks] == [53, 53, 52, 53]
    assert [b.spaces["kv_group"].size for b in again.blocks] == [3, 3, 2, 3]
    assert [b.spaces["head"].copies for b in again.blocks] == [3, 3, 2, 3]
