"""Small arguments and a brute-force meaning for every operator in fnattn.ops, so that `check_operator` can run on all.

Sizes are primes, so that no mixed-up axis passes. The causal ones keep some second head axis of another size (grouped
heads), a mask leaves one row without a key.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from fnattn_kernels.contracts import KernelUnavailable
from torch import Tensor

from . import brute

REFERENCE = "reference"
STATES = ("sums", "h0", "state")


class Case(NamedTuple):
    """One way to call one operator.

    name:     for people.
    module:   where the operator lies, under fnattn.ops.
    operator: its name there, and in `brute`.
    tensors:  argument name -> (shape, kind); kinds are in `_make`.
    options:  further keyword arguments.
    dynamic:  per tensor, {axis: name of a size that export leaves free}.
    diff:     indices of differentiated tensors; None: the floating ones.
    """

    name: str
    module: str
    operator: str
    tensors: dict[str, tuple[tuple[int, ...], str]]
    options: dict[str, Any] = {}
    dynamic: tuple[dict[int, str], ...] | None = None
    diff: tuple[int, ...] | None = None

    def args(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """The same tensors every time. States are float32 at least, as everywhere in the library."""
        source = torch.Generator().manual_seed(17)
        wide = torch.promote_types(dtype, torch.float32)
        return tuple(_make(shape, kind, source, wide if name.partition(".")[0] in STATES else dtype)
                     for name, (shape, kind) in self.tensors.items())

    def call(self, impl: str) -> Callable:
        """The operator as a function of the tensors alone; importable, so that it can travel to another process."""
        operator = getattr(importlib.import_module(f"fnattn.ops.{self.module}"), self.operator)
        return partial(_call, operator, names=tuple(self.tensors), options=dict(self.options, impl=impl))

    def brute(self) -> Callable:
        """The same by brute force."""
        return partial(_call, getattr(brute, self.operator), names=tuple(self.tensors), options=self.options)

    def implementations(self) -> tuple[list[str], dict[str, str]]:
        """Names of the implementations that can serve this case here, and the reasons of the others."""
        able, reasons = [REFERENCE], {}
        for kernel in kernels(self.module):
            try:
                with torch.no_grad():
                    self.call(kernel)(*self.args())
            except KernelUnavailable as error:
                reasons[kernel] = str(error)
            else:
                able.append(kernel)
        return able, reasons


def _call(operator: Callable, *tensors: Tensor, names: tuple[str, ...], options: dict[str, Any]):
    given: dict[str, Any] = {}
    for name, t in zip(names, tensors):
        head, _, place = name.partition(".")
        if place:  # "state.0", "state.1": one argument made of several tensors
            given[head] = given.get(head, ()) + (t,)
        else:
            given[head] = t
    return operator(**given, **options)


def _make(shape: tuple[int, ...], kind: str, source: torch.Generator, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=source, dtype=torch.float64)
    if kind == "normal":
        return x.to(dtype)
    if kind == "gate":  # between 0 and 1
        return x.sigmoid().to(dtype)
    if kind == "positive":
        return x.abs().add(0.5).to(dtype)
    if kind == "mask":  # nothing is visible to the first row of the last axis
        keep = x > -0.3
        keep.view(-1, shape[-1])[0] = False
        return keep
    if kind == "positions":
        return torch.arange(shape[0]) + 3
    if kind == "three":
        return torch.tensor(3)
    raise ValueError(f"testing.cases: expected a known kind; got {kind!r}.\n  See _make.")


def _qkv(b: int = 2, h: int = 2, g: int = 2, n: int = 5, m: int = 5, d: int = 3, e: int = 2) -> dict:
    return {"q": ((b, h, n, d), "normal"), "k": ((b, g, m, d), "normal"), "v": ((b, g, m, e), "normal")}


_BN = ({0: "b", 2: "n"},) * 3
_SCAN = ({0: "b"},) * 2  # the references are one program for each length

CASES = (
    Case("causal_dot", "causal_dot", "causal_dot", _qkv(), dynamic=_BN),
    Case("causal_dot, reverse, one key head", "causal_dot", "causal_dot", _qkv(b=1, h=3, g=1), {"reverse": True}),
    Case("scan", "scan", "scan", {"a": ((2, 7, 3), "gate"), "x": ((2, 7, 3), "normal")}, dynamic=_SCAN),
    Case("scan, pairs, reverse, h0", "scan", "scan",
         {"a": ((2, 5, 3, 2), "gate"), "x": ((2, 5, 3, 2), "normal"), "h0": ((2, 3, 2), "normal")},
         {"pairs": True, "reverse": True}),
    Case("taylor", "taylor", "taylor", _qkv(b=2, h=2, g=2, d=2), dynamic=_BN),
    Case("taylor, one key head, weights, earlier sums", "taylor", "taylor",
         {**_qkv(b=1, h=3, g=1, d=2), "keep": ((1, 5), "positive"), "sums": ((1, 1, 6, 3), "positive")}),
    Case("taylor, not causal, mask", "taylor", "taylor",
         {**_qkv(b=2, h=2, g=1, m=7, d=2), "keep": ((2, 7), "mask")}, {"causal": False}),
    Case("gate_loop", "gate_loop.complex", "gate_loop",
         {**_qkv(b=1, h=2, g=2, n=3, m=3, d=2), "a": ((1, 2, 3, 2), "normal")}),
    Case("gate_loop, width 1, state", "gate_loop.complex", "gate_loop",
         {**_qkv(b=1, h=3, g=3, n=3, m=3, d=1, e=1), "a": ((1, 3, 3, 2), "normal"), "state.0": ((1, 3, 1, 1, 2), "normal"),
          "state.1": ((1, 3, 2), "normal")}),
    Case("simple_gate_loop", "gate_loop.simple", "simple_gate_loop",
         {"q": ((2, 5, 3), "normal"), "kv": ((2, 5, 3), "normal"), "a": ((2, 5, 3), "normal")},
         dynamic=({0: "b"},) * 3),
    Case("simple_gate_loop, reverse, h0", "gate_loop.simple", "simple_gate_loop",
         {"q": ((1, 5, 3), "normal"), "kv": ((1, 5, 3), "normal"), "a": ((1, 5, 3), "normal"), "h0": ((1, 3), "normal")},
         {"reverse": True}),
    Case("softmax_attention", "softmax", "softmax_attention",
         _qkv(m=7), dynamic=({0: "b", 2: "n"}, {0: "b", 2: "m"}, {0: "b", 2: "m"})),
    Case("softmax_attention, causal, one key head", "softmax", "softmax_attention",
         _qkv(b=1, h=3, g=1), {"causal": True}),
    Case("softmax_attention, mask, offset", "softmax", "softmax_attention",
         {**_qkv(b=2, h=2, g=1, n=3, m=7), "mask": ((2, 1, 3, 7), "mask"), "offset": ((), "three")}, {"causal": True}),
    Case("cached_attention", "cached_attention", "cached_attention",
         {**_qkv(n=3, m=7), "k_late": ((2, 2, 3, 3), "normal"), "v_late": ((2, 2, 3, 2), "normal")}, {"first": 5, "length": 7},
         dynamic=({0: "b"},) * 5),
    Case("cached_attention, one key head, mask", "cached_attention", "cached_attention",
         {**_qkv(b=2, h=3, g=1, n=2, m=3), "k_late": ((2, 1, 5, 3), "normal"), "v_late": ((2, 1, 5, 2), "normal"),
          "mask": ((2, 1, 2, 7), "mask")}, {"first": 3, "length": 7, "scale": 0.7}),
    Case("conv_attention", "conv_attention", "conv_attention", _qkv(h=1, g=1, n=11, m=11, d=2),
         {"text_len": 2, "image_size": 3, "kernel_size": 3}, dynamic=({0: "b"},) * 3),
    Case("conv_attention, dilated, one key head, mask", "conv_attention", "conv_attention",
         {**_qkv(b=2, h=3, g=1, n=10, m=10, d=2), "mask": ((2, 10), "mask")},
         {"text_len": 3, "image_size": 3, "kernel_size": 3, "dilation": 2, "text_sees_all": True}),
    Case("axial_attention, rows", "axial_attention", "axial_attention", _qkv(h=1, g=1, n=11, m=11, d=2),
         {"text_len": 2, "image_size": 3}, dynamic=({0: "b"},) * 3),
    Case("axial_attention, columns, one key head, mask", "axial_attention", "axial_attention",
         {**_qkv(b=2, h=3, g=1, n=10, m=10, d=2), "mask": ((2, 10), "mask")}, {"text_len": 3, "image_size": 3, "axis": 1}),
    # Two axes: for more, what torch records of its own linear's gradient under make_fx with symbolic sizes does not run.
    Case("linear", "linear", "linear", {"x": ((3, 5), "normal"), "weight": ((7, 5), "normal"), "bias": ((7,), "normal")},
         dynamic=({0: "b"}, {}, {})),
    Case("rms_norm", "rms_norm", "rms_norm", {"x": ((2, 3, 5), "normal"), "gamma": ((5,), "normal")}, dynamic=({0: "b", 1: "n"}, {})),
    Case("masked_softmax", "masked_softmax", "masked_softmax", {"scores": ((3, 7), "normal"), "mask": ((3, 7), "mask")},
         dynamic=({0: "b"}, {0: "b"})),
    Case("rotary", "rotary", "rotary",
         {"x": ((2, 2, 5, 7), "normal"), "positions": ((5,), "positions"), "freqs": ((3,), "positive")}),
    Case("coor_descent", "coor_descent", "coor_descent", {"s": ((3, 7), "normal"), "k": ((3,), "positive")},
         {"n_iters": 5, "eps": 0.3, "eps_init": 2.0, "eps_decay": 0.7}, dynamic=({0: "b"}, {0: "b"})),
    Case("coor_descent, exact, mask", "coor_descent", "coor_descent",
         {"s": ((3, 7), "normal"), "k": ((3,), "positive"), "mask": ((3, 7), "mask")}, {"solver": "exact", "eps": 0.3}),
    Case("coor_descent_attention", "coor_attention", "coor_descent_attention",
         {**_qkv(b=2, g=1, n=3), "sparsity_k": ((3,), "positive")},
         {"n_iters": 3, "eps": 0.3, "eps_init": 2.0, "eps_decay": 0.7}, dynamic=({0: "b"}, {0: "b"}, {0: "b"}, {})),
    Case("block_sparse_attention", "block_sparse", "block_sparse_attention",
         {**_qkv(), "layout": ((1, 3, 3), "mask")}, {"block": 2},
         dynamic=({0: "b"}, {0: "b"}, {0: "b"}, {})),
)


def modules() -> dict[str, Any]:
    """Every module of fnattn.ops that offers a choice of kernels, by its name below fnattn.ops."""
    package = importlib.import_module("fnattn.ops")
    names = [m.name for m in pkgutil.walk_packages(package.__path__, "fnattn.ops.") if "._" not in m.name]
    found = {name.removeprefix("fnattn.ops."): importlib.import_module(name) for name in sorted(names)}
    return {name: module for name, module in found.items() if hasattr(module, "KERNELS")}


def kernels(module: str) -> list[str]:
    """Names of the kernels of an operator's module, whether or not they can run here."""
    return [kernel.name for kernel in modules()[module].KERNELS] if module in modules() else []


def pairs() -> list[tuple[Case, str]]:
    """Every case with every implementation that it may have."""
    return [(case, impl) for case in CASES for impl in (REFERENCE, *kernels(case.module))]
