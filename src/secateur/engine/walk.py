"""Walk: block after block through a model that may be larger than memory.

    for visit in walk(model, anatomy, source, batches, plan_of_the_walk):
        ...                     # evidence for this block is complete here; change its weights
                                # and the next block is fed by this one

Per block: weights in; calibration batches through it with probes attached; yield; and on resumption the pruned
block runs again to make the next inputs and is let go. The first pass stops inside the block as soon as the
last statistic asked for is there: what nobody reads is not computed (`Ear`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Anatomy, Block
from secateur.engine.distribute import World
from secateur.engine.ear import Ear, Enough
from secateur.engine.heap import give_back
from secateur.engine.host.capture import Call, capture, hidden_of, move_call, run_block
from secateur.engine.host.convert import kept_wide
from secateur.engine.probes import Evidence, LocalGradient, Probe
from secateur.errors import SecateurError


class Source(Protocol):
    """Where blocks come from and go: shards on disk, or nothing to do for a model in memory."""

    def load_block(self, model: nn.Module, index: int, device: torch.device) -> None: ...

    def release_block(self, model: nn.Module, index: int) -> None: ...


@dataclass(frozen=True)
class WalkSettings:
    """How to walk.

    Attributes:
        needs: probe classes to gather; without any, and without ``inputs``, no text is read at all.
        dense: every block sees the dense model's activations, whatever becomes of the blocks; one pass each.
        beside: carry the dense model's activations beside those of the changed blocks, for ``paired`` statistics and
            for `Stream.dense`: one more pass each.
        aim: the share of the way from the inputs to the dense stream's at which ``paired`` statistics aim.
        inputs: keep a block's inputs while it is visited (`Visit.stream`).
        device: where the block being worked on lives.
        dtype: precision of the matrix products of the forward passes; weights, norms and the residual stream stay
            fp32 (with all of it in bf16, SparseGPT at 50 % lost 1.4 % perplexity on a 135M model).
        spill: directory for activations that do not fit; None keeps them in memory.
        world: this process among those that share the text.
        captured: called once the text is inside: embedding and head are not needed any more.
        skip: blocks whose evidence nobody needs (they were finished by an earlier run).
        tick: called with the number of batches done, for progress.
    """

    needs: tuple[type[Probe], ...] = ()
    dense: bool = False
    beside: bool = False
    aim: float = 1.0
    inputs: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    spill: Path | None = None
    world: World = field(default_factory=World)
    captured: Callable[[], None] = lambda: None
    skip: Callable[[int], bool] = lambda index: False
    tick: Callable[[int], None] = lambda n: None


class Stream(Protocol):
    """What flows into one block, batch by batch (this process's batches)."""

    spill: Path | None  # where what is made of it may be spilled

    def __len__(self) -> int: ...

    def inputs(self, batch: int) -> Tensor:
        """Hidden states [batch, length, hidden] in front of the block, on the walk's device."""
        ...

    def dense(self, batch: int) -> Tensor:
        """The dense model's in the same place; the same tensor where only one stream is walked."""
        ...

    def answer(self, batch: int) -> Tensor:
        """What the dense block made of `dense`, where a dense stream is walked."""
        ...

    def call(self, batch: int) -> Call:
        """How the host calls the block: this batch's masks and positions."""
        ...

    def run(self, module: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        """What a module (the block, or a part of it) makes of hidden states, at the walk's precision."""
        ...


@dataclass
class Visit:
    """One block, open for change.

    Attributes:
        block, module: its anatomy and its weights (fp32, on the walk's device).
        evidence: per matrix-site name (``model.layers.0.mlp.up_proj.weight``, ``[e]`` appended for an expert).
        block_evidence: of the whole block.
        stream: what flows into the block, where the walk keeps it.
    """

    block: Block
    module: nn.Module
    evidence: dict[str, Evidence]
    block_evidence: Evidence
    stream: Stream | None = None


def batches_of(windows: Tensor, size: int) -> list[Tensor]:
    """Calibration windows [n, length] as batches of at most ``size``."""
    return [windows[i : i + size] for i in range(0, len(windows), size)]


class Activations:
    """Hidden states per batch, in memory or spilled to files (raw bytes, written and read whole)."""

    def __init__(self, spill: Path | None) -> None:
        self.spill = spill
        self.kept: list[Tensor | tuple[torch.Size, torch.dtype]] = []

    def append(self, x: Tensor) -> None:
        self.kept.append(x)
        self[len(self.kept) - 1] = x

    def __setitem__(self, i: int, x: Tensor) -> None:
        if self.spill is None:
            self.kept[i] = x.detach().cpu()
            return
        self.spill.mkdir(parents=True, exist_ok=True)
        flat = x.detach().cpu().contiguous()
        self.kept[i] = (flat.shape, flat.dtype)
        try:
            self._file(i).write_bytes(flat.view(torch.uint8).numpy().tobytes())
        except OSError as e:
            raise SecateurError(
                f"activations could not be spilled: {e.strerror}",
                received=str(self.spill),
                works="free some space beside the output, or give less text (--samples, --length)",
            ) from e

    def put(self, i: int, x: Tensor) -> None:
        """Set the i-th, or append it where it is the next."""
        if i == len(self.kept):
            self.append(x)
        else:
            self[i] = x

    def __getitem__(self, i: int) -> Tensor:
        kept = self.kept[i]
        if torch.is_tensor(kept):
            return kept
        shape, dtype = kept
        return torch.frombuffer(bytearray(self._file(i).read_bytes()), dtype=dtype).reshape(shape)

    def __len__(self) -> int:
        return len(self.kept)

    def _file(self, i: int) -> Path:
        assert self.spill is not None
        return self.spill / f"activations-{i:05d}.bin"

    def clear(self) -> None:
        for i in range(len(self.kept)):
            if self.spill is not None:
                self._file(i).unlink(missing_ok=True)
        self.kept.clear()


def walk(
    model: nn.Module, anatomy: Anatomy, source: Source, batches: Sequence[Tensor], how: WalkSettings
) -> Iterator[Visit]:
    """Visit every block in order.

    Args:
        model: embedding, norms and buffers real; blocks loaded by ``source`` one at a time.
        anatomy: of this model.
        batches: all processes' token ids [batch, length]; empty when ``how.needs`` is.
        how: see `WalkSettings`.

    Yields:
        A `Visit` per block. Whatever the consumer does to ``visit.module`` feeds the next block. The consumer
        may set ``visit.module``'s block to already finished weights (a resumed run): evidence is then unused.
    """
    feed = _Feed(model, anatomy, batches, how) if how.needs or how.inputs else None
    how.captured()
    blocks = model.get_submodule(anatomy.path)
    assert isinstance(blocks, nn.ModuleList)
    try:
        for i, block in enumerate(anatomy.blocks):
            source.load_block(model, i, how.device)
            module = blocks[i]
            visit = Visit(block, module, {}, Evidence(block.name))
            last = i + 1 == len(anatomy.blocks)
            if feed is not None:
                feed.gather(visit, last, how.skip(i))
                give_back()  # deciding needs room of its own
            yield visit
            if feed is not None and not last:
                feed.advance(module, i)
            source.release_block(model, i)
            give_back()
    finally:
        if feed is not None:
            feed.clear()


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products in ``dtype`` while the context is open, everything else in fp32 (torch's autocast)."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype, cache_enabled=False)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bf16, which then take about half of the time of fp32's."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return any(able.get(word) for word in ("avx512_bf16", "amx_bf16", "bf16"))


@contextmanager
def running_as(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """A model in ``dtype`` for a while, as `convert.cast` would have it; the originals come back."""
    kept: list[tuple[Tensor, Tensor]] = []
    wide = kept_wide(module, dtype)
    for name, t in module.state_dict(keep_vars=True).items():  # without tables, which are not rounded
        if t.is_floating_point() and t.dtype != dtype and t.device.type != "meta" and not wide(name):
            kept.append((t, t.data))
            t.data = t.data.to(dtype)
    try:
        yield
    finally:
        for t, data in kept:
            t.data = data


class _Feed:
    """Calibration batches on their way through the blocks.

    Of every batch it holds the hidden states that the next block is fitted on, with ``how.beside`` the dense model's
    as well, and with ``how.inputs`` the dense stream's next ones apart until the present ones were looked at.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, batches: Sequence[Tensor], how: WalkSettings) -> None:
        self.how = how
        captured = capture(model, anatomy.path, how.world.mine(batches))
        self.calls = captured.calls
        self.hidden = Activations(how.spill)
        self.beside = Activations(how.spill and how.spill / "dense") if how.beside else self.hidden
        self.coming = Activations(how.spill and how.spill / "coming") if how.inputs else self.beside
        for x in captured.inputs:
            self.hidden.append(x)
            if how.beside:
                self.beside.append(x)
        captured.inputs.clear()
        self._moved: tuple[Call, Call] | None = None

    def call(self, batch: int, block: int) -> Call:
        """This block's call on the device; the last one moved is kept, as most are equal."""
        call = self.calls[batch][block]
        if self._moved is None or self._moved[0] is not call:
            self._moved = (call, move_call(call, self.how.device))
        return self._moved[1]

    def gather(self, visit: Visit, last: bool, skip: bool) -> None:
        """First pass: fill the visit's evidence, and take the dense stream (if one is walked) through the block.

        Args:
            last: the block's outputs are nobody's inputs.
            skip: nobody needs the evidence. A dense walk listens all the same: what goes on into the next block must
                be computed as it was in the run that finished this one.
        """
        local = any(issubclass(p, LocalGradient) for p in self.how.needs)
        looked_at = self.how.inputs and not skip  # what the dense block answers, by `Stream.answer`
        keep_output = self.how.dense and (not last or looked_at)
        dense_goes_on = self.how.beside and (not last or looked_at)
        ear = Ear(visit.block, visit.module, self.how.needs, self.how.aim)
        visit.evidence, visit.block_evidence = ear.evidence, ear.block_evidence
        if self.how.inputs:
            visit.stream = _BlockStream(self, visit.block.index)
        listens = bool(self.how.needs) and (not skip or keep_output)
        early = not (keep_output or ear.block_probes or local)
        index = visit.block.index
        for b in range(len(self.hidden)) if listens or keep_output or dense_goes_on else ():
            with products_in(self.how.dtype, self.how.device):
                if dense_goes_on or (self.how.beside and ear.paired):
                    with torch.no_grad(), ear.overhearing():
                        d = self.beside[b].to(self.how.device)
                        self.coming.put(b, hidden_of(run_block(visit.module, d, self.call(b, index))))
                if listens or keep_output:
                    with ear.listening():
                        self._hear(visit, ear, b, early=early, keep=keep_output)
            self.how.tick(1)
        visit.module.requires_grad_(False)
        if listens:
            self.how.world.add_up(ear.probes())

    def _hear(self, visit: Visit, ear: Ear, b: int, early: bool, keep: bool) -> None:
        """One batch through the block, its probes listening."""
        x = self.hidden[b].to(self.how.device)
        local = bool(ear.local)
        visit.module.requires_grad_(local)
        ear.begin(x, stop=early)
        try:
            with torch.set_grad_enabled(local):
                y = hidden_of(run_block(visit.module, x, self.call(b, visit.block.index)))
        except Enough:
            return
        if local:
            ear.gradients(y)
        for probe in ear.block_probes.values():
            probe.update(x.reshape(-1, x.shape[-1]), y.detach().reshape(-1, y.shape[-1]))
        if keep:
            self.coming.put(b, y)

    def advance(self, module: nn.Module, index: int) -> None:
        """Second pass: the changed block makes the next block's inputs; a dense stream has passed already."""
        if self.coming is not self.beside:
            ahead, behind = self.coming, self.beside
            if len(ahead):
                self.coming, self.beside = behind, ahead
                if not self.how.beside:
                    self.hidden = ahead
        if self.how.dense:
            return
        with torch.no_grad(), products_in(self.how.dtype, self.how.device):
            for b in range(len(self.hidden)):
                x = self.hidden[b].to(self.how.device)
                self.hidden[b] = hidden_of(run_block(module, x, self.call(b, index)))
                self.how.tick(1)

    def clear(self) -> None:
        """Let go of everything, spilled files too."""
        for held in (self.hidden, self.beside, self.coming):
            held.clear()


class _BlockStream:
    """A feed as seen from one block; see `Stream`."""

    def __init__(self, feed: _Feed, index: int) -> None:
        self.feed, self.index, self.spill = feed, index, feed.how.spill

    def __len__(self) -> int:
        return len(self.feed.hidden)

    def inputs(self, batch: int) -> Tensor:
        return self.feed.hidden[batch].to(self.feed.how.device)

    def dense(self, batch: int) -> Tensor:
        return self.feed.beside[batch].to(self.feed.how.device)

    def answer(self, batch: int) -> Tensor:
        assert self.feed.how.beside or self.feed.how.dense, "no dense stream is walked"
        return self.feed.coming[batch].to(self.feed.how.device)

    def call(self, batch: int) -> Call:
        return self.feed.call(batch, self.index)

    def run(self, module: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        with products_in(self.feed.how.dtype, self.feed.how.device):
            return hidden_of(run_block(module, hidden, call))
