"""What one core of this machine does at most: the rates that the benchmark's floors are made of."""

from __future__ import annotations

import ctypes

from .build import load

SOURCE = "peaks"
CHAINS, CELLS = 12, 2048  # as in csrc/peaks.c


def fma(rounds: int) -> int:
    """Runs multiply-adds in registers; returns how many flops that were."""
    library = load(SOURCE)
    _call(library.fnattn_peak_fma_f32, rounds)
    return rounds * 2 * CHAINS * library.fnattn_peak_lanes_f32()


def exponentials(rounds: int) -> int:
    """Runs exponentials in the first-level cache; returns how many."""
    _call(load(SOURCE).fnattn_peak_exp_f32, rounds)
    return rounds * CELLS


def _call(fn, rounds: int) -> float:
    fn.argtypes, fn.restype = [ctypes.c_int64, ctypes.c_float], ctypes.c_float
    return fn(rounds, 0.5)
