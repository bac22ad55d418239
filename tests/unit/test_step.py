"""The decoding step against float64 written out from its definition, layer by layer and head by head."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.sparse.formats import Kind, Packed, pack, unpack
from secateur.sparse.kernels import Handle, levels
from secateur.sparse.step import ACTS, Heads, Layer, Product, Step, Text, ready

pytestmark = pytest.mark.skipif(not ready(), reason="the library was not built here")
HIDDEN, FFN, VOCABULARY = 40, 56, 70
HEADS = Heads(6, 2, 12, 0.3)


@dataclass(frozen=True)
class Shape:
    """What a toy model is made of."""

    heads: Heads = HEADS
    kind: Kind = "bitmask"
    dtype: torch.dtype = torch.float32
    act: str = "silu"
    bias: bool = False
    apart: bool = False  # q, k, v and gate, up as matrices of their own
    level: str | None = None


class Toy:
    """A random model, and the same in float64."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape, self.random = shape, torch.Generator().manual_seed(seed)
        layers = [self.layer(i) for i in range(2)]
        self.layers = layers
        self.head, self.norm = self.product([VOCABULARY], HIDDEN), self.vector(HIDDEN)
        self.step = Step(layers, self.head, self.norm, 1e-4)

    def vector(self, n: int) -> Tensor:
        return torch.randn(n, generator=self.random)

    def product(self, rows: list[int], columns: int) -> Product:
        shape, handles = self.shape, []
        for n in rows if shape.apart else [sum(rows)]:
            weight = torch.randn(n, columns, generator=self.random) / math.sqrt(columns)
            weight[torch.rand(n, columns, generator=self.random) < 0.5] = 0
            tile = (8, 8) if shape.kind == "tile" else None
            handles.append(Handle(pack(weight, shape.dtype, shape.kind, tile), shape.level))
        return Product(tuple(handles), self.vector(sum(rows)) if shape.bias else None)

    def layer(self, i: int) -> Layer:
        heads, ffn = self.shape.heads, FFN + 16 * i  # layers of different width
        if heads.norms is not None:
            heads = replace(heads, norms=(self.vector(heads.size), self.vector(heads.size)))
        q, kv = heads.queries * heads.size, heads.groups * heads.size
        qkv, o = self.product([q, kv, kv], HIDDEN), self.product([HIDDEN], q)
        gate_up, down = self.product([ffn, ffn], HIDDEN), self.product([HIDDEN], ffn)
        return Layer(qkv, o, gate_up, down, self.vector(HIDDEN), self.vector(HIDDEN), 1e-3, heads, self.shape.act)

    def text(self, batch: int, room: int) -> Text:
        heads = self.shape.heads
        size = (batch, heads.groups, room, heads.size)
        caches = [tuple(torch.randn(*size, generator=self.random) for _ in range(2)) for _ in self.layers]
        angles = tuple(torch.randn(room, heads.size, generator=self.random) for _ in range(2))
        text = Text(caches, angles)  # type: ignore[arg-type]  # pairs
        self.step.fit(text)
        return text

    def by_hand(self, x: Tensor, text: Text, at: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits, and the caches with the new token in them."""
        x, caches = x.double(), [(k.double(), v.double()) for k, v in text.caches]
        for layer, cache in zip(self.layers, caches, strict=True):
            qkv = times(layer.qkv, normed(x, layer.before_attention, layer.eps))
            x = x + times(layer.o, attention(layer.heads, qkv, cache, [a[at].double() for a in text.angles], at))
            gate, up = times(layer.gate_up, normed(x, layer.before_ffn, layer.eps)).chunk(2, 1)
            x = x + times(layer.down, acted(layer.act, gate) * up)
        return times(self.head, normed(x, self.norm, 1e-4)), caches


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def acted(act: str, x: Tensor) -> Tensor:
    if act == "silu":
        return x / (1 + (-x).exp())
    if act == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    if act == "gelu_tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x.clamp(min=0)


def times(product: Product, x: Tensor) -> Tensor:
    y = torch.cat([x @ unpack(handle.packed).double().t() for handle in product.handles], 1)
    return y if product.bias is None else y + product.bias.double()


def attention(heads: Heads, qkv: Tensor, cache: tuple[Tensor, Tensor], angles: list[Tensor], at: int) -> Tensor:
    """Head by head; writes position ``at`` of the caches."""
    (cos, sin), half, out = angles, heads.size // 2, []

    def turned(x: Tensor, own: int) -> Tensor:
        if heads.norms is not None:
            x = normed(x, heads.norms[own], heads.eps)
        pairs = zip(x[:half], x[half:], cos[:half], sin[:half], cos[half:], sin[half:], strict=True)
        first, second = zip(*((a * c - b * s, b * c2 + a * s2) for a, b, c, s, c2, s2 in pairs), strict=True)
        return torch.stack([*first, *second])

    for b, row in enumerate(qkv.view(len(qkv), -1, heads.size)):
        for g in range(heads.groups):
            cache[0][b, g, at] = turned(row[heads.queries + g], 1)
            cache[1][b, g, at] = row[heads.queries + heads.groups + g]
        for q in range(heads.queries):
            keys, values = (c[b, q // (heads.queries // heads.groups), : at + 1] for c in cache)
            out.append((keys @ turned(row[q], 0) * heads.scale).softmax(0) @ values)
    return torch.cat(out).view(len(qkv), -1)


def check(toy: Toy, batch: int, room: int, at: int, bound: float = 1e-5) -> None:
    """One token: logits and caches, everything else in the caches untouched."""
    text = toy.text(batch, room)
    x = torch.randn(batch, HIDDEN, generator=toy.random)
    kept = x.clone()
    logits, caches = toy.by_hand(x, text, at)
    found = toy.step(x, text, at)
    assert float((found - logits).abs().max()) <= bound * float(logits.abs().max())
    assert torch.equal(x, kept)
    for pair, wanted in zip(text.caches, caches, strict=True):
        for now, then in zip(pair, wanted, strict=True):
            assert float((now - then).abs().max()) <= bound * float(then.abs().max())
            now[:, :, at] = then[:, :, at].float()
            assert torch.equal(now, then.float())


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> object:
    used = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(used)


KINDS: tuple[Kind, ...] = ("bitmask", "csr", "tile", "columns", "dense")


@pytest.mark.parametrize("threads", [1, 2, 3, 8], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_every_level(kind: Kind, threads: int) -> None:
    for level in levels():
        for apart in (False, True):
            toy = Toy(Shape(kind=kind, level=level, apart=apart, bias=apart))
            for batch in (1, 3):
                check(toy, batch, 9, 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-5), (torch.float16, 1e-5), (torch.int8, 5e-4)])
def test_every_dtype(kind: Kind, dtype: torch.dtype, bound: float) -> None:
    for batch in (1, 2):
        check(Toy(Shape(kind=kind, dtype=dtype)), batch, 4, 3, bound)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("heads", [
    Heads(9, 3, 64, 0.125), Heads(4, 4, 8, 0.5), Heads(6, 1, 24, 0.2), Heads(1, 1, 2, 1.0),
    Heads(4, 2, 16, 0.3, 1e-4, (torch.ones(16), torch.ones(16))),
])  # fmt: skip
def test_heads(heads: Heads, threads: int) -> None:
    toy = Toy(Shape(heads=heads))
    for batch, room, at in ((1, 50, 46), (3, 20, 19), (2, 1, 0), (2, 9, 0)):
        check(toy, batch, room, at)


@pytest.mark.parametrize("act", ACTS)
def test_activations(act: str) -> None:
    check(Toy(Shape(act=act)), 2, 6, 4)


@pytest.mark.parametrize("batch", [4, 5, 8, 9, 16, 17, 40])
def test_batches(batch: int) -> None:
    for kind in KINDS:
        check(Toy(Shape(kind=kind, bias=True)), batch, 3, 2)


def test_a_step_follows_a_step_whatever_came_between() -> None:
    toy = Toy(Shape(kind="dense"))
    for batch, room in ((2, 7), (1, 9), (9, 3), (2, 7)):
        for at in range(room - 2, room):
            check(toy, batch, room, at)


@pytest.mark.parametrize("act", ACTS)
def test_large_activations_saturate(act: str) -> None:
    """gate = up = x for a normed x of +-200: exp overflows on the way, the result must not."""
    eye = Handle(pack(torch.eye(2), torch.float32, "dense"))
    zero = Handle(pack(torch.zeros(2, 2), torch.float32, "dense"))
    none = Product((zero,))
    twice = Product((eye, eye))
    layer = Layer(
        Product((zero, zero, zero)), none, twice, Product((eye,)), torch.ones(2), torch.full((2,), 200.0), 0.0,
        Heads(1, 1, 2, 1.0), act,
    )  # fmt: skip
    step = Step([layer], Product((eye,)), torch.ones(2), 0.0)
    text = Text([(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))], (torch.ones(1, 2), torch.zeros(1, 2)))
    x = torch.tensor([[1.0, -1.0]])
    grown = torch.tensor([1.0 + 200.0 * 200.0, -1.0])  # act(-200) is nothing
    wanted = grown / (grown.square().mean()).sqrt()
    assert torch.allclose(step(x, text, 0)[0], wanted, rtol=1e-5, atol=1e-7)


def test_one_large_score_takes_all() -> None:
    eye, zero = (Handle(pack(m, torch.float32, "dense")) for m in (torch.eye(4), torch.zeros(4, 4)))
    layer = Layer(
        Product((eye, zero, zero)), Product((eye,)), Product((zero, zero)), Product((zero,)), torch.ones(4),
        torch.ones(4), 0.0, Heads(1, 1, 4, 1.0), "silu",
    )  # fmt: skip
    step = Step([layer], Product((eye,)), torch.ones(4), 0.0)
    keys, values = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
    keys[..., 0, :], values[..., 1, :] = 300.0, -5.0
    values[..., 0, :] = torch.tensor([7.0, 1.0, 2.0, 3.0])
    text = Text([(keys, values)], (torch.ones(3, 4), torch.zeros(3, 4)))
    wanted = torch.tensor([8.0, 2.0, 3.0, 4.0])
    assert torch.allclose(step(torch.ones(1, 4), text, 2)[0], wanted / wanted.square().mean().sqrt())


def test_what_does_not_fit_is_refused() -> None:
    toy = Toy(Shape())
    layer, rest = toy.layers[0], (toy.head, toy.norm, 1e-4)
    with pytest.raises(SecateurError, match=r"matrix does not fit.*o of layer 0"):
        Step([replace(layer, o=layer.down)], *rest)
    with pytest.raises(SecateurError, match=r"vector does not fit.*a norm of layer 0.*float64"):
        Step([replace(layer, before_ffn=layer.before_ffn.double())], *rest)
    with pytest.raises(SecateurError, match="heads do not fit"):
        Step([replace(layer, heads=Heads(6, 4, 12, 0.3))], *rest)
    with pytest.raises(SecateurError, match=r"bias of the head"):
        Step([layer], replace(toy.head, bias=torch.zeros(3)), toy.norm, 1e-4)
    text = toy.text(2, 5)
    with pytest.raises(SecateurError, match="caches do not fit"):
        toy.step.fit(Text(text.caches[:1], text.angles))
    with pytest.raises(SecateurError, match="caches do not fit"):
        toy.step.fit(Text(text.caches, (text.angles[0][:4], text.angles[1])))
    if len(levels()) > 1:
        other = Toy(Shape(level="portable"))
        with pytest.raises(SecateurError, match="at one level"):
            Step([layer], other.head, toy.norm, 1e-4)


def test_memory_is_kept_alive() -> None:
    """Nothing but the step holds the matrices."""
    packed = [pack(torch.eye(4), torch.float32, "dense") for _ in range(2)]

    def made(p: Packed) -> Product:
        return Product((Handle(p),))

    zeros = Product(tuple(Handle(pack(torch.zeros(4, 4), torch.float32, "dense")) for _ in range(3)))
    layer = Layer(
        zeros, made(packed[0]), Product(zeros.handles[:2]), made(packed[1]), torch.ones(4), torch.ones(4), 0.0,
        Heads(1, 1, 4, 1.0),
    )  # fmt: skip
    step = Step([layer], made(pack(torch.eye(4), torch.float32, "dense")), torch.ones(4), 0.0)
    del layer, packed, zeros
    torch.randn(10_000)
    text = Text([(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))], (torch.ones(2, 4), torch.zeros(2, 4)))
    assert torch.equal(step(torch.ones(1, 4), text, 0), torch.ones(1, 4))


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_beyond_the_scratch(kind: Kind, batch: int) -> None:
    for dtype in (torch.float32, torch.int8):
        toy = Toy(Shape(kind=kind, dtype=dtype))
        text, x = toy.text(batch, 5), torch.randn(batch, HIDDEN)
        wanted = toy.step(x, text, 4)
        asked = toy.step._scratch.numel() - 64  # 64 to begin at a cache line
        toy.step._scratch = torch.full((asked + 8192,), 0x5A, dtype=torch.uint8)
        base = -toy.step._scratch.data_ptr() % 64
        toy.step._scratch[: base + asked] = 0
        assert torch.equal(toy.step(x, text, 4), wanted)
        assert bool((toy.step._scratch[base + asked :] == 0x5A).all())
        assert bool((toy.step._scratch[:base] == 0).all())
