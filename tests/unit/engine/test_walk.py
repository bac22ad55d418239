"""Walk against hooks on the whole model: every statistic recomputed from what the host's own forward does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.anatomy import anatomy_of
from secateur.anatomy.types import Anatomy
from secateur.engine.distribute import World
from secateur.engine.ear import site_name
from secateur.engine.host.build import describe_skeleton
from secateur.engine.probes import (
    BlockOutput,
    Contribution,
    Cosine,
    Evidence,
    Gram,
    InputMoments,
    InputNorm,
    LocalGradient,
    PositionSquares,
    RouterMass,
)
from secateur.engine.walk import Visit, WalkSettings, batches_of, walk
from whole_toys import make, tokens

INPUT = (InputNorm, InputMoments, Gram, Contribution, PositionSquares)
FAMILIES = ("llama", "gpt2", "gemma2", "falcon", "bert", "mixtral")
SPARSE = ("mixtral",)


class InMemory:
    """A source whose model is all there already."""

    def load_block(self, model: nn.Module, index: int, device: torch.device) -> None:
        return None

    def release_block(self, model: nn.Module, index: int) -> None:
        return None


def anatomy(model: nn.Module) -> Anatomy:
    return anatomy_of(describe_skeleton(model))


def gather(model: nn.Module, batches: list[Tensor], change: Callable[[Visit], None] | None = None, **how: Any) -> Any:
    """Evidence of all sites and of all blocks."""
    evidence: dict[str, Evidence] = {}
    blocks: list[Evidence] = []
    for visit in walk(model, anatomy(model), InMemory(), batches, WalkSettings(**how)):
        evidence |= visit.evidence
        blocks.append(visit.block_evidence)
        if change is not None:
            change(visit)
    return evidence, blocks


@contextmanager
def hooked(model: nn.Module) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, list[tuple[Tensor, Tensor]]]]]:
    """Inputs by module name, and (before, after) by block name, of every forward while the context is open."""
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    hidden: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    handles = []
    found = anatomy(model)
    for block in found.blocks:
        module = model.get_submodule(block.name)

        def seen(m: nn.Module, args: Any, kwargs: Any, out: Any, name: str = block.name) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            hidden[name].append((before, out[0] if isinstance(out, tuple) else out))

        handles.append(module.register_forward_hook(seen, with_kwargs=True))
        for part in {m.module for m in block.matrices if not m.experts}:
            name = f"{block.name}.{part}"
            handles.append(
                module.get_submodule(part).register_forward_pre_hook(lambda m, a, name=name: inputs[name].append(a[0]))
            )
    yield inputs, hidden
    for handle in handles:
        handle.remove()


def moe_inputs(model: Any, x: Tensor) -> tuple[dict[tuple[str, int], tuple[Tensor, Tensor]], Tensor]:
    """What each expert's matrices read, and the router's weights, from the definition of a Mixtral layer.

    Args:
        x: [tokens, hidden], the MoE part's input.
    """
    gate, experts = model.gate, model.experts
    routing = torch.softmax((x @ gate.weight.T).float(), -1)
    best = routing.topk(2, -1)
    mass = torch.zeros_like(routing).scatter(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    out = {}
    for e in range(4):
        at = mass[:, e] > 0
        read, g = x[at], mass[at, e]
        a, b = (read @ experts.gate_up_proj[e].T).chunk(2, -1)
        out["mlp.experts.gate_up_proj", e] = (read, g)
        out["mlp.experts.down_proj", e] = (torch.nn.functional.silu(a) * b, g)
    return out, mass


def check(evidence: Evidence, xs: list[Tensor], weight: Tensor, gates: list[Tensor] | None = None) -> None:
    """One site's statistics against plain sums over all tokens. ``xs``: per batch [batch, length, in] (experts:
    [tokens, in] with ``gates`` [tokens])."""
    flat = torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).double()
    loud = flat if gates is None else flat * torch.cat(gates).double().unsqueeze(1)
    near = dict(rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(evidence[InputNorm].norm.double(), loud.square().sum(0).sqrt(), **near)
    torch.testing.assert_close(evidence[InputMoments].mean.double(), flat.mean(0), rtol=1e-4, atol=1e-5)
    variance = flat.var(0, correction=0)
    torch.testing.assert_close(evidence[InputMoments].variance.double(), variance, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(evidence[Gram].gram.double(), flat.T @ flat, rtol=1e-4, atol=1e-4)
    a = flat.abs().unsqueeze(1) * weight.double().abs()  # [tokens, out, in]
    share = (a / a.sum(-1, keepdim=True).clamp_min(1e-300)).mean(0)
    torch.testing.assert_close(evidence[Contribution].share.double(), share, **near)
    if gates is None:
        squares = sum(x.double().square().sum(0) for x in xs)
        torch.testing.assert_close(evidence[PositionSquares].square.double(), squares, **near)


@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_is_what_the_hosts_forward_does(family: str) -> None:
    model, batches = make(family), batches_of(tokens(), 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with hooked(model) as (inputs, hidden), torch.no_grad():
        for ids in batches:
            model(input_ids=ids)
    needs = (*INPUT, Cosine, BlockOutput, *((RouterMass,) if family in SPARSE else ()))
    evidence, blocks = gather(model, batches, needs=needs)

    count = 0
    for block, of_block in zip(anatomy(model).blocks, blocks, strict=True):
        module = model.get_submodule(block.name)
        for m in block.matrices:
            weight = module.get_parameter(m.tensor).detach()
            if not m.experts:
                check(evidence[site_name(block, m.tensor)], inputs[f"{block.name}.{m.module}"], m.view(weight))
                count += 1
        if family in SPARSE:
            count += _check_experts(module, block.name, evidence, of_block, hidden)
        pairs = [(x.reshape(-1, 32), y.reshape(-1, 32)) for x, y in hidden[block.name]]
        x, y = (torch.cat(side).double() for side in zip(*pairs, strict=True))
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        assert of_block[Cosine].cosine == pytest.approx(float(cosine.mean()), rel=1e-5, abs=1e-6)
        assert of_block[BlockOutput].mean_norm == pytest.approx(float((y - x).norm(dim=-1).mean()), rel=1e-5)
    assert count == len(evidence) > 0

    # nothing is left behind
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and "forward" not in vars(module), name


def _check_experts(
    module: Any, name: str, evidence: dict[str, Evidence], of_block: Evidence, hidden: dict[str, Any]
) -> int:
    """Expert by expert; the MoE part's input is what the block does up to it."""
    reads: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    routed = []
    caught: list[Tensor] = []
    handle = module.mlp.register_forward_pre_hook(lambda m, a: caught.append(a[0]))
    for before, _ in hidden[name]:
        length = before.shape[1]
        from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

        rotary = MixtralRotaryEmbedding(module.self_attn.config)
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        with torch.no_grad():
            module(before, attention_mask=mask, position_embeddings=rotary(before, torch.arange(length)[None]))
            found, mass = moe_inputs(module.mlp, caught[-1].reshape(-1, 32))
        routed.append(mass)
        for key, value in found.items():
            reads[key].append(value)
    handle.remove()
    for (tensor, e), pairs in reads.items():
        weight = module.get_parameter(tensor)[e].detach()
        xs, gates = zip(*pairs, strict=True)
        check(evidence[f"{name}.{tensor}[{e}]"], list(xs), weight, list(gates))
    total = torch.cat(routed)
    torch.testing.assert_close(of_block[RouterMass].mass, total.sum(0), rtol=1e-5, atol=1e-5)
    return len(reads)


@pytest.mark.parametrize(("width", "tile"), [(13, 5), (400, None)])
def test_inputs_wider_than_a_tile_are_multiplied_out_too(
    monkeypatch: pytest.MonkeyPatch, width: int, tile: int | None
) -> None:
    if tile is not None:
        monkeypatch.setattr(Gram, "tile", tile)
    assert Gram.tile < width
    x, probe = torch.randn(9, width, generator=torch.Generator().manual_seed(0)), Gram()
    for part in x.split(5):
        probe.update(part)
    torch.testing.assert_close(probe.gram.double(), x.double().T @ x.double(), rtol=1e-4, atol=1e-4)


def test_matrices_that_read_the_same_share_one_statistic() -> None:
    evidence, _ = gather(make("llama"), [tokens()], needs=(Gram, PositionSquares, Contribution))
    block = "model.layers.1"
    for probe in (Gram, PositionSquares):
        q, k, v, o = (evidence[f"{block}.self_attn.{x}_proj.weight"][probe] for x in "qkvo")
        assert q is k is v and o is not q
        gate, up, down = (evidence[f"{block}.mlp.{x}_proj.weight"][probe] for x in ("gate", "up", "down"))
        assert gate is up and down is not up and gate is not q
    own = [evidence[f"{block}.self_attn.{x}_proj.weight"][Contribution] for x in "qkv"]
    assert len({id(p) for p in own}) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_stopping_early_changes_nothing(family: str) -> None:
    """A walk that asks for the block's output too must run the whole block, and hears the same."""
    batches = batches_of(tokens(), 2)
    early, _ = gather(make(family), batches, needs=(InputNorm,))
    full, _ = gather(make(family), batches, needs=(InputNorm, Cosine))
    assert early.keys() == full.keys()
    assert all(torch.equal(early[k][InputNorm].sums["square"], full[k][InputNorm].sums["square"]) for k in early)


def test_early_stop_runs_no_down_projection() -> None:
    model = make("llama")
    ran = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *a: ran.append(1))
    gather(model, [tokens()], needs=(InputNorm,))
    # batch 1 of a block finds out what comes last; and every block but the last runs once more to feed the next
    assert len(ran) <= 3 + 2
    ran.clear()
    gather(model, batches_of(tokens(5), 1), needs=(InputNorm,))
    assert len(ran) <= 3 + 2 * 5


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "mixtral"])
def test_a_changed_block_feeds_the_next_one(family: str) -> None:
    """Sequential: evidence of block i is that of a model whose blocks before i are changed; dense: of no change."""
    batches = batches_of(tokens(4), 2)

    def halve(visit: Visit) -> None:
        for p in visit.module.parameters():
            p.data.mul_(0.5)

    dense, _ = gather(make(family), batches, needs=(InputNorm,))
    sequential, _ = gather(make(family), batches, halve, needs=(InputNorm,))
    ignoring, _ = gather(make(family), batches, halve, needs=(InputNorm,), dense=True)
    want, names = make(family), [b.name for b in anatomy(make(family)).blocks]
    for name in names:
        here, _ = gather(want, batches, needs=(InputNorm,))
        for key in (k for k in here if k.startswith(name + ".")):
            norm = sequential[key][InputNorm].norm
            torch.testing.assert_close(norm, here[key][InputNorm].norm, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ignoring[key][InputNorm].norm, dense[key][InputNorm].norm)
            if name == names[-1]:
                assert not torch.allclose(norm, dense[key][InputNorm].norm, rtol=1e-3)
        for p in want.get_submodule(name).parameters():
            p.data.mul_(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spilled_activations_are_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    batches = batches_of(tokens(), 2)
    memory, _ = gather(make("llama"), batches, needs=(Gram,), dtype=dtype)
    disk, _ = gather(make("llama"), batches, needs=(Gram,), dtype=dtype, spill=tmp_path / "s")
    assert all(torch.equal(memory[k][Gram].gram, disk[k][Gram].gram) for k in memory)
    assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_statistics_of_bf16_passes_are_summed_in_full(family: str) -> None:
    """A product of statistics made in bf16 would be wrong by some 1e-3; the inputs themselves may be bf16."""
    model, batches = make(family), batches_of(tokens(), 2)
    with hooked(model) as (inputs, _):
        evidence, _ = gather(model, batches, needs=(Gram,), dense=True, dtype=torch.bfloat16)
    for block in anatomy(model).blocks:
        for m in block.matrices:
            if not m.experts:
                x = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[f"{block.name}.{m.module}"]]).double()
                found = evidence[site_name(block, m.tensor)][Gram].gram.double()
                torch.testing.assert_close(found, x.T @ x, rtol=1e-5, atol=1e-5 * float((x.T @ x).diagonal().mean()))
    grams = [probes[Gram].gram for name, probes in evidence.items() if "experts" in name]
    assert (len(grams) > 0) == (family == "mixtral")
    for gram in grams:  # of rank at most the number of tokens, and never negative: rounding to bf16 breaks that
        values = torch.linalg.eigvalsh(gram.double())
        assert float(values[0]) > -1e-6 * float(values[-1])


def test_bf16_passes_leave_fp32_weights_alone() -> None:
    model, batches = make("llama"), [tokens()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inside = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, y: inside.append((m.weight.dtype, y.dtype)))
    model.model.layers[1].register_forward_pre_hook(lambda m, a: inside.append(a[0].dtype))  # the residual stream

    def still_wide(visit: Visit) -> None:
        assert {p.dtype for p in visit.module.parameters()} == {torch.float32}

    low, _ = gather(model, batches, still_wide, needs=(InputNorm,), dtype=torch.bfloat16)
    assert set(inside) == {(torch.float32, torch.bfloat16), torch.float32}
    assert all(v.dtype == torch.float32 and torch.equal(v, before[k]) for k, v in model.state_dict().items())
    high, _ = gather(model, batches, needs=(InputNorm,))
    for key in high:
        assert low[key][InputNorm].sums["square"].dtype == torch.float64
        torch.testing.assert_close(low[key][InputNorm].norm, high[key][InputNorm].norm, rtol=0.1, atol=0.05)


def test_a_walk_left_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    model = make("mixtral")
    steps = walk(model, anatomy(model), InMemory(), [tokens()], WalkSettings(needs=(InputNorm,), spill=tmp_path))
    next(steps)
    assert list(tmp_path.iterdir())
    steps.close()
    assert not list(tmp_path.iterdir())
    assert all("forward" not in vars(m) and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt2", "mixtral"])
def test_local_gradient_is_that_of_the_norm_of_the_blocks_output(family: str) -> None:
    model, batches = make(family), batches_of(tokens(4), 2)
    evidence, _ = gather(model, batches, needs=(LocalGradient,))
    assert not any(
        p.requires_grad for layer in anatomy(model).blocks for p in model.get_submodule(layer.name).parameters()
    )
    model = make(family)
    block = anatomy(model).blocks[1]
    module = model.get_submodule(block.name)
    model.requires_grad_(False)
    module.requires_grad_(True)
    out: list[Tensor] = []
    module.register_forward_hook(lambda m, a, y: out.append(y[0] if isinstance(y, tuple) else y))
    for ids in batches:
        model(input_ids=ids)
        out[-1].norm().backward()
    total: dict[str, Tensor] = {}
    for m in block.matrices:
        total[m.tensor] = module.get_parameter(m.tensor).grad / len(batches)
    for m in block.matrices:
        for e in range(m.experts) if m.experts else [None]:
            got = evidence[site_name(block, m.tensor, e)][LocalGradient].gradient
            torch.testing.assert_close(got, m.view(total[m.tensor], e or 0), rtol=1e-3, atol=1e-5)


def test_statistics_split_over_processes_add_up() -> None:
    """Each process's share of the batches, added by hand, is what one process sees."""
    batches = batches_of(tokens(7), 2)
    one, _ = gather(make("llama"), batches, needs=(InputNorm,))

    class Alone(World):
        def add_up(self, probes: Any) -> None:
            return None

    parts = [gather(make("llama"), batches, needs=(InputNorm,), world=Alone(r, 2))[0] for r in (0, 1)]
    first = [k for k in one if ".layers.0." in k]  # deeper blocks too: a dense model feeds them alike
    assert first
    for key in one:
        a, b = (p[key] for p in parts)
        square = a[InputNorm].sums["square"] + b[InputNorm].sums["square"]
        torch.testing.assert_close(square, one[key][InputNorm].sums["square"], rtol=1e-6, atol=0)
        assert not torch.equal(a[InputNorm].sums["square"], one[key][InputNorm].sums["square"])
