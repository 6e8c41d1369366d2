"""Routing by coordinate descent: a hard choice of positions that passes the gradient of the soft one.

    y = coor_descent(score)         gate = y + stop(1 - y)        value 1, derivative that of y

Source: topk and CoordinateDescentRouter of colt5-attention 0.11.2; Ainslie et al. 2023 (CoLT5), arXiv 2303.09752.
Different here: pure functions; several routing tokens and routing in blocks gather from the right sequence; positions are
picked by score, of which y is a rising function, so that entries capped at 1 are not picked at random; masked positions are
picked last and carry 0; where there is nothing to choose, the indices are all positions instead of None; `route_back` writes
into nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import random
from ._door import only_plain
from .coor_descent import coor_descent

# b batch, n positions, r routes (routing tokens), t chosen positions


class TopK(NamedTuple):
    """What `topk` chose, largest first."""

    values: Tensor               # [..., t]: entries of x, with the gradient of the gates
    indices: Tensor              # [..., t] int64
    coor_descent_values: Tensor  # [..., t]: y, between 0 and 1
    gates: Tensor                # [..., t]: 1, with the gradient of y; 0 where masked


class Routed(NamedTuple):
    """What `route` chose. The axis r is there if there are several routing tokens, or with keep_one_route_dim."""

    indices: Tensor        # [b, r, t] int64
    scores: Tensor         # [b, r, t]: 1 with the gradient of y (straight_through) or y; 0 where masked
    routed_tokens: Tensor  # [b, r, t, d]
    routed_mask: Tensor    # [b, r, t] bool: False where a masked position was picked for want of others


def stop_gradient(x: Tensor) -> Tensor:
    """x without derivatives, in every mode and at every level of nesting."""
    return x.detach()


def straight_through(y: Tensor) -> Tensor:
    """1 with the derivatives of y."""
    return y + stop_gradient(1.0 - y)


def topk(x: Tensor, k: int, *, coor_descent_k_ratio: float = 9 / 8, n_iters: int = 20, eps: float = 0.1,
         eps_init: float | None = None, eps_decay: float = 1.0, mask: Tensor | None = None, non_differentiable: bool = False,
         solver: str = "iterate", impl: str = "auto") -> TopK:
    """The k largest entries along the last axis, with a gradient to those that were nearly chosen.

        values = x gate at the k largest x        gate = y + stop(1 - y),  y = coor_descent(x, min(k ratio, n))

    Args:
        x: [..., n], floating point.
        k: how many, from 1 to n.
        coor_descent_k_ratio: coordinate descent chooses this many times k, for a better gradient; at least 1.
        n_iters, eps, eps_init, eps_decay, solver, impl: of `coor_descent`.
        mask: bool, broadcasts to x; False entries come last, with value and gate 0.
        non_differentiable: gates and values pass no gradient of y; coor_descent_values and gates are 1.
    Returns:
        TopK, each leaf [..., k].
    Raises:
        ValueError: k or the ratio out of range. KernelUnavailable: the named kernel cannot serve the call.

    Differentiable where no two entries are equal, in every mode, as the straight-through estimate says.
    """
    n = x.shape[-1] if isinstance(x, Tensor) and x.ndim else 0
    if not isinstance(k, int) or not 1 <= k <= n:
        raise ValueError(f"topk: k must be an int from 1 to {n}, the size of the last axis; got {k!r}.\n  Use min(k, x.shape[-1]).")
    _check_ratio("topk", "coor_descent_k_ratio", coor_descent_k_ratio)
    indices = _pick(x, mask, k)
    if non_differentiable:
        only_plain("topk", impl, "non_differentiable=True takes the largest without coordinate descent, in plain torch")
        y = torch.ones_like(x) if mask is None else mask.expand_as(x).to(x.dtype)
    else:
        y = coor_descent(x, min(k * coor_descent_k_ratio, n), eps=eps, eps_init=eps_init, eps_decay=eps_decay, n_iters=n_iters,
                         mask=mask, solver=solver, impl=impl)
    y = y.gather(-1, indices)
    gates = straight_through(y)
    values = x.gather(-1, indices)
    if mask is not None:
        there = mask.expand_as(x).gather(-1, indices)
        gates, values = _zero(gates, there), _zero(values, there)
    return TopK(values * gates, indices, y, gates)


def route(x: Tensor, routing_tokens: Tensor, *, num_tokens: int, straight_through: bool = True, n_iters: int = 20,
          fetch_k_ratio: float = 9 / 8, eps: float = 0.03, eps_decay: float = 0.7, eps_init: float | None = 4.0,
          cosine_sim_routing: bool = False, cosine_sim_scale: float = 8, route_block_size: int | None = None,
          mask: Tensor | None = None, random_route_key: Tensor | None = None, keep_one_route_dim: bool = False,
          solver: str = "iterate", impl: str = "auto") -> Routed:
    """Chooses num_tokens positions of each sequence, for each routing token the ones that meet it best.

        score = x . routing_token        y = coor_descent(score, min(num_tokens ratio, n))        the num_tokens largest

    Args:
        x: [b, n, d].
        routing_tokens: [r, d], parameters, drawn as random.normal(key, (r, d)); or [b, r, d], each sequence its own.
        num_tokens: how many to choose; if n is no larger, all are chosen, in order, with score 1.
        straight_through: scores are 1 and pass the gradient of y; else they are y.
        n_iters, eps, eps_decay, eps_init, solver, impl: of `coor_descent`.
        fetch_k_ratio: coordinate descent chooses this many times num_tokens; at least 1.
        cosine_sim_routing: score = cosine_sim_scale times the cosine of x and the routing token.
        route_block_size: choose equally many (num_tokens / blocks, rounded up) from each block of this length; what is left
            behind the last whole block is not chosen from.
        mask: bool [b, n]; False positions are picked last, with score 0.
        random_route_key: a key: choose at random instead, as a control.
        keep_one_route_dim: give the results an axis r also for one routing token.
    Returns:
        Routed.
    Raises:
        ValueError: shapes or options that cannot be. KernelUnavailable: the named kernel cannot serve the call.
    """
    _check_route(x, routing_tokens, num_tokens, fetch_k_ratio, route_block_size, mask)
    b, n, _ = x.shape
    tokens = routing_tokens.expand(b, *routing_tokens.shape[-2:])
    there = x.new_ones((), dtype=torch.bool).expand(b, n) if mask is None else mask
    drop_axis = tokens.shape[1] == 1 and not keep_one_route_dim
    if n <= num_tokens:
        only_plain("route", impl, f"all of {n} positions are chosen, without coordinate descent")
        indices = torch.arange(n, device=x.device).expand(b, tokens.shape[1], n)
        return _routed(x, there, indices, x.new_ones(()).expand(b, tokens.shape[1], n), drop_axis)

    size = n if route_block_size is None else route_block_size
    blocks = n // size
    wanted = min(math.ceil(num_tokens / blocks), size)
    left, right = (_unit(x), _unit(tokens)) if cosine_sim_routing else (x, tokens)
    s = torch.einsum("bnd,brd->brn", left, right)
    s = s * cosine_sim_scale if cosine_sim_routing else s
    s = s[..., :blocks * size].unflatten(-1, (blocks, size))                                    # [b, r, blocks, size]
    seen = there[:, None, :blocks * size].expand(b, s.shape[1], -1).unflatten(-1, (blocks, size))
    y = coor_descent(s, min(wanted * fetch_k_ratio, size), eps=eps, eps_init=eps_init, eps_decay=eps_decay, n_iters=n_iters,
                     mask=None if mask is None else seen, solver=solver, impl=impl)
    if random_route_key is not None:
        s = y = random.normal(random_route_key, tuple(s.shape)).to(s)
    within = _pick(s, seen, wanted)
    scores = y.gather(-1, within)
    if straight_through:
        scores = _zero(scores + stop_gradient(1.0 - scores), seen.gather(-1, within))
    indices = within + size * torch.arange(blocks, device=x.device)[:, None]
    return _routed(x, there, indices.flatten(-2), scores.flatten(-2), drop_axis)


def route_back(src: Tensor, routed_tokens: Tensor, indices: Tensor) -> Tensor:
    """src with routed_tokens at the positions that they came from; src itself stays as it is.

    Args:
        src: [..., n, d]; one sequence per route, if there are routes: several tokens cannot lie at one place.
        routed_tokens: [..., t, d].
        indices: int64 [..., t], as `route` gave them.
    """
    if src.shape[:-2] != indices.shape[:-1] or routed_tokens.shape != (*indices.shape, src.shape[-1]):
        raise ValueError(f"route_back: expected src [..., n, d], routed_tokens [..., t, d], indices [..., t]; "
                         f"got {list(src.shape)}, {list(routed_tokens.shape)}, {list(indices.shape)}.\n"
                         f"  With several routes give src the same axis: src[:, None].expand(b, r, n, d).")
    where = indices.unsqueeze(-1).expand(routed_tokens.shape)
    return src.scatter(-2, where, routed_tokens.to(src.dtype))


# ------------------------------------------------------------------------------------------------ parts


def _pick(s: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Indices of the `count` largest entries, masked ones last."""
    s = stop_gradient(s)
    return (s if mask is None else s.masked_fill(~mask, -torch.inf)).topk(count, -1).indices


def _zero(x: Tensor, there: Tensor) -> Tensor:
    return torch.where(there, x, torch.zeros_like(x))


def _unit(x: Tensor) -> Tensor:
    """x / |x|, 0 for 0, with finite derivatives there."""
    return x * x.square().sum(-1, keepdim=True).clamp(min=1e-24).rsqrt()


def _routed(x: Tensor, there: Tensor, indices: Tensor, scores: Tensor, drop_axis: bool) -> Routed:
    b, r, t = indices.shape
    tokens = x[:, None].expand(b, r, *x.shape[1:]).gather(2, indices[..., None].expand(b, r, t, x.shape[-1]))
    mask = there[:, None].expand(b, r, x.shape[1]).gather(2, indices)
    found = Routed(indices, scores, tokens, mask)
    return Routed(*(leaf.squeeze(1) for leaf in found)) if drop_axis else found


def _check_ratio(who: str, name: str, value: float) -> None:
    if not value >= 1:
        raise ValueError(f"{who}: {name} must be at least 1; got {value}.\n  Upstream's value is 9/8.")


def _check_route(x, routing_tokens, num_tokens, fetch_k_ratio, route_block_size, mask) -> None:
    if x.ndim != 3:
        raise ValueError(f"route: x must be [batch, n, d]; got {list(x.shape)}.\n  A single sequence needs a batch axis: x[None].")
    b, n, d = x.shape
    shape = routing_tokens.shape
    if len(shape) not in (2, 3) or shape[-1] != d or len(shape) == 3 and shape[0] != b:
        raise ValueError(f"route: routing_tokens must be [r, {d}] or [{b}, r, {d}]; got {list(shape)}.\n"
                         f"  One token per sequence needs an axis for routes: routing_tokens[:, None].")
    if num_tokens < 1:
        raise ValueError(f"route: num_tokens must be at least 1; got {num_tokens}.\n  Give the number of positions to choose.")
    _check_ratio("route", "fetch_k_ratio", fetch_k_ratio)
    if route_block_size is not None and not 1 <= route_block_size <= n:
        raise ValueError(f"route: route_block_size must lie in [1, {n}], the length of x; got {route_block_size}.\n"
                         f"  Pad x to a whole block, or leave route_block_size out.")
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[0] != b or mask.shape[1] != n):
        raise ValueError(f"route: mask must be bool [{b}, {n}], True = may be chosen; got {mask.dtype} {list(mask.shape)}.\n"
                         f"  Cast it: mask.bool().")
