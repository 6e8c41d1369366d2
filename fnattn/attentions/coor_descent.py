"""Coordinate-descent attention: each query chooses about k keys, softly and differentiably, instead of averaging over all.

    y = coor_descent(q_i . k_j / sqrt(d), k_i)        0 <= y_ij <= 1, sum_j y_ij about k_i        out_i = sum_j y_ij v_j

The weights of a query sum to about k, not to 1; early positions, which see fewer keys, take all of them, so the scale of the
result varies with the position. That is part of upstream's models; `normalize` divides by the sum.

Source: Attention of coordinate-descent-attention 0.0.11; Wright 2015, arXiv 1502.04759.
Different here: the learned k has one value per (sequence, head, query) for any batch and number of heads, a row without a
visible key gives 0, and there are a key mask, a state and the exact solver.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from fnattn_kernels.native import steps_weights
from fnattn_kernels.native.coor_descent import c_schedule
from torch import Tensor
from torch.nn import functional as F

from .. import ops, random, taps
from ..core import EMPTY, Empty, Family, check, check_init, check_input, check_sizes, config, config_of, refuse
from ..ops.coor_descent import LEAST_K, settings
from . import _cache, _states, _step
from ._cache import Rows
from ._heads import layer_norm, linear_init, merge_heads, ones_init, split_heads

# b batch, h heads, n positions, d width of a head, z null keys


@config
class Config:
    """Options of coordinate-descent attention. It is always causal, and norms its input itself.

    dim:        width of x.
    dim_head, heads: width of one head, number of heads.
    use_coor_descent: choose by coordinate descent; else softmax attention with the same parameters, and the options that
                follow do nothing.
    coor_descent_iters, coor_descent_eps, coor_descent_eps_init, coor_descent_eps_decay: the iteration, see
                `ops.coor_descent`. The iteration is not converged at its end: its number is part of the model.
    coor_descent_sparsity_k: how many keys a query chooses, at least 1; with learned_sparsity_k the most.
    attn_null_kv: number of learned keys and values without a position, visible to all queries.
    learned_sparsity_k: each query and head chooses its own k = 1 + (coor_descent_sparsity_k - 1) sigmoid(linear(x)).
    solver:     "iterate" is upstream's; "exact" takes the limit of the iteration, in which only eps counts.
    normalize:  divide the result by the sum of the weights, so that they average.
    """

    dim: int
    dim_head: int = 64
    heads: int = 8
    use_coor_descent: bool = False
    coor_descent_iters: int = 20
    coor_descent_sparsity_k: float = 1
    coor_descent_eps: float = 0.1
    coor_descent_eps_init: float | None = 4.0
    coor_descent_eps_decay: float = 0.7
    attn_null_kv: int = 0
    learned_sparsity_k: bool = False
    solver: str = "iterate"
    normalize: bool = False

    def __post_init__(self):
        check_sizes("coor_descent.Config", 1, dim=self.dim, dim_head=self.dim_head, heads=self.heads,
                    coor_descent_iters=self.coor_descent_iters)
        check_sizes("coor_descent.Config", 0, "0 means no null keys.", attn_null_kv=self.attn_null_kv)
        for name in ("coor_descent_sparsity_k", "coor_descent_eps", "coor_descent_eps_decay"):
            check(getattr(self, name) > 0, "coor_descent.Config: {} must be above 0; got {}.", name, getattr(self, name),
                  remedy="Upstream's values: sparsity_k=1, eps=0.1, eps_decay=0.7.")
        check(self.coor_descent_eps_init is None or self.coor_descent_eps_init > 0,
              "coor_descent.Config: coor_descent_eps_init must be above 0; got {}.", self.coor_descent_eps_init,
              remedy="None starts at coor_descent_eps.")
        check(self.solver in ("iterate", "exact"), "coor_descent.Config: solver must be 'iterate' or 'exact'; got {!r}.",
              self.solver, remedy="'iterate' is upstream's.")


class Params(NamedTuple):
    """Weights are [out, in], as in torch.nn.Linear."""

    cfg: Config
    norm: Tensor                                # [dim]
    norm_bias: Tensor                           # [dim]
    null_kv: Tensor                             # [2, h, z, d]: keys, values; z may be 0
    to_qkv: Tensor                              # [3 h d, dim], rows (q | k | v, head, channel)
    to_out: Tensor                              # [dim, h d]
    to_learned_k: Tensor | Empty = EMPTY        # [h, dim]; Empty unless learned_sparsity_k
    to_learned_k_bias: Tensor | Empty = EMPTY   # [h]


class State(NamedTuple):
    """Keys and values seen so far, with room for a fixed number. Null keys are parameters and not in here."""

    k: Rows          # [b, h, capacity, d]
    v: Rows          # [b, h, capacity, d]
    visible: Tensor  # [b, capacity] bool: False where mask hid the position that came in
    pos: Tensor      # [] int64: positions seen


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name: uniform in +-1/sqrt(fan in), null keys normal, norm 1 and 0, k's bias -10 (k near 1)."""
    check_init("coor_descent.init", cfg, Config, dtype)
    inner, kind = cfg.heads * cfg.dim_head, {"dtype": dtype, "device": device}
    shape = (2, cfg.heads, cfg.attn_null_kv, cfg.dim_head)
    if device is not None and torch.device(device).type == "meta":
        null_kv = torch.empty(shape, **kind)
    else:
        null_kv = random.normal(random.fold_in(params_key, "null_kv"), shape).to(**kind)
    return Params(
        cfg,
        norm=ones_init((cfg.dim,), **kind),
        norm_bias=torch.zeros(cfg.dim, **kind),
        null_kv=null_kv,
        to_qkv=linear_init(params_key, "to_qkv", 3 * inner, cfg.dim, **kind),
        to_out=linear_init(params_key, "to_out", cfg.dim, inner, **kind),
        to_learned_k=linear_init(params_key, "to_learned_k", cfg.heads, cfg.dim, **kind) if cfg.learned_sparsity_k else EMPTY,
        to_learned_k_bias=torch.full((cfg.heads,), -10.0, **kind) if cfg.learned_sparsity_k else EMPTY)


def init_state(params: Params, batch: int, *, capacity: int) -> State:
    """Empty buffers for `batch` sequences of up to `capacity` positions."""
    config_of("coor_descent.init_state", params, Params)
    check_sizes("coor_descent.init_state", 0, batch=batch)
    check_sizes("coor_descent.init_state", 1, "Give the number of positions that the longest sequence will have.", capacity=capacity)
    return _states.fresh(_layout(params, batch, capacity), params.to_qkv)


def _layout(params: Params, batch: int, capacity: int | str) -> State:
    """What a state of these params must be; see `_states`."""
    rows = _cache.layout(batch, params.cfg.heads, capacity, params.cfg.dim_head, params.to_qkv.dtype)
    return State(rows, rows, _cache.seen(batch, capacity), _states.POSITION)


def apply(params: Params, x: Tensor, state: State | Empty = EMPTY, *, mask: Tensor | None = None,
          context: Tensor | None = None, dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """Attends to about k keys. Time grows with the square of the length, memory with the length.

    Args:
        params: from `init`.
        x: [b, n, dim].
        state: from `init_state` or a former call: x continues that sequence, in a chunk of any length.
        mask: bool [b, n], describing x; False positions are not there as keys. A state remembers it. Null keys stay.
        context: refused; this attention is causal.
        dropout_key: accepted; this attention drops nothing.
        impl: passed to `ops.coor_descent_attention`, or to `ops.softmax_attention` without use_coor_descent.
    Returns:
        out [b, n, dim] in x's dtype, 0 where no key is visible; the state after x, or EMPTY.
    Raises:
        ValueError: shapes, more positions than the state has room for, a keyword that cannot be honoured.
    """
    cfg, streaming = config_of("coor_descent.apply", params, Params), not isinstance(state, Empty)
    if _step.asked_for(x, state, impl, mask, context, dropout_key) and (done := _step.layer(step, params, x, state, cfg.dim)):
        return done
    check_input("coor_descent.apply", x, cfg.dim, like=params.to_qkv, mask=mask)
    refuse("coor_descent.apply", "A query attends to its own past, and a context has none.",
           "Choose a family with cross attention: full, linformer, taylor.", context=context)
    n = x.shape[1]
    used = 0
    if streaming:
        x, used = _cache.room("coor_descent", state, x, _layout(params, x.shape[0], _cache.capacity(state)))

    x = layer_norm(x, params.norm, params.norm_bias)
    q, k, v = (split_heads(t, cfg.heads) for t in F.linear(x, params.to_qkv).chunk(3, -1))
    q, k, v = taps.tap("q", q), taps.tap("k", k), taps.tap("v", v)
    sparsity_k: float | Tensor = cfg.coor_descent_sparsity_k
    if cfg.learned_sparsity_k and cfg.use_coor_descent:
        gate = F.linear(x, params.to_learned_k, params.to_learned_k_bias).sigmoid().transpose(1, 2)
        sparsity_k = taps.tap("sparsity_k", gate * (cfg.coor_descent_sparsity_k - 1) + 1)

    offset, visible = None, mask
    if streaming:
        offset = state.pos
        state = State(_cache.append(state.k, k, offset, used), _cache.append(state.v, v, offset, used),
                      _cache.noted(state.visible, mask, offset), offset + n)
        if used != 0:
            known = None if used is None else used + n
            k, v, visible = (*(_cache.read(rows, state.pos, known) for rows in state[:2]), state.visible[:, :known])
    k, v, visible = _with_nulls(params, k, v, visible)
    attend = _choose if cfg.use_coor_descent else _soften
    out = taps.tap("heads", attend(cfg, q, k, v, sparsity_k, visible, offset, impl))
    return F.linear(merge_heads(out).to(x.dtype), params.to_out), state


def step(steps: _step.Steps, params: Params, x: _step.Row, state: State, out: _step.Row | None = None) -> tuple[_step.Row, State]:
    """What `apply` does for one position of few sequences, as instructions."""
    cfg = params.cfg
    _step.fits(cfg.use_coor_descent or not cfg.attn_null_kv)
    _step.check_state(steps, params, state, _layout, _cache.capacity(state))
    pos, d = _step.position(steps, state.pos), cfg.dim_head
    x = steps.layer_norm(x, params.norm, params.norm_bias)
    q, k, v = steps.parts(x, params.to_qkv, *(cfg.heads * d,) * 3)
    keys, values, first, end = _step.cached(steps, state, (k, v), pos)
    after, seen = State(keys, values, state.visible, state.pos + 1), steps.mask(state.visible)
    if not cfg.use_coor_descent:
        return steps.linear(steps.decode(q, keys, values, seen, first, end, d ** -0.5), params.to_out, out=out), after
    gates = steps.linear(x, params.to_learned_k, params.to_learned_k_bias) if cfg.learned_sparsity_k else None
    exact = cfg.solver == "exact"
    how_many = steps_weights.sparsity(steps, cfg.heads, gates, cfg.coor_descent_sparsity_k, LEAST_K, log=not exact)
    nulls = (params.null_kv[0], params.null_kv[1]) if cfg.attn_null_kv else None
    scores = steps_weights.weigh(steps, q, keys, values, first, end, d ** -0.5, nulls)
    steps_weights.hide(steps, scores, seen)
    schedule = None if exact else c_schedule(*settings(cfg.coor_descent_eps, cfg.coor_descent_eps_init, cfg.coor_descent_eps_decay,
                                                       cfg.coor_descent_iters))
    weights = steps_weights.choose(steps, scores, how_many, cfg.coor_descent_eps, schedule)
    return steps.linear(steps_weights.mix(steps, weights, cfg.normalize), params.to_out, out=out), after


def _with_nulls(params: Params, k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Null keys and values before all others, visible."""
    nulls = params.cfg.attn_null_kv
    if not nulls:
        return k, v, visible
    null_k, null_v = params.null_kv.to(k.dtype).unsqueeze(1).expand(2, k.shape[0], *params.null_kv.shape[1:])
    if visible is not None:
        visible = torch.cat((visible.new_ones(visible.shape[0], nulls), visible), 1)
    return torch.cat((null_k, k), 2), torch.cat((null_v, v), 2), visible


def _choose(cfg, q, k, v, sparsity_k, visible, offset, impl):
    if cfg.normalize:
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    out = ops.coor_descent_attention(
        q, k, v, sparsity_k, eps=cfg.coor_descent_eps, eps_init=cfg.coor_descent_eps_init, eps_decay=cfg.coor_descent_eps_decay,
        n_iters=cfg.coor_descent_iters, keep=visible, nulls=cfg.attn_null_kv, offset=offset, solver=cfg.solver, impl=impl)
    if not cfg.normalize:
        return out
    total = out[..., -1:]
    return out[..., :-1] / torch.where(total > 0, total, torch.ones_like(total))


def _soften(cfg, q, k, v, sparsity_k, visible, offset, impl):
    """Softmax; null keys are seen by all if position 0 is that of the first null key."""
    offset = cfg.attn_null_kv + offset if offset is not None else None
    keys = None if visible is None else visible[:, None, None, :]
    return ops.softmax_attention(q, k, v, mask=keys, causal=True, offset=offset, impl=impl)


FAMILY = Family(
    name="coor_descent", config=Config, init=init, init_state=init_state, apply=apply, streams=True, masks=True, contexts=False,
    source="coordinate-descent-attention 0.0.11, Attention; arXiv 1502.04759",
    examples=(
        Config(dim=7, dim_head=3, heads=5, use_coor_descent=True, coor_descent_sparsity_k=2),
        Config(dim=7, dim_head=5, heads=3, use_coor_descent=True, coor_descent_sparsity_k=3, coor_descent_iters=11, attn_null_kv=2,
               learned_sparsity_k=True),
        Config(dim=5, dim_head=3, heads=2, use_coor_descent=True, coor_descent_sparsity_k=2.5, solver="exact", normalize=True),
        Config(dim=11, dim_head=5, heads=2, attn_null_kv=1),
    ), step=step)
