"""The command as a process of its own: real exit codes, real streams, a disk that is really full."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "secateur"]
FFN = ["--space", "ffn", "--score", "magnitude", "--keep", "0.5", "--no-measure"]


def run(*argv: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_words_from_outside(models: Path, tmp_path: Path) -> None:
    """Exit code, one line, nothing else, for a refusal of each depth; one object for what works."""
    model = tmp_path / "m"
    shutil.copytree(models / "llama", model)
    (model / "config.json").write_text((model / "config.json").read_text().replace('"llama"', '"lamma"'))
    for argv, says in (
        (["inspect", model, "--json"], "lamma"),
        (["prune", models / "llama", "-o", "out", "--space", "weight", "--score", "wanda", "--sparsity", "1.5"], "1.5"),
        (["prune", models / "llama", "-o", models / "llama", *FFN, "--overwrite"], "replace the input"),
    ):
        done = run(*argv, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1 and says in done.stderr and "Traceback" not in done.stderr
    done = run("prune", models / "llama", "-o", "out", *FFN, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert json.loads(done.stdout)["out"] == "out"


NARROW = """
import json, os, subprocess, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from secateur import cli

place, argv = Path(sys.argv[1]), sys.argv[2:]
def mounted(*options):
    return subprocess.run(["mount", *options, str(place)], capture_output=True).returncode == 0
def call(*more):
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        return cli.main([*argv, "-o", str(place / "out"), *more]), out.getvalue(), err.getvalue()
results = []
for size in (4, 64, 150, 250, 290):
    if not mounted("-t", "tmpfs", "-o", f"size={size}k", "tmpfs"):
        sys.exit(77)
    first = call()
    left = sorted(p.name for p in place.iterdir()), [p.name for p in place.rglob("*.part")]
    mounted("-o", "remount,ro")
    mounted("-o", "remount,ro,size=9m")
    read_only = call("--resume")
    mounted("-o", "remount,rw,size=9m")
    second = call("--resume")
    made = {p.name: p.read_bytes().hex() for p in (place / "out").glob("*.safetensors")}
    results.append([first, left, read_only, second, made, sorted(p.name for p in place.iterdir())])
    subprocess.run(["umount", str(place)], check=True)
print(json.dumps(results))
"""


def test_a_full_disk_and_one_that_may_not_be_written(models: Path, tmp_path: Path) -> None:
    """Whatever write fails: a sentence, no half-written file, and --resume ends with the bytes of a quiet run."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare to mount a small disk with")
    (tmp_path / "disk").mkdir()
    prune = ["prune", str(models / "llama"), *FFN]
    inner = [sys.executable, "-c", NARROW, str(tmp_path / "disk"), *prune]
    done = subprocess.run(["unshare", "-m", *inner], capture_output=True, text=True, timeout=300)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 0, done.stderr
    quiet = run(*prune, "-o", tmp_path / "quiet", cwd=tmp_path)
    assert quiet.returncode == 0, quiet.stderr
    wanted = {p.name: p.read_bytes().hex() for p in (tmp_path / "quiet").glob("*.safetensors")}
    results = json.loads(done.stdout)
    for (code, out, err), (left, parts), read_only, resumed, made, at_last in results[:4]:
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert ("full" in err or "No space" in err) and "--resume" in err
        assert (left, parts) == ([".out.secateur-work"], [])
        assert read_only[0] == 2 and read_only[2].count("\n") == 1 and "Read-only" in read_only[2]
        assert resumed[0] == 0, resumed
        assert made == wanted and at_last == ["out"]
