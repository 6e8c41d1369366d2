"""Steps that are written once and carried out again: to write a step takes longer than to carry it out.

From one step of a sequence to the next the weights are the same tensors, and the input and the states are others of the same
shape. So a list of instructions serves the next step too, once it has the new addresses, and where it counts positions the new
position. `find` looks for a list that does, `Kept.run` carries it out, and `keep` keeps one that was just carried out.
"""

from __future__ import annotations

import array
import bisect
import operator
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..watchers import unwatched
from .steps import DONE, Steps, carry_out, entry

MOST = 16  # lists that are kept, those last written
_KEPT: dict[tuple, Kept] = {}
_LAST: list = [None]  # whose step was the one before: only who takes a second one is likely to take a third
# By map, without a frame of Python for each tensor: they stand on the way of every step.
_place, _whole, _kind = Tensor.data_ptr, Tensor.is_contiguous, operator.attrgetter("shape", "dtype")


class Kept(NamedTuple):
    """Instructions, and what must be as it was for them to serve.

    code, space: see `Steps`. c: the function that carries them out.
    moves: which numbers of the code are addresses: (where, in which of x, the states, the result, the states after it; how far
        from its beginning).
    counts: which numbers of the code grow with a position: (where, with which of `clocks`).
    clocks: (which state is the position, what it was, from which on the instructions are others).
    rest: of the trees of weights and states, all that is not a tensor.
    weights: their places; kinds: shape and dtype of the weights, x and the states; stride: of x.
    result: the shape of the result if that is not x's. fates: how each state becomes the next, "new", "same" or "count".
    watch: forgets the list when a weight is gone, whose identity another tensor could get.
    """

    code: array.array
    space: int
    dtype: torch.dtype
    c: Any
    moves: list[tuple[int, int, int]]
    counts: list[tuple[int, int]]
    clocks: list[tuple[int, int, int]]
    rest: list
    weights: list[int]
    kinds: list[tuple[torch.Size, torch.dtype]]
    stride: tuple[int, ...]
    result: torch.Size | None
    fates: list[str]
    watch: list[weakref.ref]

    def run(self, x: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]] | None:
        """The result and the states after it; None if an id was not in its table."""
        out = torch.empty_like(x) if self.result is None else torch.empty(self.result, dtype=self.dtype)
        after = [torch.empty_like(t) if fate == "new" else t if fate == "same" else t + 1 for fate, t in zip(self.fates, states)]
        places, code = list(map(_place, (x, *states, out, *after))), self.code[:]
        for at, which, far in self.moves:
            code[at] = places[which] + far
        if self.counts:
            passed = [states[i].item() - before for i, before, _ in self.clocks]
            for at, clock in self.counts:
                code[at] += passed[clock]
        return (out, after) if carry_out(code, self.space, self.dtype) == DONE else None


def find(weights: Sequence[Tensor], x: Tensor, states: Sequence[Tensor], rest: list) -> Kept | None:
    """Instructions that serve these: the same weights where they were, all else in the same layout, and nobody watches."""
    kept = _KEPT.get((x.shape, *map(id, weights)))
    if kept is None:
        return None
    if (kept.weights != list(map(_place, weights)) or kept.kinds != list(map(_kind, (*weights, x, *states))) or kept.stride != x.stride()
            or kept.rest != rest or not all(map(_whole, weights)) or not all(map(_whole, states)) or kept.c is not entry(kept.dtype)
            or not unwatched((x, *states), weights)):
        return None
    for i, first, until in kept.clocks:
        if not first <= states[i].item() < until:
            return None
    return kept


def keep(steps: Steps, weights: Sequence[Tensor], x: Tensor, states: Sequence[Tensor], rest: list, out: Tensor,
         after: Sequence[Tensor]) -> None:
    """Keeps the instructions of a step that gave `out` and the states `after`, the second time that its weights take one."""
    who = x.shape, *map(id, weights)
    before, _LAST[0] = _LAST[0], who
    if before != who or steps.fixed or steps.kept or (fates := _fates(states, after)) is None:
        return
    written = [out, *(t for t, fate in zip(after, fates) if fate == "new")]
    moves, every = _moves(steps.code, [x, *states], written, weights), [x, *states, out, *after]
    number = {id(t): i for i, t in reversed([*enumerate(every)])}
    if moves is None or not {id(t) for t in written} <= {id(t) for _, t, _ in moves}:
        return
    here = [weakref.ref(t, lambda _: _KEPT.pop(who, None)) for t in weights]
    clocks = [(number[id(t)] - 1, t.item(), until) for t, until in steps.clocks]
    _KEPT.pop(who, None)
    for old in list(_KEPT)[:max(len(_KEPT) + 1 - MOST, 0)]:  # a copy: other threads keep theirs too
        _KEPT.pop(old, None)
    _KEPT[who] = Kept(
        array.array("q", steps.code), steps.space, steps.dtype, entry(steps.dtype), [(at, number[id(t)], far) for at, t, far in moves],
        list(steps.counts), clocks, list(rest), list(map(_place, weights)), list(map(_kind, (*weights, x, *states))), x.stride(),
        None if out.shape == x.shape and out.dtype is x.dtype and x.is_contiguous() else out.shape, fates, here)


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
