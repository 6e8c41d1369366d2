"""Taylor-series linear attention: exp(q.k) ~ 1 + q.k + (q.k)^2 / 2, so that attention is a running sum.

    out_i = sum_{j <= i} p_ij v_j / sum_{j <= i} p_ij          p = 1 + s + s^2 / 2,  s = q_i . k_j / sqrt(d)

p is at least 1/2 for every s, so the denominator never vanishes and no maximum needs to be subtracted. The state is the
sum of features of the keys times [v, 1]: constant in the length of the sequence.

Source: TaylorSeriesLinearAttn of taylor-series-linear-attention 0.2.0; Arora et al. 2024 (Based), arXiv 2402.18668.
Different here: the state keeps the 1 + d + d(d+1)/2 distinct features whatever `remove_even_power_dups` says (both give
the same values), a one-headed KV has a one-headed state, a key mask works in the causal form too, chunks may have any
length, and masked-out rows are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops, taps
from ..core import EMPTY, Empty, Family, check, check_init, check_input, check_sizes, config, config_of, kind_of, refuse
from ..ops.taylor.reference import EPS
from . import _states, _step
from ._heads import dropout, linear, linear_init, merge_heads, ones_init, rms_norm, shift_tokens, split_heads
from ._states import POSITION, Leaf

# b batch, h query heads, g key heads (h, or 1 if one-headed), n positions, d width of a head, f features


@config
class Config:
    """Options of Taylor-series linear attention.

    dim:        width of x.
    dim_head:   width of one head, of queries, keys and values alike.
    heads:      number of query heads.
    causal:     position i attends to j <= i; needed for a state.
    one_headed_kv: one key and value head serves all query heads.
    rotary_emb: rotary positions on queries and keys, over the whole head.
    combine_heads: project the heads back to dim; else out is [b, n, heads * dim_head] and nothing is dropped.
    gate_value_heads: one sigmoid gate per head and position, computed from x before the norm.
    prenorm:    RMSNorm on x, not on context.
    shift_tokens: half of the channels come from the position before.
    dropout:    chance of zeroing an entry of the result, when a dropout_key is passed.
    remove_even_power_dups: upstream's storage option for the features; the same values either way, and the state here
                always has the smaller form.
    """

    dim: int
    dim_head: int = 16
    heads: int = 8
    causal: bool = False
    one_headed_kv: bool = False
    rotary_emb: bool = False
    combine_heads: bool = True
    gate_value_heads: bool = False
    prenorm: bool = False
    shift_tokens: bool = False
    dropout: float = 0.0
    remove_even_power_dups: bool = False

    def __post_init__(self):
        check_sizes("taylor.Config", 1, dim=self.dim, dim_head=self.dim_head, heads=self.heads)
        check(0.0 <= self.dropout <= 1.0, "taylor.Config: dropout must lie in [0, 1]; got {}.", self.dropout,
              remedy="It is the chance of zeroing an entry.")
        check(not self.rotary_emb or self.dim_head % 2 == 0, "taylor.Config: rotary_emb needs an even dim_head; got {}.",
              self.dim_head, remedy="Rotary positions turn pairs of channels.")


class Params(NamedTuple):
    """Weights are [out, in], as in torch.nn.Linear; there are no biases."""

    cfg: Config
    to_q: Tensor                        # [h d, dim]
    to_kv: Tensor                       # [2 g d, dim]: keys, then values
    to_out: Tensor | Empty = EMPTY      # [dim, h d]; Empty unless combine_heads
    to_v_gates: Tensor | Empty = EMPTY  # [h, dim]; Empty unless gate_value_heads
    norm: Tensor | Empty = EMPTY        # [dim]; Empty unless prenorm


class State(NamedTuple):
    """What the past leaves behind: constant in its length."""

    sums: Tensor                  # [b, g, f, d + 1]: sum of features(k) [v, 1]^T; the last column is the sum for the denominator
    last: Tensor | Empty          # [b, 1, dim]: the last token; Empty unless shift_tokens
    pos: Tensor                   # [] int64: positions seen


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key: uniform in +-1/sqrt(fan in), norm 1."""
    check_init("taylor.init", cfg, Config, dtype)
    inner, kv = cfg.heads * cfg.dim_head, (1 if cfg.one_headed_kv else cfg.heads) * cfg.dim_head
    kind = {"dtype": dtype, "device": device}
    return Params(
        cfg,
        to_q=linear_init(params_key, "to_q", inner, cfg.dim, **kind),
        to_kv=linear_init(params_key, "to_kv", 2 * kv, cfg.dim, **kind),
        to_out=linear_init(params_key, "to_out", cfg.dim, inner, **kind) if cfg.combine_heads else EMPTY,
        to_v_gates=linear_init(params_key, "to_v_gates", cfg.heads, cfg.dim, **kind) if cfg.gate_value_heads else EMPTY,
        norm=ones_init((cfg.dim,), **kind) if cfg.prenorm else EMPTY)


def init_state(params: Params, batch: int, *, capacity: int = 0) -> State:
    """The state before the first position. `capacity` is accepted for all families alike; this one needs none."""
    cfg = config_of("taylor.init_state", params, Params)
    check(cfg.causal, "taylor.init_state: cannot stream. A non-causal query sees later keys, so no prefix has a final answer.",
          remedy="Use Config(causal=True, ...), or call apply(params, x) on the whole sequence.")
    check_sizes("taylor.init_state", 0, batch=batch, capacity=capacity)
    return _states.fresh(_layout(params, batch), params.to_q)


def _layout(params: Params, batch: int) -> State:
    """What a state of these params must be; see `_states`."""
    cfg, d, like = params.cfg, params.cfg.dim_head, params.to_q
    shape = batch, 1 if cfg.one_headed_kv else cfg.heads, 1 + d + d * (d + 1) // 2, d + 1
    last = Leaf("batch, 1, dim", (batch, 1, cfg.dim), like.dtype) if cfg.shift_tokens else EMPTY
    return State(Leaf("batch, key heads, features, width + 1", shape, _states.wide(like)), last, POSITION)


def apply(params: Params, x: Tensor, state: State | Empty = EMPTY, *, mask: Tensor | None = None,
          context: Tensor | None = None, dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """Attends with polynomial weights. Time and memory grow linearly with the length.

    Args:
        params: from `init`.
        x: [b, n, dim].
        state: from `init_state` or a former call (causal only): x continues that sequence, in a chunk of any length.
        mask: bool [b, keys]; False keys are not there. Describes context if given, else x.
        context: [b, keys, dim] to attend to instead of x; not with causal or rotary_emb. Not normed, as upstream.
        dropout_key: drops entries of the result if cfg.dropout > 0.
        impl: passed to `ops.taylor`.
    Returns:
        out [b, n, dim] ([b, n, heads * dim_head] without combine_heads) in x's dtype; the state after x, or EMPTY.
    """
    cfg = config_of("taylor.apply", params, Params)
    if _step.asked_for(x, state, impl, mask, context, dropout_key) and (done := _step.layer(step, params, x, state, cfg.dim)):
        return done
    check_input("taylor.apply", x, cfg.dim, like=params.to_q, mask=mask, context=context)
    if cfg.causal:
        refuse("taylor.apply", "With causal=True a query attends to its own past, and a context has none.",
               "Use Config(causal=False, ...) for cross attention.", context=context)
    else:
        refuse("taylor.apply", "A non-causal query sees later keys, so no prefix has a final answer.",
               "Use Config(causal=True, ...), or call apply(params, x) on the whole sequence.", state=state)
    if cfg.rotary_emb:
        refuse("taylor.apply", "Rotary positions of x say nothing about positions of a context.",
               "Use Config(rotary_emb=False, ...) for cross attention.", context=context)
    streaming = not isinstance(state, Empty)
    if streaming:
        _states.check("taylor", state, _layout(params, x.shape[0]))

    shifted = shift_tokens(x, state.last if streaming else None) if cfg.shift_tokens else x
    normed = rms_norm(shifted, params.norm, impl) if cfg.prenorm else shifted
    q = split_heads(linear(normed, params.to_q, impl=impl), cfg.heads)
    k, v = _keys(params, normed if context is None else context, impl)
    if cfg.rotary_emb:
        q, k = _turned(cfg, state.pos if streaming else None, impl, q, k)
    q, k, v = taps.tap("q", q), taps.tap("k", k), taps.tap("v", v)

    out, sums = ops.taylor(q, k, v, keep=mask, sums=state.sums if streaming else None, causal=cfg.causal, impl=impl)
    out = taps.tap("heads", out)
    if cfg.gate_value_heads:
        out = out * linear(shifted, params.to_v_gates, impl=impl).sigmoid().transpose(1, 2).unsqueeze(-1)
    out = merge_heads(out)
    if cfg.combine_heads:
        out = dropout(dropout_key, "out", linear(out, params.to_out, impl=impl), cfg.dropout)
    if not streaming:
        return out, EMPTY
    return out, _after(cfg, state, x, sums)


def _keys(params: Params, x: Tensor, impl: str) -> list[Tensor]:
    """Keys and values [b, g, n, d]."""
    heads = 1 if params.cfg.one_headed_kv else params.cfg.heads
    return [split_heads(t, heads) for t in linear(x, params.to_kv, impl=impl).chunk(2, -1)]


def _turned(cfg: Config, start: Tensor | None, impl: str, *rows: Tensor) -> list[Tensor]:
    """Rows [b, h, n, d] turned by their positions, from `start` on."""
    n, device = rows[0].shape[2], rows[0].device
    positions = (torch.zeros((), dtype=torch.int64, device=device) if start is None else start) + torch.arange(n, device=device)
    freqs = ops.lang_freqs(cfg.dim_head, device=device)
    return [ops.rotary(t, positions, freqs, impl=impl if impl == "reference" else "auto") for t in rows]


def _after(cfg: Config, state: State, x: Tensor, sums: Tensor) -> State:
    last = torch.cat((state.last, x.to(state.last.dtype)), 1)[:, -1:] if cfg.shift_tokens else EMPTY
    return State(sums, last, state.pos + x.shape[1])


def absorb(params: Params, x: Tensor, state: State, *, mask: Tensor | None = None, impl: str = "auto") -> State:
    """The state after x, as `apply` gives it, without queries and outputs: half of the work."""
    cfg = config_of("taylor.absorb", params, Params)
    check_input("taylor.absorb", x, cfg.dim, like=params.to_q, mask=mask)
    _states.check("taylor", state, _layout(params, x.shape[0]))
    shifted = shift_tokens(x, state.last) if cfg.shift_tokens else x
    k, v = _keys(params, rms_norm(shifted, params.norm, impl) if cfg.prenorm else shifted, impl)
    if cfg.rotary_emb:
        k, = _turned(cfg, state.pos, impl, k)
    nobody = k.new_zeros(x.shape[0], cfg.heads, 0, cfg.dim_head)
    return _after(cfg, state, x, ops.taylor(nobody, k, v, keep=mask, sums=state.sums, causal=False, impl=impl)[1])


def channel_first(params: Params, x: Tensor, *, mask: Tensor | None = None, dropout_key: Tensor | None = None,
                  impl: str = "auto") -> Tensor:
    """`apply` on images or video, whose channels come first: every point attends to all points.

        out[b, :, p] = apply(params, the points x[b, :, q] as a sequence)[b, p]

    Time and memory grow linearly with the number of points. With cfg.causal a point sees those before it, row by row.

    Args:
        params: from `init`.
        x: [b, dim, *spatial], for example [b, dim, height, width]; any number of spatial axes, at least one.
        mask: bool [b, *spatial]; False points are not there as keys.
        dropout_key: drops entries of the result if cfg.dropout > 0.
        impl: passed to `ops.taylor`.
    Returns:
        [b, dim, *spatial] ([b, heads * dim_head, *spatial] without combine_heads) in x's dtype, summed in float32 or wider.
    Raises:
        ValueError: shapes. TypeError: x not floating, mask not bool. KernelUnavailable: the named kernel cannot serve the call.

    Differentiable any number of times in both modes; batches under vmap without a loop; compiles and exports.

    Source: ChannelFirstTaylorSeriesLinearAttn of taylor-series-linear-attention 0.2.0; its `attn` holds our params.
    """
    dim = config_of("taylor.channel_first", params, Params).dim
    for name, t in {"x": x, "mask": x if mask is None else mask}.items():
        check(isinstance(t, Tensor), "taylor.channel_first: {} must be a tensor; got {}.", name, kind_of(t),
              remedy=f"Convert it: torch.as_tensor({name}).", error=TypeError)
    check(x.ndim >= 3 and x.shape[1] == dim, "taylor.channel_first: x must be [batch, {}, *spatial] (cfg.dim={}); got {}.", dim, dim,
          list(x.shape), remedy="Channels come before the spatial axes: x.movedim(-1, 1). For sequences [batch, seq, dim] use apply.")
    spatial = x.shape[2:]
    check(mask is None or mask.shape == (x.shape[0], *spatial), "taylor.channel_first: mask must be [batch, *spatial] = {}; got {}.",
          [x.shape[0], *spatial], None if mask is None else list(mask.shape), remedy="Give one bool for each point.")
    out, _ = apply(params, x.flatten(2).mT, mask=None if mask is None else mask.flatten(1), dropout_key=dropout_key, impl=impl)
    return out.mT.unflatten(2, spatial)


def step(steps: _step.Steps, params: Params, x: _step.Row, state: State, out: _step.Row | None = None) -> tuple[_step.Row, State]:
    """What `apply` does for one position of few sequences, as instructions."""
    cfg = params.cfg
    _step.fits(cfg.causal and cfg.combine_heads)
    _step.check_state(steps, params, state, _layout)
    width, last, shifted = (1 if cfg.one_headed_kv else cfg.heads) * cfg.dim_head, EMPTY, x
    if cfg.shift_tokens:
        shifted, last, stay = steps.room(x.width), torch.empty_like(state.last), (x.width + 1) // 2
        steps.copy(x, shifted, stay)
        steps.copy(steps.given(state.last), shifted, x.width - stay, skip=stay)
        steps.store(x, last)
    normed = steps.norm(shifted, params.norm) if cfg.prenorm else shifted
    q = steps.linear(normed, params.to_q)
    k, v = steps.parts(normed, params.to_kv, width, width)
    if cfg.rotary_emb:
        pos = _step.position(steps, state.pos, counted=True)
        for turned in (q, k):
            steps.turn(turned, _step.lang_freqs(cfg.dim_head), cfg.dim_head, pos)
    heads, sums = steps.taylor(q, k, v, state.sums, cfg.dim_head ** -0.5, EPS)
    if cfg.gate_value_heads:
        steps.gate(heads, steps.linear(shifted, params.to_v_gates))
    return steps.linear(heads, params.to_out, out=out), State(sums, last, state.pos + 1)


def resume(state: State, last: Tensor | None = None, skipped: int = 0) -> State:
    """A state that has seen no keys, `skipped` positions later, after the token `last`: see `core.Family`."""
    turned = state.last if last is None or isinstance(state.last, Empty) else last.to(state.last.dtype)
    return State(torch.zeros_like(state.sums), turned, state.pos + skipped)


def combine(a: State, b: State) -> State:
    """The state after both segments, where b was grown from `resume(a)` (or from the same position and last token)."""
    return State(a.sums + b.sums, b.last, b.pos)


FAMILY = Family(
    name="taylor", config=Config, init=init, init_state=init_state, apply=apply, streams=True, masks=True, contexts=True,
    source="taylor-series-linear-attention 0.2.0, TaylorSeriesLinearAttn; arXiv 2402.18668",
    examples=(
        Config(dim=7, dim_head=3, heads=5, causal=True),
        Config(dim=7, dim_head=4, heads=3, causal=True, one_headed_kv=True, rotary_emb=True, gate_value_heads=True, prenorm=True,
               shift_tokens=True, dropout=0.25),
        Config(dim=11, dim_head=5, heads=2, dropout=0.25),
        Config(dim=5, dim_head=2, heads=3, one_headed_kv=True, combine_heads=False, gate_value_heads=True, prenorm=True,
               remove_even_power_dups=True),
    ),
    combine=combine, resume=resume, step=step, absorb=absorb)
