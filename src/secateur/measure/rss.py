"""``python -m secateur.measure.rss ORDER``: one process, one model, one prompt; writes its peak resident bytes.

A process of its own because a peak never comes down again: measured in place, the second model would inherit
the first one's. ORDER is JSON as `secateur.measure.latency` makes it: ``{"path", "dtype", "threads", "options"}``, and
``"trust_remote_code"`` where the model brings code of its own.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch


def peak_bytes() -> int:
    """Peak resident bytes of this process so far.

    Linux's VmHWM belongs to this program alone; getrusage's figure would be inherited from the (large)
    process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(order: str) -> int:
    """Load, prefill, decode; returns the peak."""
    from secateur.engine.checkpoint import load
    from secateur.measure.latency import LatencyOptions, latency

    words = json.loads(order)
    torch.set_num_threads(words["threads"])
    trust = words.get("trust_remote_code", False)
    model = load(Path(words["path"]), dtype=getattr(torch, words["dtype"]), trust_remote_code=trust).eval()
    options = LatencyOptions(**{**words["options"], "repeats": 1, "rss": False})
    latency([model], options)
    return peak_bytes()


if __name__ == "__main__":
    sys.stdout.write(f"{main(sys.argv[1])}\n")
