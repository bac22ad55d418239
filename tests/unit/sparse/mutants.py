"""A child process that mutates packed parts and headers: each mutant is refused in one sentence or runs.

    python mutants.py COUNT SEED

Prints how many were refused and how many ran. A crash, or any other exception, is the parent's to see.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.sparse import from_tensors, header, pack, to_tensors
from secateur.sparse.formats import DTYPES, PARTS, Packed
from secateur.sparse.kernels import Handle, levels

EXTREMES = (-(1 << 63), -1, 0, 1, 127, (1 << 15) - 1, (1 << 31) - 1, (1 << 63) - 1)


def mutate(tensors: dict[str, Tensor], said: dict[str, Any], draw: random.Random) -> None:
    """Changes one thing: a bit, an entry, a length, a dtype, a missing part, or a word of the header."""
    name = draw.choice(sorted(tensors))
    part = tensors[name]
    what = draw.randrange(8)
    if what <= 1 and part.numel():  # flip a bit
        octets = part.view(-1).view(torch.uint8)
        octets[draw.randrange(octets.numel())] ^= 1 << draw.randrange(8)
    elif what == 2 and part.numel() and not part.is_floating_point():
        limits = torch.iinfo(part.dtype)
        part.view(-1)[draw.randrange(part.numel())] = max(limits.min, min(limits.max, draw.choice(EXTREMES)))
    elif what == 3:
        tensors[name] = part[: draw.randrange(len(part) + 1)].clone()
    elif what == 4:
        tensors[name] = torch.cat([part, part[:1]]) if draw.random() < 0.5 else part.unsqueeze(0)
    elif what == 5:
        tensors[name] = part.to(draw.choice([torch.int64, torch.int32, torch.int16, torch.int8, torch.float32]))
    elif what == 6:
        other = draw.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        word = draw.choice(["kind", "dtype", "shape", "tile", "gone"])
        if word == "gone":
            del tensors[name]
        elif word in ("kind", "dtype"):
            said[word] = draw.choice([*PARTS, *DTYPES, None, 3, ""])
        else:
            pair = list(said.get(word, [4, 4]))
            pair[draw.randrange(2)] = draw.choice([*EXTREMES, *range(70), 1.5, None])
            said[word] = pair


def run(packed: Packed, draw: random.Random) -> None:
    """Everything that reads the parts: products at a random level, panels, int8 sums."""
    if packed.shape[0] * packed.shape[1] > 1 << 20:
        return  # honest but large: csr may say any size that its pointers bear
    x = torch.randn(draw.choice([1, 3, 20]), packed.shape[1])
    handle = Handle(packed, draw.choice(levels()) if levels() else None)
    handle.product(x)
    if levels():
        handle.by_panels(x)


def main(count: int, seed: int) -> None:
    """Mutates ``count`` times and prints the tally."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    refused = ran = 0
    originals = []
    for kind in PARTS:
        for dtype in DTYPES.values():
            w = torch.randn(37, 45) * (torch.rand(37, 45) < 0.4)
            packed = pack(w, dtype, kind, (4, 8) if kind == "tile" else None)  # type: ignore[arg-type]
            originals.append((header(packed), to_tensors(packed, "w")))
    for _ in range(count):
        said, tensors = draw.choice(originals)
        said, tensors = dict(said), {name: part.clone() for name, part in tensors.items()}
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            if tensors:
                mutate(tensors, said, draw)
        try:
            packed = from_tensors("w", tensors, said)
        except SecateurError:
            refused += 1
            continue
        run(packed, draw)
        ran += 1
    sys.stdout.write(f"{refused} {ran}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
