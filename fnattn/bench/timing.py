"""How long two things take, one against the other, on a machine that others use too.

One thread: processor time of the process, which waiting for a turn does not count. Several: the clock on the wall. The
two sides take turns; each round gives a ratio, and the median of the rounds counts, so that a slow minute hurts both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

SLICE = 0.02  # seconds that one measurement should last at least: clocks of processor time are coarse


class Times(NamedTuple):
    """Medians over the rounds, in milliseconds per call; spread is the range of the ratios' middle half, as a part."""

    ours: float
    theirs: float | None
    ratio: float | None
    spread: float | None


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds; only differences mean something."""
    if device.type == "cuda":
        def now() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()
        return now
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def once(fn: Callable, calls: int, now: Callable[[], float]) -> float:
    """Seconds per call."""
    began = now()
    for _ in range(calls):
        fn()
    return (now() - began) / calls


def alternate(ours: Callable, theirs: Callable | None, rounds: int, device: torch.device) -> Times:
    """ours, theirs, ours, theirs, ...; the first call of each is not counted."""
    measured = _turns([ours] + ([theirs] if theirs else []), rounds, device)
    milliseconds = [1e3 * statistics.median(column) for column in zip(*measured, strict=True)]
    if not theirs:
        return Times(milliseconds[0], None, None, None)
    ratios = sorted(b / a for a, b in measured)
    ratio = statistics.median(ratios)
    return Times(*milliseconds, ratio, (ratios[3 * len(ratios) // 4] - ratios[len(ratios) // 4]) / ratio)


def least(sides: Sequence[Callable], rounds: int, device: torch.device) -> list[float]:
    """Milliseconds per call of each, taking turns: the least of the rounds, since what disturbs a call only adds to it."""
    return [1e3 * min(column) for column in zip(*_turns(sides, rounds, device), strict=True)]


def _turns(sides: Sequence[Callable], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds per call of each side in each round."""
    now = clock(device)
    calls = []
    for side in sides:
        first = once(side, 1, now)
        again = first if first > SLICE * 10 else once(side, 1, now)  # the first call may have built something
        calls.append(max(1, min(1000, round(SLICE / max(again, 1e-6)))))
    return [[once(side, count, now) for side, count in zip(sides, calls, strict=True)] for _ in range(rounds)]
