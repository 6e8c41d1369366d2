"""Where one implementation overtakes another: what `fnattn bench --crossovers` prints, beside the table that decides."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fnattn_kernels import crossovers
from torch import Tensor

from ..ops._door import REFERENCE, worthwhile
from ..ops.report import CASES
from . import implementations, timing

LENGTHS, QUICK = (16, 64, 256, 1024, 4096), (16, 256)
FEW, KEYS = (1, 8, 16, 32, 64), 1024  # queries against many keys, as in a step of generation
SIZES = {"b": 1, "h": 8, "d": 16}
CLOSE = 1.1     # what counts as equally fast
PATIENCE = 1e3  # ms after which a kind of implementation is not tried at greater lengths
HEAD = f"{'operator':<24}{'n':>6}  {'auto takes':<12}{'fastest':<24}ms with gradient (value alone)"


def rows(operators: list[str], lengths: tuple[int, ...], device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Per operator and length: milliseconds of every implementation, what "auto" takes, what is fastest."""
    for name in operators:
        slow: set[str] = set()
        for n in lengths:
            sides, auto = _sides(name, {**SIZES, "n": n}, device)
            sides = {impl: fn for impl, fn in sides.items() if impl not in slow}
            args = implementations.inputs(CASES[name], {**SIZES, "n": n}, device, torch.float32)
            with_gradient = _turns({k: partial(implementations.gradients, fn, args) for k, fn in sides.items()}, rounds, device)
            value = _turns({k: partial(fn, *args) for k, fn in sides.items()}, rounds, device)
            slow |= {impl for impl, ms in with_gradient.items() if ms > PATIENCE}
            yield _row(name, n, auto, with_gradient, value)
        if name == "softmax_attention" and device == "cpu":
            yield from _few_queries(rounds)


def _row(name: str, n: int, auto: str, ms: dict[str, float], value: dict[str, float]) -> dict[str, Any]:
    fastest = min(ms, key=ms.__getitem__)
    return {"operator": name, "n": n, "auto": auto, "fastest": fastest, "ms": ms, "value_ms": value,
            "behind": ms[auto] / ms[fastest] if auto in ms else None}


def _sides(name: str, sizes: dict, device: str) -> tuple[dict[str, Callable], str]:
    """Every implementation that can serve here, as a function of the tensors; and the name of the one that "auto" takes."""
    kernels = importlib.import_module(f"fnattn.ops.{CASES[name].module}").KERNELS
    asked = CASES[name].asked(*implementations.inputs(CASES[name], sizes, device, torch.float32))
    able = [kernel for kernel in kernels if kernel.why_not(*asked) is None]
    sides = {impl: implementations.function(name, impl, sizes) for impl in (REFERENCE, *(kernel.name for kernel in able))}
    if name == "taylor":
        sides["reference, quadratic"] = _taylor_table
    return sides, next((kernel.name for kernel in able if worthwhile(name, kernel, *asked)), REFERENCE)


def _taylor_table(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Taylor attention in plain torch by the [n, n] table."""
    from ..ops.taylor.reference import reference
    return reference(q, k, v, None, None, False, True, q.shape[3] ** -0.5, chunk=q.shape[2])[0]


def _few_queries(rounds: int) -> Iterator[dict[str, Any]]:
    """softmax_attention of few queries: the kernel of our own, and torch's, between which the native one chooses."""
    limits = crossovers.limits("softmax_attention", "native, torch's")
    kept, named = dict(limits), implementations.function("softmax_attention", "native", {})

    def under(bytes_of_queries: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        limits.update(bytes=bytes_of_queries, ratio=0, extra=0)
        try:
            return named(q, k, v)
        finally:
            limits.update(kept)

    for n in FEW:
        q, k, v = (t.detach() for t in implementations.inputs(CASES["softmax_attention"], {**SIZES, "n": KEYS}, "cpu", torch.float32))
        q = q[:, :, :n].contiguous()
        ms = _turns({"ours": partial(under, 0, q, k, v), "torch's": partial(under, 1 << 20, q, k, v)}, rounds, "cpu")
        few = n < kept["bytes"] // q.element_size() and kept["ratio"] * n + kept["extra"] < KEYS
        yield _row(f"softmax, {KEYS} keys", n, "torch's" if few else "ours", ms, ms)


def _turns(sides: dict[str, Callable], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each, taking turns; processor time on one thread."""
    now = timing.clock(torch.device(device))
    calls = {}
    for impl, fn in sides.items():
        fn()  # may build something
        calls[impl] = max(1, min(200, round(timing.SLICE / max(timing.once(fn, 1, now), 1e-6))))
    measured = [{impl: timing.once(fn, calls[impl], now) for impl, fn in sides.items()} for _ in range(rounds)]
    return {impl: 1e3 * statistics.median(one[impl] for one in measured) for impl in sides}


def line(row: dict[str, Any]) -> str:
    """One row as text; "<" where another choice is faster by more than CLOSE."""
    mark = "<" if row["behind"] is not None and row["behind"] > CLOSE else " "
    times = ", ".join(f"{impl} {ms:.3g} ({row['value_ms'][impl]:.3g})" for impl, ms in sorted(row["ms"].items(), key=lambda x: x[1]))
    return f"{row['operator']:<24}{row['n']:>6}{mark} {row['auto']:<12}{row['fastest']:<24}{times}"


def table() -> str:
    """What decides today: the rows of `fnattn_kernels.crossovers`."""
    lines = [f"{'operator':<24}{'kernel':<26}{'taken':<62}measured"]
    lines += [f"{row.operator:<24}{row.kernel:<26}{row.rule:<62}{row.measured}" for row in crossovers.TABLE]
    return "\n".join(lines)
