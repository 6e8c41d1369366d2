"""Calling a C function with tensors: pointers, argument types, and how many threads a call is worth."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from .build import load

SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
# Multiply-adds below which waking a second thread costs more than it saves.
PARALLEL_FROM = 1 << 17


@functools.cache
def function(source: str, name: str, dtype: torch.dtype, arguments: str):
    """The C function fnattn_<name>_<f32|f64|bf16> of csrc/<source>.c; `arguments` spells its types (p pointer, i int64, d double)."""
    fn = getattr(load(source), f"fnattn_{name}_{SUFFIX[dtype]}")
    fn.argtypes = [TYPES[letter] for letter in arguments]
    fn.restype = ctypes.c_int if name.startswith("try_") else None
    return fn


def sums_dtype(rows: Tensor) -> torch.dtype:
    """What a kernel sums such rows in, and keeps states in: float32 for bfloat16."""
    return torch.float32 if rows.dtype == torch.bfloat16 else rows.dtype


def address(t: Tensor | None) -> int | None:
    """The address of a tensor's first element; None (a null pointer) for None."""
    return None if t is None else t.data_ptr()


_ABSENT = (0, 0, 0, 0)


def strided(t: Tensor | None) -> tuple[int, ...]:
    """Address and first three strides of a tensor, zeros for None: `strided` in csrc/softmax_call.h."""
    return _ABSENT if t is None else (t.data_ptr(), *t.stride()[:3])


def numbers(first: Sequence[int], tensors: Sequence[Tensor | None]) -> bytes:
    """int64 for a C function that takes its arguments as one struct: numbers, then a `strided` for each tensor. C must not write."""
    every = list(first)
    for t in tensors:
        every += _ABSENT if t is None else (t.data_ptr(), *t.stride()[:3])
    return _struct(len(every)).pack(*every)


@functools.cache
def _struct(count: int) -> struct.Struct:
    return struct.Struct(f"{count}q")


def rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, copied only if the numbers of a row do not lie side by side."""
    return [t if t is None or t.stride(-1) == 1 or t.shape[-1] < 2 else t.contiguous() for t in tensors]


def merged(like: Tensor, width: int) -> Tensor:
    """An empty [b, heads, rows, width] that lies in memory as [b, rows, heads, width]: merging the heads copies nothing."""
    b, heads, count = like.shape[:3]
    return like.new_empty_strided((b, heads, count, width), (count * heads * width, width, heads * width, 1))


def threads(work: int) -> int:
    """How many threads a call of `work` multiply-adds may use: torch's setting, or 1 if it is small."""
    return torch.get_num_threads() if work >= PARALLEL_FROM else 1
