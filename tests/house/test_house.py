"""The rules of the house as tests: floors, sizes, names, and what importing does."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "secateur"
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = {"errors": 0, "anatomy": 1, "sparse": 1, "engine": 2}
FLOORS |= dict.fromkeys(("methods", "runtimes", "training", "search", "measure", "export"), 3)
TOP = 4  # cli run recipe report testing, and the helpers beside them
HOST = {"engine/checkpoint.py"}  # and everything in engine/host/


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, also those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: relative import"
            yield node.lineno, node.module or ""
            if node.module == "secateur":
                yield from ((node.lineno, f"secateur.{alias.name}") for alias in node.names)


def functions(path: Path) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function of a file's surface (module level and methods of module-level classes), and whether a method."""
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, False
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from ((f, True) for f in node.body if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef))


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_only_go_down(path: Path) -> None:
    here = room(path)
    floor = FLOORS.get(here, TOP)
    for line, module in imports(path):
        if not module.startswith("secateur."):
            continue
        there = module.split(".")[1]
        below = FLOORS.get(there, TOP)
        fine = there == here or below < floor or floor == TOP == below
        assert fine, f"{name(path)}:{line}: floor {floor} ({here}) imports {module} on floor {below}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_transformers_is_met_in_one_place(path: Path) -> None:
    if name(path) in HOST or name(path).startswith("engine/host/"):
        return
    for line, module in imports(path):
        assert module.split(".")[0] != "transformers", f"{name(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_prints_pickles_or_blind_excepts(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{name(path)}:{node.lineno}"
            assert node.func.id != "print" or name(path) == "cli.py", f"{name(path)}:{node.lineno} prints"
        if isinstance(node, ast.ExceptHandler):
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"everything"}
            reraises = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
            blind = caught & {"Exception", "everything"} or (caught & {"BaseException"} and not reraises)
            assert not blind, f"{name(path)}:{node.lineno} catches {caught}"
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = {n.id for n in ast.walk(node.exc) if isinstance(n, ast.Name)}
            assert "NotImplementedError" not in raised, f"{name(path)}:{node.lineno} is a stub"
    assert not re.search(r"\bTODO\b|\bFIXME\b|\bXXX\b", text), name(path)
    assert not {m for _, m in imports(path)} & {"pickle", "marshal", "shelve", "dill"}, name(path)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_short_and_introduce_themselves(path: Path) -> None:
    docstring = ast.get_docstring(tree(path)) or ""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert docstring or lines == 0 or not tree(path).body, f"{name(path)} has no header"
    assert lines <= 400 or "long because" in docstring.lower(), f"{name(path)}: {lines} lines and no 'Long because ...'"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_functions_are_narrow(path: Path) -> None:
    for node, method in functions(path):
        if node.name.startswith("_") and node.name != "__init__":
            continue
        a = node.args
        count = len(a.posonlyargs + a.args + a.kwonlyargs) - int(method and "staticmethod" not in _decorators(node))
        assert count <= 6, f"{name(path)}:{node.lineno} {node.name} takes {count} parameters"
        overload = node.name in ("forward", "__init__", "__call__") and method
        assert a.kwarg is None or overload, f"{name(path)}:{node.lineno} {node.name} takes **{a.kwarg.arg}"


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {d.id for d in node.decorator_list if isinstance(d, ast.Name)}


MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
CONTAINERS = {"list", "dict", "set", "defaultdict", "OrderedDict", "Counter", "deque", "bytearray"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_modules_hold_no_state(path: Path) -> None:
    """A table is a constant: capitals, and nobody in the package writes to it."""
    for node in tree(path).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        called = (
            isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Name)
            and node.value.func.id in CONTAINERS
        )
        if isinstance(node.value, MUTABLE) or called:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                assert isinstance(target, ast.Name)
                assert target.id == "__all__" or target.id.isupper(), f"{name(path)}:{node.lineno} {target.id}"
    constants = {
        t.id for n in tree(path).body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
    }
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Global), f"{name(path)}:{node.lineno} uses global"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            writes = node.func.attr in ("append", "extend", "update", "setdefault", "pop", "clear", "add")
            shadow = node.func.value.id in constants and node.func.value.id.isupper()
            assert not (writes and shadow), f"{name(path)}:{node.lineno} writes to {node.func.value.id}"


def test_nothing_names_the_machine_it_was_made_on() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    paths = [ROOT / p for p in listed if p] or [p for p in ROOT.rglob("*.md") if ".venv" not in p.parts]
    machine = re.compile("|".join(("/wo" + "rk/", "/ro" + "ot/", r"\.libr" + "ary")))
    for path in paths:
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".sh", ".txt", ".html", ".json", ""} and path.is_file():
            found = machine.search(path.read_text(encoding="utf-8", errors="replace"))
            assert not found, f"{path.relative_to(ROOT)}: {found and found.group()}"


def test_importing_is_quick_and_patches_nothing() -> None:
    code = (
        "import sys, warnings, signal, logging; before = (warnings.filters[:], signal.getsignal(15), sys.excepthook);"
        "import secateur, secateur.cli, secateur.errors, secateur.progress, secateur.printing;"
        "assert before == (warnings.filters[:], signal.getsignal(15), sys.excepthook);"
        "assert not {'torch', 'transformers', 'rich', 'yaml', 'numpy'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_everything_below_the_host_leaves_transformers_and_torch_as_they_were() -> None:
    code = (
        "import torch, sys; n, d = torch.get_num_threads(), torch.get_default_dtype(); "
        "hooks = len(torch.nn.modules.module._global_forward_hooks);"
        "import secateur.recipe, secateur.methods.scores, secateur.methods.budgets, secateur.methods.joint;"
        "import secateur.anatomy;"
        "assert 'transformers' not in sys.modules, 'transformers was imported';"
        "assert (n, d) == (torch.get_num_threads(), torch.get_default_dtype());"
        "assert hooks == len(torch.nn.modules.module._global_forward_hooks)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_commands_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"setup", "demo", "test", "check", "check-slow", "lint", "docs", "bench"} <= targets
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "guide.md"):
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.M):
            assert target in targets, f"{page.name} names make {target}"


def test_the_commands_of_the_pages_parse() -> None:
    """Every ``secateur ...`` line of the documentation is a command the parser takes."""
    import shlex

    from secateur.cli import _parser

    found = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line in re.findall(
            r"^ *(?:\$ )?secateur ((?:inspect|prune|plan|measure|report|pack|unpack) .*)$", page.read_text(), re.M
        ):
            if "..." in line or "[" in line:
                continue
            _parser().parse_args(shlex.split(line.replace("\\", ""), comments=True))
            found += 1
    assert found >= 5


def test_every_refusal_says_what_works() -> None:
    """`SecateurError(...)` without ``works=`` leaves its reader alone."""
    silent = [
        f"{path.name}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "SecateurError"
        and "works" not in {k.arg for k in node.keywords}
    ]
    assert silent == []


def test_every_recipe_reads() -> None:
    from secateur.parts import parts_of
    from secateur.recipe import Recipe, read_recipe

    files = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(files) >= 8
    for file in files:
        recipe = Recipe.from_words(read_recipe(file))
        assert recipe.title, f"{file.name} has no title"
        for step in recipe.steps:
            parts_of(step)


def test_what_recipes_expect_was_measured() -> None:
    """A figure that a recipe takes from a file of ours is the one in that file."""
    from secateur.recipe import read_recipe

    found = 0
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        expect = read_recipe(file).get("expect", {})
        if str(expect.get("of", "")).startswith("benchmarks/"):
            measured = json.loads((ROOT / expect["of"]).read_text())["rows"][expect["row"]]
            assert expect["perplexity"] == round(measured["perplexity"], 1), file.name
            found += 1
    assert found >= 5


@pytest.mark.parametrize("page", ["README.md", "docs/adding-a-method.md"])
def test_the_method_in_the_pages_works(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of a method, saved as a stranger would, ranks by w^2 times the input's variance."""
    import torch

    from secateur.engine.probes import Evidence, InputMoments
    from secateur.methods.base import MatrixSite, Score
    from secateur.parts import parts_of
    from secateur.step import Step

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    module = f"mine_{page[0].lower()}"
    (tmp_path / f"{module}.py").write_text(next(b for b in blocks if "class Fluctuation" in b))
    monkeypatch.syspath_prepend(str(tmp_path))
    score = parts_of(Step("weight", score=f"{module}:Fluctuation", keep=0.5)).score
    w, x = torch.randn(3, 4, dtype=torch.float64).float(), torch.randn(50, 4)
    probe = InputMoments()
    probe.update(x)
    site = MatrixSite("w", w, "ffn", 0, 1, torch.Generator())
    assert isinstance(score, Score)
    got = score.score(site, Evidence("w", {InputMoments: probe}))
    torch.testing.assert_close(got, w**2 * x.var(0, correction=0), rtol=1e-4, atol=1e-6)


def test_the_python_of_the_readme_names_real_things() -> None:
    """The README's Python runs up to the work itself: names exist, the recipe is legal."""
    import secateur

    block = next(
        b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "Recipe(" in b
    )
    names = re.search(r"from secateur import (.*)", block)
    assert names
    for word in names[1].split(", "):
        assert callable(getattr(secateur, word)), word
    lines = [line for line in block.splitlines() if line.startswith(("from", "step", "text", "recipe"))]
    made: dict[str, object] = {}
    exec(compile("\n".join(lines), "README.md", "exec"), made)
    assert isinstance(made["recipe"], secateur.Recipe)
