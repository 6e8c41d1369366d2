"""Steps that are written once and carried out again: to write a step takes longer than to carry it out.

From one step of a sequence to the next the weights stay where they are, and the input and the states are others of the same
shape. So a list of instructions serves the next step too, once it has the new addresses, and where it counts positions the new
position. `find` looks for a list that does, `Kept.run` carries it out, and `keep` keeps one that was just carried out.

Nothing is kept of the tensors themselves. Whatever lies where a weight lay, in the same layout, is as good as that.
"""

from __future__ import annotations

import array
import bisect
import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..watchers import unwatched
from .steps import Steps, available, carry_out
from .steps_rows import DONE

MOST = 16  # lists that are kept, those last written
_KEPT: dict[tuple, Kept] = {}
_LAST: list = [None]  # whose step was the one before: only who takes a second one is likely to take a third
# By map, without a frame of Python for each tensor: they stand on the way of every step.
_place, _whole, _kind = Tensor.data_ptr, Tensor.is_contiguous, operator.attrgetter("shape", "dtype")


class Kept(NamedTuple):
    """Instructions, and what must be as it was for them to serve.

    code, space: see `Steps`.
    moves: which numbers of the code are addresses: (where, in which of x, the states, the result, the states after it; how far
        from its beginning).
    counts: which numbers of the code grow with a position: (where, with which of `clocks`).
    clocks: (which state is the position, what it was, from which on the instructions are others).
    rest: of the trees of weights and states, all that is not a tensor.
    kinds: shape and dtype of the weights, x and the states; stride: of x.
    result: the shape of the result if that is not x's. fates: how each state becomes the next, "new", "same" or "count".
    """

    code: array.array
    space: int
    dtype: torch.dtype
    moves: list[tuple[int, int, int]]
    counts: list[tuple[int, int]]
    clocks: list[tuple[int, int, int]]
    rest: list
    kinds: list[tuple[torch.Size, torch.dtype]]
    stride: tuple[int, ...]
    result: torch.Size | None
    fates: list[str]

    def run(self, x: Tensor, states: Sequence[Tensor], passed: Sequence[int]) -> tuple[Tensor, list[Tensor]] | None:
        """The result and the states after it; None if an id was not in its table. passed: what `find` says."""
        out = torch.empty_like(x) if self.result is None else torch.empty(self.result, dtype=self.dtype)
        after = [torch.empty_like(t) if fate == "new" else t if fate == "same" else t + 1 for fate, t in zip(self.fates, states)]
        places, code = list(map(_place, (x, *states, out, *after))), self.code[:]
        for at, which, far in self.moves:
            code[at] = places[which] + far
        for at, clock in self.counts:
            code[at] += passed[clock]
        return (out, after) if carry_out(code, self.space, self.dtype) == DONE else None


def find(weights: Sequence[Tensor], x: Tensor, states: Sequence[Tensor], rest: list) -> tuple[Kept, list[int]] | None:
    """Instructions that serve these, and how many positions each of their clocks is on; None if there are none.

    They serve where the weights lie where they lay, all else has the layout that it had, and nobody watches.
    """
    if not _KEPT or not available() or not unwatched(every := (*weights, x, *states)):  # first: sizes may be symbols
        return None
    kept = _KEPT.get((x.shape, *map(_place, weights)))
    if (kept is None or kept.kinds != list(map(_kind, every)) or kept.stride != x.stride() or kept.rest != rest
            or not all(map(_whole, weights)) or not all(map(_whole, states))):
        return None
    passed = []
    for i, first, until in kept.clocks:
        position = states[i].item()
        if not first <= position < until:
            return None
        passed.append(position - first)
    return kept, passed


def keep(steps: Steps, weights: Sequence[Tensor], x: Tensor, states: Sequence[Tensor], rest: list, out: Tensor,
         after: Sequence[Tensor]) -> None:
    """Keeps the instructions of a step that gave `out` and the states `after`, the second time that its weights take one."""
    who = x.shape, *map(_place, weights)
    before, _LAST[0] = _LAST[0], who
    if before != who or steps.fixed or steps.kept or not all(map(_static, rest)) or (fates := _fates(states, after)) is None:
        return
    written = [out, *(t for t, fate in zip(after, fates) if fate == "new")]
    moves, every = _moves(steps.code, [x, *states], written, weights), [x, *states, out, *after]
    number = {id(t): i for i, t in reversed([*enumerate(every)])}
    if moves is None or not {id(t) for t in written} <= {id(t) for _, t, _ in moves}:
        return
    clocks = [(number[id(t)] - 1, t.item(), until) for t, until in steps.clocks]
    _KEPT.pop(who, None)
    for old in list(_KEPT)[:max(len(_KEPT) + 1 - MOST, 0)]:  # a copy: other threads keep theirs too
        _KEPT.pop(old, None)
    _KEPT[who] = Kept(
        array.array("q", steps.code), steps.space, steps.dtype, [(at, number[id(t)], far) for at, t, far in moves], list(steps.counts),
        clocks, list(rest), list(map(_kind, (*weights, x, *states))), x.stride(),
        None if out.shape == x.shape and out.dtype is x.dtype and x.is_contiguous() else out.shape, fates)


def _static(item: Any) -> bool:
    """Whether this, of a tree, cannot change and holds no tensor that nobody looked at."""
    return (isinstance(item, (type, int, float, str, type(None)))
            or dataclasses.is_dataclass(item) and type(item).__dataclass_params__.frozen)


def _fates(states: Sequence[Tensor], after: Sequence[Tensor]) -> list[str] | None:
    """How each state became the next; None if one did in no way that is known here."""
    fates = []
    for a, b in zip(states, after, strict=True):
        if b is a:
            fates.append("same")
        elif a.dtype is b.dtype is torch.int64 and a.ndim == b.ndim == 0 and b == a + 1:
            fates.append("count")
        elif b.is_floating_point() and b.shape == a.shape and b.dtype is a.dtype and b.is_contiguous():
            fates.append("new")
        else:
            return None
    return fates


def _moves(code: Sequence[int], read: Sequence[Tensor], written: Sequence[Tensor],
           weights: Sequence[Tensor]) -> list[tuple[int, Tensor, int]] | None:
    """Which numbers of the code are addresses in tensors that move, and how far in; None where such a one overlaps any other.

    Nothing else looks like an address: sizes are far smaller, and places in the scratch negative.
    """
    spans = sorted(((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), t if moves else None)
                    for part, moves in ((read, True), (written, True), (weights, False)) for t in part if t.numel()),
                   key=lambda span: span[0])
    end_of_moving = end_of_all = 0
    for begin, end, t in spans:
        if begin < (end_of_moving if t is None else end_of_all):
            return None
        end_of_all = max(end_of_all, end)
        end_of_moving = end_of_moving if t is None else end
    moving = [span for span in spans if span[2] is not None]
    begins, found = [begin for begin, _, _ in moving], []
    for at, number in enumerate(code):
        i = bisect.bisect_right(begins, number) - 1
        if i >= 0 and number < moving[i][1]:
            found.append((at, moving[i][2], number - begins[i]))
    return found
