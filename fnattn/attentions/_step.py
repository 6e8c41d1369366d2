"""One new position of a few sequences in a single call, where nothing watches: what `apply` tries first when it generates.

A family that can write its step as instructions (`fnattn_kernels.native.steps`) has a function

    step(steps, params, x, state, out) -> (rows of the result, state after it)

with x and out as `Row`s, `Unfit` raised for what it cannot write. The results are those of `apply`, to rounding. Under any
transform, mode, profiler or harvest, with gradients, masks, dropout, a named kernel, or more than a few sequences, `apply`
goes its ordinary way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.native import kept_steps
from fnattn_kernels.native.steps import Steps, begin
from fnattn_kernels.native.steps_rows import Row, Unfit, fits
from torch import Tensor

from .. import ops, taps
from ..core import Empty
from . import _states
from ._cache import Rows

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
    def write(steps: Steps) -> tuple[Tensor, Any]:
        out, row = steps.result(width, x)
        return out, step(steps, params, steps.given(x), state, row)[1]

    return in_one_call(write, params, x, state, *others)


def in_one_call(write: Callable[[Steps], tuple[Tensor, Any]], params: Any, x: Tensor, state: Any,
                *others: Tensor) -> tuple[Tensor, Any] | None:
    """What `write` gives, results that the instructions that it writes will fill; None where that cannot be.

    If the same was written for the step before, that is carried out, and `write` not called.
    """
    weights, states, rest = [], [], []
    _take_apart(params, weights, rest)
    _take_apart(state, states, rest)
    if not others and (found := kept_steps.find(weights, x, states, rest)) is not None:
        kept, passed = found
        done = kept.run(x, states, passed)
        return None if done is None else (done[0], _put_together(state, iter(done[1])))
    steps = begin(x.shape[0], x, [*weights, *states, *others])
    if steps is None:
        return None
    try:
        out, after = write(steps)
    except (Unfit, KernelUnavailable):
        return None
    if not steps.run():
        return None
    if not others and not steps.fixed:
        new: list[Tensor] = []
        _take_apart(after, new, again := [])
        if rest[len(rest) - len(again):] == again and len(new) == len(states):
            kept_steps.keep(steps, weights, x, states, rest, out, new)
    return out, after


def _take_apart(node: tuple, leaves: list, rest: list) -> None:
    """The tensors of params or states, which are nested tuples, in `leaves`; in `rest` all else, and where they and tuples are."""
    rest.append(type(node))
    for item in node:
        if isinstance(item, Tensor):
            leaves.append(item)
            rest.append(Tensor)
        elif isinstance(item, tuple):
            _take_apart(item, leaves, rest)
        else:
            rest.append(item)


def _put_together(node: tuple, leaves: Iterator[Tensor]) -> tuple:
    """The same tuples with other tensors."""
    items = [next(leaves) if isinstance(item, Tensor) else _put_together(item, leaves) if isinstance(item, tuple) else item
             for item in node]
    return tuple.__new__(type(node), items)


_LAYOUTS: dict[tuple, tuple] = {}  # of states lately: to write one down takes longer than to compare with it


def check_state(steps: Steps, params: Any, state: Any, layout: Callable[..., Any], *sizes: Any) -> None:
    """Raises Unfit unless the state is as layout(params, rows, *sizes) says: what `apply` refuses, a step must not read by address."""
    key = id(params.cfg), steps.dtype, steps.rows, *sizes
    known = _LAYOUTS.get(key)
    if known is not None and _states.fits(state, known[1]):
        return
    like = layout(params, steps.rows, *sizes)
    fits(_states.fits(state, like))
    if len(_LAYOUTS) >= 1 << 8:
        _LAYOUTS.clear()
    _LAYOUTS[key] = params.cfg, like  # the config stays alive, so that no other one has its id


def position(steps: Steps, pos: Tensor, counted: bool = False) -> int:
    """The number of positions seen, which Python may look at: `begin` found the state unwatched.

    counted: the family uses it for nothing but arguments of `turned`, `cached` and `Steps.decode`, which count it.
    """
    fits(pos.ndim == 0 and pos.dtype == torch.int64)
    if counted:
        steps.clock(pos)
    else:
        steps.fixed = True
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
    """The two caches of a state, which `check_state` has seen, after keys and values at `pos`; how many positions they then hold in
    their main parts, and in all."""
    (k, v), end = state[:2], pos + 1
    return Rows(*steps.append(*k, rows[0], pos)), Rows(*steps.append(*v, rows[1], pos)), end - end % k.late.shape[2], end


@functools.cache
def lang_freqs(dim: int) -> Tensor:
    """`ops.lang_freqs`, kept: making them takes longer than a step."""
    with torch.inference_mode(False):
        return ops.lang_freqs(dim, device="cpu")
