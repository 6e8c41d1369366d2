"""GateLoop: a linear recurrence whose decay and rotation are functions of the input.

    H_t = alpha_t H_{t-1} + k_t v_t^T,     out_t = q_t^T Re(H_t),     alpha_t = sigmoid(|a_t|) exp(i arg a_t)

with one complex a_t per head and step, a linear function of x. |alpha| lies in [1/2, 1): a step forgets half at most. The
state is one complex d x d matrix per head, kept as (real, imaginary) pairs.

Source: GateLoopedAttention of gateloop-transformer 0.2.5; Katsch 2023, arXiv 2311.01927 (their a_n is our alpha).
Different here: real arithmetic throughout (bfloat16 works), a state, and the ablations are options of the config.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops, taps
from ..core import EMPTY, Empty, Family, check, check_init, check_input, check_sizes, config, config_of, refuse
from . import _states, _step
from ._heads import layer_norm, linear, linear_init, merge_heads, ones_init, scale_gradient, split_heads, uniform_init
from ._states import Leaf

# b batch, h heads, n positions, d width of a head


@config
class Config:
    """Options of GateLoop.

    dim:        width of x.
    heads:      number of heads, a divisor of dim_inner; default dim_inner: one head per channel.
    dim_inner:  width of queries, keys and values together; default dim.
    checkpoint_gate_looped_attn: upstream's switch for recomputing the scan in backward; the operator always does, so it
                changes neither values nor memory.
    add_swish_gating: multiply the result by SiLU of a projection of x.
    sub_ln:     LayerNorm on the heads' result before the gate.
    frac_gradient_state_transition: factor on every derivative through a. At anything but 1 what differentiation returns
                is not the derivative of the function computed; see `fnattn.gradient_is_exact`.
    ablate_complex: drop the imaginary part of a: the phase is 0 or pi.
    ablate_state_transition: alpha = 1, a sum without decay.
    """

    dim: int
    heads: int | None = None
    dim_inner: int | None = None
    checkpoint_gate_looped_attn: bool = True
    add_swish_gating: bool = True
    sub_ln: bool = False
    frac_gradient_state_transition: float = 0.9
    ablate_complex: bool = False
    ablate_state_transition: bool = False

    def __post_init__(self):
        check_sizes("gate_loop.Config", 1, dim=self.dim, dim_inner=self.inner, heads=self.head_count)
        check(self.inner % self.head_count == 0,
              "gate_loop.Config: heads must divide dim_inner={}; got {}.", self.inner, self.head_count,
              remedy="Choose a divisor, or leave heads out for one head per channel.")

    @property
    def inner(self) -> int:
        """Width of queries, keys and values together."""
        return self.dim if self.dim_inner is None else self.dim_inner

    @property
    def head_count(self) -> int:
        """Number of heads."""
        return self.inner if self.heads is None else self.heads

    @property
    def projects_out(self) -> bool:
        """Whether there is an output projection: not if the widths agree and nothing gates, as upstream."""
        return self.inner != self.dim or self.add_swish_gating


class Params(NamedTuple):
    """Weights are [out, in], as in torch.nn.Linear."""

    cfg: Config
    to_qkv: Tensor                          # [3 h d, dim]
    to_a: Tensor                            # [2 h, dim], rows (head, re | im)
    to_a_bias: Tensor                       # [2 h]
    to_gates: Tensor | Empty = EMPTY        # [h d, dim]; Empty unless add_swish_gating
    sub_ln: Tensor | Empty = EMPTY          # [h d]; Empty unless cfg.sub_ln
    sub_ln_bias: Tensor | Empty = EMPTY     # [h d]
    to_out: Tensor | Empty = EMPTY          # [dim, h d]; Empty unless cfg.projects_out


class State(NamedTuple):
    """What the past leaves behind: constant in its length."""

    h: Tensor   # [b, h, d, d, 2]: sum of decayed k v^T, (real, imaginary)
    a: Tensor   # [b, h, 2]: product of all alphas since the state began; what `combine` decays an earlier state by


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key: uniform in +-1/sqrt(fan in), norms 1 and 0."""
    check_init("gate_loop.init", cfg, Config, dtype)
    kind = {"dtype": dtype, "device": device}
    gated, normed = cfg.add_swish_gating, cfg.sub_ln
    return Params(
        cfg,
        to_qkv=linear_init(params_key, "to_qkv", 3 * cfg.inner, cfg.dim, **kind),
        to_a=linear_init(params_key, "to_a", 2 * cfg.head_count, cfg.dim, **kind),
        to_a_bias=uniform_init(params_key, "to_a_bias", (2 * cfg.head_count,), cfg.dim ** -0.5, **kind),
        to_gates=linear_init(params_key, "to_gates", cfg.inner, cfg.dim, **kind) if gated else EMPTY,
        sub_ln=ones_init((cfg.inner,), **kind) if normed else EMPTY,
        sub_ln_bias=torch.zeros(cfg.inner, **kind) if normed else EMPTY,
        to_out=linear_init(params_key, "to_out", cfg.dim, cfg.inner, **kind) if cfg.projects_out else EMPTY)


def init_state(params: Params, batch: int, *, capacity: int = 0) -> State:
    """The state before the first position. `capacity` is accepted for all families alike; this one needs none."""
    config_of("gate_loop.init_state", params, Params)
    check_sizes("gate_loop.init_state", 0, batch=batch, capacity=capacity)
    return resume(_states.fresh(_layout(params, batch), params.to_qkv))


def _layout(params: Params, batch: int) -> State:
    """What a state of these params must be; see `_states`."""
    heads, wide = params.cfg.head_count, _states.wide(params.to_qkv)
    d = params.cfg.inner // heads
    return State(Leaf("batch, heads, width, width, 2", (batch, heads, d, d, 2), wide), Leaf("batch, heads, 2", (batch, heads, 2), wide))


def apply(params: Params, x: Tensor, state: State | Empty = EMPTY, *, mask: Tensor | None = None,
          context: Tensor | None = None, dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """Mixes the past by a gated recurrence. Time grows linearly with the length, memory of the state not at all.

    Args:
        params: from `init`.
        x: [b, n, dim].
        state: from `init_state` or a former call: x continues that sequence, in a chunk of any length.
        mask, context: refused; a recurrence has no keys to hide or to take from elsewhere.
        dropout_key: accepted; GateLoop drops nothing.
        impl: passed to `ops.gate_loop`.
    Returns:
        out [b, n, dim] in x's dtype; the state after x, or EMPTY.
    """
    cfg = config_of("gate_loop.apply", params, Params)
    if _step.asked_for(x, state, impl, mask, context) and (done := _step.layer(step, params, x, state, cfg.dim)):
        return done
    check_input("gate_loop.apply", x, cfg.dim, like=params.to_qkv)
    refuse("gate_loop.apply", "The recurrence reads every position in order and has no keys to choose from.",
           "Leave padding at the end of the sequence and ignore its outputs, or choose a family that masks: full, taylor.",
           mask=mask, context=context)
    streaming = not isinstance(state, Empty)
    if streaming:
        _states.check("gate_loop", state, _layout(params, x.shape[0]))

    q, k, v = (split_heads(t, cfg.head_count) for t in linear(x, params.to_qkv, impl=impl).chunk(3, -1))
    q, k, v = taps.tap("q", q), taps.tap("k", k), taps.tap("v", v)
    if cfg.ablate_state_transition:
        out, after = _sum_without_decay(q, k, v, state, impl)
    else:
        a = taps.tap("a", _gates(params, x, impl))
        if cfg.ablate_complex:
            a = torch.stack((a[..., 0], torch.zeros_like(a[..., 1])), -1)
        out, after = ops.gate_loop(q, k, v, a, state=tuple(state) if streaming else None, impl=impl)
        after = State(*after) if streaming else EMPTY
    out = merge_heads(taps.tap("heads", out))
    if cfg.sub_ln:
        out = layer_norm(out, params.sub_ln, params.sub_ln_bias)
    if cfg.add_swish_gating:
        out = F.silu(linear(x, params.to_gates, impl=impl)) * out
    return (linear(out, params.to_out, impl=impl) if cfg.projects_out else out), after


def step(steps: _step.Steps, params: Params, x: _step.Row, state: State, out: _step.Row | None = None) -> tuple[_step.Row, State]:
    """What `apply` does for one position of few sequences, as instructions."""
    cfg = params.cfg
    _step.fits(not cfg.ablate_state_transition and not cfg.ablate_complex)
    _step.check_state(steps, params, state, _layout)
    q, k, v = steps.parts(x, params.to_qkv, cfg.inner, cfg.inner, cfg.inner)
    a = steps.linear(x, params.to_a, params.to_a_bias)
    heads, h, product = steps.gate_loop(q, k, v, a, state.h, state.a, None if cfg.sub_ln or cfg.projects_out else out)
    if cfg.sub_ln:
        heads = steps.layer_norm(heads, params.sub_ln, params.sub_ln_bias, None if cfg.projects_out else out)
    if cfg.add_swish_gating:
        steps.multiply(heads, steps.linear(x, params.to_gates, act=steps.SILU))
    if cfg.projects_out:
        heads = steps.linear(heads, params.to_out, out=out)
    return heads, State(h, product)


def _gates(params: Params, x: Tensor, impl: str) -> Tensor:
    """[b, h, n, 2]"""
    a = linear(x, params.to_a, params.to_a_bias, impl).unflatten(-1, (params.cfg.head_count, 2)).transpose(1, 2)
    return scale_gradient(a, params.cfg.frac_gradient_state_transition)


def absorb(params: Params, x: Tensor, state: State, *, mask: Tensor | None = None, impl: str = "auto") -> State:
    """The state after x, as `apply` gives it, without the projections of queries, of the gate and of the result: half of the work."""
    cfg = config_of("gate_loop.absorb", params, Params)
    if cfg.ablate_state_transition or cfg.ablate_complex:
        return apply(params, x, state, mask=mask, impl=impl)[1]
    check_input("gate_loop.absorb", x, cfg.dim, like=params.to_qkv)
    refuse("gate_loop.absorb", "The recurrence has no keys to choose from.", "Leave it out.", mask=mask)
    _states.check("gate_loop", state, _layout(params, x.shape[0]))
    k, v = (split_heads(t, cfg.head_count) for t in linear(x, params.to_qkv[cfg.inner:], impl=impl).chunk(2, -1))
    return State(*ops.gate_loop(k, k, v, _gates(params, x, impl), state=tuple(state), impl=impl)[1])  # no state depends on queries


def _sum_without_decay(q: Tensor, k: Tensor, v: Tensor, state: State | Empty, impl: str) -> tuple[Tensor, State | Empty]:
    """alpha = 1: causal linear attention, on top of the real part of the state."""
    out = ops.causal_dot(q, k, v, impl=impl)
    if isinstance(state, Empty):
        return out, EMPTY
    wide = state.h.dtype
    out = (out.to(wide) + torch.einsum("bhnd,bhde->bhne", q.to(wide), state.h[..., 0])).to(v.dtype)
    added = torch.einsum("bhnd,bhne->bhde", k.to(wide), v.to(wide))
    return out, State(state.h + torch.stack((added, torch.zeros_like(added)), -1), state.a)


def resume(state: State, last: Tensor | None = None, skipped: int = 0) -> State:
    """A state that has seen nothing: see `core.Family`. No position and no token is in it."""
    return State(torch.zeros_like(state.h), torch.stack((torch.ones_like(state.a[..., 0]), torch.zeros_like(state.a[..., 1])), -1))


def combine(a: State, b: State) -> State:
    """The state after both segments, where b was grown from `resume(a)`: H = A_b H_a + H_b, A = A_b A_a."""
    return State(_times(b.a[..., None, None, :], a.h) + b.h, _times(b.a, a.a))


def _times(x: Tensor, y: Tensor) -> Tensor:
    """The product of complex numbers kept as pairs in the last axis."""
    return torch.stack((x[..., 0] * y[..., 0] - x[..., 1] * y[..., 1], x[..., 0] * y[..., 1] + x[..., 1] * y[..., 0]), -1)


FAMILY = Family(
    name="gate_loop", config=Config, init=init, init_state=init_state, apply=apply, streams=True, masks=False, contexts=False,
    source="gateloop-transformer 0.2.5, GateLoopedAttention; arXiv 2311.01927",
    examples=(
        Config(dim=7, frac_gradient_state_transition=1.0),
        Config(dim=6, heads=2, sub_ln=True, frac_gradient_state_transition=1.0),
        Config(dim=5, heads=3, dim_inner=9, add_swish_gating=False, ablate_complex=True),
        Config(dim=5, add_swish_gating=False, ablate_state_transition=True),
    ),
    combine=combine, resume=resume, step=step, absorb=absorb)
