"""What instructions of a step work on: rows of numbers in the scratch of its call, and tensors where they lie; see steps.py."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .build import load
from .call import SUFFIX

(NORM, LAYER_NORM, LINEAR, EMBED, COPY, ADD, MULTIPLY, GATE, TURN, APPEND, FLUSH, SHIFT, GATHER, SEEN, COMPLEX_PRODUCT, LAYOUT,
 MEET, HIDE, MIX, AVERAGE, SPARSITY, WIDEN_ROWS, NARROW_ROWS, CALL_TAYLOR, CALL_DECODE, CALL_SIMPLE, CALL_NARROW, CALL_WIDE, CALL_ITERATE,
 CALL_EXACT) = range(30)
DONE, NO_MEMORY, OUT_OF_RANGE = range(3)
# What weights and caches may be, and what rows in the scratch and the states of loops are then.
KINDS = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}
LINE = 16  # numbers of a cache line, at least


class Unfit(Exception):
    """Tensors that this step cannot be written for."""


class Row(NamedTuple):
    """One row of numbers per sequence. `at`: an address, or -1 - i for the i-th number of the scratch."""

    at: int
    width: int
    stride: int  # from one row to the next


class Mask(NamedTuple):
    """Bytes that say which keys are there. `at` as of a Row; batch, head: from one sequence and head to the next; width: keys."""

    at: int
    batch: int
    head: int
    width: int


ALL = Mask(0, 0, 0, 0)  # nothing is hidden


class Rows:
    """The instructions so far. Rows in the scratch follow each other without a gap.

    dtype: that of weights, caches, inputs and results; wide: of rows in the scratch, and of states that are sums.
    """

    def __init__(self, rows: int, dtype: torch.dtype):
        self.rows, self.dtype, self.wide = rows, dtype, KINDS[dtype]
        self.half = dtype is not self.wide
        self.size, self.number = dtype.itemsize, self.wide.itemsize  # in bytes
        self.results: list[tuple[Row, Tensor]] = []  # to be narrowed at the end
        self.code: list[int] = []
        self.kept: list[Any] = []  # what must live until the run
        self.space = 0
        # For kept_steps.py: whether the instructions serve this position only; else positions of states, and from which on the
        # instructions are others; which numbers in the code grow with which of these.
        self.fixed = False
        self.clocks: list[tuple[Tensor, float]] = []
        self.counts: list[tuple[int, int]] = []

    def room(self, width: int) -> Row:
        """Rows in the scratch."""
        return Row(self.place_for(self.rows * width), width, width)

    def place_for(self, count: int) -> int:
        """Where in the scratch there is room for so many numbers."""
        at = self.space
        self.space = at + -(-count // LINE) * LINE
        return -1 - at

    def result(self, width: int, x: Tensor | None = None) -> tuple[Tensor, Row]:
        """Rows that outlive the call, as a tensor [b, 1, width] too; x: one that may be shaped so already."""
        if x is not None and x.dtype is self.dtype and x.shape == (self.rows, 1, width) and x.is_contiguous():
            out = torch.empty_like(x)  # a third of the time of the other
        else:
            out = torch.empty((self.rows, 1, width), dtype=self.dtype)
        if not self.half:
            return out, Row(out.data_ptr(), width, width)
        row = self.room(width)
        self.results.append((row, out))
        return out, row

    def given(self, x: Tensor) -> Row:
        """The rows of x [b, 1, width], where they lie, or widened."""
        fits(x.dtype is self.dtype and x.ndim == 3 and x.shape[:2] == (self.rows, 1) and (x.stride(2) == 1 or x.shape[2] == 1))
        if not self.half:
            return Row(x.data_ptr(), x.shape[2], x.stride(0))
        row = self.room(x.shape[2])
        self.code += (WIDEN_ROWS, x.data_ptr(), x.stride(0), row.at, row.stride, self.rows, row.width)
        return row

    def store(self, x: Row, to: Tensor) -> None:
        """to = x: rows [b, 1, width] of a state's dtype, side by side."""
        fits(to.dtype is self.dtype and to.shape == (self.rows, 1, x.width) and to.is_contiguous())
        self.code += (NARROW_ROWS if self.half else COPY, x.at, x.stride, to.data_ptr(), x.width, self.rows, x.width)

    def vector(self, x: Tensor) -> int:
        """The place of a vector of weights as numbers of the scratch's kind."""
        if not self.half:
            return x.data_ptr()
        at = self.place_for(x.numel())
        self.code += (WIDEN_ROWS, x.data_ptr(), 0, at, 0, 1, x.numel())
        return at

    def narrow(self, x: Row) -> int:
        """The place of rows as numbers of a cache's kind."""
        if not self.half:
            return x.at
        at = self.place_for(-(-self.rows * x.width * self.size // self.number))
        self.code += (NARROW_ROWS, x.at, x.stride, at, x.width, self.rows, x.width)
        return at

    def clock(self, position: Tensor) -> None:
        """What follows depends on this position of a state by nothing but numbers that `counted` knows of."""
        self.clocks.append((position, math.inf))

    def counted(self, from_end: int, until: float = math.inf) -> None:
        """The number that was written so many places before the end is one more at the next position, up to `until`."""
        if self.clocks:
            self.counts.append((len(self.code) - from_end, len(self.clocks) - 1))
            position, before = self.clocks[-1]
            self.clocks[-1] = position, min(before, until)


def fits(so: bool) -> None:
    """Raises Unfit unless so."""
    if not so:
        raise Unfit


@functools.cache
def kernel(source: str, name: str, dtype: torch.dtype) -> int:
    """The address of a C function."""
    return ctypes.cast(getattr(load(source), f"fnattn_{name}_{SUFFIX[dtype]}"), ctypes.c_void_p).value


@functools.lru_cache(maxsize=256)
def bits(number: float) -> int:
    """A double as an integer with the same bits."""
    return struct.unpack("q", struct.pack("d", number))[0]
