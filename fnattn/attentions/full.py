"""Softmax attention over all positions, with a key-value cache: out_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j.

Source: Attention of dalle-pytorch 1.6.6; Vaswani et al. 2017, arXiv 1706.03762.
Different here: a query that sees no key gives 0 instead of an average over all keys, later ones included; new positions are
causal among themselves in a chunk of any length, because what is visible follows from absolute positions; the cache has a
fixed capacity and remembers the mask. `stable` changes nothing: softmax runs in float32 or wider with its maximum subtracted.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, taps
from ..core import EMPTY, Empty, Family, check, check_init, check_input, check_sizes, config, config_of, refuse
from . import _cache, _states, _step
from ._cache import Rows
from ._heads import dropout, linear, linear_init, merge_heads, split_heads, uniform_init

# b batch, h query heads, g key heads, n positions, m keys, d width of a head
WORD = 62  # entries of a static mask in one integer of a compiled program


@config
class Config:
    """Options of softmax attention.

    dim:         width of x.
    seq_len:     side of static_mask; without one, lengths are free.
    causal:      position i attends to j <= i; needed for a state.
    heads, dim_head: number of query heads, width of one head.
    dropout:     chance of zeroing an entry of the result, when a dropout_key is passed.
    stable:      upstream's rescaled softmax for float16; the same function, and always safe here.
    static_mask: which keys (columns) each position (row) may attend to, in addition to all else: a bool tensor or nested
                 sequence [seq_len, seq_len]. Kept as a tuple of strings of "0" and "1", one per row, so that a config can be
                 hashed and written to JSON.
    rotary_emb:  rotary positions on queries and keys, over the whole head.
    kv_heads:    number of key and value heads, a divisor of heads; None: heads.
    """

    dim: int
    seq_len: int
    causal: bool = True
    heads: int = 8
    dim_head: int = 64
    dropout: float = 0.0
    stable: bool = False
    static_mask: Any = None
    rotary_emb: bool = False
    kv_heads: int | None = None

    def __post_init__(self):
        check_sizes("full.Config", 1, dim=self.dim, seq_len=self.seq_len, heads=self.heads, dim_head=self.dim_head)
        check(0.0 <= self.dropout <= 1.0, "full.Config: dropout must lie in [0, 1]; got {}.", self.dropout,
              remedy="It is the chance of zeroing an entry.")
        check(not self.rotary_emb or self.dim_head % 2 == 0, "full.Config: rotary_emb needs an even dim_head; got {}.",
              self.dim_head, remedy="Rotary positions turn pairs of channels.")
        check_sizes("full.Config", 1, kv_heads=self.key_heads)
        check(self.heads % self.key_heads == 0,
              "full.Config: kv_heads must divide heads={}; got {}.", self.heads, self.kv_heads,
              remedy="Each key head serves heads / kv_heads query heads; None gives every query head its own.")
        if self.static_mask is not None:
            object.__setattr__(self, "static_mask", _rows(self.static_mask, self.seq_len))

    @property
    def key_heads(self) -> int:
        """The number of key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads


def _rows(mask: Any, seq_len: int) -> tuple[str, ...]:
    """The static mask as strings of "0" and "1", from such strings, a bool tensor, or nested sequences of bools."""
    if isinstance(mask, Tensor):
        mask = mask.tolist()
    try:
        rows = tuple(row if isinstance(row, str) else "".join("01"[bool(entry)] for entry in row) for row in mask)
    except TypeError:
        rows = ()
    check(len(rows) == seq_len and all(len(row) == seq_len and set(row) <= {"0", "1"} for row in rows),
          "full.Config: static_mask must be bools [{}, {}] (cfg.seq_len); got {} rows of {}.", seq_len, seq_len, len(rows),
          sorted({len(row) for row in rows}), remedy="Row i tells which keys position i may attend to.")
    return rows


class Params(NamedTuple):
    """Weights are [out, in], as in torch.nn.Linear."""

    cfg: Config
    to_qkv: Tensor       # [(h + 2 g) d, dim], rows (q | k | v, head, channel)
    to_out: Tensor       # [dim, h d]
    to_out_bias: Tensor  # [dim]


class State(NamedTuple):
    """Keys and values seen so far, with room for a fixed number."""

    k: Rows          # [b, g, capacity, d], rotated
    v: Rows          # [b, g, capacity, d]
    visible: Tensor  # [b, capacity] bool: False where mask hid the position that came in
    pos: Tensor      # [] int64: positions seen


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key: uniform in +-1/sqrt(fan in)."""
    check_init("full.init", cfg, Config, dtype)
    inner, kind = cfg.heads * cfg.dim_head, {"dtype": dtype, "device": device}
    return Params(
        cfg,
        to_qkv=linear_init(params_key, "to_qkv", inner + 2 * cfg.key_heads * cfg.dim_head, cfg.dim, **kind),
        to_out=linear_init(params_key, "to_out", cfg.dim, inner, **kind),
        to_out_bias=uniform_init(params_key, "to_out_bias", (cfg.dim,), inner ** -0.5, **kind))


def init_state(params: Params, batch: int, *, capacity: int) -> State:
    """Empty buffers for `batch` sequences of up to `capacity` positions."""
    cfg = config_of("full.init_state", params, Params)
    check(cfg.causal, "full.init_state: cannot stream. A non-causal query sees later keys, so no prefix has a final answer.",
          remedy="Use Config(causal=True, ...), or call apply(params, x) on the whole sequence.")
    check_sizes("full.init_state", 0, batch=batch)
    check_sizes("full.init_state", 1, "Give the number of positions that the longest sequence will have.", capacity=capacity)
    check(cfg.static_mask is None or capacity <= cfg.seq_len, "full.init_state: capacity must be at most {}, the side of "
          "cfg.static_mask; got {}.", cfg.seq_len, capacity, remedy="Build the Config with a larger seq_len and static_mask.")
    return _states.fresh(_layout(params, batch, capacity), params.to_qkv)


def _layout(params: Params, batch: int, capacity: int | str) -> State:
    """What a state of these params must be; see `_states`."""
    rows = _cache.layout(batch, params.cfg.key_heads, capacity, params.cfg.dim_head, params.to_qkv.dtype)
    return State(rows, rows, _cache.seen(batch, capacity), _states.POSITION)


def apply(params: Params, x: Tensor, state: State | Empty = EMPTY, *, mask: Tensor | None = None,
          context: Tensor | None = None, dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """Attends to all visible positions. Time grows with the square of the length; memory with the length if fused.

    Args:
        params: from `init`.
        x: [b, n, dim].
        state: from `init_state` or a former call (causal only): x continues that sequence, in a chunk of any length.
        mask: bool [b, keys]; False keys are not there. Describes context if given, else x; a state remembers it.
        context: [b, keys, dim] to attend to instead of x; only without causal, rotary_emb and static_mask.
        dropout_key: drops entries of the result if cfg.dropout > 0.
        impl: passed to `ops.softmax_attention`; "reference" makes all of it plain torch.
    Returns:
        out [b, n, dim] in x's dtype, 0 where no key is visible; the state after x, or EMPTY.
    Raises:
        ValueError: shapes, more positions than the state or static_mask has room for, a keyword that cannot be honoured.
    """
    return attend(params, x, state, mask=mask, context=context, dropout_key=dropout_key, impl=impl)


def attend(params: Params, x: Tensor, state: State | Empty = EMPTY, *, angles: Tensor | None = None, mask: Tensor | None = None,
           context: Tensor | None = None, dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """`apply` with a table of rotary angles [positions, f] that turns queries, keys and values, as DALLE does."""
    cfg = config_of("full.apply", params, Params)
    if _step.asked_for(x, state, impl, mask, context, dropout_key):
        own, others = (step, ()) if angles is None else (partial(step, angles=angles), (angles,))
        if done := _step.layer(own, params, x, state, cfg.dim, *others):
            return done
    (x, used), n = _check(params, x, state, mask, context, angles), x.shape[1]
    pos = state.pos if isinstance(state, State) else torch.zeros((), dtype=torch.int64, device=x.device)
    if mask is None and context is not None and context.shape[1] == 0:  # no key at all: as if all were hidden
        mask = torch.zeros_like(context[..., 0], dtype=torch.bool)

    turn = impl if impl == "reference" else "auto"
    q, k, v = _project(params, x, context, impl)
    if cfg.rotary_emb:
        at, freqs = _cache.positions(pos, n), ops.lang_freqs(cfg.dim_head, device=x.device)
        q, k = ops.rotary(q, at, freqs, impl=turn), ops.rotary(k, at, freqs, impl=turn)
    if angles is not None:
        here = angles.index_select(0, _cache.positions(pos, n))
        q, k, v = (ops.rotate(t, here, impl=turn) for t in (q, k, v))
    q, k, v = taps.tap("q", q), taps.tap("k", k), taps.tap("v", v)

    if isinstance(state, State):
        state = State(_cache.append(state.k, k, pos, used), _cache.append(state.v, v, pos, used),
                      _cache.noted(state.visible, mask, pos), pos + n)
    if used == 0:
        allowed, seen = _allowed(cfg, mask, mask, pos, n, k.shape[2])
        out = ops.softmax_attention(q, k, v, mask=allowed, causal=cfg.causal, offset=0 if cfg.causal else None, impl=impl)
    else:
        visible = state.visible if used is None else state.visible[:, :used + n]
        allowed, seen = _allowed(cfg, visible, mask, pos, n, visible.shape[1])
        out = _cache.attend(q, state.k, state.v, pos, used, mask=allowed, impl=impl)
    out = linear(merge_heads(taps.tap("heads", out)).to(x.dtype), params.to_out, params.to_out_bias, impl)
    if seen is not None:
        out = torch.where(seen[..., None], out, torch.zeros_like(out))
    return dropout(dropout_key, "out", out, cfg.dropout), state


def step(steps: _step.Steps, params: Params, x: _step.Row, state: State, out: _step.Row | None = None, *,
         angles: Tensor | None = None) -> tuple[_step.Row, State]:
    """What `apply` does for one position of few sequences, as instructions."""
    cfg = params.cfg
    _step.fits(cfg.causal and cfg.static_mask is None)
    _step.check_state(steps, params, state, _layout, _cache.capacity(state))
    pos, d = _step.position(steps, state.pos, counted=angles is None), cfg.dim_head
    widths = cfg.heads * d, cfg.key_heads * d, cfg.key_heads * d
    q, k, v = _step.turned(steps, x, params.to_qkv, widths, d, pos, cfg.rotary_emb, angles)
    keys, values, first, end = _step.cached(steps, state, (k, v), pos)
    heads = steps.decode(q, keys, values, steps.mask(state.visible), first, end, d ** -0.5)
    return steps.linear(heads, params.to_out, params.to_out_bias, out=out), State(keys, values, state.visible, state.pos + 1)


def _project(params: Params, x: Tensor, context: Tensor | None, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """q [b, h, n, d]; k, v [b, g, m, d]."""
    cfg = params.cfg
    widths = [cfg.heads * cfg.dim_head, cfg.key_heads * cfg.dim_head, cfg.key_heads * cfg.dim_head]
    if context is None:
        q, k, v = linear(x, params.to_qkv, impl=impl).split(widths, -1)
    else:
        to_q, to_kv = params.to_qkv.split([widths[0], 2 * widths[1]])
        q, (k, v) = linear(x, to_q, impl=impl), linear(context, to_kv, impl=impl).chunk(2, -1)
    return split_heads(q, cfg.heads), split_heads(k, cfg.key_heads), split_heads(v, cfg.key_heads)


def _allowed(cfg: Config, visible: Tensor | None, mask: Tensor | None, pos: Tensor, n: int,
             m: int) -> tuple[Tensor | None, Tensor | None]:
    """What the masks allow [b or 1, 1, n or 1, m], and which rows see a key at all [b or 1, n or 1]; None: everything, all.

    visible: which keys are there; mask: what this call says of its own.
    """
    if cfg.static_mask is None:
        if visible is None:
            return None, None
        allowed = visible[:, None, None, :]
        if not cfg.causal:
            return allowed, visible.any(-1, keepdim=True)
        if mask is None:  # every query sees itself
            return allowed, None
        return allowed, (visible.cumsum(-1) > 0).index_select(-1, _cache.positions(pos, n))
    at, keys = _cache.positions(pos, n), torch.arange(m, device=pos.device)
    allowed = _static(cfg.static_mask).to(keys.device).index_select(0, at).index_select(1, keys)[None]
    if visible is not None:
        allowed = allowed & visible[:, None, :]
    past = allowed & (keys <= at[:, None]) if cfg.causal else allowed
    return allowed[:, None], past.any(-1)


def _static(rows: tuple[str, ...]) -> Tensor:
    """The static mask as a bool tensor [seq_len, seq_len]."""
    if torch.compiler.is_dynamo_compiling():  # which reads no buffers; a million bools would be a long program
        words = torch.tensor(_words(rows)).unflatten(0, (len(rows), -1))
        return (words.unsqueeze(-1) >> torch.arange(WORD) & 1).flatten(1)[:, :len(rows)] == 1
    return torch.frombuffer(bytearray("".join(rows), "ascii"), dtype=torch.uint8).view(len(rows), -1) == ord("1")


def _words(rows: tuple[str, ...]) -> list[int]:
    """The static mask row by row, WORD entries in one number, the first in its lowest bit."""
    return [int(row[i:i + WORD][::-1], 2) for row in rows for i in range(0, len(row), WORD)]


# A constant to tracers (the decorator of torch.compiler that says so would import the compiler). A tensor would not do: all those
# of one function have one name in a program, which then may hold a single one.
_words._dynamo_marked_constant = True


def _check(params: Params, x: Tensor, state: State | Empty, mask: Tensor | None, context: Tensor | None,
           angles: Tensor | None) -> tuple[Tensor, int | None]:
    """Raises for what cannot be honoured. Returns how many positions the state holds, where Python may know."""
    cfg = params.cfg
    check_input("full.apply", x, cfg.dim, like=params.to_qkv, mask=mask, context=context)
    if cfg.causal:
        refuse("full.apply", "With causal=True a query attends to its own past, and a context has none.",
               "Use Config(causal=False, ...) for cross attention.", context=context)
    else:
        refuse("full.apply", "A non-causal query sees later keys, so no prefix has a final answer.",
               "Use Config(causal=True, ...), or call apply(params, x) on the whole sequence.", state=state)
    if cfg.rotary_emb or angles is not None:
        refuse("full.apply", "Rotary positions of x say nothing about positions of a context.",
               "Use Config(rotary_emb=False, ...) for cross attention.", context=context)
    if cfg.static_mask is not None:
        refuse("full.apply", "The rows and columns of static_mask are positions of x.",
               "Use Config(static_mask=None, ...) for cross attention.", context=context)
    n, used = x.shape[1], 0
    if not isinstance(state, Empty):
        x, used = _cache.room("full", state, x, _layout(params, x.shape[0], _cache.capacity(state)))
    limit = cfg.seq_len if cfg.static_mask is not None else None
    check(limit is None or used is None or used + n <= limit, "full.apply: x has {} positions, but cfg.static_mask has {}.", n,
          limit, remedy="Shorten x, or build the Config with a larger seq_len and static_mask.")
    return x, used


FAMILY = Family(
    name="full", config=Config, init=init, init_state=init_state, apply=apply, streams=True, masks=True, contexts=True,
    source="dalle-pytorch 1.6.6, Attention; arXiv 1706.03762",
    examples=(
        Config(dim=7, seq_len=13, heads=3, dim_head=5),
        Config(dim=7, seq_len=13, heads=6, dim_head=4, kv_heads=2, rotary_emb=True, dropout=0.25),
        Config(dim=5, seq_len=13, heads=2, dim_head=3, dropout=0.25,
               static_mask=tuple("".join("01"[(i - j) % 3 != 1] for j in range(13)) for i in range(13))),
        Config(dim=11, seq_len=13, causal=False, heads=3, dim_head=5),
    ),
    step=step)
