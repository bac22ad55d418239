"""The command line: parse, call, print; no logic.

Exit codes: 0 done, 2 bad input (one message on standard error), 1 our own failure, 130 interrupted.
Standard output carries the result and nothing else; progress goes to standard error when that is a terminal.

Long because every verb's options stand in one place.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import json
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from secateur.errors import SecateurError, is_text
from secateur.helptext import ABOUT, BENCH, INSPECT, MEASURE, MODEL, PACK, PLAN, PRUNE, REPORT, RUN, UNPACK

if TYPE_CHECKING:
    from secateur.progress import Progress

STEP_WORDS = (
    *("space", "score", "method", "keep", "sparsity", "target", "grain", "budget", "apply", "protect", "map"),
    *("include", "exclude", "at_most_worse", "repair", "fit_on", "effort"),
)
RUN_WORDS = ("model", "out", "plan", "pack", "batch_size", "seed", "dtype", "device", "threads", "revision")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """The ``secateur`` command. Returns the exit code."""
    if argv is None:
        sys.excepthook = _our_failure
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _quiet(), _termination():
            return _run(words)
    except SecateurError as error:
        _say(str(error))
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        _say(f"{error.strerror}: {error.filename or 'the output'}")
        return 2
    except KeyboardInterrupt:
        again = [*words, *([] if "--resume" in words else ["--resume"])]
        _say("interrupted" + (f"; go on with: {shlex.join(['secateur', *again])}" if "prune" in words[:1] else ""))
        return 130


def _run(words: list[str]) -> int:
    if odd := [word for word in words if not is_text(word)]:
        raise SecateurError("a word is not UTF-8 text", received=odd[0], works="rename the file, or set a UTF-8 locale")
    try:
        args = _parser().parse_args(words)
    except SystemExit:  # --help and --version
        sys.stdout.flush()
        raise
    with contextlib.redirect_stdout(sys.stderr), _watched() as progress:  # stdout is for the result alone
        data, reason = args.verb(args, progress)
    if not data:  # not the first of several processes: that one speaks
        return 0
    if args.json:
        sys.stdout.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        _print(data)
    sys.stdout.flush()
    if reason:
        _say(reason)
        return 2
    return 0


def _inspect(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str | None]:
    from secateur import run
    from secateur.printing import plain

    found = plain(
        run.inspect(args.model, check=args.check, trust_remote_code=args.trust_remote_code, revision=args.revision)
    )
    return found, found.get("reason") if args.check else None


def _prune(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str | None]:
    from secateur import run
    from secateur.printing import plain
    from secateur.recipe import How, Recipe

    words = _recipe_words(args)
    recipe = Recipe.from_words(words)
    how = How(
        resume=args.resume,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        measure=recipe.measure,
        plan_file=Path(recipe.plan) if recipe.plan else None,
        plan_text=_names_text(words.get("text", {})),
        only_plan=args.only_plan,
    )
    return plain(run.prune(recipe, _out(args, recipe.out), how, progress=progress)), None


def _names_text(text: object) -> bool:
    """Whether a text is named (a seed or a number of windows alone says nothing about which)."""
    return isinstance(text, str) or (isinstance(text, Mapping) and "source" in text)


def _measure(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str | None]:
    from secateur import run
    from secateur.printing import measured
    from secateur.recipe import MeasureRequest

    request = MeasureRequest(
        models=tuple(args.models),
        text=args.text,
        windows=args.windows,
        length=args.length,
        dtype=args.dtype,
        choices=Path(args.choices) if args.choices else None,
        tasks=tuple(args.tasks.split(",")) if args.tasks else (),
        latency=args.latency,
        batch_size=args.batch_size,
        device=args.device,
        threads=args.threads,
        trust_remote_code=args.trust_remote_code,
        revision=args.revision,
    )
    return measured(*run.measure(request, progress=progress)), None


def _write(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str | None]:
    from secateur import run
    from secateur.engine.running import Opening
    from secateur.printing import plain
    from secateur.speed import RunRequest

    how = Opening(args.model, args.dtype, args.own_kernel, args.compile, args.trust_remote_code, args.revision)
    return plain(run.run(RunRequest(how, args.prompt, args.max_new_tokens, args.threads), progress)), None


def _bench(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str | None]:
    from secateur import run
    from secateur.measure.bench import BenchOptions
    from secateur.printing import plain
    from secateur.speed import BenchRequest

    request = BenchRequest(
        models=tuple(args.models),
        options=BenchOptions(_counts(args.batch), _counts(args.prompt_tokens), args.new_tokens, args.rounds),
        dtype=args.dtype,
        threads=args.threads,
        own_kernel=args.own_kernel,
        compiled=args.compile,
        memory=not args.no_memory,
        trust_remote_code=args.trust_remote_code,
        revision=args.revision,
    )
    return plain(run.bench(request, progress)), None


def _counts(text: str) -> tuple[int, ...]:
    """``1,4`` as numbers."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise SecateurError("not a list of whole numbers", received=text, works="1,4 works") from error


def _pack(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str | None]:
    from secateur import run
    from secateur.engine.host.origin import resolve

    origin = resolve(args.model, args.revision, args.trust_remote_code)
    if args.unpack:
        return run.unpack(origin, Path(args.out), args.overwrite, progress), None
    return run.pack(origin, Path(args.out), args.dtype, args.overwrite, progress), None


def _report(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str | None]:
    from secateur import run

    return {"report": str(run.report(Path(args.out)))}, None


def _recipe_words(args: argparse.Namespace) -> dict[str, Any]:
    """The words of ``--recipe`` with the options laid over them."""
    from secateur.recipe import override, read_map, read_recipe

    given = {word: getattr(args, word) for word in (*STEP_WORDS, *RUN_WORDS) if getattr(args, word) is not None}
    if "map" in given:
        given["map"] = read_map(Path(given["map"]))
    text = {"source": args.text, "samples": args.samples, "length": args.length}
    if text := {word: value for word, value in text.items() if value is not None}:
        given["text"] = text
    given |= {"measure": False} if args.no_measure else {}
    given |= {"curve": True} if args.curve else {}
    given |= {"trust_remote_code": True} if args.trust_remote_code else {}
    return override(read_recipe(Path(args.recipe)) if args.recipe else {}, given)


def _out(args: argparse.Namespace, out: str | None) -> Path:
    if out:
        return Path(out)
    if args.recipe:
        return Path("out") / Path(args.recipe).stem
    if args.dry_run:
        return Path("out") / "dry-run"
    raise SecateurError("no output is named", works="-o OUT says where the result goes")


class _Parser(argparse.ArgumentParser):
    """argparse whose refusals are SecateurErrors: one message and nothing else."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if "unrecognized arguments: " in message:
            word = message.split("unrecognized arguments: ")[1].split()[0].split("=")[0]
            options = [o for action in self._actions for o in action.option_strings] + _options(self)
            close = difflib.get_close_matches(word, options, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
        raise SecateurError(message, works=f"{hint}{self.prog} --help lists what works")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [o for g in groups for p in g.choices.values() for a in p._actions for o in a.option_strings]


def _parser() -> _Parser:
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(prog="secateur", description=ABOUT, **shape)
    from secateur import __version__

    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)

    p = verbs.add_parser("inspect", help="what a model is made of and what can be pruned", description=INSPECT, **shape)
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("--check", action="store_true", help="prove mask = cut = reloaded on a toy copy, for every space")
    _origin(p)
    p.set_defaults(verb=_inspect)

    for name, text, only_plan in (("prune", PRUNE, False), ("plan", PLAN, True)):
        about = "decide what stays, without writing weights" if only_plan else "prune a model and write the result"
        p = verbs.add_parser(name, help=about, description=text, **shape)
        _prune_options(p)
        p.set_defaults(verb=_prune, only_plan=only_plan)

    p = verbs.add_parser("measure", help="perplexity, size, choices and speed of models", description=MEASURE, **shape)
    p.add_argument("models", metavar="MODEL", nargs="+", help=f"{MODEL}; the first is the reference")
    p.add_argument("--text", metavar="PATH", help="test text (default: the builtin test text)")
    p.add_argument("--windows", metavar="N", type=int, default=64, help="windows of test text (64)")
    p.add_argument("--length", metavar="N", type=int, default=1024, help="tokens per window (1024)")
    p.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16: what the models run in")
    p.add_argument("--choices", metavar="FILE", help="a JSONL file of multiple-choice items")
    p.add_argument("--tasks", metavar="NAMES", help="lm-eval tasks, comma-separated (needs secateur[tasks])")
    p.add_argument("--latency", action="store_true", help="time prefill and decode, interleaved with the reference")
    p.add_argument("--batch-size", metavar="N", type=int, default=4, help="windows per forward pass (4)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--threads", metavar="N", type=int, help="CPU threads")
    _origin(p)
    p.set_defaults(verb=_measure)

    p = verbs.add_parser("run", help="continue a prompt", description=RUN, **shape)
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("--prompt", metavar="TEXT", required=True, help="what the model continues")
    p.add_argument("--max-new-tokens", metavar="N", type=int, default=64, help="tokens to write at most (64)")
    p.add_argument("--own-kernel", action="store_true", help="run a plain model on our dense kernel")
    _speed(p)
    p.set_defaults(verb=_write)

    p = verbs.add_parser("bench", help="time models side by side", description=BENCH, **shape)
    p.add_argument("models", metavar="MODEL", nargs="+", help=f"{MODEL}; the first is the reference")
    p.add_argument("--batch", metavar="N,N", default="1,4", help="sequences at once (1,4); 1 is the headline")
    p.add_argument("--prompt-tokens", metavar="N,N", default="64,256", help="prompt lengths (64,256)")
    p.add_argument("--new-tokens", metavar="N", type=int, default=24, help="tokens written after each prompt (24)")
    p.add_argument("--rounds", metavar="N", type=int, default=5, help="turns that count (5)")
    p.add_argument("--own-kernel", action="store_true", help="also a dense model on our dense kernel, as the last row")
    p.add_argument("--no-memory", action="store_true", help="leave out the process per model that measures memory")
    _speed(p)
    p.set_defaults(verb=_bench)

    for name, text, about in (("pack", PACK, "leave zeros out of the files"), ("unpack", UNPACK, "undo pack, exactly")):
        p = verbs.add_parser(name, help=about, description=text, **shape)
        p.add_argument("model", metavar="MODEL", help=MODEL if name == "pack" else "a directory that pack wrote")
        p.add_argument("-o", "--out", metavar="OUT", required=True, help="where the result goes")
        if name == "pack":
            p.add_argument("--dtype", default="bf16", help="bf16 (default), fp32, fp16 or int8: of what is written")
        p.add_argument("--overwrite", action="store_true", help="replace an output that secateur wrote")
        _origin(p)
        p.set_defaults(verb=_pack, unpack=name == "unpack")

    p = verbs.add_parser("report", help="redraw report.html from report.json", description=REPORT, **shape)
    p.add_argument("out", metavar="OUT", help="a directory that prune wrote")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    p.set_defaults(verb=_report)
    return parser


def _prune_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    p.add_argument("-o", "--out", metavar="OUT", help="where the result goes")
    p.add_argument("--recipe", metavar="FILE", help="a YAML recipe; options given beside it override it")
    g = p.add_argument_group("what is pruned")
    g.add_argument("--space", help="weight, ffn, kv_group, head, layer or expert")
    g.add_argument("--score", metavar="NAME", help="magnitude, wanda, ria, taylor, ... (docs/methods.md lists all)")
    g.add_argument("--method", metavar="NAME", help="sparsegpt: choose and repair in one sweep")
    g.add_argument("--effort", metavar="E", help="fast, balanced or best: chooses method, budget and repair of weights")
    g.add_argument(
        "--repair", metavar="NAME", help="least_squares, mean_bias, local_ or block_reconstruction: mend what stays"
    )
    g.add_argument(
        "--fit-on", metavar="S", help="whose activations layers are fitted on: dense, pruned, mix[:share=0.25]"
    )
    g.add_argument("--grain", help="row, matrix, columns:128, 2:4, tile:16x16 or unit: who competes with whom")
    g.add_argument("--include", metavar="PATTERN", action="append", help="only tensors whose name matches (repeatable)")
    g.add_argument("--exclude", metavar="PATTERN", action="append", help="not tensors whose name matches (repeatable)")
    g = p.add_argument_group("how much stays (one of these, or an n:m grain)")
    g.add_argument("--keep", metavar="F", help="0.75 or 75%% is a share, a bare integer a count per site")
    g.add_argument("--sparsity", metavar="F", help="keep = 1 - F")
    g.add_argument("--target", metavar="T", help="params=100M, params=-20%%, bytes=90MB or macs=-20%%")
    g.add_argument("--at-most-worse", metavar="F", help="5%%: the most that perplexity may rise; keep is searched")
    g.add_argument(
        "--map", metavar="FILE", help="YAML list of {match: attention | ffn | layers:0-9 | PATTERN, keep: F}"
    )
    g.add_argument("--budget", metavar="NAME", help="uniform, pooled, owl, ...: how much each site keeps")
    g.add_argument("--protect", metavar="ENDS", help="first:2,last:1: layers left whole")
    g.add_argument("--apply", help="mask (zeros) or cut (smaller tensors)")
    g = p.add_argument_group("calibration")
    g.add_argument("--text", metavar="SOURCE", help="builtin, self, a .txt or .jsonl path, or a datasets id")
    g.add_argument("--samples", metavar="N", type=int, help="windows of text (64)")
    g.add_argument("--length", metavar="N", type=int, help="tokens per window (1024)")
    g.add_argument("--batch-size", metavar="N", type=int, help="windows per forward pass (8)")
    g.add_argument("--seed", metavar="N", type=int, help="of text offsets and random choices (0)")
    g.add_argument("--dtype", help="fp32, bf16 or fp16: of the forward passes only")
    g.add_argument("--device", help="auto, cpu or cuda: where the block being worked on lives")
    g.add_argument("--threads", metavar="N", type=int, help="CPU threads")
    g = p.add_argument_group("the run")
    g.add_argument("--dry-run", action="store_true", help="predict size, memory and time, and stop")
    g.add_argument("--resume", action="store_true", help="go on from the last finished block")
    g.add_argument("--overwrite", action="store_true", help="replace an output that secateur wrote")
    g.add_argument("--curve", action="store_true", help="also measure perplexity from 0 to 70 %% sparsity")
    g.add_argument("--no-measure", action="store_true", help="leave out the short measurement at the end")
    g.add_argument("--pack", metavar="DTYPE", nargs="?", const="bf16", help="write the result packed (bf16; see pack)")
    g.add_argument("--plan", metavar="FILE", help="replay a saved plan instead of choosing")
    _origin(p)


def _speed(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dtype", help="fp32, bf16 or fp16 (the model's own); packed matrices keep theirs")
    p.add_argument("--threads", metavar="N", type=int, help="CPU threads")
    p.add_argument("--compile", action="store_true", help="torch.compile for the step of what runs in Transformers")
    _origin(p)


def _origin(p: argparse.ArgumentParser) -> None:
    p.add_argument("--trust-remote-code", action="store_true", help="allow a model's own code to run")
    p.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


@contextlib.contextmanager
def _watched() -> Iterator[Progress]:
    from secateur.progress import Bar, Silent, watching

    if watching():
        with Bar() as bar:
            yield bar
    else:
        yield Silent()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries neither warn nor log nor draw bars while a verb runs, unless SECATEUR_DEBUG is set."""
    if os.environ.get("SECATEUR_DEBUG"):
        yield
        return
    for name, value in (("TRANSFORMERS_VERBOSITY", "critical"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, so that cleaning up happens once, in one way."""

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: signals are somebody else's business
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _our_failure(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    """What an unforeseen exception looks like: one sentence, or the traceback if asked for. Python exits with 1."""
    if os.environ.get("SECATEUR_DEBUG"):
        sys.__excepthook__(kind, error, tb)
        return
    first = " ".join(str(error).split())[:200]
    _say(
        f"this is a failure of secateur, not of your input: {kind.__name__}: {first}. "
        "Run it again with SECATEUR_DEBUG=1 and open an issue with what it prints"
    )


def _print(data: dict[str, Any]) -> None:
    from rich.console import Console

    from secateur.printing import page

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    with console.capture() as text:  # rich would end the process on a closed pipe
        for part in page(data):
            console.print(part)
    sys.stdout.write(text.get())


def _say(text: str) -> None:
    print(f"secateur: {text}", file=sys.stderr)
