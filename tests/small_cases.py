"""The least that each operator with a Triton kernel can be called with, so that all of testing.CHECKS run on it in seconds.

Tables of second derivatives and derivatives of Jacobians run a kernel once for every pair of numbers, so there are few. Sizes that
fill several tiles, and axes that nothing mixes up, are what the other files of tests/kernels/interpreted are about.

Importing this puts `torch_triton` under our kernels: a process that checks compilation has to import it too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch_triton
from torch import Tensor

from fnattn.testing.cases import CASES, Case, kernels

torch_triton.install()


def _qkv(h: int = 1, n: int = 2, m: int | None = None, d: int = 1) -> dict:
    """One key head; values of width 1."""
    m = n if m is None else m
    return {"q": ((1, h, n, d), "normal"), "k": ((1, 1, m, d), "normal"), "v": ((1, 1, m, 1), "normal")}


_CHANNELS = dict.fromkeys(("q", "kv", "a"), ((1, 2, 1), "normal"))
_LATE = {"k_late": ((1, 1, 1, 1), "normal"), "v_late": ((1, 1, 1, 1), "normal")}
_PICTURE = {"text_len": 1, "image_size": 2}
_CACHE = {"first": 2, "length": 3}

TENSORS = {
    "causal_dot": _qkv(),
    "causal_dot, reverse, one key head": _qkv(h=2),
    "scan": {"a": ((1, 3, 1), "gate"), "x": ((1, 3, 1), "normal")},
    "scan, pairs, reverse, h0": {"a": ((1, 2, 1, 2), "gate"), "x": ((1, 2, 1, 2), "normal"), "h0": ((1, 1, 2), "normal")},
    "taylor": _qkv(),
    "taylor, one key head, weights, earlier sums": {**_qkv(h=2, n=1), "keep": ((1, 1), "positive"), "sums": ((1, 1, 3, 2), "positive")},
    "taylor, not causal, mask": {**_qkv(m=3), "keep": ((1, 3), "mask")},
    "gate_loop": {**_qkv(d=2), "a": ((1, 1, 2, 2), "normal")},
    "gate_loop, width 1, state": {**_qkv(), "a": ((1, 1, 2, 2), "normal"), "state.0": ((1, 1, 1, 1, 2), "normal"),
                                  "state.1": ((1, 1, 2), "normal")},
    "simple_gate_loop": _CHANNELS,
    "simple_gate_loop, reverse, h0": {**_CHANNELS, "h0": ((1, 1), "normal")},
    "softmax_attention": _qkv(m=3),
    "softmax_attention, causal, one key head": _qkv(h=2),
    "softmax_attention, mask, offset": {**_qkv(m=3), "mask": ((1, 1, 2, 3), "mask"), "offset": ((), "three")},
    "cached_attention": {**_qkv(n=1, m=2), **_LATE},
    "cached_attention, one key head, mask": {**_qkv(h=2, m=2), **_LATE, "mask": ((1, 1, 2, 3), "mask")},
    "conv_attention": _qkv(n=3),
    "conv_attention, dilated, one key head, mask": {**_qkv(h=2, n=3), "mask": ((1, 3), "mask")},
    "axial_attention, rows": _qkv(n=3),
    "axial_attention, columns, one key head, mask": {**_qkv(h=2, n=3), "mask": ((1, 3), "mask")},
    "coor_descent": {"s": ((1, 3), "normal"), "k": ((1,), "positive")},
    "coor_descent, exact, mask": {"s": ((2, 3), "normal"), "k": ((2,), "positive"), "mask": ((2, 3), "mask")},
    "block_sparse_attention": {**_qkv(n=3), "layout": ((1, 2, 2), "mask")},
}
OPTIONS = {"coor_descent": {"n_iters": 2}, "cached_attention": _CACHE, "cached_attention, one key head, mask": _CACHE,
           "conv_attention": _PICTURE, "conv_attention, dilated, one key head, mask": _PICTURE, "axial_attention, rows": _PICTURE,
           "axial_attention, columns, one key head, mask": _PICTURE}

SMALL = {case.name: case._replace(tensors=TENSORS[case.name], options={**case.options, **OPTIONS.get(case.name, {})})
         for case in CASES if "triton" in kernels(case.module)}


def run(fn: Callable, *tensors: Tensor):
    """fn(*tensors). That it lies here is why another process imports this file before it calls fn."""
    return fn(*tensors)


def call(case: Case) -> Callable:
    """The case by Triton, as a function that travels to another process."""
    return functools.partial(run, case.call("triton"))
