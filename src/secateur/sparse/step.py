"""One token through a whole model of Llama's kind: one call into the library (csrc/decode.cpp), fp32, on the CPU.

A `Step` is the model made ready, a `Text` what was read so far: static caches and the angles of every position. All
sizes are checked when the two are made, because the library trusts them. Ask `ready` first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.sparse.kernels import Handle, library

ACTS = ("silu", "gelu", "gelu_tanh", "relu")
PARTS = 3  # matrices of a product


def ready() -> bool:
    """Whether the library is there and has the step."""
    return _functions() is not None


@dataclass(frozen=True)
class Product:
    """Up to three matrices that read the same input, outputs side by side.

    Attributes:
        handles: the matrices, on the kernels.
        bias: fp32 [rows] of all of them, or None.
    """

    handles: tuple[Handle, ...]
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        """Outputs of all matrices."""
        return sum(handle.packed.shape[0] for handle in self.handles)

    @property
    def columns(self) -> int:
        """Inputs."""
        return self.handles[0].packed.shape[1]


@dataclass(frozen=True)
class Heads:
    """Attention of one layer.

    Attributes:
        queries, groups: query heads; key/value heads, a divisor of it.
        size: entries of a head, even.
        scale: what scores are multiplied by.
        eps: of the heads' norms.
        norms: weights [size] of an RMS norm of every query and key head, or None.
    """

    queries: int
    groups: int
    size: int
    scale: float
    eps: float = 0.0
    norms: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Layer:
    """x + o(attention(rope(q, k), v)), then x + down(act(gate) * up), each after an RMS norm.

    Attributes:
        qkv, o, gate_up, down: products; the first and third hand back what shares an input side by side.
        before_attention, before_ffn: fp32 weights of the norms [hidden].
        eps: of these norms.
        heads: of the attention.
        act: one of `ACTS`; gelu_tanh is GELU's approximation by tanh.
    """

    qkv: Product
    o: Product
    gate_up: Product
    down: Product
    before_attention: Tensor
    before_ffn: Tensor
    eps: float
    heads: Heads
    act: str = "silu"


class Text:
    """What a batch of texts has left behind, and room for more.

    Args:
        caches: keys and values fp32 [batch, groups, room, size] of each layer, contiguous.
        angles: cosines and sines fp32 [room, size] of every position; a head turns as x cos + (-x2, x1) sin.
    """

    def __init__(self, caches: Sequence[tuple[Tensor, Tensor]], angles: tuple[Tensor, Tensor]) -> None:
        self.caches, self.angles = caches, angles
        self.batch, self.room = len(caches[0][0]), len(angles[0])
        flat = [t.data_ptr() for pair in caches for t in pair]
        self._addresses = (ctypes.c_void_p * len(flat))(*flat)


class Step:
    """A model made ready to decode: `step(x, text, at)`.

    Keeps the matrices and the memory of the last batch size alive. Threads are torch's own number.

    Args:
        layers: in order.
        head: logits from the normed residual stream.
        norm: fp32 weight [hidden] of the last norm.
        eps: of this norm.

    Raises:
        SecateurError: sizes do not fit each other.
    """

    def __init__(self, layers: Sequence[Layer], head: Product, norm: Tensor, eps: float) -> None:
        self.layers, self.head, self.norm = tuple(layers), head, norm
        self.hidden = norm.numel()
        for i, layer in enumerate(self.layers):
            _verify(layer, self.hidden, f"layer {i}")
        _fits(head, head.rows, self.hidden, "the head")
        _vector(norm, self.hidden, "the last norm")
        levels = {handle.level for layer in self.layers for p in _products(layer) for handle in p.handles}
        levels |= {handle.level for handle in head.handles}
        if len(levels) != 1:
            raise SecateurError("matrices of one step run at one level", received=levels, works="make them alike")
        self._layers = (_Layer * len(self.layers))(*(_described(layer) for layer in self.layers))
        self._model = _Model(
            layers=ctypes.addressof(self._layers),
            count=len(self.layers),
            hidden=self.hidden,
            head=_product(head),
            norm=norm.data_ptr(),
            eps=eps,
            level=levels.pop(),
        )
        self._library = _functions()
        self._scratch, self._key = torch.empty(0), (0, 0, 0)

    def fit(self, text: Text) -> None:
        """Refuse a text whose caches and angles are not this model's."""
        wanted = [(text.batch, layer.heads.groups, text.room, layer.heads.size) for layer in self.layers]
        found = [tuple(t.shape) for pair in text.caches for t in pair]
        sizes = {layer.heads.size for layer in self.layers}
        angles = all(_plain(a) and a.dim() == 2 and len(a) == text.room for a in text.angles)
        if (
            found != [shape for shape in wanted for _ in range(2)]
            or not all(_plain(t) for pair in text.caches for t in pair)
            or not (angles and {a.shape[1] for a in text.angles} == sizes)
        ):
            raise SecateurError("caches do not fit the model", received=found[:2], works=f"fp32 {wanted[:1]}, ...")

    def __call__(self, x: Tensor, text: Text, at: int) -> Tensor:
        """Add one token to every text.

        Args:
            x: embedded tokens fp32 [batch, hidden], contiguous.
            text: what `fit` has let pass.
            at: their position, below the text's room; caches are read below it and written there.

        Returns:
            logits fp32 [batch, rows of the head].
        """
        assert self._library is not None, "ready() says so"
        assert x.shape == (text.batch, self.hidden) and _plain(x) and 0 <= at < text.room
        threads = torch.get_num_threads()
        key = (text.batch, text.room, threads)
        if key != self._key:
            self._scratch = torch.zeros(
                self._library.secateur_step_bytes(ctypes.byref(self._model), *key) + 64, dtype=torch.uint8
            )
            self._key = key
        logits = torch.empty(text.batch, self.head.rows)
        cosines, sines = text.angles
        token = _Token(
            x=x.data_ptr(),
            cosine=cosines.data_ptr() + 4 * at * cosines.shape[1],
            sine=sines.data_ptr() + 4 * at * sines.shape[1],
            caches=ctypes.addressof(text._addresses),
            logits=logits.data_ptr(),
            batch=text.batch,
            room=text.room,
            at=at,
        )
        base = -(-self._scratch.data_ptr() // 64) * 64
        self._library.secateur_step(ctypes.byref(self._model), ctypes.byref(token), base, threads)
        return logits


class _Product(ctypes.Structure):
    _fields_ = (
        ("parts", ctypes.c_void_p * PARTS),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Product) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("before_attention", "before_ffn", "query_norm", "key_norm")),
        *((name, ctypes.c_int64) for name in ("queries", "groups", "size")),
        *((name, ctypes.c_float) for name in ("eps", "head_eps", "scale")),
        ("act", ctypes.c_int32),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("head", _Product),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("level", ctypes.c_int32),
    )


class _Token(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cosine", "sine", "caches", "logits")),
        *((name, ctypes.c_int64) for name in ("batch", "room", "at")),
    )


def _products(layer: Layer) -> tuple[Product, ...]:
    return layer.qkv, layer.o, layer.gate_up, layer.down


def _product(product: Product) -> _Product:
    parts = (ctypes.c_void_p * PARTS)(*(handle.address for handle in product.handles))
    return _Product(
        parts, len(product.handles), product.rows, None if product.bias is None else product.bias.data_ptr()
    )


def _described(layer: Layer) -> _Layer:
    heads, own = layer.heads, layer.heads.norms
    return _Layer(
        *(_product(product) for product in _products(layer)),
        layer.before_attention.data_ptr(),
        layer.before_ffn.data_ptr(),
        *((own[0].data_ptr(), own[1].data_ptr()) if own else (None, None)),
        heads.queries,
        heads.groups,
        heads.size,
        layer.eps,
        heads.eps,
        heads.scale,
        ACTS.index(layer.act),
    )


def _verify(layer: Layer, hidden: int, where: str) -> None:
    heads = layer.heads
    width, ffn = heads.queries * heads.size, layer.down.columns
    if min(heads.queries, heads.groups, heads.size) < 1 or heads.queries % heads.groups or heads.size % 2:
        received = f"{heads.queries} heads, {heads.groups} groups of {heads.size}, {where}"
        raise SecateurError("heads do not fit", received=received, works="groups divide heads, sizes are even")
    _fits(layer.qkv, width + 2 * heads.groups * heads.size, hidden, f"q, k and v of {where}")
    _fits(layer.o, hidden, width, f"o of {where}")
    _fits(layer.gate_up, 2 * ffn, hidden, f"gate and up of {where}")
    _fits(layer.down, hidden, ffn, f"down of {where}")
    for weight in (layer.before_attention, layer.before_ffn):
        _vector(weight, hidden, f"a norm of {where}")
    for weight in heads.norms or ():
        _vector(weight, heads.size, f"a head's norm of {where}")


def _fits(product: Product, rows: int, columns: int, what: str) -> None:
    inputs = {handle.packed.shape[1] for handle in product.handles}
    if not 1 <= len(product.handles) <= PARTS or product.rows != rows or inputs != {columns}:
        received = f"{what}: [{product.rows}, {inputs}]"
        raise SecateurError("a matrix does not fit the model", received=received, works=f"[{rows}, {columns}]")
    if product.bias is not None:
        _vector(product.bias, rows, f"the bias of {what}")


def _vector(weight: Tensor, n: int, what: str) -> None:
    if weight.shape != (n,) or not _plain(weight):
        received = f"{what}: {tuple(weight.shape)} {weight.dtype}"
        raise SecateurError("a vector does not fit the model", received=received, works=f"fp32 [{n}], contiguous")


def _plain(t: Tensor) -> bool:
    return t.dtype == torch.float32 and t.is_contiguous() and t.device.type == "cpu"


@cache
def _functions() -> ctypes.CDLL | None:
    """The library with the types of the step; None where it was not built, or before this was part of it."""
    found = library()
    if found is None or not hasattr(found, "secateur_step"):
        return None
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    found.secateur_step_bytes.argtypes = (pointer, i64, i64, i32)
    found.secateur_step_bytes.restype = i64
    found.secateur_step.argtypes = (pointer, pointer, pointer, i32)
    found.secateur_step.restype = None
    return found
