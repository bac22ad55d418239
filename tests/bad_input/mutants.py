"""``python mutants.py FOLDER COUNT SEED``: spoil packed checkpoints in COUNT ways, and open, run and unpack each.

A process of its own, because what is tested is that it never dies. Prints one JSON object: how many mutants were
refused, how many still load (a changed weight is a weight), and every other exception, which are failures.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.errors import SecateurError

EXTREMES = (0, 1, -1, 2, 7, 255, 2**15, 2**31 - 1, -(2**31), 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
ODD: tuple[Any, ...] = (
    None,
    True,
    "",
    "bitmask",
    "tile",
    "csr",
    "dense",
    "columns",
    "int8",
    "fp32",
    [],
    {},
    1.5,
    [1, 1],
)


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(table: dict[str, Any], data: bytes) -> bytes:
    head = json.dumps(table).encode()
    return len(head).to_bytes(8, "little") + head + data


def spot(value: Any, rng: random.Random) -> Any:
    """Another value in the place of one, of the same kind or not."""
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.7:
        return rng.choice([value + 1, value - 1, value * 2, -value, *EXTREMES])
    return rng.choice(ODD)


def somewhere(tree: Any, rng: random.Random) -> None:
    """Change, drop or double something anywhere in plain data."""
    while isinstance(tree, dict | list) and tree:
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        inner = tree[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.85:
            tree = inner
            continue
        how = rng.random()
        if how < 0.2:
            del tree[key]
        elif how < 0.3 and isinstance(tree, dict):
            tree[f"{key}.packed.0"] = inner
        elif how < 0.4 and isinstance(tree, dict):
            tree[rng.choice(list(tree))] = inner
        else:
            tree[key] = spot(inner, rng)
        return


def a_byte(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]


def length(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))] if rng.random() < 0.7 else raw + bytes(rng.randrange(1, 100))


def the_header(raw: bytes, rng: random.Random) -> bytes:
    table, data = split(raw)
    somewhere(table, rng)
    return join(table, data)


def the_matrices(raw: bytes, rng: random.Random) -> bytes:
    """The list of packed matrices in the metadata."""
    table, data = split(raw)
    rows = json.loads(table["__metadata__"]["matrices"])
    for _ in range(rng.randrange(1, 3)):
        somewhere(rows, rng)
    table["__metadata__"]["matrices"] = json.dumps(rows)
    return join(table, data)


def a_part(raw: bytes, rng: random.Random) -> bytes:
    """Numbers inside one part: a mask, an offset, an index, a value, a scale."""
    table, data = split(raw)
    name = rng.choice([n for n in table if ".packed." in n] or [n for n in table if n != "__metadata__"])
    begin, end = table[name]["data_offsets"]
    width = {"I64": 8, "I32": 4, "F32": 4, "I16": 2, "BF16": 2, "F16": 2, "I8": 1}[table[name]["dtype"]]
    for _ in range(rng.choice((1, 1, 1, 4))):
        if end <= begin:
            break
        at = begin + width * rng.randrange((end - begin) // width)
        value = rng.choice((*EXTREMES, rng.getrandbits(64), 0x7F800000, 0x7FC0, 0x7C00)) & (2 ** (8 * width) - 1)
        data = data[:at] + value.to_bytes(width, "little") + data[at + width :]
    return join(table, data)


def two_parts(raw: bytes, rng: random.Random) -> bytes:
    """Two tensors of the same size trade places, or two of any size trade descriptions."""
    table, data = split(raw)
    names = [n for n in table if n != "__metadata__"]
    a, b = rng.choice(names), rng.choice(names)
    if rng.random() < 0.5:
        table[a], table[b] = table[b], table[a]
    else:
        word = rng.choice(("dtype", "shape"))
        table[a][word] = table[b][word]
    return join(table, data)


def plain_json(raw: bytes, rng: random.Random) -> bytes:
    tree = json.loads(raw)
    somewhere(tree, rng)
    return json.dumps(tree).encode()


SHARD: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    a_byte, length, the_header, the_matrices, the_matrices, a_part, a_part, a_part, two_parts,
)  # fmt: skip


def mutant(folder: Path, rng: random.Random) -> tuple[Path, bytes, str]:
    """A file of the checkpoint, its spoiled content, and how it was spoiled."""
    files = sorted(folder.glob("*.safetensors"))
    if rng.random() < 0.85:
        path, change = rng.choice(files), rng.choice(SHARD)
    else:
        path = folder / rng.choice(("model-packed.safetensors.index.json", "config.json", "secateur.json"))
        change = rng.choice((plain_json, plain_json, a_byte, length))
    return path, change(path.read_bytes(), rng), f"{path.name}: {change.__name__}"


def attempt(folder: Path, out: Path) -> str:
    """Open, run and unpack; ``refused`` or ``loads``."""
    ids = torch.tensor([[1, 2, 3]])
    try:
        model: Any = secateur.load(folder)
        if getattr(model.config, "vocab_size", 0) > 3:
            with torch.no_grad():
                model(ids)
        secateur.unpack(folder, out)
    except SecateurError as error:
        assert str(error).count("\n") == 0
        return "refused"
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return "loads"


def main(root: Path, count: int, seed: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    found: dict[str, Any] = {"refused": 0, "loads": 0, "failures": []}
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        folder = rng.choice(folders)
        path, content, how = mutant(folder, rng)
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            found[attempt(folder, root.parent / f"{root.name}-out")] += 1
        except Exception as error:  # noqa: BLE001 (any is a failure)
            found["failures"].append(f"{number}, {folder.name}, {how}: {type(error).__name__}: {str(error)[:200]}")
        finally:
            path.write_bytes(before)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))) + "\n")
