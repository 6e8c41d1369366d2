"""Block-sparse softmax attention: each block of queries attends to the blocks of keys that a layout names.

The layout is drawn in `init` from the params key and is a leaf of the params, so that it travels with the weights and an
ensemble's members have their own.

Source: SparseAttention of dalle-pytorch 1.6.6 over the layouts of DeepSpeed 0.19.6; neither runs on a current torch.
Different here: it runs; padded keys are hidden (upstream's kernel adds 1 to their scores instead); every layer has its own
layout; there is a state; sequences of any length up to seq_len.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops, random, taps
from ..core import EMPTY, Empty, Family, check, check_init, check_input, check_sizes, config, config_of, refuse
from ..ops import layouts
from ..ops.block_sparse import visible
from . import _cache, _states, _step
from ._cache import Rows
from ._heads import dropout, linear_init, merge_heads, split_heads, uniform_init

# b batch, h heads, n positions, m keys, d width of a head, nb blocks


@config
class Config:
    """Options of block-sparse attention.

    dim:         width of x. seq_len: the longest sequence.
    causal:      position i attends to j <= i; needed for a state.
    heads, dim_head: number of heads, width of one head.
    dropout:     chance of zeroing an entry of the result, when a dropout_key is passed.
    stable:      upstream's rescaled softmax for float16; the same function, and always safe here.
    block_size:  positions per block.
    text_seq_len: the blocks of so many first positions are seen by all later ones.
    num_random_blocks: random blocks per row; None: a quarter of the blocks of a row.
    pattern:     a config of `ops.layouts` to use in place of all that; its num_heads and block must agree.
    rotary_emb:  rotary positions on queries and keys, over the whole head.
    """

    dim: int
    seq_len: int
    causal: bool = True
    heads: int = 8
    dim_head: int = 64
    dropout: float = 0.0
    stable: bool = False
    block_size: int = 16
    text_seq_len: int = 256
    num_random_blocks: int | None = None
    pattern: Any = None
    rotary_emb: bool = False

    def __post_init__(self):
        check_sizes("block_sparse.Config", 1, dim=self.dim, seq_len=self.seq_len, heads=self.heads, dim_head=self.dim_head,
                    block_size=self.block_size)
        check_sizes("block_sparse.Config", 0, "0 leaves them out.", text_seq_len=self.text_seq_len,
                    num_random_blocks=0 if self.num_random_blocks is None else self.num_random_blocks)
        check(0.0 <= self.dropout <= 1.0, "block_sparse.Config: dropout must lie in [0, 1]; got {}.", self.dropout,
              remedy="It is the chance of zeroing an entry.")
        check(not self.rotary_emb or self.dim_head % 2 == 0, "block_sparse.Config: rotary_emb needs an even dim_head; got {}.",
              self.dim_head, remedy="Rotary positions turn pairs of channels.")
        if self.pattern is not None:
            got = getattr(self.pattern, "num_heads", None), getattr(self.pattern, "block", None)
            check(got == (self.heads, self.block_size), "block_sparse.Config: pattern must have num_heads={} and block={}; got {}.",
                  self.heads, self.block_size, got, remedy="Build the pattern with the same heads and block_size.")

    @property
    def blocks(self) -> int:
        """Blocks along the longest sequence."""
        return -(-self.seq_len // self.block_size)

    @property
    def layout(self) -> Any:
        """The pattern that the layout is drawn from."""
        if self.pattern is not None:
            return self.pattern
        count = self.seq_len // self.block_size // 4 if self.num_random_blocks is None else self.num_random_blocks
        return layouts.Variable(num_heads=self.heads, block=self.block_size, num_random_blocks=count,
                                global_block_indices=tuple(range(-(-self.text_seq_len // self.block_size))),
                                attention="unidirectional" if self.causal else "bidirectional")


class Params(NamedTuple):
    """Weights are [out, in], as in torch.nn.Linear."""

    cfg: Config
    to_qkv: Tensor       # [3 h d, dim], rows (q | k | v, head, channel)
    to_out: Tensor       # [dim, h d]
    to_out_bias: Tensor  # [dim]
    layout: Tensor       # [h or 1, nb, nb] bool: which blocks are there; not trained


class State(NamedTuple):
    """Keys and values seen so far, with room for a fixed number."""

    k: Rows          # [b, h, capacity, d], rotated
    v: Rows          # [b, h, capacity, d]
    visible: Tensor  # [b, capacity] bool: False where mask hid the position that came in
    pos: Tensor      # [] int64: positions seen


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key: uniform in +-1/sqrt(fan in); the layout from the same key."""
    check_init("block_sparse.init", cfg, Config, dtype)
    inner, kind = cfg.heads * cfg.dim_head, {"dtype": dtype, "device": device}
    layout = layouts.make(cfg.layout, cfg.blocks * cfg.block_size, key=random.fold_in(params_key, "layout"))
    if not cfg.layout.different_layout_per_head:
        layout = layout[:1]
    return Params(
        cfg,
        to_qkv=linear_init(params_key, "to_qkv", 3 * inner, cfg.dim, **kind),
        to_out=linear_init(params_key, "to_out", cfg.dim, inner, **kind),
        to_out_bias=uniform_init(params_key, "to_out_bias", (cfg.dim,), inner ** -0.5, **kind),
        layout=layout.to(device=device))


def init_state(params: Params, batch: int, *, capacity: int) -> State:
    """Empty buffers for `batch` sequences of up to `capacity` positions, at most cfg.seq_len rounded up to a block."""
    cfg = config_of("block_sparse.init_state", params, Params)
    check(cfg.causal, "block_sparse.init_state: cannot stream. A non-causal query sees later keys, so no prefix has a final answer.",
          remedy="Use Config(causal=True, ...), or call apply(params, x) on the whole sequence.")
    check_sizes("block_sparse.init_state", 0, batch=batch, capacity=capacity)
    check(1 <= capacity <= cfg.blocks * cfg.block_size, "block_sparse.init_state: capacity must lie in [1, {}], what the layout covers; "
          "got {}.", cfg.blocks * cfg.block_size, capacity, remedy="Build the Config with a larger seq_len.")
    return _states.fresh(_layout(params, batch, capacity), params.to_qkv)


def _layout(params: Params, batch: int, capacity: int | str) -> State:
    """What a state of these params must be; see `_states`."""
    rows = _cache.layout(batch, params.cfg.heads, capacity, params.cfg.dim_head, params.to_qkv.dtype)
    return State(rows, rows, _cache.seen(batch, capacity), _states.POSITION)


def apply(params: Params, x: Tensor, state: State | Empty = EMPTY, *, mask: Tensor | None = None,
          context: Tensor | None = None, dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """Attends to the blocks of the layout. Time grows with the blocks that are there.

    Args:
        params: from `init`.
        x: [b, n, dim], n at most what the layout covers.
        state: from `init_state` or a former call (causal only): x continues that sequence, in a chunk of any length.
        mask: bool [b, n]; False keys are not there; a state remembers it.
        context: refused; rows and columns of the layout are positions of x.
        dropout_key: drops entries of the result if cfg.dropout > 0.
        impl: passed to `ops.block_sparse_attention`; with a state to `ops.cached_attention`.
    Returns:
        out [b, n, dim] in x's dtype, 0 where no key is visible; the state after x, or EMPTY.
    """
    return attend(params, x, state, mask=mask, context=context, dropout_key=dropout_key, impl=impl)


def attend(params: Params, x: Tensor, state: State | Empty = EMPTY, *, angles: Tensor | None = None, mask: Tensor | None = None,
           context: Tensor | None = None, dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """`apply` with a table of rotary angles [positions, f] that turns queries, keys and values, as DALLE does."""
    cfg = config_of("block_sparse.apply", params, Params)
    if _step.asked_for(x, state, impl, mask, context, dropout_key):
        others = () if angles is None else (angles,)
        if done := _step.layer(partial(step, angles=angles), params, x, state, cfg.dim, *others):
            return done
    (x, used), n = _check(params, x, state, mask, context), x.shape[1]
    pos = state.pos if isinstance(state, State) else torch.zeros((), dtype=torch.int64, device=x.device)
    positions = _cache.positions(pos, n)
    turn = "reference" if impl == "reference" else "auto"
    q, k, v = (split_heads(t, cfg.heads) for t in F.linear(x, params.to_qkv).chunk(3, -1))
    if cfg.rotary_emb:
        freqs = ops.lang_freqs(cfg.dim_head, device=x.device)
        q, k = ops.rotary(q, positions, freqs, impl=turn), ops.rotary(k, positions, freqs, impl=turn)
    if angles is not None:
        here = angles.index_select(0, positions)
        q, k, v = (ops.rotate(t, here, impl=turn) for t in (q, k, v))
    q, k, v = taps.tap("q", q), taps.tap("k", k), taps.tap("v", v)

    keep = mask
    if isinstance(state, State):
        state = State(_cache.append(state.k, k, pos, used), _cache.append(state.v, v, pos, used),
                      _cache.noted(state.visible, mask, pos), pos + n)
        keep = state.visible if used is None else state.visible[:, :used + n]
        seen = visible(params.layout, positions, torch.arange(keep.shape[1], device=x.device), cfg.block_size)[None]
        out = _cache.attend(q, state.k, state.v, pos, used, mask=seen & keep[:, None, None, :], impl=impl)
    else:
        out = ops.block_sparse_attention(q, k, v, params.layout, block=cfg.block_size, causal=cfg.causal, keep=keep, impl=impl)
    out = F.linear(merge_heads(taps.tap("heads", out)).to(x.dtype), params.to_out, params.to_out_bias)
    if keep is not None:
        # A row without any visible key is 0, bias included: the layouts here always hold the diagonal.
        out = torch.where(_any_visible(params, keep, positions, cfg.causal)[..., None], out, torch.zeros_like(out))
    return dropout(dropout_key, "out", out, cfg.dropout), state


def step(steps: _step.Steps, params: Params, x: _step.Row, state: State, out: _step.Row | None = None, *,
         angles: Tensor | None = None) -> tuple[_step.Row, State]:
    """What `apply` does for one position of few sequences, as instructions."""
    cfg = params.cfg
    _step.fits(cfg.causal)
    _step.check_state(steps, params, state, _layout, _cache.capacity(state))
    pos, d = _step.position(steps, state.pos), cfg.dim_head
    q, k, v = _step.turned(steps, x, params.to_qkv, (cfg.heads * d,) * 3, d, pos, cfg.rotary_emb, angles)
    keys, values, first, end = _step.cached(steps, state, (k, v), pos)
    seen = steps.layout(params.layout, cfg.heads, pos // cfg.block_size, cfg.block_size, state.visible, end)
    heads = steps.decode(q, keys, values, seen, first, end, d ** -0.5)
    return steps.linear(heads, params.to_out, params.to_out_bias, out=out), State(keys, values, state.visible, state.pos + 1)


def _any_visible(params: Params, keep: Tensor, positions: Tensor, causal: bool) -> Tensor:
    """Which rows see a key in at least one head: bool [b, n]."""
    keys = torch.arange(keep.shape[1], device=keep.device)
    seen = visible(params.layout, positions, keys, params.cfg.block_size).any(0)
    seen = seen & (keys <= positions[:, None]) if causal else seen
    return (seen & keep[:, None, :]).any(-1)


def _check(params: Params, x: Tensor, state: State | Empty, mask: Tensor | None,
           context: Tensor | None) -> tuple[Tensor, int | None]:
    cfg = params.cfg
    check_input("block_sparse.apply", x, cfg.dim, like=params.to_qkv, mask=mask)
    refuse("block_sparse.apply", "Rows and columns of the layout are positions of x.",
           "Use the family full with causal=False for cross attention.", context=context)
    n, limit = x.shape[1], cfg.blocks * cfg.block_size
    check(n <= limit, "block_sparse.apply: x has {} positions, but the layout covers {}.", n, limit,
          remedy="Shorten x, or build the Config with a larger seq_len.")
    if isinstance(state, Empty):
        return x, 0
    if not cfg.causal:
        refuse("block_sparse.apply", "A non-causal query sees later keys, so no prefix has a final answer.",
               "Use Config(causal=True, ...), or call apply(params, x) on the whole sequence.", state=state)
    return _cache.room("block_sparse", state, x, _layout(params, x.shape[0], _cache.capacity(state)))


FAMILY = Family(
    name="block_sparse", config=Config, init=init, init_state=init_state, apply=apply, streams=True, masks=True, contexts=False,
    source="dalle-pytorch 1.6.6, SparseAttention; DeepSpeed 0.19.6, VariableSparsityConfig",
    examples=(
        Config(dim=7, seq_len=26, heads=3, dim_head=5, block_size=2, text_seq_len=3, num_random_blocks=1),
        Config(dim=7, seq_len=26, heads=2, dim_head=4, block_size=3, rotary_emb=True, dropout=0.25,
               pattern=layouts.BigBird(num_heads=2, block=3, different_layout_per_head=True, attention="unidirectional")),
        Config(dim=5, seq_len=26, causal=False, heads=2, dim_head=3, block_size=4, text_seq_len=4, num_random_blocks=1),
    ), step=step)
