"""One new position of a few sequences in a single call, where nothing watches: what `apply` tries first when it generates.

A family that can write its step as instructions (`fnattn_kernels.native.steps`) has a function

    step(steps, params, x, state, out) -> (rows of the result, state after it)

with x and out as `Row`s, `Unfit` raised for what it cannot write. The results are those of `apply`, to rounding. Under any
transform, mode, profiler or harvest, with gradients, masks, dropout, a named kernel, or more than a few sequences, `apply`
goes its ordinary way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.native.steps import Row, Steps, Unfit, begin, fits
from torch import Tensor

from .. import ops, taps
from ..core import Empty
from ._cache import Rows, window

Step = Callable[[Steps, Any, Row, Any, "Row | None"], "tuple[Row, Any]"]


def asked_for(x: Tensor, state: Any, impl: str, *options: Tensor | None) -> bool:
    """Whether a call is one new position without options. Nothing is checked yet: a step fits, or the ordinary way says why not."""
    if torch.compiler.is_compiling():  # first: the comparison of a length would bind an exported program to it
        return False
    if impl != "auto" or isinstance(state, Empty) or not isinstance(state, tuple) or taps.in_use():
        return False
    for option in options:
        if option is not None:
            return False
    return isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == 1


def layer(step: Step, params: Any, x: Tensor, state: Any, width: int, *others: Tensor) -> tuple[Tensor, Any] | None:
    """`apply` by a family's step: out [b, 1, width] and the state after it; None where that cannot be. It may read `others`."""
    steps = begin(x.shape[0], x, [*tensors(params, state), *others])
    if steps is None:
        return None
    try:
        out, row = steps.result(width, x)
        _, after = step(steps, params, steps.given(x), state, row)
    except (Unfit, KernelUnavailable):
        return None
    return (out, after) if steps.run() else None


def tensors(*trees: Any) -> list[Tensor]:
    """The tensors of params and states, which are nested tuples."""
    found: list[Tensor] = []
    for part in trees:
        for item in part:
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, tuple):
                found += tensors(item)
    return found


def position(pos: Tensor) -> int:
    """The number of positions seen, which Python may look at: `begin` found the state unwatched."""
    fits(pos.ndim == 0 and pos.dtype == torch.int64)
    return pos.item()


def turned(steps: Steps, x: Row, weight: Tensor, widths: Sequence[int], d: int, pos: int, rotary: bool,
           angles: Tensor | None = None) -> list[Row]:
    """Queries, keys and values of heads of d channels: x weight^T in parts, turned to their position by `rotary` or a table of angles."""
    rows = steps.parts(x, weight, *widths)
    if rotary:
        for row in rows[:2]:
            steps.turn(row, lang_freqs(d), d, pos)
    if angles is not None:
        fits(angles.dtype == torch.float32 and angles.ndim == 2 and pos < angles.shape[0])
        for row in rows:
            steps.turn(row, angles[pos], d, 1)
    return rows


def cached(steps: Steps, state: Any, rows: Sequence[Row], pos: int) -> tuple[Rows, Rows, int, int]:
    """A state's two caches after keys and values at `pos`; how many positions they then hold in their main parts, and in all."""
    (k, v), end = state[:2], pos + 1
    fits(k.main.ndim == k.late.ndim == 4)
    capacity, seen = k.main.shape[2], getattr(state, "visible", None)
    fits(k.late.shape[2] == window(capacity) and (seen is None or seen.shape[1:] == (capacity,)))
    return Rows(*steps.append(*k, rows[0], pos)), Rows(*steps.append(*v, rows[1], pos)), end - end % k.late.shape[2], end


@functools.cache
def lang_freqs(dim: int) -> Tensor:
    """`ops.lang_freqs`, kept: making them takes longer than a step."""
    with torch.inference_mode(False):
        return ops.lang_freqs(dim, device="cpu")
