"""llama.cpp as one more contender of `decode.py`: reads orders on standard input, answers on standard output.

    PYTHON benchmarks/decode_llama.py MODEL.gguf {Q4_1,Q8_0} THREADS FOLDER

PYTHON is one that has llama-cpp-python, in an environment of its own. Another type than the file's is made by
llama.cpp's own quantiser into FOLDER. An order is one line of JSON, `{"time": [ids, new_tokens]}` or
`{"perplexity": windows}`, and is answered by seconds, or a mean negative log-likelihood. Times are taken here, so that
the pipe is not in them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def quantised(source: Path, kind: str, folder: Path) -> Path:
    """The model as a file of this type."""
    if kind in source.name:
        return source
    target = folder / f"{kind}.gguf"
    if not target.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
        if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
            raise SystemExit(f"llama.cpp could not make {kind} of {source}")
    return target


def timed(model: Any, ids: list[int], new: int) -> list[float]:
    """Seconds of the prompt, until the first token, and of each token after it."""
    model.reset()
    start = time.perf_counter()
    model.eval(ids)
    read = time.perf_counter()
    token = int(np.argmax(np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), (model.n_vocab(),))))
    first = time.perf_counter()
    for _ in range(new - 1):
        model.eval([token])
        token = int(np.argmax(np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), (model.n_vocab(),))))
    return [read - start, first - start, (time.perf_counter() - first) / (new - 1)]


def mean_nll(model: Any, windows: list[list[int]]) -> float:
    """Mean nats per predicted token; every window's first token is unscored."""
    total, count = 0.0, 0
    for window in windows:
        model.reset()
        model.eval(window)
        logits = np.array(model.scores[: len(window) - 1], dtype=np.float64)
        top = logits.max(1)
        norm = top + np.log(np.exp(logits - top[:, None]).sum(1))
        total += float((norm - logits[np.arange(len(window) - 1), window[1:]]).sum())
        count += len(window) - 1
    return total / count


def main() -> None:
    """Answer until standard input ends."""
    source, kind, threads, folder = sys.argv[1:]
    file = quantised(Path(source), kind, Path(folder))

    def opened(context: int, all_logits: bool) -> Any:
        return llama_cpp.Llama(
            str(file), n_ctx=context, n_batch=context, n_ubatch=512, n_threads=int(threads),
            n_threads_batch=int(threads), logits_all=all_logits, verbose=False,
        )  # fmt: skip

    fast = opened(1024, False)
    for line in sys.stdin:
        order = json.loads(line)
        if "time" in order:
            answer: object = timed(fast, *order["time"])
        else:
            windows = order["perplexity"]
            slow = opened(max(map(len, windows)), True)
            answer = mean_nll(slow, windows)
            slow.close()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
