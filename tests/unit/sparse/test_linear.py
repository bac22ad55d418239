"""PackedLinear against torch.nn.Linear on the unpacked weight: shapes, dtypes, copies, gradients, compiled graphs."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from secateur.sparse import pack, unpack
from secateur.sparse.calibrate import TOKENS
from secateur.sparse.formats import DTYPES, PARTS
from secateur.sparse.kernels import Handle, available
from secateur.sparse.linear import PackedLinear, calibrate, fused

KINDS = tuple(PARTS)


def layer(kind: str = "bitmask", dtype: str = "bf16", bias: bool = True) -> tuple[PackedLinear, nn.Linear]:
    """The packed layer and its dense twin."""
    g = torch.Generator().manual_seed(3)
    w = torch.randn(50, 40, generator=g) * (torch.rand(50, 40, generator=g) < 0.5)
    b = torch.randn(50, generator=g) if bias else None
    packed = pack(w, DTYPES[dtype], kind, (8, 4) if kind == "tile" else None)  # type: ignore[arg-type]
    twin = nn.Linear(40, 50, bias)
    with torch.no_grad():
        twin.weight.copy_(unpack(packed))
        if b is not None:
            twin.bias.copy_(b)
    return PackedLinear(packed, b), twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 3, 40), (2, 30, 40), (0, 40)])
def test_it_is_the_linear_layer(kind: str, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        for bias in (True, False):
            packed, twin = layer(kind, dtype, bias)
            x = torch.randn(shape)
            with torch.no_grad():
                y = packed(x)
            torch.testing.assert_close(y, twin(x).detach(), rtol=1e-4, atol=1e-3 if dtype == "int8" else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_activations_comes_back(dtype: torch.dtype) -> None:
    packed, twin = layer()
    x = torch.randn(3, 40, dtype=dtype)
    y = packed(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), twin(x.float()).detach(), rtol=1e-2, atol=1e-2)


def test_casting_the_model_leaves_the_weight_packed_as_it_is() -> None:
    packed, twin = layer()
    model = nn.Sequential(packed).to(torch.float64)
    assert packed.values.dtype == torch.bfloat16 and packed.mask.dtype == torch.int64
    assert packed.bias is not None and packed.bias.dtype == torch.float64
    x = torch.randn(2, 40)
    torch.testing.assert_close(model(x), twin(x).detach(), rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_loaded_states_stand_on_their_own() -> None:
    packed, _ = layer()
    x = torch.randn(2, 40)
    want = packed(x)
    twins = [copy.deepcopy(packed)]
    stream = io.BytesIO()
    torch.save(packed, stream)
    stream.seek(0)
    twins.append(torch.load(stream, weights_only=False))
    with torch.no_grad():
        packed.values.zero_()
    assert (packed(x) == packed.bias).all(), "the parts are what runs"
    for other in twins:
        assert torch.equal(other(x), want)
    packed.load_state_dict(twins[0].state_dict(), assign=True)
    assert torch.equal(packed(x), want)


def test_gradients_reach_the_input() -> None:
    packed, twin = layer()
    x = torch.randn(2, 40, requires_grad=True)
    packed(x).square().sum().backward()
    got, x.grad = x.grad, None
    twin(x).square().sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_weight_can_be_read_like_a_linear_layers() -> None:
    packed, twin = layer()
    assert torch.equal(packed.weight.float(), twin.weight)
    assert "kind=bitmask" in repr(packed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_graph_holds_the_product_as_one_operator(kind: str) -> None:
    """fullgraph: no break; aot_eager: traced with the meta implementation, whose shapes must be the real ones."""
    torch.compiler.reset()
    packed, twin = layer(kind)
    compiled = torch.compile(nn.Sequential(packed, nn.ReLU()), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for tokens in (1, 5):
            x = torch.randn(2, tokens, 40)
            torch.testing.assert_close(compiled(x), twin(x).detach().relu(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, inside inductor
def test_inductor_compiles_it() -> None:
    packed, twin = layer()
    compiled = torch.compile(nn.Sequential(packed, nn.ReLU()), fullgraph=True)
    with torch.no_grad():
        x = torch.randn(3, 40)
        torch.testing.assert_close(compiled(x), twin(x).detach().relu(), rtol=1e-4, atol=1e-5)


def test_the_dense_twin_runs_the_same_module() -> None:
    w = torch.randn(20, 30)
    module = PackedLinear(pack(w, torch.float32, "dense"))
    x = torch.randn(4, 30)
    torch.testing.assert_close(module(x), x @ w.t(), rtol=1e-5, atol=1e-5)


def test_fused_layers_answer_side_by_side() -> None:
    parts = [layer(bias=False)[0] for _ in range(3)]
    x = torch.randn(2, 40)
    torch.testing.assert_close(PackedLinear(fused([p.packed for p in parts]))(x), torch.cat([p(x) for p in parts], 1))


@pytest.mark.skipif(available() is None, reason="nothing to choose between")
def test_calibration_sets_one_limit_per_shape() -> None:
    modules: list[nn.Module] = [layer()[0], layer()[0], layer("dense")[0], nn.Linear(3, 3)]
    calibrate(modules)
    limits: list[Tensor | int] = [m.limit for m in modules[:3]]  # type: ignore[misc]
    assert limits[0] == limits[1] and all(n in (1, *TOKENS) for n in limits)
    assert modules[0].handle().limit == limits[0]  # type: ignore[operator, union-attr]


@pytest.mark.skipif(available() is None, reason="nothing to choose between")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibration_times_the_activations_that_the_model_has(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    direct = Handle.direct

    def spy(self: Handle, x: Tensor, *more: object) -> tuple[Tensor, int]:
        seen.add(x.dtype)
        return direct(self, x, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Handle, "direct", spy)
    calibrate(nn.Sequential(nn.Embedding(3, 40, dtype=dtype), layer()[0]).modules())
    assert seen == {dtype}
