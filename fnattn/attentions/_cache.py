"""A key-value cache that is never written to and yet cheap to extend: two parts, of which a token copies the small one.

    main    all positions before the last multiple of the window; shared by every state up to the next multiple
    late    the positions from there on

Nothing else is kept, so a cache is a function of the positions that it has seen, however they were cut into calls. With room
for c positions the window is about sqrt(c): a token costs a copy of one window, and of the rest once per window.

Where Python may look at the position, the parts are extended and read by slices. Under a transform that maps it, or while
tracing, the same values come from comparisons of positions, at the cost of reading everything.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import ops
from ..core import check, peek_int, peek_most
from ..ops.cached_attention import join
from . import _states
from ._states import Leaf

# b batch, g heads, c capacity, w window, n new positions


class Rows(NamedTuple):
    """One row per position; zeros where none has come, or in main where it is not there yet."""

    main: Tensor  # [b, g, c, d]
    late: Tensor  # [b, g, w, d]


def window(capacity: int) -> int:
    """The largest power of two up to the square root of the capacity."""
    return 1 << math.isqrt(max(capacity, 1)).bit_length() - 1


def fresh(like: Tensor, batch: int, heads: int, capacity: int, width: int, dtype: torch.dtype | None = None) -> Rows:
    """No positions yet, on the device of `like` and in its dtype."""
    return _states.fresh(layout(batch, heads, capacity, width, like.dtype if dtype is None else dtype), like)


def layout(batch: int, heads: int, capacity: int | str, width: int, dtype: torch.dtype) -> Rows:
    """What a cache must be; see `_states`. capacity: a number, or a word where a state has none."""
    late, axes = "window" if isinstance(capacity, str) else window(capacity), "batch, key heads, capacity, width"
    return Rows(Leaf(axes, (batch, heads, capacity, width), dtype, free=2), Leaf(axes, (batch, heads, late, width), dtype))


def seen(batch: int, capacity: int | str) -> Leaf:
    """What the leaf must be that says which positions a mask left there; those to come are there."""
    return Leaf("batch, capacity", (batch, capacity), torch.bool, fill=1)


def capacity(state: Any) -> int | str:
    """How many positions a state's caches have room for, by the first of them; a word where there is no such thing."""
    try:
        _, _, rows, _ = state.k.main.shape
    except (AttributeError, ValueError, TypeError):
        return "capacity"
    return rows


def room(who: str, state: Any, x: Tensor, layout: Any) -> tuple[Tensor, int | None]:
    """x, and how many positions a family's state with caches holds, where Python may know. Where it may not look, x is NaN in the
    positions that there is no room for.

    Raises:
        TypeError: the state is not of the layout's kind. ValueError: it has not the shapes of x's state, or no room for x.
    """
    _states.check(who, state, layout)
    used, n, most = peek_int(state.pos), x.shape[1], capacity(state)
    held = peek_most(state.pos) if used is None else used
    if held is not None and held + n > most:
        check(False, "{}.apply: the state holds {} of {} positions and {} more {} given.", who, held, most, n,
              "was" if n == 1 else "were", remedy=f"Make it larger: init_state(params, batch, capacity={held + n} or more).")
    return _states.within(x, state.pos, most) if held is None else x, used


def positions(pos: Tensor, n: int) -> Tensor:
    """pos, pos + 1, ...: int64 [n]."""
    return pos.unsqueeze(0) if n == 1 else pos + torch.arange(n, device=pos.device)


def append(rows: Rows, new: Tensor, pos: Tensor, used: int | None) -> Rows:
    """The cache after the rows [b, g, n, d] of the positions from `pos` on; `used` is that position where Python may know it."""
    new = new.to(rows.main.dtype)
    if new.shape[2] == 0:
        return rows
    return _append_traced(rows, new, pos) if used is None else _append(rows, new, used)


def _append(rows: Rows, new: Tensor, used: int) -> Rows:
    (main, late), end = rows, used + new.shape[2]
    w = late.shape[2]
    filled, ending = used % w, end % w
    before, after = used - filled, end - ending
    if after == before:
        return Rows(main, torch.cat((late.narrow(2, 0, filled), new, late.narrow(2, ending, w - ending)), 2))
    body = torch.cat((late.narrow(2, 0, filled), new), 2) if filled else new
    moved = after - before
    main = torch.cat((main.narrow(2, 0, before), body.narrow(2, 0, moved), main.narrow(2, after, main.shape[2] - after)), 2)
    return Rows(main, pad(body.narrow(2, moved, ending), (0, 0, 0, w - ending)))


def _append_traced(rows: Rows, new: Tensor, pos: Tensor) -> Rows:
    main, late = rows
    n, w = new.shape[2], late.shape[2]
    end, before = pos + n, pos - pos % w
    after = end - end % w
    body = torch.cat((late, new), 2)

    def at(where: Tensor) -> Tensor:
        """The rows of some positions from `before` to `end`."""
        source = torch.where(where < pos, where - before, where - pos + w)
        return body.index_select(2, source.clamp(0, w + n - 1))

    slots = torch.arange(main.shape[2], device=pos.device)
    last = after + torch.arange(w, device=pos.device)
    moved, left = (slots >= before) & (slots < after), last < end
    return Rows(torch.where(moved[:, None], at(slots), main), torch.where(left[:, None], at(last), torch.zeros_like(late)))


def noted(visible: Tensor, mask: Tensor | None, pos: Tensor) -> Tensor:
    """visible [b, c], which is True where nothing has come yet, after the positions from `pos` on, of which mask [b, n] hides some."""
    return visible if mask is None else visible.index_copy(1, positions(pos, mask.shape[1]), mask)


def read(rows: Rows, length: Tensor, known: int | None) -> Tensor:
    """Rows in one tensor: [b, g, known, d] of the `known` positions so far, or [b, g, c, d] with zeros after them."""
    main, late = rows
    w = late.shape[2]
    if known is not None:
        return join(main, late, known - known % w, known)
    behind = torch.arange(main.shape[2], device=length.device) - (length - length % w)
    return torch.where((behind >= 0)[:, None], late.index_select(2, behind.clamp(0, w - 1)), main)


def attend(q: Tensor, k: Rows, v: Rows, pos: Tensor, used: int | None, *, mask: Tensor | None = None, scale: float | None = None,
           impl: str = "auto") -> Tensor:
    """Causal softmax attention of queries [b, h, n, d] from position `pos` on, which the cache holds already.

    mask: bool, broadcastable to [b, h, n, m]: m = used + n, or all c positions where `used` is None.
    """
    n = q.shape[2]
    if used is None:
        keys, values = read(k, pos + n, None), read(v, pos + n, None)
        return ops.softmax_attention(q, keys, values, mask=mask, causal=True, offset=pos, scale=scale, impl=impl)
    length = used + n
    first = length - length % k.late.shape[2]
    return ops.cached_attention(q, k.main, v.main, k.late, v.late, first=first, length=length, mask=mask, scale=scale, impl=impl)
