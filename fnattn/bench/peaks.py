"""The machine's own limits, measured first: what the floors of the table are divided by."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.native import peaks as native

from .case import Work

ROUNDS, SECONDS = 7, 0.03
MEGABYTE = 1 << 20


class Peaks(NamedTuple):
    """Per second, on all threads together: float32 flops as multiply-adds, exponentials, bytes read plus written."""

    flops: float
    exps: float
    bytes: float
    how: str

    def floor(self, work: Work | None) -> float | None:
        """Milliseconds that the work takes at least, if arithmetic and memory overlap perfectly."""
        if work is None:
            return None
        return 1e3 * max(work.flops / self.flops + work.exps / self.exps, work.bytes / self.bytes)


def measure(threads: int) -> Peaks:
    """Some tenths of a second of each. Best of several tries: a peak is what was possible once."""
    source, target = torch.ones(64 * MEGABYTE // 4), torch.empty(64 * MEGABYTE // 4)
    copied = _rate(lambda: target.copy_(source), 2 * source.nbytes, 1)
    try:
        flops, exps = _best(native.fma, threads), _best(native.exponentials, threads)
        return Peaks(flops, exps, copied, "multiply-adds in registers, exponentials in cache, copy of 64 MB")
    except KernelUnavailable:  # no compiler: what torch reaches
        a = torch.ones(512, 512)
        return Peaks(_rate(lambda: a @ a, 2 * 512 ** 3, 8), _rate(lambda: a.exp(), a.numel(), 64), copied,
                     "torch.mm, torch.exp, copy of 64 MB: there is no compiler, so true peaks are higher")


def _rate(fn: Callable, amount: float, calls: int) -> float:
    def once() -> float:
        began = time.perf_counter()
        for _ in range(calls):
            fn()
        return (time.perf_counter() - began) / calls

    once()
    return amount / min(once() for _ in range(ROUNDS))


def _best(run: Callable[[int], int], threads: int) -> float:
    """Operations per second of `threads` threads: ctypes lets go of the interpreter, so they run side by side."""
    now = time.process_time if threads == 1 else time.perf_counter
    rounds = run(1) and 1000  # builds the library
    while True:
        began = now()
        run(rounds)
        if now() - began > SECONDS / 2:
            break
        rounds *= 2
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            began = now()
            done = sum(pool.map(run, [rounds] * threads))
            found.append(done / (now() - began))
    return max(found)
