"""Every implementation of an operator against its plain-torch reference: what `fnattn bench --op` prints."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import random, tree
from ..core import KernelUnavailable
from ..ops._door import REFERENCE
from ..ops.report import CASES, Case

# Largest error as a part of the largest entry. float64 catches wrong mathematics, also in packages that compute inside in
# float32; float32 catches a wrong precision.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


HEAD = f"{'operator':<23}{'n':>6}  {'impl':<24}{'forward ms':>11}{'x ref':>7}{'with gradient ms':>18}{'x ref':>7}"


def line(row: dict) -> str:
    """One row as text."""
    head = f"{row['operator']:<23}{row['n']:>6}  {row['impl']:<24}"
    if "forward_ms" not in row:
        return head + (f"WRONG: {row['wrong']}" if "wrong" in row else row["unavailable"])
    return (f"{head}{row['forward_ms']:>11.3f}{row['forward_speedup']:>7.2f}{row['gradient_ms']:>18.3f}"
            f"{row['gradient_speedup']:>7.2f}")


def measure(name: str, sizes: dict, device: str, repeats: int) -> list[dict]:
    """One row per implementation of an operator at one size; the reference first."""
    case = CASES[name]
    module = importlib.import_module(f"fnattn.ops.{case.module}")
    args = inputs(case, sizes, device, torch.float32)
    rows, base = [], {}
    for impl in (REFERENCE, *(k.name for k in module.KERNELS)):
        row: dict[str, Any] = {"operator": name, **sizes, "impl": impl}
        rows.append(row)
        kernel = next((k for k in module.KERNELS if k.name == impl), None)
        reason = kernel.why_not(*case.asked(*args)) if kernel else None
        if reason is not None:
            row["unavailable"] = reason
            continue
        wrong = disagreement(name, sizes, device, impl) if kernel else None
        if wrong:
            row["wrong"] = wrong
            continue
        fn = function(name, impl, sizes)
        row["forward_ms"] = _median(lambda fn=fn: fn(*args), repeats, device)
        row["gradient_ms"] = _median(lambda fn=fn: gradients(fn, args), repeats, device)
        base = base or row
        for kind in ("forward", "gradient"):
            row[f"{kind}_speedup"] = base[f"{kind}_ms"] / row[f"{kind}_ms"]
    return rows


def function(name: str, impl: str, sizes: dict) -> Callable:
    """The operator with one implementation, giving its first result."""
    op = getattr(importlib.import_module("fnattn.ops"), name)
    options = CASES[name].options(sizes)

    def fn(*args):
        out = op(*args, **options, impl=impl)
        return out[0] if isinstance(out, tuple) else out

    return fn


def inputs(case: Case, sizes: dict, device: str, dtype: torch.dtype) -> tuple:
    """Normal numbers for a call, the same ones in every run."""
    count = iter(range(1000))
    return case.call(lambda *shape: random.normal(random.fold_in(random.key(0, device=device), next(count)), shape, dtype), sizes)


def gradients(fn: Callable, args: tuple) -> tuple[Tensor, Any]:
    """A weighted sum of the result, and its gradient with respect to every floating argument."""
    def total(given):
        out = fn(*given)
        # Uneven weights: a plain sum of squares cannot see a rotation.
        return (out * torch.arange(out.numel(), device=out.device, dtype=out.dtype).reshape(out.shape).cos()).sum()

    return tree.value_and_grad(total)(args)


def disagreement(name: str, sizes: dict, device: str, impl: str) -> str | None:
    """How an implementation differs from the reference, with at most 128 positions; None if it does not.

    The reference computes in double precision where the device has it, from the same numbers.
    """
    small = {**sizes, "n": min(sizes["n"], 128)}
    wide = torch.float32 if device == "mps" else torch.float64
    given = inputs(CASES[name], small, device, torch.float32)
    truth = tree.leaves(gradients(function(name, REFERENCE, small), _cast(given, wide)))
    most = max((float(b.abs().max()) for b in truth[1:] if b is not None and b.numel()), default=0.0)  # of any gradient
    for dtype, tolerance in TOLERANCE.items():
        args = _cast(given, dtype)
        try:
            found = tree.leaves(gradients(function(name, impl, small), args))
        except KernelUnavailable:  # not in this precision: nothing to compare
            continue
        for a, b in zip(found, truth):
            if a is None or not a.numel():
                continue
            error, largest = float((a - b).abs().max()), float(b.abs().max())
            # Zero but for the reference's own rounding, as for a lone key: then off by a rounding of what cancels.
            bound = 8 * torch.finfo(dtype).eps * most if largest <= 64 * torch.finfo(wide).eps * most else tolerance * largest
            if not error <= bound:
                return f"{dtype}: differs from the reference by {error:.1e} of {largest:.1e}"
    return None


def _cast(given: tuple, dtype: torch.dtype) -> tuple:
    return tree.map(lambda x: x.to(dtype) if tree.is_differentiable(x) else x, given)


def _median(fn: Callable, repeats: int, device: str) -> float:
    """Milliseconds of one call."""
    def once() -> float:
        began = time.perf_counter()
        fn()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) * 1e3

    once()
    return statistics.median(once() for _ in range(repeats))
