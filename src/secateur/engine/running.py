"""Opening a model in order to run it: which forward pass, on which kernels, and how that is said.

A plain model runs in untouched Transformers: eager, with its growing cache. A packed one runs on our kernels, with a
step of our own where the family allows it (`secateur.engine.fast`) and inside Transformers otherwise; then a note says
why. ``own_kernel`` puts a plain model's matrices on our dense kernel, unchanged: what packing gains beside that is
what skipping zeros gains, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.engine.checkpoint import load
from secateur.engine.decoders import CompiledDecoder, Decoder, HostDecoder
from secateur.engine.fast import FastDecoder, NotFast
from secateur.engine.fusing import to_kernels
from secateur.engine.host.build import describe_skeleton
from secateur.engine.host.origin import resolve
from secateur.errors import SecateurError, unknown
from secateur.sparse.kernels import available
from secateur.sparse.linear import PackedLinear, calibrate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Opening:
    """A model, and how it is to run.

    Attributes:
        model: a directory (packed or not), a ``.gguf`` file, ``smollm2`` or a hub id.
        dtype: fp32, bf16 or fp16; None: the model's own. Packed matrices keep the one they were packed in.
        own_kernel: a plain model's matrices go to our dense kernel.
        compiled: the host's one-token step goes through torch.compile.
        trust_remote_code, revision: as elsewhere.
    """

    model: str
    dtype: str | None = None
    own_kernel: bool = False
    compiled: bool = False
    trust_remote_code: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class Running:
    """An opened model. ``dtype`` is that of what is not packed; ``packed`` says whether anything is."""

    model: nn.Module
    decoder: Decoder
    dtype: str
    packed: bool

    @property
    def vocabulary(self) -> int:
        """Ids that the model can read."""
        return int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]

    @property
    def positions(self) -> int | None:
        """The longest text the config allows, or None where it sets no bound."""
        config: Any = self.model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None


def opened(how: Opening) -> Running:
    """Load a model and choose what runs it.

    Raises:
        SecateurError: the files are wrong, it is not a causal language model, or it cannot run as asked.
    """
    origin = resolve(how.model, how.revision, how.trust_remote_code)
    dtype = DTYPES[how.dtype] if how.dtype else None
    place = origin.path if origin.kind == "directory" else how.model
    model = load(place, dtype, trust_remote_code=how.trust_remote_code)
    if not describe_skeleton(model).causal:
        raise SecateurError(
            "only a causal language model writes text", received=type(model).__name__, works="give one with a head"
        )
    packed = is_packed(model)
    if how.own_kernel and packed:
        raise SecateurError(
            "a packed model runs on our kernels already", received=how.model, works="--own-kernel with a plain model"
        )
    decoder = decoder_of(model, own_kernel=how.own_kernel, compiled=how.compiled)
    name = str(next(model.parameters()).dtype).removeprefix("torch.")
    short = {str(v).removeprefix("torch."): k for k, v in DTYPES.items()}
    return Running(model, decoder, short.get(name, name), packed)


def is_packed(model: nn.Module) -> bool:
    """Whether any matrix of a model runs on our kernels."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def decoder_of(model: nn.Module, *, own_kernel: bool = False, compiled: bool = False) -> Decoder:
    """What runs a model in memory; see the header of this file.

    Args:
        model: in eval mode. Its matrices may be laid out anew, and with ``own_kernel`` its linear layers replaced.
        own_kernel: run a plain model on our kernels, too.
        compiled: what runs in Transformers runs through torch.compile.

    Raises:
        SecateurError: torch.compile was asked for and the family cannot be compiled.
    """
    ours = own_kernel or is_packed(model)
    if not ours:
        return CompiledDecoder(model) if compiled else HostDecoder(model)
    if own_kernel:
        to_kernels(model)
    calibrate(model.modules())
    try:
        decoder: Decoder = FastDecoder(model)
        decoder.notes = ("--compile changes nothing: no step of Transformers runs",) if compiled else ()
    except NotFast as error:
        decoder = CompiledDecoder(model) if compiled else HostDecoder(model)
        level = available()
        decoder.how += f", {level} kernels" if level else ", packed weights through torch"
        decoder.notes = (str(error),)
    return decoder
