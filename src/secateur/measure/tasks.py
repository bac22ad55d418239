"""Any task of the LM Evaluation Harness (EleutherAI), through the optional extra ``secateur[tasks]``."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from torch import nn

from secateur.errors import SecateurError


def tasks(
    model: nn.Module, tokenizer: Any, names: Sequence[str], limit: int | None = None, batch_size: int = 8
) -> dict[str, float]:
    """Run harness tasks on a model in memory.

    Args:
        model: a causal language model in eval mode.
        tokenizer: of Transformers' kind.
        names: task names, as the harness lists them.
        limit: items per task; None for all.
        batch_size: sequences per forward pass.

    Returns:
        ``{"piqa/acc_norm": 0.67, "piqa/acc_norm_stderr": 0.01, ...}``.

    Raises:
        SecateurError: the harness is not installed, or knows no such task.
    """
    manager = known(names)
    import lm_eval  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found,import-untyped,unused-ignore]

    with _only_on_a_terminal():
        host = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(model=host, tasks=list(names), limit=limit, task_manager=manager)
    return flatten(found["results"])


def known(names: Sequence[str]) -> Any:
    """The harness's task manager, after checking that it knows these tasks; no model is needed for that.

    Raises:
        SecateurError: the harness is not installed, or knows no such task.
    """
    try:
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise SecateurError(
            f"lm-eval tasks need the extra that is not installed ({error.name})",
            received=", ".join(names),
            works="pip install 'secateur[tasks]', or use --choices FILE.jsonl, which needs nothing",
        ) from None
    manager = TaskManager()
    if missing := [n for n in names if n not in manager.all_tasks]:
        raise SecateurError("no such lm-eval task", received=", ".join(missing), works="`lm_eval ls tasks` lists them")
    return manager


@contextmanager
def _only_on_a_terminal() -> Iterator[None]:
    """Keep the harness off standard output, and its progress bars out of logs."""
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with redirect_stdout(shown), redirect_stderr(shown):
        yield


def flatten(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Harness results ``{task: {"metric,filter": number}}`` as ``{"task/metric": number}``; the default filter
    ``none`` goes unnamed. What has no filter (aliases, sample counts) is no metric."""
    out: dict[str, float] = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if comma and isinstance(value, int | float) and not isinstance(value, bool):
                out[f"{task}/{metric}" + ("" if chosen == "none" else f"@{chosen}")] = float(value)
    return out
