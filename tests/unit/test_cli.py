"""The command line: words in, one object or one sentence out, the promised exit codes."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import secateur
from secateur import cli
from secateur.errors import SecateurError
from secateur.measure.types import Measurement, Perplexity, Size
from secateur.methods.base import Amount
from secateur.printing import cell, page, plain
from secateur.recipe import How, MeasureRequest, Recipe

PRUNE = ["prune", "smollm2", "-o", "out", "--space", "weight", "--score", "wanda"]


@dataclass
class Seen:
    """What the command line handed over."""

    recipe: Recipe | None = None
    out: Path | None = None
    how: How | None = None
    request: MeasureRequest | None = None
    inspected: tuple[Any, ...] = ()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """A stand-in for `secateur.run` that notes what it is asked."""
    note = Seen()

    def prune(recipe: Recipe, out: Path, how: How, progress: Any) -> dict[str, Any]:
        sys.stdout.write("a library talks to standard output\n")
        progress.phase("prune", 3)
        progress.advance()
        note.recipe, note.out, note.how = recipe, out, how
        return {
            "out": out,
            "models": [{"model": "dense", "perplexity": 25.17}, {"model": "out", "perplexity": float("inf")}],
        }

    def inspect(model: str, *, check: bool, trust_remote_code: bool, revision: str | None) -> dict[str, Any]:
        note.inspected = (model, check, trust_remote_code, revision)
        proved = {"ffn": True, "layer": not model.startswith("bad")}
        reason = None if all(proved.values()) else "layer: masked and cut differ by 0.5"
        return {"family": "llama", **({"proved": proved, "reason": reason} if check else {})}

    def measure(request: MeasureRequest, progress: Any) -> tuple[list[Measurement], list[Any]]:
        note.request = request
        size = Size(100, 50, 400, 90, 8, 1024, "fp32")
        ppl = Perplexity(12.5, (2.5,), 1, 16, 16, 15, "fp32", "builtin")
        return [Measurement(m, size, ppl) for m in request.models], []

    fake = SimpleNamespace(prune=prune, inspect=inspect, measure=measure, report=lambda out: out / "report.html")
    monkeypatch.setitem(sys.modules, "secateur.run", fake)
    monkeypatch.setattr(secateur, "run", fake, raising=False)
    return note


def raising(error: BaseException) -> Callable[..., Any]:
    def verb(*args: Any, **kwargs: Any) -> Any:
        raise error

    return verb


def test_every_option_of_prune_is_a_recipe_word(seen: Seen, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("[{match: ffn, keep: 0.5}]")
    argv = [
        *("prune", "dir", "-o", "o", "--space", "weight", "--score", "magnitude:p=2", "--grain", "matrix"),
        *("--map", str(tmp_path / "m.yaml"), "--protect", "first:1", "--include", "*q_proj*", "--include", "*v_proj*"),
        *("--exclude", "*.3.*", "--text", "self", "--samples", "4", "--length", "32", "--batch-size", "2"),
        *("--seed", "9", "--dtype", "bf16", "--device", "cpu", "--threads", "1", "--overwrite", "--resume"),
        *("--no-measure", "--curve", "--trust-remote-code", "--revision", "main"),
    ]
    assert cli.main(argv) == 0
    recipe, how = seen.recipe, seen.how
    assert recipe is not None and how is not None
    step = recipe.steps[0]
    assert (recipe.model, seen.out, step.space, step.score, step.grain) == (
        "dir",
        Path("o"),
        "weight",
        "magnitude:p=2",
        "matrix",
    )
    assert (step.ends, step.include, step.exclude) == ((1, 0), ("*q_proj*", "*v_proj*"), ("*.3.*",))
    assert [(r.match, r.keep) for r in step.map] == [("ffn", 0.5)]
    assert (recipe.text.source, recipe.text.samples, recipe.text.length, recipe.text.seed) == ("self", 4, 32, 9)
    assert (recipe.batch_size, recipe.seed, recipe.dtype, recipe.device, recipe.threads) == (2, 9, "bf16", "cpu", 1)
    assert (recipe.trust_remote_code, recipe.revision, recipe.curve) == (True, "main", True)
    assert how == How(resume=True, overwrite=True, measure=False, plan_text=True)


@pytest.mark.parametrize(
    ("argv", "amount"),
    [
        (["--keep", "0.75"], Amount(share=Decimal("0.75"))),
        (["--keep", "75%"], Amount(share=Decimal("0.75"))),
        (["--keep=1152"], Amount(count=1152)),
        (["--sparsity", "0.1"], Amount(share=Decimal("0.9"))),
        (["--grain", "2:4"], Amount(share=Decimal("0.5"))),
        (["--target", "params=-20%"], None),
        (["--at-most-worse", "5%"], None),
    ],
)
def test_how_much_stays(seen: Seen, argv: list[str], amount: Amount | None) -> None:
    assert cli.main([*PRUNE, *argv]) == 0
    assert seen.recipe is not None and seen.recipe.steps[0].amount == amount


def test_plan_is_prune_that_writes_only_the_plan(seen: Seen) -> None:
    assert cli.main(["plan", *PRUNE[1:], "--keep", "0.5"]) == 0
    assert seen.how is not None and seen.how.only_plan
    assert cli.main(["prune", "other", "-o", "o", "--plan", "p.safetensors"]) == 0
    assert seen.how.plan_file == Path("p.safetensors") and not seen.how.plan_text and not seen.how.only_plan


def test_a_recipe_file_with_options_beside_it(seen: Seen, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: smollm2\nsteps: [{space: weight, method: sparsegpt, sparsity: 0.5}]\n")
    assert cli.main(["prune", "--recipe", str(file)]) == 0
    assert seen.out == Path("out/mine") and seen.recipe is not None and seen.recipe.steps[0].method == "sparsegpt"
    assert cli.main(["prune", "--recipe", str(file), "-o", "x", "--sparsity", "0.7", "--samples", "8"]) == 0
    assert seen.out == Path("x") and seen.recipe.steps[0].amount == Amount(share=Decimal("0.3"))
    assert seen.recipe.text.samples == 8


def test_json_is_one_object_and_nothing_else(seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*PRUNE, "--keep", "0.5", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["models"][1]["perplexity"] is None  # JSON has no infinity
    assert out.count("\n") == 1 and "library" not in out and "library" in err


def test_measure_prints_flat_entries_in_the_order_given(seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "measure",
        "b",
        "a",
        "--text",
        "t.txt",
        "--windows",
        "3",
        "--length",
        "16",
        "--dtype",
        "bf16",
        "--latency",
        "--json",
    ]
    assert cli.main(argv) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [m["model"] for m in models] == ["b", "a"]
    assert {k: models[0][k] for k in ("perplexity", "parameters", "nonzero", "bytes")} == {
        "perplexity": 12.5, "parameters": 100, "nonzero": 50, "bytes": 400,
    }  # fmt: skip
    want = MeasureRequest(("b", "a"), text="t.txt", windows=3, length=16, dtype="bf16", latency=True)
    assert seen.request == want


def test_inspect_check_fails_with_the_reason_last(seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "good", "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proved"] == {"ffn": True, "layer": True}
    assert cli.main(["inspect", "bad", "--check", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["proved"] == {"ffn": True, "layer": False}
    assert err.splitlines()[-1].endswith("layer: masked and cut differ by 0.5")
    assert cli.main(["inspect", "bad"]) == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "VERB"),
        (["prun"], "prun"),
        (["prune", "m", "--spase", "ffn"], "did you mean --space"),
        (["prune", "m", "-o", "o"], "no steps"),
        (["prune", "-o", "o", "--space", "ffn", "--score", "wanda", "--keep", "0.5"], "no model"),
        (["prune", "m", "--space", "ffn", "--score", "wanda", "--keep", "0.5"], "no output"),
        ([*PRUNE, "--sparsity", "1.5"], "1.5"),
        ([*PRUNE, "--sparsity", "0.5", "--keep", "0.6"], "disagree"),
        ([*PRUNE, "--keep", "0.5", "--samples", "many"], "many"),
        ([*PRUNE, "--keep", "0.5", "--apply", "cut"], "cannot be cut"),
        ([*PRUNE, "--keep", "0.5", "--text", "builtin", "--samples", "0"], "samples"),
        (["prune", "--recipe", "nowhere.yaml"], "nowhere.yaml"),
        ([*PRUNE, "--map", "nowhere.yaml"], "nowhere.yaml"),
        (["measure"], "MODEL"),
        (["measure", "m", "--windows", "0"], "windows"),
        (["report"], "OUT"),
        (["inspect", "a", "b"], "b"),
    ],
)
def test_a_refusal_is_one_sentence_on_stderr(
    seen: Seen, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err
    assert err.startswith("secateur: ") and err.count("\n") == 1
    assert seen.recipe is None


def test_refusals_and_interruptions_from_the_run(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(error: BaseException) -> tuple[int, str]:
        monkeypatch.setattr(secateur.run, "prune", raising(error))
        code = cli.main([*PRUNE, "--keep", "0.5"])
        return code, capsys.readouterr().err

    assert ends(SecateurError("no such model", received="m", works="try smollm2")) == (
        2, "secateur: no such model (received: 'm'); try smollm2.\n",
    )  # fmt: skip
    code, err = ends(KeyboardInterrupt())
    assert code == 130 and "secateur prune smollm2 -o out --space weight --score wanda --keep 0.5 --resume" in err
    code, err = ends(OSError(errno.ENOSPC, "No space left on device", "/x/y"))
    assert code == 2 and err == "secateur: No space left on device: /x/y\n"
    with pytest.raises(ZeroDivisionError):  # ours: the hook below turns it into a sentence and exit code 1
        ends(ZeroDivisionError())


def run_python(code: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, env={**os.environ, **env}, timeout=60
    )


FAILING = """
import sys, types, secateur
def inspect(*a, **k): raise RuntimeError("inner\\nmatter")
sys.modules["secateur.run"] = secateur.run = types.SimpleNamespace(inspect=inspect)
from secateur.cli import main
raise SystemExit(main())
"""


def test_our_own_failure_is_a_sentence_and_exit_one() -> None:
    quiet = run_python(FAILING, "inspect", "m")
    assert quiet.returncode == 1 and quiet.stdout == ""
    assert (
        quiet.stderr.count("\n") == 1
        and "RuntimeError: inner matter" in quiet.stderr
        and "SECATEUR_DEBUG=1" in quiet.stderr
    )
    loud = run_python(FAILING, "inspect", "m", SECATEUR_DEBUG="1")
    assert loud.returncode == 1 and "Traceback" in loud.stderr


SLEEPING = """
import sys, time, types, secateur
def prune(*a, **k):
    try:
        print("ready", file=sys.stderr, flush=True); time.sleep(60)
    finally:
        print("cleaned up", file=sys.stderr, flush=True)
sys.modules["secateur.run"] = secateur.run = types.SimpleNamespace(prune=prune)
from secateur.cli import main
raise SystemExit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_cleanly_and_says_how_to_resume(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPING, *PRUNE, "--keep", "0.5"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == ""
    assert (
        err.splitlines()[0] == "cleaned up" and err.splitlines()[1].endswith("--resume") and len(err.splitlines()) == 2
    )


def test_help_teaches_and_is_quick() -> None:
    code = "import sys; from secateur.cli import main\nmain(sys.argv[1:])"
    begin = time.perf_counter()
    done = run_python(code, "prune", "--help")
    assert time.perf_counter() - begin < 2.0  # 0.1 s on a quiet machine; importing torch alone takes more than 1 s
    assert done.returncode == 0 and "secateur prune smollm2" in done.stdout and "%%" not in done.stdout
    assert "torch" not in run_python("import sys, secateur.cli; print([m for m in sys.modules if m == 'torch'])").stdout


LONG = """
import sys, types, secateur
def inspect(*a, **k): return {"words": ["x" * 1000] * 1000}
sys.modules["secateur.run"] = secateur.run = types.SimpleNamespace(inspect=inspect)
from secateur.cli import main
raise SystemExit(main())
"""


@pytest.mark.parametrize("argv", [["inspect", "m", "--json"], ["inspect", "m"], ["--help"]])
def test_a_reader_that_leaves_is_not_an_error(argv: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", LONG, *argv], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


WATCHED = """
import sys, types, secateur
def prune(recipe, out, how, progress):
    progress.phase("calibrating", 4); progress.advance(2); progress.advance()
    return {"out": "x"}
sys.modules["secateur.run"] = secateur.run = types.SimpleNamespace(prune=prune)
from secateur.cli import main
raise SystemExit(main())
"""


def test_progress_is_drawn_only_for_a_terminal_and_never_on_stdout() -> None:
    argv = [sys.executable, "-c", WATCHED, *PRUNE, "--keep", "0.5", "--json"]
    piped = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (piped.stdout, piped.stderr) == ('{"out": "x"}\n', "")
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    shown = subprocess.run(argv, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=60, env=env)
    os.close(theirs)
    drawn = os.read(ours, 100_000).decode()
    os.close(ours)
    assert shown.stdout == '{"out": "x"}\n'
    assert "calibrating" in drawn and "3/4" in drawn and "left" in drawn


def test_values_for_people() -> None:
    assert (
        cell(134515008) == "134,515,008"
        and cell(90_000_000, "bytes") == "90.0 MB"
        and cell(46080, "kv_bytes") == "46.1 kB"
        and cell(None) == "–"
    )
    assert cell(25.1742) == "25.17" and cell(True) == "yes" and cell({"a": 1, "b": None}) == "a 1"
    assert plain({"p": Path("x"), "n": float("nan"), "d": Decimal("0.5"), "t": (1, 2)}) == {
        "p": "x",
        "n": None,
        "d": 0.5,
        "t": [1, 2],
    }
    assert len(page({"family": "llama", "models": [{"model": "a"}, {"model": "[b]red"}], "proved": {"ffn": True}})) == 3


def test_a_dry_run_for_people_says_change_and_time() -> None:
    from io import StringIO

    from rich.console import Console

    told = {"parameters": [200, 150], "bytes": [400, 400], "peak_ram": 2_000_000_000, "ram": {"model": 538_128_000}}
    told |= {"seconds": 2369.0, "phases": {"step 1": 2269.0}, "disk": 1_000, "notes": ["guessed"]}
    console = Console(file=StringIO(), width=100)
    for part in page({"dry_run": told}):
        console.print(part)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert {"parameters 200 150 −25 %", "bytes 400 B 400 B unchanged", "time 39 min 29 s"} <= set(lines)
    assert {"peak ram 2,000.0 MB", "model 538.1 MB", "step 1 37 min 49 s", "disk 1,000 B", "note guessed"} <= set(lines)
