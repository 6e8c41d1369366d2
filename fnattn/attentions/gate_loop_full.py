"""GateLoop's attention form: causal attention with data-dependent relative positions, with or without softmax.

    s_ij = sum_p Re(prod_{j < t <= i} alpha_tp) (q_ip . k_jp) / sqrt(d)        out_i = sum_{j <= i} w(s_i)_j v_j

over pairs p of channels, alpha = sigmoid(|a|) exp(i arg a) per position and pair; w is softmax, or nothing. Without
data_dependent_rel_pos it is plain causal attention, rotary if asked for.

Source: CausalFullAttention of gateloop-transformer 0.2.5; Katsch 2023, arXiv 2311.01927, section 3.3.
Different here: upstream multiplies alpha up along the channel pairs instead of along time, and divides by the clamped
product, so there is no relative position in it. That arithmetic is kept behind `compat=True`, for checkpoints; the default
is the product over time, in logarithms and without a clamp. There is a state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from fnattn_kernels.native import steps_weights
from torch import Tensor
from torch.nn import functional as F

from .. import ops, taps
from ..core import EMPTY, Empty, Family, check, check_init, check_input, check_sizes, config, config_of, refuse
from ..ops._door import only_plain
from ..ops.decayed_attention import decay, decayed_attention
from . import _cache, _states, _step
from ._cache import Rows
from ._heads import linear_init, merge_heads, scale_gradient, split_heads, uniform_init
from ._states import POSITION, Leaf

# b batch, h heads, n positions, d width of a head, p = d / 2 pairs of channels
CLAMP = 1e-10  # compat: upstream's lower bound of the real part of the product


@config
class Config:
    """Options of GateLoop's attention form.

    dim:        width of x.
    dim_head:   width of one head. heads: number of heads.
    rotary_emb: rotary positions on queries and keys.
    add_swish_gating: multiply the heads by SiLU of a projection of x.
    data_dependent_rel_pos: decay and turn scores by products of alpha.
    frac_gradient_data_dependent_rel_pos: factor on every derivative through a. At anything but 1 what differentiation
                returns is not the derivative of the function computed; see `fnattn.gradient_is_exact`.
    softmax_normalize: softmax over the scores; default: exactly when there is no data_dependent_rel_pos.
    ablate_complex: drop the imaginary part of a. ablate_state_transition: alpha = 1.
    compat:     upstream's arithmetic: the product runs along the channel pairs, clamped, its inverse on the keys.
    """

    dim: int
    dim_head: int = 64
    heads: int = 8
    rotary_emb: bool = False
    add_swish_gating: bool = False
    data_dependent_rel_pos: bool = False
    frac_gradient_data_dependent_rel_pos: float = 0.5
    softmax_normalize: bool | None = None
    ablate_complex: bool = False
    ablate_state_transition: bool = False
    compat: bool = False

    def __post_init__(self):
        check_sizes("gate_loop_full.Config", 1, dim=self.dim, dim_head=self.dim_head, heads=self.heads)
        check(self.dim_head % 2 == 0 or not (self.rotary_emb or self.data_dependent_rel_pos),
              "gate_loop_full.Config: rotary_emb and data_dependent_rel_pos need an even dim_head; got {}.", self.dim_head,
              remedy="They act on pairs of channels.")

    @property
    def softmax(self) -> bool:
        """Whether scores are normalised by softmax."""
        return not self.data_dependent_rel_pos if self.softmax_normalize is None else self.softmax_normalize

    @property
    def decays(self) -> bool:
        """Whether scores decay over time."""
        return self.data_dependent_rel_pos and not self.ablate_state_transition and not self.compat


class Params(NamedTuple):
    """Weights are [out, in], as in torch.nn.Linear."""

    cfg: Config
    to_qkv: Tensor                      # [3 h d, dim], rows (q | k | v, head, channel)
    to_out: Tensor                      # [dim, h d]
    to_out_bias: Tensor                 # [dim]
    to_a: Tensor | Empty = EMPTY        # [h d, dim], rows (head, pair, re | im); Empty unless data_dependent_rel_pos
    to_gates: Tensor | Empty = EMPTY    # [h d, dim]; Empty unless add_swish_gating


class State(NamedTuple):
    """Keys and values seen so far, with room for a fixed number."""

    k: Rows                    # [b, h, capacity, d], rotated or scaled as they enter the scores
    v: Rows                    # [b, h, capacity, d]
    log_sum: Rows | Empty      # [b, h, capacity, p] float64: running sum of log|alpha|; Empty unless cfg.decays
    phase_sum: Rows | Empty    # [b, h, capacity, p] float64: running sum of arg alpha
    total: Tensor | Empty      # [2, b, h, 1, p] float64: both sums at the last position
    pos: Tensor                # [] int64: positions seen


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key: uniform in +-1/sqrt(fan in)."""
    check_init("gate_loop_full.init", cfg, Config, dtype)
    inner, kind = cfg.heads * cfg.dim_head, {"dtype": dtype, "device": device}
    return Params(
        cfg,
        to_qkv=linear_init(params_key, "to_qkv", 3 * inner, cfg.dim, **kind),
        to_out=linear_init(params_key, "to_out", cfg.dim, inner, **kind),
        to_out_bias=uniform_init(params_key, "to_out_bias", (cfg.dim,), inner ** -0.5, **kind),
        to_a=linear_init(params_key, "to_a", inner, cfg.dim, **kind) if cfg.data_dependent_rel_pos else EMPTY,
        to_gates=linear_init(params_key, "to_gates", inner, cfg.dim, **kind) if cfg.add_swish_gating else EMPTY)


def init_state(params: Params, batch: int, *, capacity: int) -> State:
    """Empty buffers for `batch` sequences of up to `capacity` positions."""
    config_of("gate_loop_full.init_state", params, Params)
    check_sizes("gate_loop_full.init_state", 0, batch=batch)
    check_sizes("gate_loop_full.init_state", 1, "Give the number of positions that the longest sequence will have.", capacity=capacity)
    return _states.fresh(_layout(params, batch, capacity), params.to_qkv)


def _layout(params: Params, batch: int, capacity: int | str) -> State:
    """What a state of these params must be; see `_states`."""
    cfg, pairs = params.cfg, params.cfg.dim_head // 2
    rows = _cache.layout(batch, cfg.heads, capacity, cfg.dim_head, params.to_qkv.dtype)
    if not cfg.decays:
        return State(rows, rows, EMPTY, EMPTY, EMPTY, POSITION)
    sums = _cache.layout(batch, cfg.heads, capacity, pairs, torch.float64)
    return State(rows, rows, sums, sums, Leaf("2, batch, heads, 1, pairs", (2, batch, cfg.heads, 1, pairs), torch.float64), POSITION)


def apply(params: Params, x: Tensor, state: State | Empty = EMPTY, *, mask: Tensor | None = None,
          context: Tensor | None = None, dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """Causal attention with decaying, turning scores. Time grows with the square of the length.

    Args:
        params: from `init`.
        x: [b, n, dim].
        state: from `init_state` or a former call: x continues that sequence, in a chunk of any length.
        mask, context: refused; the decay between two positions is that of all positions between them.
        dropout_key: accepted; this attention drops nothing.
        impl: passed to `ops.softmax_attention`; scores that decay, or that no softmax normalises, are plain torch and take "auto" or
            "reference".
    Returns:
        out [b, n, dim] in x's dtype; the state after x, or EMPTY.
    """
    cfg = config_of("gate_loop_full.apply", params, Params)
    if _step.asked_for(x, state, impl, mask, context, dropout_key) and (done := _step.layer(step, params, x, state, cfg.dim)):
        return done
    check_input("gate_loop_full.apply", x, cfg.dim, like=params.to_qkv)
    refuse("gate_loop_full.apply", "The decay between two positions is that of all positions between them.",
           "Leave padding at the end of the sequence and ignore its outputs, or choose a family that masks: full, taylor.",
           mask=mask, context=context)
    streaming, n = not isinstance(state, Empty), x.shape[1]
    used = 0
    if streaming:
        x, used = _cache.room("gate_loop_full", state, x, _layout(params, x.shape[0], _cache.capacity(state)))
    pos = state.pos if streaming else torch.zeros((), dtype=torch.int64, device=x.device)

    q, k, v = (split_heads(t, cfg.heads) for t in F.linear(x, params.to_qkv).chunk(3, -1))
    if cfg.rotary_emb:
        positions, freqs = _cache.positions(pos, n), ops.lang_freqs(cfg.dim_head, device=x.device)
        turn = impl if impl == "reference" else "auto"
        q, k = ops.rotary(q, positions, freqs, impl=turn), ops.rotary(k, positions, freqs, impl=turn)
    q = q * cfg.dim_head ** -0.5
    log_sum = phase_sum = total = EMPTY
    if cfg.data_dependent_rel_pos and not cfg.ablate_state_transition:
        a = taps.tap("a", _raw_gate(params, x))
        if cfg.compat:
            q, k = _upstream_scaling(q, k, a)
        else:
            log_sum, phase_sum = (t.double().cumsum(2) for t in decay(a))
            if streaming:
                log_sum, phase_sum = log_sum + state.total[0], phase_sum + state.total[1]
            total = torch.stack((log_sum, phase_sum))[..., -1:, :] if n else (state.total if streaming else EMPTY)
    q, k, v = taps.tap("q", q), taps.tap("k", k), taps.tap("v", v)

    after = EMPTY
    if streaming:
        seen = (EMPTY if isinstance(rows, Empty) else _cache.append(rows, t, pos, used)
                for rows, t in zip(state[:4], (k, v, log_sum, phase_sum)))
        after = State(*seen, total, pos + n)
    if cfg.softmax and not cfg.decays:
        if used == 0:
            out = ops.softmax_attention(q, k, v, causal=True, scale=1.0, offset=0, impl=impl)
        else:
            out = _cache.attend(q, after.k, after.v, pos, used, scale=1.0, impl=impl)
    else:
        keys = (k, v, log_sum, phase_sum)
        if used != 0:
            known = None if used is None else used + n
            keys = tuple(EMPTY if isinstance(rows, Empty) else _cache.read(rows, after.pos, known) for rows in after[:4])
        if cfg.decays:
            only_plain("gate_loop_full.apply", impl, "decaying scores are plain torch")
            out = decayed_attention(q, *keys[:2], log_sum, phase_sum, *keys[2:], offset=pos, softmax=cfg.softmax)
        else:
            only_plain("gate_loop_full.apply", impl, "scores without softmax are plain torch")
            out = _unnormalised(q, *keys[:2], pos)
    out = taps.tap("heads", out).to(x.dtype)
    if cfg.add_swish_gating:
        out = out * F.silu(split_heads(F.linear(x, params.to_gates), cfg.heads))
    return F.linear(merge_heads(out), params.to_out, params.to_out_bias), after


def step(steps: _step.Steps, params: Params, x: _step.Row, state: State, out: _step.Row | None = None) -> tuple[_step.Row, State]:
    """What `apply` does for one position of few sequences, as instructions: without data_dependent_rel_pos."""
    cfg = params.cfg
    _step.fits(not cfg.data_dependent_rel_pos or cfg.ablate_state_transition)
    _step.check_state(steps, params, state, _layout, _cache.capacity(state))
    pos, d = _step.position(steps, state.pos, counted=cfg.softmax), cfg.dim_head
    q, k, v = _step.turned(steps, x, params.to_qkv, (cfg.heads * d,) * 3, d, pos, cfg.rotary_emb)
    keys, values, first, end = _step.cached(steps, state, (k, v), pos)
    if cfg.softmax:
        heads = steps.decode(q, keys, values, None, first, end, d ** -0.5)
    else:
        heads = steps_weights.mix(steps, steps_weights.weigh(steps, q, keys, values, first, end, d ** -0.5))
    if cfg.add_swish_gating:
        steps.multiply(heads, steps.linear(x, params.to_gates, act=steps.SILU))
    return (steps.linear(heads, params.to_out, params.to_out_bias, out=out),
            State(keys, values, EMPTY, EMPTY, EMPTY, state.pos + 1))


def _raw_gate(params: Params, x: Tensor) -> Tensor:
    """a [b, h, n, p, 2]."""
    cfg = params.cfg
    a = split_heads(F.linear(x, params.to_a), cfg.heads).unflatten(-1, (cfg.dim_head // 2, 2))
    a = scale_gradient(a, cfg.frac_gradient_data_dependent_rel_pos)
    return torch.stack((a[..., 0], torch.zeros_like(a[..., 1])), -1) if cfg.ablate_complex else a


def _upstream_scaling(q: Tensor, k: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """q r and k / r per channel pair, with r the clamped real part of alpha multiplied up along the pairs."""
    log_size, phase = decay(a)
    r = (log_size.cumsum(-1).exp() * phase.cumsum(-1).cos()).clamp(min=CLAMP).unsqueeze(-1)
    return ((q.unflatten(-1, (-1, 2)) * r).flatten(-2), (k.unflatten(-1, (-1, 2)) * (1.0 / r)).flatten(-2))


def _unnormalised(q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    """Scores as weights: sum over j <= i of (q_i . k_j) v_j, with queries from position pos on."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    at = pos + torch.arange(q.shape[2], device=q.device)
    scores = torch.einsum("bhid,bhjd->bhij", q.to(wide), k.to(wide))
    seen = torch.arange(k.shape[2], device=q.device) <= at[:, None]
    return torch.einsum("bhij,bhje->bhie", torch.where(seen, scores, 0.0), v.to(wide)).to(v.dtype)


FAMILY = Family(
    name="gate_loop_full", config=Config, init=init, init_state=init_state, apply=apply, streams=True, masks=False,
    contexts=False, source="gateloop-transformer 0.2.5, CausalFullAttention; arXiv 2311.01927",
    examples=(
        Config(dim=7, dim_head=6, heads=3, rotary_emb=True, add_swish_gating=True),
        Config(dim=7, dim_head=4, heads=3, data_dependent_rel_pos=True, frac_gradient_data_dependent_rel_pos=1.0),
        Config(dim=5, dim_head=4, heads=2, data_dependent_rel_pos=True, frac_gradient_data_dependent_rel_pos=1.0,
               softmax_normalize=True, ablate_complex=True),
    ), step=step)
