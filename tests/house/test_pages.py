"""Generated pages say what their sources say: docs/methods.md the docstrings, docs/weights.md the results."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from secateur.methods.budgets import BUDGETS
from secateur.methods.joint import METHODS
from secateur.methods.repairs import REPAIRS
from secateur.methods.scores import SCORES

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "target"), [("methods_table", "methods.md"), ("weights_table", "weights.md")])
def test_a_page_is_up_to_date(name: str, target: str) -> None:
    assert (ROOT / "docs" / target).read_text("utf-8") == script(name).page(), f"run python benchmarks/{name}.py"


def test_every_method_has_a_line() -> None:
    page = script("methods_table").page()
    for name in (*SCORES, *BUDGETS, *METHODS, *REPAIRS):
        assert f"| `{name}` |" in page
