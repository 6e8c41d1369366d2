"""Instructions for attention whose weights are not softmax: scores of one query per head, weights from them, sums of values.

As `Steps.decode`, but in three steps, so that heads and sequences choose their keys side by side: csrc/steps.c.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from torch import Tensor

from .steps import Steps
from .steps_rows import AVERAGE, CALL_EXACT, CALL_ITERATE, HIDE, MEET, MIX, SPARSITY, Mask, Row, bits, fits, kernel


class Part(NamedTuple):
    """Keys and values of all heads: addresses, numbers from one sequence and head to the next, and how many."""

    keys: int
    values: int
    batch: int
    head: int
    count: int


class Weights(NamedTuple):
    """Numbers [b, heads, m] of one query per head, for keys in parts one after the other."""

    at: int
    parts: tuple[Part, ...]
    heads: int
    g: int
    d: int
    m: int


def weigh(steps: Steps, q: Row, k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], first: int, length: int, scale: float,
          nulls: tuple[Tensor, Tensor] | None = None) -> Weights:
    """Scores of one query per head with a cache in two parts, as `decode` has it; with `nulls` [h, z, d] before them for all."""
    g, d, room, late = steps.cache(q, k, v, first, length)
    parts = [Part(k[0].data_ptr(), v[0].data_ptr(), g * room * d, room * d, first),
             Part(k[1].data_ptr(), v[1].data_ptr(), g * late * d, late * d, length - first)]
    if nulls is not None:
        z = nulls[0].shape[1]
        fits(nulls[0].shape == nulls[1].shape == (g, z, d) and nulls[0].dtype is nulls[1].dtype is steps.dtype)
        parts.insert(0, Part(nulls[0].data_ptr(), nulls[1].data_ptr(), 0, z * d, z))
        steps.kept += nulls
    heads, m = q.width // d, sum(part.count for part in parts)
    s, at = steps.room(heads * m).at, 0
    for part in parts:
        steps.code += (MEET, q.at, part.keys, part.batch, part.head, s, steps.rows, heads, g, d, part.count, m, at, bits(scale))
        at += part.count
    return Weights(s, tuple(parts), heads, g, d, m)


def hide(steps: Steps, s: Weights, visible: Mask) -> None:
    """Scores of keys that a mask hides become -infinity; null keys, which come first, have no place in it."""
    first = s.m - s.parts[-1].count - s.parts[-2].count
    fits(visible.head == 0 and visible.width >= s.m - first)
    steps.code += (HIDE, s.at, visible.at, visible.batch, steps.rows, s.heads, s.m, first)


def sparsity(steps: Steps, heads: int, gates: Row | None, most: float, least: float, log: bool) -> Row:
    """1 + (most - 1) sigmoid(gates), or `most`, for each head, and at least `least`; or its logarithm."""
    fits(gates is None or gates.width == gates.stride == heads)
    y = steps.room(heads)
    steps.code += (SPARSITY, y.at, 0 if gates is None else gates.at, steps.rows * heads, bits(most), bits(least), int(log))
    return y


def choose(steps: Steps, s: Weights, log_or_k: Row, eps: float, schedule: ctypes.Array | None) -> Weights:
    """Weights from scores by coordinate descent, as `fnattn.ops.coor_descent`; schedule: from `c_schedule`, None for the exact solver."""
    rows = steps.rows * s.heads
    fits(log_or_k.width == log_or_k.stride == s.heads)
    y, marks = steps.room(s.heads * s.m).at, steps.room(s.heads * (2 if schedule is None else len(schedule) - 1)).at
    if schedule is None:
        steps.code += (CALL_EXACT, kernel("coor_descent", "coor_exact", steps.wide), s.at, log_or_k.at, y, marks, marks - rows, rows, s.m,
                       bits(eps))
    else:
        steps.kept.append(schedule)
        steps.code += (CALL_ITERATE, kernel("coor_descent", "coor_iterate", steps.wide), s.at, log_or_k.at, y, marks, rows, s.m,
                       ctypes.addressof(schedule), len(schedule) - 1)
    return s._replace(at=y)


def mix(steps: Steps, s: Weights, average: bool = False) -> Row:
    """The sums of the values that weights belong to, divided by the sums of the weights if `average`."""
    out, at = steps.room(s.heads * s.d), 0
    for part in s.parts:
        if part.count or not at:
            steps.code += (MIX, s.at, part.values, part.batch, part.head, out.at, steps.rows, s.heads, s.g, s.d, part.count, s.m, at)
        at += part.count
    if average:
        steps.code += (AVERAGE, out.at, s.at, steps.rows * s.heads, s.d, s.m)
    return out
