"""Two processes that share the calibration text decide as one does, and write once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secateur.engine.plan import Plan
from whole_toys import cli, write_model, write_text

STEPS = {
    "wanda": ["--space", "weight", "--score", "wanda", "--sparsity", 0.5],
    "sparsegpt": ["--space", "weight", "--method", "sparsegpt", "--sparsity", 0.5],
    "repaired": [
        *["--space", "weight", "--score", "wanda", "--sparsity", 0.5, "--repair", "least_squares", "--fit-on", "mix"],
    ],
    "fisher": [
        *["--space", "weight", "--method", "alps:rows=fisher", "--sparsity", 0.5, "--budget", "rate_distortion"],
    ],
    "spilled": ["--space", "weight", "--score", "wanda", "--sparsity", 0.5],  # with little memory free
    "pooled-taylor": ["--space", "ffn", "--score", "taylor", "--keep", "0.75", "--budget", "pooled"],
}
# one interpreter start and one process group for all runs; every process notes what it writes
DRIVER = """
import json, os, sys
from pathlib import Path
import psutil
import torch
import torch.distributed
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
from secateur.cli import main
rank, seen, real = os.environ["RANK"], [], os.replace
os.replace = lambda a, b: (seen.append(str(b)), real(a, b))[1]
free = psutil.virtual_memory()
for words, want in json.loads(Path(sys.argv[1]).read_text()):
    little = any(word.endswith("/spilled") for word in words)
    psutil.virtual_memory = lambda now=free._replace(available=1 << 16) if little else free: now
    code = main(words)
    if code != want:
        raise SystemExit(f"{code} instead of {want}: {words}")
Path(f"written-{rank}.json").write_text(json.dumps(seen))
torch.distributed.barrier()  # a process that leaves first can abort the other's gloo threads
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same steps by one process (``one/``) and by two (``two/``)."""
    place = tmp_path_factory.mktemp("distributed")
    write_model(place / "model", "llama", hidden_size=64, intermediate_size=160, num_hidden_layers=4)
    write_text(place / "text.txt", 6000)
    common = [
        "--text",
        str(place / "text.txt"),
        "--samples",
        "10",
        "--length",
        "32",
        "--batch-size",
        "2",
        "--no-measure",
    ]
    runs = {}
    for which in ("one", "two"):
        runs[which] = [
            [
                "prune",
                str(place / "model"),
                "-o",
                str(place / which / name),
                *map(str, step),
                *common,
                "--no-measure",
                "--json",
            ]
            for name, step in STEPS.items()
        ]
    for words in runs["one"]:
        assert cli(*words) == 0
    (place / "driver.py").write_text(DRIVER)
    # somebody else's unfinished work lies where the last run would write: the first process finds it, both stop
    leftover = place / "two/.refused.secateur-work"
    (leftover / "step-0").mkdir(parents=True)
    (leftover / "run.json").write_text("{}")
    (leftover / "step-0/block-00000.safetensors").write_bytes(b"work")
    refused = [w.replace("/wanda", "/refused") for w in runs["two"][0]]
    (place / "runs.json").write_text(json.dumps([(w, 0) for w in runs["two"]] + [(refused, 2)]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    ended = subprocess.run(
        [*launch, "driver.py", "runs.json"],
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[:6000]
    (place / "said").write_text(ended.stdout)
    (place / "heard").write_text(ended.stderr)
    return place


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_decide_as_one(both: Path, name: str) -> None:
    one, two = (Plan.open(both / which / name / "plan.safetensors") for which in ("one", "two"))
    total = sum(one.total(k) for k in one)
    assert total > 100
    assert sum((one ^ two).kept(k) for k in one) <= 1e-5 * total
    a, b = (load_file(both / which / name / "model.safetensors") for which in ("one", "two"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def test_one_output_written_by_the_first_process_once(both: Path) -> None:
    assert sorted(p.name for p in (both / "two").iterdir() if p.name[0] != ".") == sorted(STEPS)
    first, second = (json.loads((both / f"written-{rank}.json").read_text()) for rank in (0, 1))
    assert second == [] and len(first) > 10
    assert max(Counter(first).values()) == 1
    assert len((both / "said").read_text().strip().splitlines()) == len(STEPS), "one object per run, from one process"


def test_what_stops_the_first_process_stops_both(both: Path) -> None:
    """The driver has seen exit code 2 in each; here is why."""
    assert (both / "heard").read_text().count("an interrupted run's work is beside this output") == 2
    assert (both / "two/.refused.secateur-work/step-0/block-00000.safetensors").read_bytes() == b"work"
