"""A 7B-shape Llama of random weights, pruned from its shards in little memory, beside the dry run's prediction.

    .venv/bin/python benchmarks/streaming.py --work /some/disk [--layers 32] [--hidden 4096 --ffn 11008]

Makes bf16 shards (4,096 wide, 11,008 FFN, one shard a layer, 13 GB for 32 layers), runs the command line with Wanda
50 % on 16 x 512 tokens of the builtin text, and prints the peak memory that the dry run says, the larger peak of the
two processes (the dry run's and the run's, by getrusage), and the one in the run's report. The files are deleted
afterwards unless --keep is given. Words after ``--`` are added to both command lines.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig

from secateur.engine.host.origin import read_tokenizer, resolve
from secateur.engine.write import write_json, write_tensors


def make(place: Path, layers: int, d: int, f: int) -> None:
    """The checkpoint: config, tokenizer of the packaged model, one shard per layer and one for the rest."""
    place.mkdir(parents=True)
    tokenizer = read_tokenizer(resolve("smollm2"))
    tokenizer.save_pretrained(place)
    config = LlamaConfig(vocab_size=49152, hidden_size=d, intermediate_size=f, num_hidden_layers=layers,
                         num_attention_heads=d // 128, num_key_value_heads=d // 128, tie_word_embeddings=False,
                         architectures=["LlamaForCausalLM"], dtype="bfloat16", bos_token_id=1,
                         eos_token_id=2)  # fmt: skip
    config.save_pretrained(place)
    generator = torch.Generator().manual_seed(0)
    shapes = {**{f"self_attn.{n}_proj": (d, d) for n in "qkvo"}, "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d),
              "mlp.down_proj": (d, f)}  # fmt: skip
    index: dict[str, str] = {}

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        write_tensors(place / name, tensors)
        index.update(dict.fromkeys(tensors, name))

    for i in range(layers):
        tensors = {f"model.layers.{i}.{n}.weight": random(*s) for n, s in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(d, dtype=torch.bfloat16)
        shard(i, tensors)
    shard(layers, {"model.embed_tokens.weight": random(49152, d), "lm_head.weight": random(49152, d),
                   "model.norm.weight": torch.ones(d, dtype=torch.bfloat16)})  # fmt: skip
    write_json(place / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("words", nargs="*", help="further words of the command lines")
    args = parser.parse_args()
    name = f"random-{args.layers}-{args.hidden}-{args.ffn}"
    model, out = args.work / name, args.work / f"{name}-pruned"
    if not model.is_dir():
        make(model, args.layers, args.hidden, args.ffn)
    command = [sys.executable, "-m", "secateur", "prune", str(model), "-o", str(out), "--space", "weight"]
    command += ["--score", "wanda", "--sparsity", "0.5", "--samples", "16", "--length", "512", "--batch-size", "4"]
    command += ["--threads", str(args.threads), "--no-measure", "--json", "--overwrite", *args.words]
    said = json.loads(subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True).stdout)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    predicted = said["dry_run"]["peak_ram"]
    report = json.loads((out / "report.json").read_text())
    print(f"layers {args.layers}: predicted {predicted / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB "
          f"({predicted / peak - 1:+.0%}), of the run itself {report['provenance']['peak_rss'] / 1e9:.2f} GB; "
          f"seconds {report['provenance']['phases']}, predicted {said['dry_run']['phases']}; "
          f"predicted parts {said['dry_run']['ram']}")  # fmt: skip
    if not args.keep:
        shutil.rmtree(model)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
