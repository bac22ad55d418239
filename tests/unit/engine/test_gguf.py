"""A tiny GGUF file, written by the gguf package, opened by us: parsed once, and the model Transformers makes of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.engine.host import carry
from secateur.engine.host.origin import load_gguf, resolve
from secateur.engine.store import Store
from secateur.engine.write import writing
from secateur.errors import SecateurError

LAYERS, HIDDEN, WIDE, VOCABULARY, HEADS = 2, 32, 48, 40, 4
PARTS = {
    "attn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_norm": (HIDDEN,),
    "ffn_gate": (WIDE, HIDDEN), "ffn_up": (WIDE, HIDDEN), "ffn_down": (HIDDEN, WIDE),
}  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A Llama of two layers with two KV heads, and its tensors under their names in the file."""
    path, generator = tmp_path / "toy.gguf", torch.Generator().manual_seed(0)
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in PARTS.items()}
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("toy")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCABULARY)
    for name, value in tensors.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, tensors


def test_a_gguf_file_is_parsed_once(written: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    path, tensors = written
    plain = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    reader, table, parsed = gguf.GGUFReader, gguf.get_tensor_name_map, []
    start = reader.__init__

    def counted(self: gguf.GGUFReader, *args: object) -> None:
        parsed.append(args)
        start(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "__init__", counted)
    model = load_gguf(resolve(path))
    assert len(parsed) == 1
    assert gguf.GGUFReader is reader and gguf.get_tensor_name_map is table  # no trace
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    for i in range(LAYERS):  # tensors that the format stores as they are
        for ours, theirs in (
            ("mlp.down_proj", "ffn_down"),
            ("mlp.gate_proj", "ffn_gate"),
            ("self_attn.v_proj", "attn_v"),
        ):
            assert torch.equal(state[f"model.layers.{i}.{ours}.weight"], tensors[f"blk.{i}.{theirs}.weight"])


def test_another_file_is_another_model(written: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Nothing of a file is kept after it was opened."""
    path, _ = written
    first = Store.open(resolve(path))
    data = bytearray(path.read_bytes())
    data[-4:] = torch.tensor([7.0]).numpy().tobytes()  # the last weight of the last tensor
    path.write_bytes(bytes(data))
    second = Store.open(resolve(path))
    a, b = (s.skeleton() for s in (first, second))
    first.load_whole(a)
    second.load_whole(b)
    changed = [n for n, v in a.state_dict().items() if not torch.equal(v, b.state_dict()[n])]
    assert changed == [f"model.layers.{LAYERS - 1}.mlp.down_proj.weight"]
    assert float(b.state_dict()[changed[0]][-1, -1]) == 7.0


def test_a_disk_that_is_full_where_the_tokenizer_is_written(
    written: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizers library says so in a class of its own that has no errno."""
    if not Path("/dev/full").exists():
        pytest.skip("no disk here is always full")
    full = SimpleNamespace(save_pretrained=lambda target: Tokenizer(BPE()).save("/dev/full"))
    monkeypatch.setattr(carry, "read_tokenizer", lambda origin: full)
    with pytest.raises(SecateurError, match="disk is full"), writing(tmp_path):
        carry.carry_along(resolve(written[0]), None, tmp_path)
