"""``python -m secateur.measure.residence ORDER``: one process, one model, one prompt; writes what is resident.

A process of its own because memory that another model used does not come back whole, and a peak never does. ORDER is
JSON, as `secateur.measure.bench.residence` makes it; the answer has the fields of a `Residence`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from dataclasses import asdict

import psutil
import torch

from secateur.engine.running import Opening, opened
from secateur.measure.bench import BenchOptions, Residence, once
from secateur.measure.rss import peak_bytes


def resident() -> int:
    """Resident bytes of this process, after unused memory was given back where the C library can."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return int(psutil.Process().memory_info().rss)


def main(order: str) -> dict[str, int]:
    """Open, read a prompt, write a few tokens; the fields of a `Residence`."""
    words = json.loads(order)
    torch.set_num_threads(words["threads"])
    given = words["options"]
    options = BenchOptions(prompts=tuple(given["prompts"]), new_tokens=given["new_tokens"])
    bare = resident()
    running = opened(Opening(**words["opening"]))
    ids = torch.randint(0, running.vocabulary, (1, options.prompts[0]), generator=torch.Generator().manual_seed(0))
    once(running.decoder, ids, options.new_tokens)
    return asdict(Residence(resident(), peak_bytes(), bare))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])) + "\n")
