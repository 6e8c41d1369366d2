"""SimpleGateLoop: one real gated recurrence per channel, a cheap mixer beside attention.

    h_t = sigmoid(a_t) h_{t-1} + kv_t,     out_t = q_t h_t

with q, kv and a linear in x. No output projection and no residual inside.

Source: SimpleGateLoopLayer of gateloop-transformer 0.2.5; the logarithmic form is Heinsen 2023, arXiv 2311.06281.
Different here: the state is h alone (upstream also carries the product of the gates, which nothing reads), and a reversed
layer refuses a state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops, taps
from ..core import EMPTY, Empty, Family, check, check_init, check_input, check_sizes, config, config_of, refuse
from ..ops._door import only_plain
from . import _states, _step
from ._heads import layer_norm, linear, linear_init, ones_init, rms_norm

# b batch, n positions, c channels (dim)


@config
class Config:
    """Options of SimpleGateLoop.

    dim:        width of x, and number of channels.
    prenorm:    RMSNorm on x.
    use_heinsen: compute the recurrence through logarithms, as upstream offers: 100 to 1000 times less exact, and only for
                comparison with upstream. Takes impl "auto" or "reference".
    use_jax_associative_scan: refused; the scan here needs no other framework.
    post_ln:    LayerNorm on the result.
    reverse:    run from the last position to the first; then there is no state.
    """

    dim: int
    prenorm: bool = True
    use_heinsen: bool = False
    use_jax_associative_scan: bool = False
    post_ln: bool = False
    reverse: bool = False

    def __post_init__(self):
        check_sizes("simple_gate_loop.Config", 1, dim=self.dim)
        check(not self.use_jax_associative_scan, "simple_gate_loop.Config: use_jax_associative_scan must be False; got True.",
              remedy="Leave it out: `ops.scan` computes the same recurrence in torch.")


class Params(NamedTuple):
    """Weights are [out, in], as in torch.nn.Linear."""

    cfg: Config
    to_qkva: Tensor                         # [3 dim, dim], rows (q | kv | a)
    norm: Tensor | Empty = EMPTY            # [dim]; Empty unless prenorm
    post_ln: Tensor | Empty = EMPTY         # [dim]; Empty unless cfg.post_ln
    post_ln_bias: Tensor | Empty = EMPTY    # [dim]


class State(NamedTuple):
    """What the past leaves behind."""

    h: Tensor   # [b, dim], float32 or wider


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key: uniform in +-1/sqrt(dim), norms 1 and 0."""
    check_init("simple_gate_loop.init", cfg, Config, dtype)
    kind = {"dtype": dtype, "device": device}
    return Params(
        cfg,
        to_qkva=linear_init(params_key, "to_qkva", 3 * cfg.dim, cfg.dim, **kind),
        norm=ones_init((cfg.dim,), **kind) if cfg.prenorm else EMPTY,
        post_ln=ones_init((cfg.dim,), **kind) if cfg.post_ln else EMPTY,
        post_ln_bias=torch.zeros(cfg.dim, **kind) if cfg.post_ln else EMPTY)


def init_state(params: Params, batch: int, *, capacity: int = 0) -> State:
    """The state before the first position. `capacity` is accepted for all families alike; this one needs none."""
    cfg = config_of("simple_gate_loop.init_state", params, Params)
    check(not cfg.reverse, "simple_gate_loop.init_state: cannot stream. A reversed layer begins at the last position.",
          remedy="Use Config(reverse=False, ...), or call apply(params, x) on the whole sequence.")
    check_sizes("simple_gate_loop.init_state", 0, batch=batch, capacity=capacity)
    return _states.fresh(_layout(params, batch), params.to_qkva)


def _layout(params: Params, batch: int) -> State:
    """What a state of these params must be; see `_states`."""
    return State(_states.Leaf("batch, dim", (batch, params.cfg.dim), _states.wide(params.to_qkva)))


def apply(params: Params, x: Tensor, state: State | Empty = EMPTY, *, mask: Tensor | None = None,
          context: Tensor | None = None, dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """Mixes the past by a gated recurrence per channel. Time grows linearly with the length.

    Args:
        params: from `init`.
        x: [b, n, dim].
        state: from `init_state` or a former call: x continues that sequence, in a chunk of any length.
        mask, context: refused; a recurrence has no keys to hide or to take from elsewhere.
        dropout_key: accepted; this layer drops nothing.
        impl: passed to `ops.simple_gate_loop`.
    Returns:
        out [b, n, dim] in x's dtype; the state after x, or EMPTY.
    """
    cfg = config_of("simple_gate_loop.apply", params, Params)
    if _step.asked_for(x, state, impl, mask, context) and (done := _step.layer(step, params, x, state, cfg.dim)):
        return done
    check_input("simple_gate_loop.apply", x, cfg.dim, like=params.to_qkva)
    refuse("simple_gate_loop.apply", "The recurrence reads every position in order and has no keys to choose from.",
           "Leave padding at the end of the sequence and ignore its outputs, or choose a family that masks: full, taylor.",
           mask=mask, context=context)
    if cfg.reverse:
        refuse("simple_gate_loop.apply", "A reversed layer begins at the last position.",
               "Use Config(reverse=False, ...), or call apply(params, x) on the whole sequence.", state=state)
    streaming = not isinstance(state, Empty)
    if streaming:
        _states.check("simple_gate_loop", state, _layout(params, x.shape[0]))
    normed = rms_norm(x, params.norm, impl) if cfg.prenorm else x
    q, kv, a = linear(normed, params.to_qkva, impl=impl).chunk(3, -1)
    q, kv, a = taps.tap("q", q), taps.tap("kv", kv), taps.tap("a", a)
    h0 = state.h if streaming else None
    if cfg.use_heinsen:
        only_plain("simple_gate_loop.apply", impl, "use_heinsen is plain torch; Config(use_heinsen=False, ...) has kernels")
        out, h = ops.heinsen_gate_loop(q, kv, a, h0, reverse=cfg.reverse)
    else:
        out, h = ops.simple_gate_loop(q, kv, a, h0, reverse=cfg.reverse, impl=impl)
    if cfg.post_ln:
        out = layer_norm(out, params.post_ln, params.post_ln_bias)
    return out, State(h) if streaming else EMPTY


def step(steps: _step.Steps, params: Params, x: _step.Row, state: State, out: _step.Row | None = None) -> tuple[_step.Row, State]:
    """What `apply` does for one position of few sequences, as instructions."""
    cfg = params.cfg
    _step.fits(not cfg.reverse and not cfg.use_heinsen)
    _step.check_state(steps, params, state, _layout)
    normed = steps.norm(x, params.norm) if cfg.prenorm else x
    q, kv, a = steps.parts(normed, params.to_qkva, cfg.dim, cfg.dim, cfg.dim)
    mixed, h = steps.simple_gate_loop(q, kv, a, state.h, None if cfg.post_ln else out)
    return (steps.layer_norm(mixed, params.post_ln, params.post_ln_bias, out) if cfg.post_ln else mixed), State(h)


FAMILY = Family(
    name="simple_gate_loop", config=Config, init=init, init_state=init_state, apply=apply, streams=True, masks=False,
    contexts=False, source="gateloop-transformer 0.2.5, SimpleGateLoopLayer",
    examples=(Config(dim=7), Config(dim=5, prenorm=False, post_ln=True), Config(dim=3, reverse=True)),
    step=step)
