"""Multiple choice by log-likelihood: the answer the model finds least surprising.

    accuracy       argmax over choices of  log p(choice | question)
    accuracy_norm  the same divided by the choice's length in UTF-8 bytes

A file has one JSON object per line, in PIQA's form ``{"goal", "sol1", "sol2", "label"}`` or in the general form
``{"question" or "context", "choices": [...], "label"}``. A goal or question is put as ``Question: ...\\nAnswer:``,
a context as it stands; a choice follows after one space. Labels count from 0. Ties go to the first choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.text import check_ids, json_lines
from secateur.errors import SecateurError
from secateur.measure.passes import LOGIT_BYTES, logits_of, positions
from secateur.measure.types import Choices

WORKS = '{"goal", "sol1", "sol2", "label"} and {"question" or "context", "choices": [...], "label"} work, one per line'


@dataclass(frozen=True)
class Item:
    """A prompt, its possible continuations (without the space between), and which one is right."""

    prompt: str
    choices: tuple[str, ...]
    label: int


def read_items(path: Path) -> list[Item]:
    """The items of a JSONL file.

    Raises:
        SecateurError: unreadable, not UTF-8, empty, or a line in neither form.
    """
    return [_item(record, number) for number, record in json_lines(path, "the choices file", WORKS)]


def _item(record: Any, number: int) -> Item:
    match record:
        case {"goal": str(q), "sol1": str(a), "sol2": str(b), "label": label}:
            prompt, choices = f"Question: {q}\nAnswer:", [a, b]
        case {"question": str(q), "choices": list(choices), "label": label}:
            prompt = f"Question: {q}\nAnswer:"
        case {"context": str(prompt), "choices": list(choices), "label": label}:
            pass
        case _:
            raise SecateurError(
                f"line {number} of the choices has neither form", received=str(record)[:80], works=WORKS
            )
    if len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise SecateurError(
            f"line {number} needs two or more non-empty choices", received=str(record)[:80], works=WORKS
        )
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise SecateurError(
            f"line {number} has a label that is no choice",
            received=label,
            works=f"labels here go from 0 to {len(choices) - 1}",
        )
    return Item(prompt, tuple(choices), label)


def choices(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    source: str = "",
    progress: Callable[[float], None] | None = None,
) -> Choices:
    """Accuracy of a causal language model on multiple-choice items.

    Args:
        model: in eval mode.
        tokenizer: of Transformers' kind.
        items: from `read_items`.
        source: the file's name, recorded in the result.
        progress: told the share done.
    """
    spans = [_span(tokenizer, item.prompt, choice, positions(model)) for item in items for choice in item.choices]
    scores = iter(log_likelihoods(model, spans, progress))
    plain, normed = [], []
    for item in items:
        found = torch.tensor([next(scores) for _ in item.choices], dtype=torch.float64)
        length = torch.tensor([len(c.encode()) for c in item.choices], dtype=torch.float64)
        plain.append(int(found.argmax()) == item.label)
        normed.append(int((found / length).argmax()) == item.label)
    n = len(items)
    return Choices(sum(normed) / n, sum(plain) / n, n, tuple(normed), source)


@torch.inference_mode()
def log_likelihoods(
    model: nn.Module, spans: Sequence[tuple[list[int], int]], progress: Callable[[float], None] | None = None
) -> list[float]:
    """Log-likelihood of the end of each sequence, in nats.

    Sequences of similar length share a batch, padded on the right and masked: a causal model's scored positions
    see no padding.

    Args:
        model: a causal language model in eval mode.
        spans: token ids, and the index of the first one scored (at least 1).
        progress: told the share done.
    """
    order = sorted(range(len(spans)), key=lambda i: -len(spans[i][0]))
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    out = [0.0] * len(spans)
    done = 0
    while done < len(order):
        width = len(spans[order[done]][0])
        batch = order[done : done + max(1, min(32, LOGIT_BYTES // (4 * width * vocabulary)))]
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            tokens = spans[i][0]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        check_ids(ids, vocabulary)
        logits = logits_of(model, ids, mask)
        for row, i in enumerate(batch):
            out[i] = _score(logits[row], *spans[i])
        done += len(batch)
        if progress is not None:
            progress(done / len(order))
    return out


def _score(logits: Tensor, tokens: list[int], start: int) -> float:
    logp = logits[start - 1 : len(tokens) - 1].float().log_softmax(-1)
    targets = torch.tensor(tokens[start:], device=logits.device)
    return float(logp.gather(-1, targets[:, None]).double().sum())


def _span(tokenizer: Any, prompt: str, choice: str, limit: int | None) -> tuple[list[int], int]:
    """Tokens of prompt and choice together, and where the choice begins: at the first token that differs from
    the prompt's own (a tokenizer may merge across the seam)."""
    alone = tokenizer(prompt)["input_ids"]
    whole = tokenizer(f"{prompt} {choice}")["input_ids"]
    start = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole)))
    start = max(1, min(start, len(whole) - 1))
    cut = max(0, len(whole) - limit) if limit else 0
    return whole[cut:], max(1, start - cut)
