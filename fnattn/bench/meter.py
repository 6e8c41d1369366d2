"""What a device says about a call: time and memory, within a budget of seconds. On CUDA by events; on a CPU by the clock.

The other files of the GPU's benchmark ask a Meter and nothing else, so that all of them run on a CPU as well.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .peaks import Peaks

CACHE = 256 << 20  # bytes, more than any second-level cache: written before each measurement, so that nothing is in it
SLICE = 0.2        # seconds that the repeats of one measurement may take
MOST = 30          # repeats
MB = 1e6


class Meter:
    """Measures calls on one device. `seconds`: after so long no further measurement should be begun; see `left`."""

    def __init__(self, device: torch.device, seconds: float, clock: Callable[[], float] = time.perf_counter):
        self.device, self.clock, self.end = device, clock, clock() + seconds
        self.cuda = device.type == "cuda"
        self.flush = torch.empty(CACHE if self.cuda else 0, dtype=torch.uint8, device=device)

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.end - self.clock()

    def wait(self) -> None:
        """Until the device has done all."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def once(self, fn: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        if not self.cuda:
            began = self.clock()
            fn()
            return 1e3 * (self.clock() - began)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        fn()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def time(self, fn: Callable[[], Any]) -> float:
        """The median of several calls, in milliseconds, after two that compile and warm up."""
        fn()
        self.wait()
        began = self.clock()
        fn()
        self.wait()
        first = max(self.clock() - began, 1e-6)
        return statistics.median(self.once(fn) for _ in range(min(MOST, max(3, round(SLICE / first)))))

    def memory(self, fn: Callable[[], Any]) -> float | None:
        """Megabytes held at most during a call, above what was there before; None where the device does not count."""
        if not self.cuda:
            return None
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        fn()
        self.wait()
        return (torch.cuda.max_memory_allocated(self.device) - before) / MB

    def peaks(self) -> dict[torch.dtype, Peaks]:
        """Bytes per second of a copy, exponentials, and flops per second of a product in each dtype; float32 without TF32."""
        size, n = (1 << 28, 8192) if self.cuda else (1 << 22, 256)
        source = torch.ones(size, device=self.device)
        target = torch.empty_like(source)
        copied = 2 * source.nbytes / (1e-3 * self.time(lambda: target.copy_(source)))
        exps = size / (1e-3 * self.time(lambda: torch.exp(source, out=target)))
        found = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a = torch.ones(n, n, dtype=dtype, device=self.device)
            found[dtype] = Peaks(2 * n ** 3 / (1e-3 * self.time(lambda a=a: a @ a)), exps, copied, f"torch.mm of {n}, torch.exp, copy")
        return found
