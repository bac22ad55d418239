"""Multiple choice: files, spans, and log-likelihoods against one unpadded pass per choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from measure_toys import VOCABULARY, gpt2, llama

from secateur.errors import SecateurError
from secateur.measure.choices import Item, choices, log_likelihoods, read_items

ITEMS = [
    Item("Question: the water\nAnswer:", ("in the river", "thread"), 0),
    Item("the forest", ("of the thread and the water", "and", "the river in the forest"), 2),
    Item("a", ("é", "the thread"), 1),
]


def write(tmp_path: Path, *records: object) -> Path:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_both_forms(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"goal": "cut", "sol1": "saw", "sol2": "glue", "label": 0, "id": 7},
        {"question": "why", "choices": ["a", "b", "c"], "label": 2},
        {"context": "It was", "choices": ["red", "seven"], "label": 1},
    )
    assert read_items(path) == [
        Item("Question: cut\nAnswer:", ("saw", "glue"), 0),
        Item("Question: why\nAnswer:", ("a", "b", "c"), 2),
        Item("It was", ("red", "seven"), 1),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of c.jsonl is not JSON"),
        ("[1]", "neither form"),
        ('{"goal": "a", "sol1": "b", "label": 0}', "neither form"),
        ('{"goal": 1, "sol1": "b", "sol2": "c", "label": 0}', "neither form"),
        ('{"goal": "a", "sol1": "b", "sol2": "", "label": 0}', "two or more non-empty"),
        ('{"question": "a", "choices": ["b"], "label": 0}', "two or more"),
        ('{"question": "a", "choices": ["b", 3], "label": 0}', "two or more"),
        ('{"question": "a", "choices": ["b", "c"], "label": 2}', "received: 2.*from 0 to 1"),
        ('{"question": "a", "choices": ["b", "c"], "label": -1}', "received: -1"),
        ('{"question": "a", "choices": ["b", "c"], "label": true}', "received: True"),
        ('{"question": "a", "choices": ["b", "c"], "label": "0"}', "label that is no choice"),
        ("  ", "empty"),
    ],
)
def test_bad_files(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(SecateurError, match=message):
        read_items(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="the choices file is missing"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(SecateurError, match="not UTF-8"):
        read_items(tmp_path / "x")


@pytest.mark.parametrize("make", [llama, gpt2])
def test_padding_and_batches_do_not_change_a_likelihood(make: Any) -> None:
    model = make()
    generator = torch.Generator().manual_seed(0)
    spans = []
    for length in (5, 30, 7, 12, 5):
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        spans.append((ids, length // 2))
    want = []
    for ids, start in spans:
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        want.append(sum(float(logp[t - 1, ids[t]]) for t in range(start, len(ids))))
    assert log_likelihoods(model, spans) == pytest.approx(want, rel=1e-4)


def test_accuracy_by_a_loop_over_choices(tokenizer: Any) -> None:
    model, normed, plain = llama(), [], []
    for item in ITEMS:
        scores = []
        for choice in item.choices:
            prompt, whole = (tokenizer(t)["input_ids"] for t in (item.prompt, f"{item.prompt} {choice}"))
            assert whole[: len(prompt)] == prompt
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logp[t - 1, whole[t]]) for t in range(len(prompt), len(whole))))
        plain.append(scores.index(max(scores)) == item.label)
        per_byte = [s / len(c.encode()) for s, c in zip(scores, item.choices, strict=True)]
        normed.append(per_byte.index(max(per_byte)) == item.label)
    got = choices(model, tokenizer, ITEMS, "toy.jsonl")
    assert got.correct_norm == tuple(normed)
    assert got.accuracy_norm == pytest.approx(sum(normed) / 3)
    assert got.accuracy == pytest.approx(sum(plain) / 3)
    assert (got.items, got.source) == (3, "toy.jsonl")


def test_prompts_longer_than_the_model_lose_their_beginning(tokenizer: Any) -> None:
    model = gpt2()  # 64 positions
    long = Item("the water of the river " * 30, ("thread", "forest"), 0)
    tail = tokenizer(f"{long.prompt} thread")["input_ids"][-64:]
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([tail])).logits[0].log_softmax(-1)
    scored = len(tokenizer(f"{long.prompt} thread")["input_ids"]) - len(tokenizer(long.prompt)["input_ids"])
    assert 0 < scored < 10
    want = sum(float(logp[t - 1, tail[t]]) for t in range(64 - scored, 64))
    from secateur.measure.choices import _span

    assert log_likelihoods(model, [_span(tokenizer, long.prompt, "thread", 64)]) == pytest.approx([want], rel=1e-4)
    assert choices(model, tokenizer, [long]).items == 1


def test_ids_that_the_model_has_no_embedding_for() -> None:
    with pytest.raises(SecateurError, match=f"id {VOCABULARY}, {VOCABULARY} embeddings"):
        log_likelihoods(llama(), [([1, VOCABULARY], 1)])
