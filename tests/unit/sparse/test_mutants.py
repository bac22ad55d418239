"""Hostile packed parts: whatever is mutated, the process lives and says one sentence or computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("count", [10_000])
def test_mutated_parts_never_crash(count: int) -> None:
    child = Path(__file__).with_name("mutants.py")
    done = subprocess.run([sys.executable, str(child), str(count), "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, ran = map(int, done.stdout.split())
    assert refused + ran == count and refused > count // 3 and ran > count // 50
