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
from fnattn.testing.operators import _apart_worker
from fnattn.testing.subject import subject

torch_triton.install()


def _qkv(n: int = 2, m: int | None = None, d: int = 1) -> dict:
    """One head; values of width 1."""
    m = n if m is None else m
    return {"q": ((1, 1, n, d), "normal"), "k": ((1, 1, m, d), "normal"), "v": ((1, 1, m, 1), "normal")}


TENSORS = {
    "causal_dot": _qkv(),
    "scan": {"a": ((1, 3, 1), "gate"), "x": ((1, 3, 1), "normal")},
    "taylor": _qkv(),
    "gate_loop": {**_qkv(d=2), "a": ((1, 1, 2, 2), "normal")},
    "simple_gate_loop": dict.fromkeys(("q", "kv", "a"), ((1, 2, 1), "normal")),
    "softmax_attention": _qkv(m=3),
    "cached_attention": {**_qkv(n=1, m=2), "k_late": ((1, 1, 1, 1), "normal"), "v_late": ((1, 1, 1, 1), "normal")},
    "conv_attention": _qkv(n=3),
    "axial_attention, rows": _qkv(n=3),
    "coor_descent": {"s": ((1, 3), "normal"), "k": ((1,), "positive")},
    "block_sparse_attention": {**_qkv(n=3), "layout": ((1, 3, 3), "mask")},
}
OPTIONS = {"coor_descent": {"n_iters": 2}, "cached_attention": {"first": 2, "length": 3}, "block_sparse_attention": {"block": 1},
           "conv_attention": {"text_len": 1, "image_size": 2}, "axial_attention, rows": {"text_len": 1, "image_size": 2}}

SMALL = {case.name: case._replace(tensors=TENSORS[case.name], options={**case.options, **OPTIONS.get(case.name, {})})
         for case in CASES if case.name in TENSORS}
# With other options, and larger.
OTHERS = [case for case in CASES if "triton" in kernels(case.module) and case.name not in SMALL]


def run(fn: Callable, *tensors: Tensor):
    """fn(*tensors). That it lies here is why another process imports this file before it calls fn."""
    return fn(*tensors)


def call(case: Case) -> Callable:
    """The case by Triton, as a function that travels to another process."""
    return functools.partial(run, case.call("triton"))


def apart(_, name: str) -> str | None:
    """The answer of one check "case: check" of compilation or export; see testing.apart, whose worker this is."""
    of, _, check = name.partition(": ")
    case = SMALL[of]
    tested = subject(call(case), case.args(), like=case.brute(), diff=case.diff)
    return _apart_worker((tested, tested._replace(fn=case.brute()), 1e-8), check)
