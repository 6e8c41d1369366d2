"""How much memory a case needs above its arguments, results and gradients, as the operating system counts it.

Runs in a process of its own, in which every larger block of memory goes back at once when it is freed, so that the peak
of resident memory is the peak of what was held. Linux only: the peak is reset through /proc/self/clear_refs.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from . import upstream
from .case import Case, Contest, Side

PROMPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0", "MALLOC_ARENA_MAX": "1"}
TIMEOUT = 300
MB = 1e6


def extra(case: Case, quick: bool = False) -> dict[str, float] | None:
    """Megabytes by (pass, side), for example {"forward ours": 0.4}; None where the system does not count them."""
    command = [sys.executable, "-W", "ignore", "-m", "fnattn.bench.memory", case.name, *(["quick"] if quick else [])]
    done = subprocess.run(command, env={**os.environ, **PROMPT}, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def measure(case: Case, quick: bool) -> dict[str, float]:
    """What `extra` does, in this process."""
    device = torch.device("cpu")
    small, large = case.build(case.quick, device), case.build(case.quick if quick else case.sizes, device)
    found = {}
    for side in ("ours", "upstream"):
        try:
            warm, real = _side(small, side), _side(large, side)
        except upstream.Missing:
            continue
        if warm is None or real is None:
            continue
        for name, run in (("forward", Side.forward), ("forward+backward", Side.both)):
            # The small one loads libraries and starts pools; room that a kernel keeps for itself is not hidden by it.
            run(warm)
            if name != "forward":
                real.cotangent = torch.zeros_like(real.forward())
            found[f"{name} {side}"] = max(0.0, _peak(run, real) / MB)
    return found


def _side(contest: Contest, which: str) -> Side | None:
    if which == "ours":
        args = contest.args
        if contest.packed:
            args = (tuple(t.contiguous() for t in args[0].chunk(3, -1)), *args[1:])
        return Side(contest.ours, args)
    if contest.theirs is None:
        return None
    opponent = contest.theirs()
    return Side(opponent.fn, contest.args, opponent.parameters, opponent.takes)


def _peak(run: Callable[[Side], Tensor], side: Side) -> int:
    """Bytes held at the peak of one run, without what was there before and what is there after."""
    for t in side.leaves:
        t.grad = None
    gc.collect()
    _trim()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    out = run(side)
    peak = _status("VmHWM")
    kept = out.untyped_storage().nbytes() + sum(t.grad.untyped_storage().nbytes() for t in side.leaves if t.grad is not None)
    return peak - before - kept


def _trim() -> None:
    """Gives freed memory back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name + ":"))


def _main() -> None:
    from . import CASES
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(measure(CASES[sys.argv[1]], "quick" in sys.argv[2:])))


if __name__ == "__main__":
    _main()
