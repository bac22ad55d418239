"""Calibration and test text: sources, documents, tokens, windows.

Packing: documents are joined by the end-of-sequence token in file order (a single text file is read as it is,
no special tokens anywhere). Calibration windows start at random offsets, test windows do not overlap:

    offsets = torch.randint(0, n - length - 1, (samples,), generator=torch.Generator().manual_seed(seed))

Tokenizers are duck-typed: anything that is called as ``tokenizer(text, add_special_tokens=False)`` and
returns ``input_ids``, as those of Transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from secateur.errors import SecateurError

Split = Literal["calibration", "test"]
SHINGLE = 50  # tokens; a run this long in both texts is a copied passage
PASSAGE = 40  # words; builtin topics that share a run this long are kept on the same side
SHARED = 0.01  # largest share of the test text that calibration text may contain


@dataclass(frozen=True)
class TextSource:
    """Where calibration text comes from and how it is cut.

    Attributes:
        source: ``builtin`` (Python's own manual, shipped with the interpreter), ``self`` (the model writes it), a path
            (.jsonl: one document per line in ``text``; anything else: one document), or a `datasets` id
            ``name[:config[:split[:column]]]``.
        samples, length: windows, and tokens per window.
        seed: of the offsets (and of ``self``).
    """

    source: str = "builtin"
    samples: int = 64
    length: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for word in ("samples", "length"):
            if (value := getattr(self, word)) < (1 if word == "samples" else 2):
                raise SecateurError(f"text {word} is too small", received=value, works="64 windows of 1024 tokens work")


def documents(source: str, split: Split = "calibration") -> list[str]:
    """The documents of a text source.

    Args:
        source: see `TextSource`; ``self`` has no documents (see `secateur.engine.decode.self_text`).
        split: which half of ``builtin``, or which default split of a dataset; a file is read whole for both.

    Raises:
        SecateurError: no such source, an empty or unreadable file, not UTF-8, a line without ``text``.
    """
    if source == "builtin":
        return builtin_documents(split)
    if source == "self":
        raise SecateurError("text the model writes itself has no documents", received=source, works=_WORKS)
    path = Path(source)
    if len(path.name) < 256 and path.is_dir():
        raise SecateurError("the text is a directory", received=source, works="give one .txt, .md or .jsonl file")
    if len(path.name) < 256 and path.exists():  # longer names are an operating system error even to ask for
        return _file_documents(path)
    if path.suffix in {".txt", ".md", ".jsonl", ".json", ".text"} or source.startswith((".", "/", "~")):
        raise SecateurError("no such text file", received=source, works=_WORKS)
    return _dataset_documents(source, split)


_WORKS = "`builtin`, `self`, a .txt/.md/.jsonl path or a datasets id `name[:config[:split[:column]]]` work"


def builtin_documents(split: Split) -> list[str]:
    """Topics of Python's manual (`pydoc_data`), sorted by name, in two disjoint halves.

    Topics quote each other at length. Those that share a run of 40 words with another topic are calibration
    text; of the others every second one is test text, so that no passage is on both sides.
    """
    from pydoc_data.topics import topics

    owner: dict[int, str] = {}
    shared: set[str] = set()
    for name in sorted(topics):
        words = topics[name].split()
        for i in range(len(words) - PASSAGE + 1):
            first = owner.setdefault(hash(tuple(words[i : i + PASSAGE])), name)
            if first != name:
                shared |= {first, name}
    alone = [name for name in sorted(topics) if name not in shared]
    test = alone[1::2]
    return [topics[name] for name in sorted(topics) if (name in test) == (split == "test")]


def _file_documents(path: Path) -> list[str]:
    if path.suffix not in {".jsonl", ".json"}:
        text = read_text(path, "the text file")
        if not text.strip():
            raise SecateurError("the text file is empty", received=str(path), works=_WORKS)
        return [text]
    docs = []
    for number, record in json_lines(path, "the text file", 'one object such as {"text": "..."} per line works'):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise SecateurError(
                f"line {number} of {path.name} has no string under `text`",
                received=", ".join(record) if isinstance(record, dict) else str(record)[:80],
                works='every line must be an object such as {"text": "..."}',
            )
        docs.append(record["text"])
    if not any(d.strip() for d in docs):
        raise SecateurError("every document of the text file is empty", received=str(path), works=_WORKS)
    return docs


def read_text(path: Path, what: str) -> str:
    """A UTF-8 file (a byte-order mark is dropped).

    Raises:
        SecateurError: unreadable, not a regular file, or not UTF-8; ``what`` says whose file it is.
    """
    try:
        if not path.is_file():
            raise SecateurError(f"{what} is missing or no regular file", received=str(path), works="give a file's path")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SecateurError(
            f"{what} is not UTF-8 (byte {error.start})", received=str(path), works="convert the file to UTF-8"
        ) from None
    except OSError as error:
        raise SecateurError(
            f"{what} cannot be read", received=f"{path}: {error.strerror}", works="give a file you may read"
        ) from None


def json_lines(path: Path, what: str, works: str) -> Iterator[tuple[int, Any]]:
    """Line numbers (from 1) and records of a JSONL file, blank lines left out.

    Raises:
        SecateurError: as `read_text`; empty; a line that is not JSON, or holds what is not Unicode text.
    """
    text = read_text(path, what)
    if not text.strip():
        raise SecateurError(f"{what} is empty", received=str(path), works=works)
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "\\u" in line:
                json.dumps(record, ensure_ascii=False).encode()  # refuses half a surrogate pair, as tokenizers do
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "") or getattr(error, "reason", "") or str(error)
            raise SecateurError(
                f"line {number} of {path.name} is not JSON text ({reason})", received=line[:80], works=works
            ) from None
        yield number, record


def _dataset_documents(source: str, split: Split) -> list[str]:
    try:
        import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise SecateurError(
            "no such text file, and `datasets` is not installed to look it up as a dataset",
            received=source,
            works=_WORKS + "; datasets need `pip install datasets`",
        ) from None
    name, config, part, column = [*source.split(":"), "", "", ""][:4]
    part = part or ("train" if split == "calibration" else "test")
    refusals = (OSError, ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError)
    try:
        rows = datasets.load_dataset(name, config or None, split=part)
    except refusals as error:  # bad ids, no network, damaged files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SecateurError(f"the dataset cannot be loaded: {reason[0][:160]}", received=source, works=_WORKS) from None
    column = column or "text"
    if column not in rows.column_names:
        raise SecateurError(
            f"the dataset has no column {column!r}",
            received=source,
            works=f"name one of {', '.join(rows.column_names)} as `{name}:{config}:{part}:COLUMN`",
        )
    return [str(text) for text in rows[column] if text]


def pack(tokenizer: Any, docs: Sequence[str]) -> Tensor:
    """Tokens of the documents, joined by end-of-sequence, without special tokens: int64 [n].

    A tokenizer without an end-of-sequence token separates by its separator, or not at all.
    """
    joint = getattr(tokenizer, "eos_token_id", None)
    if joint is None:
        joint = getattr(tokenizer, "sep_token_id", None)
    parts = [tokenizer(doc, add_special_tokens=False, verbose=False)["input_ids"] for doc in docs]
    ids: list[int] = []
    for number, part in enumerate(parts):
        if number and joint is not None:
            ids.append(joint)
        ids.extend(part)
    return torch.tensor(ids, dtype=torch.long)


def check_room(count: int, length: int) -> None:
    """Refuse more token ids than fit into free memory, before they are drawn."""
    needed = count * length * torch.long.itemsize
    if needed > psutil.virtual_memory().available:
        raise SecateurError(
            f"so much text takes {needed:,} bytes, more than this machine has free",
            received=f"{count} x {length} tokens",
            works="fewer or shorter windows",
        )


def check_ids(ids: Tensor, embeddings: int) -> None:
    """Refuse token ids that a model has no embedding for."""
    if (top := int(ids.max())) >= embeddings:
        raise SecateurError(
            "the tokenizer makes token ids the model has no embedding for",
            received=f"id {top}, {embeddings} embeddings",
            works="use the tokenizer the model was trained with",
        )


def calibration_windows(ids: Tensor, samples: int, length: int, seed: int) -> Tensor:
    """Windows at random offsets: int64 [samples, length].

    Raises:
        SecateurError: fewer than ``length + 2`` tokens, or more windows than fit into memory.
    """
    check_room(samples, length)
    if (n := ids.numel()) < length + 2:
        raise SecateurError(
            f"the calibration text is too short for windows of {length} tokens",
            received=f"{n} tokens",
            works=f"give at least {length + 2} tokens, or a smaller length",
        )
    offsets = torch.randint(0, n - length - 1, (samples,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[i : i + length] for i in offsets.tolist()])


def test_windows(ids: Tensor, windows: int | None, length: int, stride: int | None = None) -> Tensor:  # noqa: PT028
    """The first windows of a text, ``stride`` (by default ``length``: no overlap) tokens apart.

    Args:
        ids: int64 [n].
        windows: how many at most; None for all there are. A shorter text gives fewer (the caller says so).

    Returns:
        int64 [windows, length]; the tail that does not fill a window is left out.

    Raises:
        SecateurError: not even one window.
    """
    if (n := ids.numel()) < length:
        raise SecateurError(
            f"the test text is too short for one window of {length} tokens",
            received=f"{n} tokens",
            works=f"give at least {length} tokens, or a smaller length",
        )
    return ids.unfold(0, length, stride or length)[:windows].contiguous()


test_windows.__test__ = False  # type: ignore[attr-defined]  # the name starts like a test's; pytest must not collect it


def calibration(text: TextSource, tokenizer: Any) -> Tensor:
    """Calibration windows of a source with documents: int64 [samples, length]."""
    return calibration_windows(pack(tokenizer, documents(text.source)), text.samples, text.length, text.seed)


def overlap(calibration: Tensor, test: Tensor, run: int = SHINGLE) -> float:
    """Share of the test text's runs of ``run`` tokens that also occur in the calibration text.

    Args:
        calibration, test: int64, one text [n] or windows [windows, length].
    """
    seen, asked = _runs(calibration, run), _runs(test, run)
    return float(torch.isin(asked, seen.unique()).double().mean()) if asked.numel() and seen.numel() else 0.0


def check_disjoint(calibration: Tensor, test: Tensor, names: tuple[str, str] = ("calibration", "test")) -> float:
    """Refuse test text that was also calibration text; returns the share that overlaps.

    Raises:
        SecateurError: more than 1 % of the test text's 50-token runs are in the calibration text.
    """
    share = overlap(calibration, test)
    if share > SHARED:
        raise SecateurError(
            f"{share:.1%} of the test text's runs of {SHINGLE} tokens are calibration text too",
            received=f"{names[0]} and {names[1]}",
            works="give other text for one of them",
        )
    return share


def _runs(ids: Tensor, run: int) -> Tensor:
    """A 64-bit polynomial hash of every run of ``run`` tokens, by doubling: h[j+k](i) = h[j](i) B^k + h[k](i+j)."""
    rows = ids.long().cpu().reshape(-1, ids.shape[-1])
    if rows.shape[1] < run:
        return rows.new_empty(0)
    total: Tensor | None = None
    power = (rows + 1) * 0x2545F4914F6CDD1D  # hashes of runs of `have` tokens; int64 wraps around
    width, have = 0, 1
    while True:
        if run & have:
            total = power if total is None else _join(total, power, width, have)
            width += have
        if width == run:
            assert total is not None
            return total.reshape(-1)
        power = _join(power, power, have, have)
        have *= 2


def _join(left: Tensor, right: Tensor, left_width: int, right_width: int) -> Tensor:
    scale = pow(0x9E3779B97F4A7C15, right_width, 1 << 64)
    n = right.shape[1] - left_width
    return left[:, :n] * (scale - (1 << 64) if scale >> 63 else scale) + right[:, left_width:]
