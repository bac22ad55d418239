"""The promises of a step, over every score and space on Llama, GPT-2 and Mixtral, through the whole path."""

from __future__ import annotations

from dataclasses import replace
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from zoo import ZOO

import secateur
from secateur.anatomy import anatomy_of
from secateur.engine.apply import cut, mask
from secateur.engine.host.build import describe_skeleton
from secateur.engine.host.origin import resolve
from secateur.engine.host.toy import VOCABULARY, toy_model
from secateur.engine.plan import Plan, keeps_of
from secateur.engine.store import Store
from secateur.engine.walk import batches_of
from secateur.errors import SecateurError
from secateur.methods.scores import SCORES
from secateur.stage import Conditions, Nowhere, Stage
from secateur.step import SPACES, Step
from whole_toys import cli, make, tokens, write_model, write_text

FAMILIES = ("llama", "gpt2", "mixtral")
UNITS = ("ffn", "kv_group", "head", "expert", "layer")
ONLY = {  # scores that do not rank everything
    "taylor_block": ("weight",),
    "taylor_vector": UNITS,
    "activation_norm": UNITS,
    "block_influence": ("layer",),
    "router_mass": ("expert",),
    "contribution": ("weight", "ffn", "kv_group", "head"),
}
KEEP = "0.5"


class Kept(Nowhere):
    """A sink that remembers every finished block's tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def write(self, index: int, module: nn.Module, plan: Plan) -> Plan:
        self.tensors |= {f"{index}.{name}": value.clone() for name, value in module.state_dict().items()}
        return plan


def carried_out(store: Store, step: Step, seed: int = 0, **conditions: Any) -> tuple[Plan, dict[str, Tensor]]:
    """A step on a store: its plan, and the blocks as they came out."""
    at = replace(Conditions(lambda: batches_of(tokens(4, 10), 2), seed), **conditions)
    sink = Kept()
    return Stage(store, step, 0, at).run(sink).plan, sink.tensors


def stepped(family: str, seed: int = 0, model: Any = None, **words: Any) -> tuple[Plan, dict[str, Tensor]]:
    store = Store.of_model(make(family) if model is None else model, torch.float32)
    return carried_out(store, Step(**{"keep": KEEP, **words}), seed)


def legal(family: str, space: str, score: str) -> bool:
    return space in ONLY.get(score, SPACES) and (space != "expert" or family == "mixtral")


COMBINATIONS = [(f, s, c) for f in FAMILIES for s in SPACES for c in SCORES]
LEGAL = [c for c in COMBINATIONS if legal(*c)]


def same(a: tuple[Plan, dict[str, Tensor]], b: tuple[Plan, dict[str, Tensor]]) -> bool:
    """Equal booleans at equal sites and equal bits of weights."""
    return (
        a[0].keys() == b[0].keys()
        and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
        and a[1].keys() == b[1].keys()
        and all(bits(a[1][k]).equal(bits(b[1][k])) for k in a[1])
    )


def bits(value: Tensor) -> Tensor:
    """A float tensor as integers: +0.0 and -0.0 differ."""
    return value.contiguous().view(torch.int32 if value.dtype == torch.float32 else torch.int16)


def of(n: int, keep: str) -> int:
    return int((n * Decimal(keep)).to_integral_value(ROUND_HALF_UP))


@pytest.mark.parametrize(("family", "space", "score"), [c for c in COMBINATIONS if not legal(*c)])
def test_illegal_combinations_are_refused(family: str, space: str, score: str) -> None:
    with pytest.raises(SecateurError) as refused:
        stepped(family, space=space, score=score)
    assert refused.value.works and space in str(refused.value)


@pytest.mark.parametrize(("family", "space", "score"), LEGAL)
def test_counts_are_exact_and_the_same_seed_gives_the_same(family: str, space: str, score: str) -> None:
    plan, weights = once = stepped(family, space=space, score=score)
    assert same(once, stepped(family, space=space, score=score))
    assert plan
    for key in plan:
        keep = plan[key]
        if space == "weight":
            conv = family == "gpt2"  # stored [in, out]: a row is a column there
            rows = keep.T if conv else keep
            assert torch.all(rows.sum(-1) == of(rows.shape[-1], KEEP)), key
        else:
            assert torch.all(keep.reshape(-1, keep.shape[-1]).sum(-1) == of(keep.shape[-1], KEEP)), key
    anatomy = anatomy_of(describe_skeleton(make(family)))
    sites = {
        "weight": {f"0/weight/{b.name}.{m.tensor}" for b in anatomy.blocks for m in b.matrices},
        "layer": {"0/layer/model"},
    }
    assert set(plan) == sites.get(space, {f"0/{space}/{b.name}" for b in anatomy.blocks})
    if space == "weight":
        dense = make(family).state_dict()
        for block in anatomy.blocks:
            for m in block.matrices:
                keep, got = plan[f"0/weight/{block.name}.{m.tensor}"], weights[f"{block.index}.{m.tensor}"]
                was = dense[f"{block.name}.{m.tensor}"]
                assert torch.equal(bits(got), bits(torch.where(keep, was, torch.zeros(())))), "zeros are +0.0"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("space", ["weight", "ffn", "layer"])
def test_random_depends_on_the_seed_and_nothing_else_does(family: str, space: str) -> None:
    if space != "layer":  # three layers: seeds coincide
        assert not same(*(stepped(family, seed, space=space, score="random") for seed in (0, 1)))
    assert same(*(stepped(family, seed, space=space, score="magnitude") for seed in (0, 1)))


KEEP_ALL = [
    *((f, dict(space="weight", score="wanda", keep="1.0")) for f in FAMILIES),
    *((f, dict(space="weight", method="sparsegpt", keep="1.0")) for f in FAMILIES),
    *((f, dict(space=s, score="wanda", keep="1.0")) for f in FAMILIES for s in UNITS if legal(f, s, "wanda")),
    ("llama", dict(space="ffn", score="wanda", keep="1.0", apply="mask")),
    ("llama", dict(space="weight", score="magnitude", keep="1.0", budget="pooled")),
]


@pytest.mark.parametrize(("family", "words"), KEEP_ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_everything_does_nothing(family: str, words: dict[str, Any], dtype: torch.dtype) -> None:
    model = make(family, dtype)
    plan, weights = stepped(family, model=model, **words)
    assert all(bool(plan[k].all()) for k in plan)
    path = anatomy_of(describe_skeleton(model)).path
    dense = {k.removeprefix(path + "."): v for k, v in model.state_dict().items() if k.startswith(path + ".")}
    assert weights.keys() == dense.keys()
    assert all(torch.equal(weights[k], dense[k].float()) for k in dense)


@pytest.mark.parametrize("score", [s for s in SCORES if legal("llama", "ffn", s) and s != "random"])
def test_permuting_neurons_permutes_the_plan(score: str) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))

    def turned(model: Any) -> Any:
        for layer in model.model.layers:
            for name in ("gate_proj", "up_proj"):
                w = getattr(layer.mlp, name).weight
                w.data = w.data[order].contiguous()
            layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, order].contiguous()
        return model

    plain, _ = stepped("llama", space="ffn", score=score)
    moved, _ = stepped("llama", model=turned(make("llama")), space="ffn", score=score)
    assert all(torch.equal(moved[k], plain[k][order]) for k in plain)
    if not legal("llama", "weight", score):
        return
    plain, _ = stepped("llama", space="weight", score=score)
    moved, _ = stepped("llama", model=turned(make("llama")), space="weight", score=score)
    for key in plain:
        want = plain[key]
        if "gate" in key or "up_proj" in key:
            want = want[order]
        elif "down" in key:
            want = want[:, order]
        assert torch.equal(moved[key], want), key


def test_permuting_experts_permutes_the_plan() -> None:
    order = torch.tensor([2, 0, 3, 1])
    model = make("mixtral")
    for layer in model.model.layers:
        for p in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            p.data = p.data[order].contiguous()
    for score in ("magnitude", "router_mass", "wanda", "taylor", "activation_norm"):
        plain, _ = stepped("mixtral", space="expert", score=score)
        moved, _ = stepped("mixtral", model=model, space="expert", score=score)
        assert all(torch.equal(moved[k], plain[k][order]) for k in plain), score


GROUND = ["--samples", 4, "--length", 10, "--batch-size", 2, "--no-measure", "--json"]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("promises")
    for family in FAMILIES:
        write_model(place / family, family)
    write_text(place / "text.txt")
    return place


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(3, 11, seed=9)).logits


UNIFORM = {  # cuts that the family's config has words for
    ("llama", "ffn"), ("llama", "kv_group"), ("llama", "head"), ("llama", "layer"),
    ("gpt2", "ffn"), ("gpt2", "layer"),
    ("mixtral", "ffn"), ("mixtral", "kv_group"), ("mixtral", "head"), ("mixtral", "expert"), ("mixtral", "layer"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "space"), [(f, s) for f in FAMILIES for s in UNITS if legal(f, s, "magnitude")])
def test_masked_is_cut_is_reloaded(ground: Path, tmp_path: Path, family: str, space: str) -> None:
    score = "magnitude" if space == "layer" else "wanda"
    words = [ground / family, "--space", space, "--score", score, "--keep", 2 if space == "layer" else KEEP]
    words += ["--text", ground / "text.txt", *GROUND]
    assert cli("prune", *words, "-o", tmp_path / "cut") == 0
    cut = logits(secateur.load(tmp_path / "cut"))
    dense = make(family)
    masked = make(family)
    anatomy = anatomy_of(describe_skeleton(masked))
    mask(masked, anatomy, keeps_of(Plan.open(tmp_path / "cut/plan.safetensors")))
    scale = logits(dense).abs().max()
    error = (cut - logits(masked)).abs().max()
    assert error <= 1e-5 * scale
    assert (cut - logits(dense)).abs().max() > 1000 * error.clamp_min(1e-7)
    small = sum(p.numel() for p in secateur.load(tmp_path / "cut").parameters())
    assert small < sum(p.numel() for p in dense.parameters())
    if (family, space) in UNIFORM:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
        torch.testing.assert_close(logits(plain), cut, rtol=1e-6, atol=1e-6)
    if space == "expert":
        assert cli("prune", *words, "-o", tmp_path / "mask", "--apply", "mask") == 2
        return
    assert cli("prune", *words, "-o", tmp_path / "mask", "--apply", "mask") == 0
    on_disk = AutoModelForCausalLM.from_pretrained(tmp_path / "mask").eval()
    assert (logits(on_disk) - cut).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("family", ["qwen2_moe", "glm4_moe"])  # routers without a correction, and with one in a buffer
def test_experts_are_inspected_and_cut(tmp_path: Path, family: str) -> None:
    dense = toy_model(ZOO[family]())
    dense.save_pretrained(tmp_path / "in")
    anatomy = anatomy_of(describe_skeleton(dense))
    rows = {row["space"]: row for row in secateur.inspect(str(tmp_path / "in"))["spaces"]}
    words = ["--space", "expert", "--score", "magnitude", "--keep", 4, "--no-measure", "-o", tmp_path / "out"]
    assert cli("prune", tmp_path / "in", *words) == 0
    small = secateur.load(tmp_path / "out")
    gone = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in small.parameters())
    assert gone == 3 * sum("expert" in b.spaces for b in anatomy.blocks) * rows["expert"]["parameters_each"]
    mask(dense, anatomy, keeps_of(Plan.open(tmp_path / "out/plan.safetensors")))
    small.set_experts_implementation("eager")  # odd sizes: the grouped kernel wants rows of 16 bytes
    text = tokens(3, 11) % VOCABULARY
    with torch.no_grad():
        cut, masked = small(text).logits, dense(text).logits
    assert (cut - masked).abs().max() <= 1e-5 * masked.abs().max()


def test_layers_that_no_config_leaves_out_are_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "in", "gpt2", scale_attn_by_inverse_layer_idx=True)  # a layer knows its number
    words = ["--space", "layer", "--score", "magnitude", "--keep", 2, "--no-measure", "-o", tmp_path / "out"]
    assert cli("prune", tmp_path / "in", *words, "--protect", "last:1") == 2
    said = capsys.readouterr().err
    assert "cannot be written without these layers" in said and "--apply mask" in said
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("block-*"))
    assert cli("prune", tmp_path / "in", *words, "--protect", "first:2") == 0  # the others keep their numbers
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(plain), logits(secateur.load(tmp_path / "out")))
    assert cli("prune", tmp_path / "in", *words, "--protect", "last:1", "--apply", "mask", "--overwrite") == 0


@pytest.mark.parametrize("space", ["weight", "ffn"])
def test_tied_weights_stay_tied(ground: Path, tmp_path: Path, space: str) -> None:
    out, words = tmp_path / "out", ["--space", space, "--score", "magnitude", "--keep", KEEP, *GROUND]
    assert cli("prune", ground / "llama", "-o", out, *words) == 0
    names = load_file(out / "model.safetensors")
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    for model in (secateur.load(out), AutoModelForCausalLM.from_pretrained(out)):
        assert model.lm_head.weight is model.model.embed_tokens.weight


STREAMED: list[tuple[str, dict[str, Any]]] = [
    *((f, dict(space="weight", score="wanda")) for f in FAMILIES),
    *((f, dict(space="weight", method="sparsegpt")) for f in FAMILIES),
    *((f, dict(space="ffn", score="taylor")) for f in FAMILIES),
    ("llama", dict(space="weight", method="alps:rows=fisher", budget="rate_distortion")),
    ("mixtral", dict(space="weight", score="fisher", budget="rate_distortion")),
    ("mixtral", dict(space="expert", score="router_mass")),
    ("mixtral", dict(space="weight", score="wanda", grain="2:4", keep=None)),
    ("llama", dict(space="weight", score="magnitude", budget="pooled")),
    ("llama", dict(space="layer", score="block_influence", keep=2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "words"), STREAMED)
def test_streamed_is_whole(tmp_path: Path, family: str, words: dict[str, Any], dtype: torch.dtype) -> None:
    """Blocks read one by one from shards give the bytes that a model in memory does."""
    make(family, dtype).save_pretrained(tmp_path / "in", max_shard_size="40KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=dtype)
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    step = Step(**{"keep": KEEP, **words})
    streamed = carried_out(Store.open(resolve(str(tmp_path / "in"))), step)
    whole = carried_out(Store.of_model(model, torch.float32), step)
    assert same(streamed, whole)
    if dtype == torch.bfloat16:  # what was written is what the next block saw
        assert all(torch.equal(v, v.bfloat16().float()) for v in whole[1].values())


@pytest.mark.parametrize("grain", ["matrix", "columns:8", "2:4", "1:4", "tile:4x4"])
@pytest.mark.parametrize("words", [{"score": "wanda"}, {"method": "sparsegpt"}])
def test_grains_count_exactly_on_real_blocks(grain: str, words: dict[str, str]) -> None:
    if "method" in words and grain.startswith("tile"):
        with pytest.raises(SecateurError):
            stepped("llama", space="weight", grain=grain, **words)
        return
    keep = None if ":" in grain and grain[0].isdigit() else "0.3"
    plan, weights = stepped("llama", space="weight", grain=grain, keep=keep, **words)
    for key in plan:
        mask_ = plan[key]
        rows, columns = mask_.shape
        if keep is None:
            n, m = map(int, grain.split(":"))
            assert torch.all(mask_.reshape(rows, columns // m, m).sum(-1) == n)
        elif grain == "matrix":
            assert int(mask_.sum()) == of(rows * columns, keep)
        elif grain.startswith("tile"):
            tiles = mask_.reshape(rows // 4, 4, columns // 4, 4).float().mean((1, 3))
            assert set(tiles.unique().tolist()) <= {0.0, 1.0}
            assert int(tiles.sum()) == of(tiles.numel(), keep)
        else:
            assert int(mask_.sum()) == of(rows * columns, keep)
        index, name = key.split("model.layers.")[1].split(".", 1)
        value = weights[f"{index}.{name}"]
        assert torch.all(bits(value)[~mask_] == 0)
        assert torch.all(value[mask_] != 0)


@pytest.mark.parametrize(
    ("keep", "protect", "stay"),
    [
        (2, None, [0, 2]),
        (3, None, [0, 2, 3]),
        (3, "last:1", [0, 2, 4]),
        (3, "first:2", [0, 1, 2]),
        (4, "first:2,last:1", [0, 1, 2, 4]),
    ],
)
def test_the_layers_of_highest_score_stay_beside_the_protected(keep: int, protect: str | None, stay: list[int]) -> None:
    model = make("llama", num_hidden_layers=5)
    with torch.no_grad():
        for layer, size in zip(model.model.layers, (3, 1, 5, 2, 0.5), strict=True):
            for weight in layer.parameters():
                weight.mul_(size)
    plan, _ = stepped("llama", model=model, space="layer", score="magnitude", keep=keep, protect=protect)
    assert plan["0/layer/model"].nonzero().flatten().tolist() == stay


def test_taylor_of_the_blocks_own_output_through_a_step() -> None:
    """The first block, by the gradient of the norm of what it answers in the host's own forward pass."""
    model, out = make("llama"), list[Tensor]()
    plan, _ = stepped("llama", model=model, space="weight", score="taylor:local=true", grain="row")
    block = model.requires_grad_(True).model.layers[0]
    block.register_forward_hook(lambda m, a, y: out.append(y))
    for ids in batches_of(tokens(4, 10), 2):
        model(input_ids=ids)
        out[-1].norm().backward()
    for m in anatomy_of(describe_skeleton(model)).blocks[0].matrices:
        weight = block.get_parameter(m.tensor)
        products = (weight * weight.grad).abs()
        best = torch.zeros_like(products).scatter(1, products.topk(products.shape[1] // 2).indices, 1)
        assert torch.equal(plan[f"0/weight/model.layers.0.{m.tensor}"], best.bool()), m.tensor


def test_units_of_unequal_cost_are_pooled_by_what_a_parameter_brings() -> None:
    """Experts of which some layers have lost neurons; each has one that stays anyway."""
    model, g = make("mixtral", num_experts_per_tok=1), torch.Generator().manual_seed(0)
    anatomy = anatomy_of(describe_skeleton(model))
    neurons = {b.name: torch.arange(24) < n for b, n in zip(anatomy.blocks, (24, 10, 16), strict=True)}
    cut(model, anatomy, {name: {"ffn": keep.expand(4, 24)} for name, keep in neurons.items()})
    found = []
    for i, layer in enumerate(model.model.layers):
        up, down = layer.mlp.experts.gate_up_proj.detach(), layer.mlp.experts.down_proj.detach()
        for e in range(4):
            size = 0.25 + 1.5 * torch.rand((), generator=g)
            up[e], down[e] = up[e] * size, down[e] * size
            cost = up[e].numel() + down[e].numel() + layer.mlp.gate.weight[e].numel()
            found.append((float(up[e].abs().sum() + down[e].abs().sum()), cost, i, e))
    kept = {}
    for way in ("false", "true"):
        words = {"space": "expert", "score": "magnitude", "budget": f"pooled:cost={way}", "keep": "0.6"}
        plan, _ = stepped("mixtral", model=model, **words)
        kept[way] = {(i, e) for i in range(3) for e in range(4) if plan[f"0/expert/model.layers.{i}"][e]}
        budget, best = Decimal("0.6") * sum(cost for _, cost, *_ in found), set()
        for _, cost, i, e in sorted(found, key=lambda f: -f[0] / (f[1] if way == "true" else 1)):
            budget -= cost
            if budget < 0:
                break
            best.add((i, e))
        assert kept[way] == best
    assert kept["true"] != kept["false"]
