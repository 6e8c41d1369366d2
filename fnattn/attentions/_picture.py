"""What the sparse attentions over a text followed by a picture share: parameters, the streaming state, one step of it.

The state keeps keys and values of the text, and those of the picture that a later pixel can still see. The latter are
either the last few positions (a window that moves along the raster) or, where pixels see their column, all pixels so
far. A call works through its positions in blocks of at most one row; each block reads text and window once. What is
visible follows from absolute positions alone, so chunks of any length are right, also under vmap over sequences at
different positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, taps
from ..core import Empty, check, check_input, check_sizes, config_of, kind_of, peek_int, peek_most, refuse
from ..ops._door import Kernel, choose, no_autocast, widen
from ..ops._picture import bands_reason
from ..ops.softmax import weights
from . import _states, _step
from ._heads import dropout, linear, linear_init, merge_heads, split_heads, uniform_init
from ._states import POSITION, Leaf

# b batch, h heads, n positions of this call, m of a block, t = text_len, w window, d width of a head, S image_size


# What a step can be asked for by name. A column is as fast in plain torch, which need not join it with the text in memory; text and
# window are read where they are by a kernel that needs no asking.
STEP_KERNELS = tuple(Kernel(name, ops.softmax_attention, bands_reason, lambda *tensors: False) for name in ("native", "bands"))


class Pattern(NamedTuple):
    """What one family's pixels see of the picture.

    who:      the family's name.
    reach:    how many positions back a pixel sees; the window holds so many. Not used with columns.
    columns:  whether a pixel sees its column and nothing else of the picture.
    sees:     sees(row, column of the query, row, column of the key) -> bool, on tensors that broadcast.
    operator: the public operator on a whole sequence, as operator(q, k, v, mask=, text_sees_all=, impl=).
    """

    who: str
    reach: int
    columns: bool
    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    operator: Callable


class Params(NamedTuple):
    """Weights are [out, in], as in torch.nn.Linear."""

    cfg: Any
    to_qkv: Tensor       # [3 h d, dim], rows (q | k | v, head, channel)
    to_out: Tensor       # [dim, h d]
    to_out_bias: Tensor  # [dim]


class State(NamedTuple):
    """Keys and values that later positions can see; queries come at absolute position pos."""

    k_text: Tensor         # [b, h, t, d], rotated if there is a table; slot i is position i
    v_text: Tensor         # [b, h, t, d]
    text_visible: Tensor   # [b, t] bool: what mask said; False where nothing has come yet
    k_image: Tensor        # [b, h, w, d]; the last w positions in order, or with columns S^2 slots in raster order
    v_image: Tensor        # [b, h, w, d]
    image_visible: Tensor  # [b, w] bool
    pos: Tensor            # [] int64: positions seen


def check_config(who: str, cfg: Any) -> None:
    """The checks that both families' configs need."""
    check_sizes(who + ".Config", 1, dim=cfg.dim, image_size=cfg.image_size, heads=cfg.heads, dim_head=cfg.dim_head)
    check_sizes(who + ".Config", 0, seq_len=cfg.seq_len)
    check(cfg.seq_len >= cfg.image_size ** 2, who + ".Config: seq_len must be at least image_size^2 = {}; got {}.",
          cfg.image_size ** 2, cfg.seq_len,
          remedy="seq_len counts text tokens and pixels: text_len = seq_len + 1 - image_size^2.")
    check(0.0 <= cfg.dropout <= 1.0, who + ".Config: dropout must lie in [0, 1]; got {}.", cfg.dropout,
          remedy="It is the chance of zeroing an entry.")


def text_len(cfg: Any) -> int:
    """Positions of the text, the first of which starts the sequence."""
    return cfg.seq_len + 1 - cfg.image_size ** 2


def init(params_key: Tensor, cfg: Any, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key: uniform in +-1/sqrt(fan in)."""
    inner, kind = cfg.heads * cfg.dim_head, {"dtype": dtype, "device": device}
    return Params(
        cfg,
        to_qkv=linear_init(params_key, "to_qkv", 3 * inner, cfg.dim, **kind),
        to_out=linear_init(params_key, "to_out", cfg.dim, inner, **kind),
        to_out_bias=uniform_init(params_key, "to_out_bias", (cfg.dim,), inner ** -0.5, **kind))


def init_state(pattern: Pattern, params: Params, batch: int, capacity: int) -> State:
    """The state before the first position."""
    limit = params.cfg.seq_len + 1
    check_sizes(pattern.who + ".init_state", 0, batch=batch, capacity=capacity)
    check(capacity <= limit, pattern.who + ".init_state: capacity must be at most cfg.seq_len + 1 = {}; got {}.", limit,
          capacity, remedy="Ask for fewer positions, or build the Config with a larger seq_len.")
    return _states.fresh(_layout(pattern, params, batch), params.to_qkv)


def _layout(pattern: Pattern, params: Params, batch: int) -> State:
    """What a state of these params must be; see `_states`."""
    cfg, dtype = params.cfg, params.to_qkv.dtype
    t, w = text_len(cfg), cfg.image_size ** 2 if pattern.columns else pattern.reach
    text = Leaf("batch, heads, text, width", (batch, cfg.heads, t, cfg.dim_head), dtype)
    image = Leaf("batch, heads, pixels, width", (batch, cfg.heads, w, cfg.dim_head), dtype)
    return State(text, text, Leaf("batch, text", (batch, t), torch.bool), image, image, Leaf("batch, pixels", (batch, w), torch.bool),
                 POSITION)


def own(who: str, params: Any, kind: type) -> Any:
    """The config in params, which two families have in one form: it must be of this kind."""
    cfg = config_of(who, params, Params)
    if not isinstance(cfg, kind):
        family = who.partition(".")[0]
        raise TypeError(f"{who}: params must come from {family}.init; got those of a {kind_of(cfg)}.\n"
                        f"  fnattn.apply and fnattn.init_state find the family by the config in the params.")
    return cfg


def attend(pattern: Pattern, params: Params, x: Tensor, state: State | Empty, *, angles: Tensor | None,
           mask: Tensor | None, context: Tensor | None, dropout_key: Tensor | None,
           impl: str) -> tuple[Tensor, State | Empty]:
    """The family's attend, see there."""
    cfg, streaming = params.cfg, not isinstance(state, Empty)
    if _step.asked_for(x, state, impl, mask, context, dropout_key):
        others = () if angles is None else (angles,)
        if done := _step.layer(partial(step, pattern, angles=angles), params, x, state, cfg.dim, *others):
            return done
    x, used = _check(pattern, params, x, state, mask, context)
    qkv = linear(x, params.to_qkv, impl=impl).chunk(3, -1)
    q, k, v = (split_heads(part, cfg.heads) for part in qkv)
    if angles is not None:
        at = torch.arange(x.shape[1], device=x.device)
        here = angles.index_select(0, state.pos + at if streaming else at)
        turn = impl if impl == "reference" else "auto"
        q, k, v = (ops.rotate(part, here, impl=turn) for part in (q, k, v))
    q, k, v = taps.tap("q", q), taps.tap("k", k), taps.tap("v", v)

    if used == 0:
        sees = mask if mask is None or not cfg.compat_mask else _text_only(mask, text_len(cfg))
        out = pattern.operator(q, k, v, mask=sees, text_sees_all=cfg.compat_mask, impl=impl)
        seen = None if mask is None or cfg.compat_mask else _rows_that_see(pattern, mask)
        if streaming:
            state = _updated(pattern, cfg, state, k, v, mask, used)[0]
    else:
        fused = choose(pattern.who + ".apply with a state", impl, STEP_KERNELS, q, k, v) is not None
        before, window = state, _updated(pattern, cfg, state, k, v, mask, used)
        out, seen = _blocks(pattern, cfg, q, before.pos, *window, "native" if fused else impl)
        state = window[0]
    out = linear(merge_heads(taps.tap("heads", out)), params.to_out, params.to_out_bias, impl)
    if seen is not None:
        out = torch.where(seen[..., None], out, torch.zeros_like(out))
    return dropout(dropout_key, "out", out, cfg.dropout), state


def step(pattern: Pattern, steps: _step.Steps, params: Params, x: _step.Row, state: State, out: _step.Row | None = None, *,
         angles: Tensor | None = None) -> tuple[_step.Row, State]:
    """What `attend` does for one pixel of few sequences, as instructions: only the keys that it sees are read."""
    cfg, t = params.cfg, text_len(params.cfg)
    _step.check_state(steps, params, state, partial(_layout, pattern))
    pos, inner, d = _step.position(steps, state.pos), cfg.heads * cfg.dim_head, cfg.dim_head
    _step.fits(max(t, 1) <= pos <= cfg.seq_len)
    q, k, v = steps.parts(x, params.to_qkv, inner, inner, inner)
    if angles is not None:
        _step.fits(angles.dtype == torch.float32 and angles.ndim == 2 and pos < angles.shape[0])
        for turned in (q, k, v):
            steps.turn(turned, angles[pos], d, 1)
    heads = steps.slots(q, (k, v), state[:3], state[3:6], _slots(pattern, cfg, pos), cfg.compat_mask, d ** -0.5)
    if pattern.columns:
        new = torch.ones_like(state.image_visible[:, :1])
        image = (steps.place(state.k_image, k, pos - t), steps.place(state.v_image, v, pos - t),
                 torch.cat((state.image_visible[:, :pos - t], new, state.image_visible[:, pos - t + 1:]), 1))
    elif pattern.reach:
        image = (*(steps.shift(old, new) for old, new in ((state.k_image, k), (state.v_image, v))),
                 torch.cat((state.image_visible[:, 1:], torch.ones_like(state.image_visible[:, :1])), 1))
    else:
        image = state[3:6]
    return steps.linear(heads, params.to_out, params.to_out_bias, out=out), State(*state[:3], *image, state.pos + 1)


_SLOTS: dict[tuple, Tensor] = {}  # of pixels asked for lately: to find them takes longer than to use them


def _slots(pattern: Pattern, cfg: Any, pos: int) -> Tensor:
    """The slots of the window, or of all pixels with columns, that the pixel at `pos` sees; their number stands for itself."""
    found = _SLOTS.get((cfg, pos))
    if found is None:
        with torch.inference_mode(False):
            at, side = torch.tensor([pos]), cfg.image_size
            if pattern.columns:
                _, row, column = _place(cfg, at)
                seen = torch.arange(side)[pattern.sees(row, column, torch.arange(side), column)] * side + column
                found = torch.where(seen == pos - text_len(cfg), side ** 2, seen)
            else:
                everywhere = torch.ones(1, pattern.reach + 1, dtype=torch.bool)
                found = _window_seen(pattern, cfg, at, everywhere)[0, 0].nonzero().squeeze(1)
        if len(_SLOTS) >= 1 << 14:
            _SLOTS.clear()
        _SLOTS[cfg, pos] = found
    return found


def _check(pattern: Pattern, params: Params, x: Tensor, state: State | Empty, mask: Tensor | None,
           context: Tensor | None) -> tuple[Tensor, int | None]:
    """Raises for what cannot be honoured. Returns x, and how many positions came before, where Python may know: see `_cache.room`."""
    who, cfg = pattern.who, params.cfg
    check_input(who + ".apply", x, cfg.dim, like=params.to_qkv, mask=mask)
    refuse(who + ".apply",
           "A position attends to its own past by its place in text and picture, and a context has neither.",
           "Use attentions.full with causal=False for cross attention.", context=context)
    n, used, held = x.shape[1], 0, 0
    if not isinstance(state, Empty):
        _states.check(who, state, _layout(pattern, params, x.shape[0]))
        used = peek_int(state.pos)
        held = peek_most(state.pos) if used is None else used
    check((held or 0) + n <= cfg.seq_len + 1,
          who + ".apply: x has {} positions{}, but cfg allows {} = text_len {} + image_size^2 {}.", n,
          f" after {held}" if held else "", cfg.seq_len + 1, text_len(cfg), cfg.image_size ** 2,
          remedy="Shorten x, or build the Config with a larger seq_len.")
    return _states.within(x, state.pos, cfg.seq_len + 1) if held is None else x, used


def _text_only(mask: Tensor, t: int) -> Tensor:
    """The mask with every pixel visible, as upstream's, which covers the text alone."""
    return torch.cat((mask[:, :t], torch.ones_like(mask[:, t:])), 1)


def _rows_that_see(pattern: Pattern, mask: Tensor) -> Tensor:
    """Which rows see a key at all, bool [b, n]: whose weights, on equal scores, add up to one."""
    ones = torch.ones_like(mask, dtype=torch.float32)[:, None, :, None]
    total = pattern.operator(torch.zeros_like(ones), torch.zeros_like(ones), ones, mask=mask, impl="reference")
    return total[:, 0, :, 0] > 0.5


# ------------------------------------------------------------------------------------------------ streaming


def _updated(pattern: Pattern, cfg: Any, state: State, k: Tensor, v: Tensor, mask: Tensor | None,
             used: int | None) -> tuple[State, Tensor, Tensor, Tensor]:
    """The state after the new keys and values, and the picture's keys, values and visibility that this call's queries
    need:
    the window followed by the new positions, or with columns all slots."""
    t, n = text_len(cfg), k.shape[2]
    new = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if mask is None else mask
    k, v = k.to(state.k_text.dtype), v.to(state.v_text.dtype)
    text = state[:3]
    if n and (used is None or used < t):
        text = _written(text, (k, v, new), state.pos, used)
    if pattern.columns:
        image = state[3:6]
        if n and (used is None or used + n > t):
            image = _written(image, (k, v, new), state.pos - t, None if used is None else used - t)
        window = image
    else:
        window = tuple(torch.cat((old, x), -1 if x.ndim == 2 else 2) for old, x in zip(state[3:6], (k, v, new)))
        # Copies, so that a state does not keep a long chunk alive and always has the same strides.
        image = tuple(x.narrow(-1 if x.ndim == 2 else 2, n, pattern.reach).contiguous() for x in window)
    return State(*text, *image, state.pos + n), *window


def _written(buffers: tuple, new: tuple, first: Tensor, known: int | None) -> tuple:
    """(k, v, visible) with the new entries in slots first, first + 1, ...; those outside the buffers are left out.

    known: first as a number, where Python may know it.
    """
    if known is not None:
        size = buffers[2].shape[1]
        start, stop = max(known, 0), min(known + new[2].shape[1], size)
        return tuple(torch.cat((old.narrow(axis, 0, start), x.narrow(axis, start - known, stop - start),
                                old.narrow(axis, stop, size - stop)), axis)
                     for old, x, axis in zip(buffers, new, (2, 2, 1)))
    source = torch.arange(buffers[2].shape[1], device=first.device) - first
    n = new[2].shape[1]
    inside, source = (source >= 0) & (source < n), source.clamp(0, n - 1)
    k, v = (torch.where(inside[:, None], x.index_select(2, source), old) for old, x in zip(buffers[:2], new[:2]))
    return k, v, torch.where(inside, new[2].index_select(1, source), buffers[2])


def _blocks(pattern: Pattern, cfg: Any, q: Tensor, first: Tensor, state: State, k_image: Tensor, v_image: Tensor,
            image_visible: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """The result [b, h, n, d] in q's dtype, and which rows see a key [b, n], block by block of at most one row."""
    outs, seens = [], []
    n, side = q.shape[2], cfg.image_size
    dtype, scale = q.dtype, cfg.dim_head ** -0.5
    with no_autocast(q):
        q, k_text, v_text, k_image, v_image = widen(q, state.k_text, state.v_text, k_image, v_image)
        for start in range(0, n, side):
            block = q[:, :, start:start + side]
            at = first + torch.arange(start, start + block.shape[2], device=q.device)
            text_seen = _text_seen(cfg, at, state.text_visible)
            if pattern.columns:
                k, v, image_seen = _columns(pattern, cfg, at, k_image, v_image, image_visible)
                out = (_fused_columns if impl == "native" else _columns_step)(block * scale, k_text, v_text, text_seen, k, v, image_seen)
            else:
                here = slice(start, start + pattern.reach + block.shape[2])
                image_seen = _window_seen(pattern, cfg, at, image_visible[:, here])
                out = _window_step(block, k_text, v_text, text_seen, k_image[:, :, here], v_image[:, :, here], image_seen, scale, impl)
            outs.append(out.to(dtype))
            seens.append(text_seen.any(-1) | image_seen.any(-1))
    if not outs:
        return q.to(dtype), q.new_zeros(q.shape[0], 0, dtype=torch.bool)
    return torch.cat(outs, 2), torch.cat(seens, 1)


def _window_step(q: Tensor, k_text: Tensor, v_text: Tensor, text_seen: Tensor, k: Tensor, v: Tensor, image_seen: Tensor,
                 scale: float, impl: str) -> Tensor:
    """Queries [b, h, m, d] against the text and a window [b, h, w, d] that ends at the last of them, under bools [b, m, .].

    That none sees beyond itself, as attention over a cache has it, is so in the bools already.
    """
    t = k_text.shape[2]
    return ops.cached_attention(q, k_text, v_text, k, v, first=t, length=t + k.shape[2], scale=scale, impl=impl,
                                mask=torch.cat((text_seen, image_seen), -1).unsqueeze(1))


def _columns_step(q: Tensor, k_text: Tensor, v_text: Tensor, text_seen: Tensor, k: Tensor, v: Tensor, image_seen: Tensor) -> Tensor:
    """Queries [b, h, m, d] against the text and keys of their own [b, h, m, w, d] in the picture, under bools [b, m, .]."""
    text = torch.einsum("bhmd,bhtd->bhmt", q, k_text)
    image = (q.unsqueeze(3) @ k.mT).squeeze(3)
    p = weights(torch.cat((text, image), -1), torch.cat((text_seen, image_seen), -1)[:, None])
    p_text, p = p.split((text.shape[-1], image.shape[-1]), -1)
    return torch.einsum("bhmt,bhtd->bhmd", p_text, v_text) + (p.unsqueeze(3) @ v).squeeze(3)


def _fused_columns(q: Tensor, k_text: Tensor, v_text: Tensor, text_seen: Tensor, k: Tensor, v: Tensor, image_seen: Tensor) -> Tensor:
    """The same by the fused kernel, on text and column joined; the queries become a batch."""
    seen, (b, h, m, d) = torch.cat((text_seen, image_seen), -1)[:, None], q.shape
    k, v = (torch.cat((text[:, None].expand(b, m, *text.shape[1:]), own.transpose(1, 2)), 3).flatten(0, 1)
            for text, own in ((k_text, k), (v_text, v)))
    out = ops.softmax_attention(q.transpose(1, 2).reshape(b * m, h, 1, d), k, v, scale=1.0, impl="native",
                                mask=seen.transpose(1, 2).reshape(b * m, 1, 1, -1))
    return out.reshape(b, m, h, d).transpose(1, 2)


def _text_seen(cfg: Any, at: Tensor, visible: Tensor) -> Tensor:
    """Which text positions each query sees, [b, m, t]."""
    slots = torch.arange(visible.shape[1], device=at.device)
    kept = visible[:, None, :]
    if cfg.compat_mask:
        kept = kept | (at < visible.shape[1])[:, None]
    return (slots <= at[:, None]) & kept


def _place(cfg: Any, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether positions are pixels, and their rows and columns."""
    pixel = at - text_len(cfg)
    return pixel >= 0, pixel // cfg.image_size, pixel % cfg.image_size


def _window_seen(pattern: Pattern, cfg: Any, at: Tensor, visible: Tensor) -> Tensor:
    """Which positions of the window each query sees, [b, m, w]; the window ends at the last query."""
    m, w = at.shape[0], visible.shape[1]
    keys = at[-1:] - torch.arange(w - 1, -1, -1, device=at.device)
    (real, row, column), (key_real, key_row, key_column) = _place(cfg, at), _place(cfg, keys)
    seen = pattern.sees(row[:, None], column[:, None], key_row, key_column) & (keys <= at[:, None])
    seen = seen & real[:, None] & key_real
    return (seen & (visible[:, None, :] | cfg.compat_mask)).expand(visible.shape[0], m, w)


def _columns(pattern: Pattern, cfg: Any, at: Tensor, k: Tensor, v: Tensor,
             visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each query's column: keys and values [b, h, m, S, d], and which of them it sees [b, m, S]."""
    side = cfg.image_size
    real, row, column = _place(cfg, at)
    k, v = (x.unflatten(2, (side, side)).index_select(3, column).transpose(2, 3) for x in (k, v))
    rows = torch.arange(side, device=at.device)
    kept = visible.unflatten(1, (side, side)).index_select(2, column).transpose(1, 2) | cfg.compat_mask
    return k, v, pattern.sees(row[:, None], column[:, None], rows, column[:, None]) & real[:, None] & kept
