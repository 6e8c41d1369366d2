"""Whether every kernel is right at real sizes and in every precision, on the device at hand: value, every gradient, tangent.

The truth is plain torch in float64, of the same numbers. An error may be twice that of plain torch in the same precision, and one
rounding; in float32 a ten-thousandth of the largest entry in any case. Each operator is checked in a process of its own, all at
once: a compiler of kernels uses one core, and what it makes is kept on disk for the benchmark.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..core import KernelUnavailable
from ..ops.report import CASES
from . import implementations
from .case import cast

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A length that fills tiles and one that does not; narrow and wide heads.
SIZES = ({"b": 2, "h": 4, "n": 1024, "d": 64}, {"b": 1, "h": 3, "n": 997, "d": 16})
QUICK = ({"b": 1, "h": 2, "n": 7, "d": 2},)
FLOOR = {torch.float32: 1e-4}


def uneven(t: Tensor) -> Tensor:
    """A direction of uneven numbers like t, the same in every precision."""
    at = torch.arange(t.numel(), device=t.device)
    return ((at * 389 % 17 - 8).to(t.dtype) / 8).reshape(t.shape)


def everything(fn: Callable, args: tuple) -> list[tuple[str, Tensor]]:
    """Value, gradients and tangent of a function of some floating tensors, named."""
    at = [i for i, a in enumerate(args) if tree.is_differentiable(a)]

    def of(*moving: Tensor) -> Tensor:
        given = list(args)
        for i, t in zip(at, moving):
            given[i] = t
        return fn(*given)

    leaves = [args[i].detach().requires_grad_() for i in at]
    out = of(*leaves)
    grads = torch.autograd.grad(out, leaves, uneven(out), materialize_grads=True)
    moving = tuple(t.detach() for t in leaves)
    tangent = torch.func.jvp(of, moving, tuple(uneven(t) for t in moving))[1]
    return [("value", out.detach()), *((f"gradient {i}", g) for i, g in zip(at, grads)), ("tangent", tangent.detach())]


def rows(name: str, device: str, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per implementation, size and precision of an operator: "errors" as parts of the largest entry, "allowed", "wrong"."""
    case = CASES[name]
    kernels = [k for k in importlib.import_module(f"fnattn.ops.{case.module}").KERNELS if k.name != "native"]
    for sizes in QUICK if quick else SIZES:
        for label, dtype in DTYPES.items():
            args = implementations.inputs(case, sizes, device, dtype)
            head = {"operator": name, **sizes, "dtype": label}
            exact = plain = None
            for kernel in kernels:
                reason = kernel.why_not(*case.asked(*args))
                if reason is not None:
                    yield {**head, "impl": kernel.name, "unavailable": reason}
                    continue
                try:
                    if exact is None:
                        exact = everything(implementations.function(name, "reference", sizes), cast(args, torch.float64))
                        plain = _errors(everything(implementations.function(name, "reference", sizes), args), exact)
                    errors = _errors(everything(implementations.function(name, kernel.name, sizes), args), exact)
                except KernelUnavailable as error:
                    yield {**head, "impl": kernel.name, "unavailable": str(error)}
                except Exception as error:  # a compiler's refusal is a finding, and no reason to stop
                    yield {**head, "impl": kernel.name, "wrong": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
                else:
                    allowed = {what: max(2 * plain[what] + torch.finfo(dtype).eps, FLOOR.get(dtype, 0.0)) for what in errors}
                    off = [what for what in errors if not errors[what] <= allowed[what]]  # so written, NaN is off
                    row = {**head, "impl": kernel.name, "errors": errors, "allowed": allowed}
                    yield {**row, "wrong": ", ".join(f"{w} off by {errors[w]:.1e}" for w in off)} if off else row


def _errors(found: list[tuple[str, Tensor]], exact: list[tuple[str, Tensor]]) -> dict[str, float]:
    errors = {}
    for (what, a), (_, b) in zip(found, exact, strict=True):
        largest = float(b.abs().max()) if b.numel() else 0.0
        errors[what] = float((a.double() - b).abs().max()) / max(largest, 1e-30) if b.numel() else 0.0
    return errors


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    shape = " ".join(f"{name}{row[name]}" for name in "bhnd" if name in row)
    said = row.get("unavailable") or (f"WRONG: {row['wrong']}" if "wrong" in row else
                                      ", ".join(f"{what} {error:.1e}" for what, error in row["errors"].items()))
    return f"{row['operator']:<23}{row.get('impl', ''):<18}{shape:<18}{row.get('dtype', ''):<10}{' '.join(said.split())[:300]}"


def apart(module: str, name: str, device: str, quick: bool, limit_s: float) -> list[dict[str, Any]]:
    """The rows that `python -m fnattn.bench.MODULE NAME DEVICE` prints as JSON; if it does not end well, a last one says so."""
    command = [sys.executable, "-W", "ignore", "-m", f"fnattn.bench.{module}", name, device, *(["quick"] if quick else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        text, end = done.stdout, None if done.returncode == 0 else f"ended with {done.returncode}: {done.stderr.strip()[-400:]}"
    except subprocess.TimeoutExpired as stopped:
        text, end = (stopped.stdout or b"").decode(), f"not done after {limit_s:.0f} s"
    found = [json.loads(one) for one in text.splitlines() if one.startswith("{") and one.endswith("}")]
    return found if end is None else [*found, {"operator": name, "wrong": end}]


def everywhere(jobs: list[tuple[str, str]], device: str, quick: bool, limit_s: float) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of these (module, name), each in a process of its own, of which no more run at once than there are cores."""
    end = time.monotonic() + limit_s
    with concurrent.futures.ThreadPoolExecutor(max(1, min(len(jobs), os.cpu_count() or 1))) as pool:
        def run(module: str, name: str) -> tuple[str, list[dict[str, Any]]]:
            return module, apart(module, name, device, quick, max(1.0, end - time.monotonic()))

        for done in concurrent.futures.as_completed([pool.submit(run, *job) for job in jobs]):
            yield done.result()


def _main() -> None:
    torch.set_num_threads(1)
    for row in rows(sys.argv[1], sys.argv[2], "quick" in sys.argv[3:]):
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
