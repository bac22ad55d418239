"""docs/methods.md says what the docstrings say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from secateur.methods.budgets import BUDGETS
from secateur.methods.joint import METHODS
from secateur.methods.repairs import REPAIRS
from secateur.methods.scores import SCORES

ROOT = Path(__file__).resolve().parents[3]


def test_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("methods_table", ROOT / "benchmarks" / "methods_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.page()
    assert (ROOT / "docs" / "methods.md").read_text("utf-8") == page, "run python benchmarks/methods_table.py"
    for name in (*SCORES, *BUDGETS, *METHODS, *REPAIRS):
        assert f"| `{name}` |" in page
