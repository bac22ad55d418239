"""Text: sources, packing, windows, and text that is on both sides."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from secateur.engine.text import (
    TextSource,
    builtin_documents,
    calibration,
    calibration_windows,
    check_disjoint,
    documents,
    overlap,
    pack,
    test_windows,
)
from secateur.errors import SecateurError


class Letters:
    """A tokenizer: one token per character; complains if special tokens are asked for."""

    eos_token_id: int | None = 0

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


def test_documents_are_joined_by_eos_and_a_single_one_is_as_it_is() -> None:
    assert pack(Letters(), ["ab"]).tolist() == [97, 98]
    assert pack(Letters(), ["ab", "c"]).tolist() == [97, 98, 0, 99]
    silent = Letters()
    silent.eos_token_id = None
    assert pack(silent, ["ab", "c"]).tolist() == [97, 98, 99]


def test_calibration_windows_follow_the_protocol() -> None:
    ids = torch.arange(5000) * 3
    got = calibration_windows(ids, 6, 100, seed=7)
    offsets = torch.randint(0, 5000 - 101, (6,), generator=torch.Generator().manual_seed(7)).tolist()
    assert got.tolist() == [[3 * (o + i) for i in range(100)] for o in offsets]


def test_shortest_calibration_text() -> None:
    assert calibration_windows(torch.arange(12), 2, 10, 0).tolist() == [list(range(10))] * 2
    with pytest.raises(SecateurError, match=r"too short.*received: '11 tokens'.*at least 12"):
        calibration_windows(torch.arange(11), 2, 10, 0)


def test_test_windows_do_not_overlap_unless_asked() -> None:
    ids = torch.arange(25)
    assert test_windows(ids, 2, 10).tolist() == [list(range(10)), list(range(10, 20))]
    assert len(test_windows(ids, 9, 10)) == 2
    assert test_windows(ids, None, 10, stride=5)[:, 0].tolist() == [0, 5, 10, 15]
    with pytest.raises(SecateurError, match="9 tokens"):
        test_windows(ids[:9], 1, 10)


def test_files(tmp_path: Path) -> None:
    one = tmp_path / "a.md"
    one.write_text("# héllo\n\nworld", encoding="utf-8")
    assert documents(str(one)) == documents(str(one), "test") == ["# héllo\n\nworld"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a\u2028b", "id": 1}\n\n{"text": "c"}\n', encoding="utf-8")
    assert documents(str(lines)) == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n ", "empty"),
        ("a.txt", b"ab\xff", r"not UTF-8 \(byte 2\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 of a.jsonl is not JSON"),
        ("a.jsonl", b'{"content": "a"}', "no string under `text`.*content"),
        ("a.jsonl", b'{"text": 3}', "no string under `text`"),
        ("a.jsonl", b'["a"]', "no string under `text`"),
        ("a.jsonl", b"", "the text file is empty"),
        ("a.jsonl", b"[" * 100_000, "line 1 of a.jsonl is not JSON"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1 of a.jsonl is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "surrogates not allowed"),
        ("a.jsonl", b'{"text": ""}', "every document"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SecateurError, match=message):
        documents(str(tmp_path / name))


def test_what_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SecateurError, match="directory"):
        documents(str(tmp_path))
    with pytest.raises(SecateurError, match="no such text file"):
        documents(str(tmp_path / "none.txt"))
    with pytest.raises(SecateurError, match="the text file is missing or no regular file"):
        documents("/dev/zero")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SecateurError, match="no such text file"):
        documents("x" * 300)
    with pytest.raises(SecateurError, match="`datasets` is not installed"):
        documents("allenai/c4:en")
    with pytest.raises(SecateurError, match=r"too small.*received: 0"):
        TextSource(samples=0)


def test_dataset_ids_name_config_split_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    class Rows(dict[str, list[str]]):
        column_names = ("text", "body")

    def load_dataset(name: str, config: str | None, split: str) -> Rows:
        asked.append((name, config, split))
        return Rows(text=["a", ""], body=["b", "c"])

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    fake.exceptions = type("E", (), {"DatasetsError": KeyError})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert documents("x/y") == ["a"]
    assert documents("x/y", "test") == ["a"]
    assert documents("x/y:en:validation:body") == ["b", "c"]
    assert asked == [("x/y", None, "train"), ("x/y", None, "test"), ("x/y", "en", "validation")]
    with pytest.raises(SecateurError, match=r"no column 'title'.*text, body"):
        documents("x/y:::title")
    for error in (OSError("no network"), KeyError("damaged")):  # the second stands for the library's own

        def refuse(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        fake.load_dataset = refuse  # type: ignore[attr-defined]
        with pytest.raises(SecateurError, match=r"the dataset cannot be loaded: .*(no network|damaged)"):
            documents("x/y")


def test_builtin_halves_share_no_passage() -> None:
    def passages(docs: list[str]) -> set[str]:
        return {" ".join(w[i : i + 40]) for w in (d.split() for d in docs) for i in range(len(w) - 39)}

    calibrate, test = builtin_documents("calibration"), builtin_documents("test")
    assert not passages(calibrate) & passages(test)
    assert sum(map(len, calibrate)) > 250_000  # characters
    assert sum(map(len, test)) > 50_000
    assert calibration(TextSource(samples=2, length=64), Letters()).shape == (2, 64)


@pytest.mark.parametrize("run", [1, 2, 3, 5, 8, 50])
def test_overlap_is_the_brute_force_share(run: int) -> None:
    rng = random.Random(run)
    a = [rng.randrange(3) for _ in range(400)]
    b = [rng.randrange(3) for _ in range(200)] + a[100:200]
    seen = {tuple(a[i : i + run]) for i in range(len(a) - run + 1)}
    want = [tuple(b[i : i + run]) in seen for i in range(len(b) - run + 1)]
    assert overlap(torch.tensor(a), torch.tensor(b), run) == pytest.approx(sum(want) / len(want))


def test_text_on_both_sides_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 50_000, (2, 4000), generator=generator)
    assert check_disjoint(a, b) == 0
    b[1000:1200] = a[3000:3200]
    with pytest.raises(SecateurError, match=r"3\.8%.*received: 'c4 and wiki'"):
        check_disjoint(a, b, ("c4", "wiki"))
    check_disjoint(a.reshape(-1, 40), b)  # windows too short for a run have none
