"""What one reads from attention maps: flow through layers, reach into the past, sharpness, decay, and how good Taylor's exp is.

Maps are [b, h, n, m] as `maps.attention_map` gives them. Those of gated loops have signs and rows of any sum; where shares are
needed, the size of the entries counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import attentions, taps
from ..core import check
from ..ops.decayed_attention import decay
from ..ops.softmax import weights
from ._formulas import _keys, _past, _scores
from .gradient_norms import tap_grads
from .maps import attention_maps

# b batch, h heads, n queries, m keys, p pairs of channels


def shares(attention: Tensor) -> Tensor:
    """Each entry's size as a share of its row: rows sum to 1, or are 0 where nothing is attended. [..., n, m]"""
    size = attention.abs()
    total = size.sum(-1, keepdim=True)
    return size / torch.where(total > 0, total, 1.0)


def rollout(maps: Sequence[Tensor], *, residual: float = 0.5) -> Tensor:
    """How much of each input position reaches each output position through all layers: [b, n, n].

        R = prod over layers of (residual I + (1 - residual) mean over heads of shares(A)), first layer rightmost

    Args:
        maps: one [b, h, n, n] per layer, first layer first. residual: the share that skips the attention.
    Source: Abnar and Zuidema 2020, arXiv 2005.00928.
    """
    check(len(maps) >= 1, "inspect.rollout: expected at least one map; got none.", remedy="Use attention_maps(apply, params, x).")
    out = None
    for attention in maps:
        n = attention.shape[-1]
        check(attention.shape[-2] == n, "inspect.rollout: maps must be [b, h, n, n]; got {}.", list(attention.shape),
              remedy="Leave null keys out: map[..., nulls:].")
        eye = torch.eye(n, dtype=attention.dtype, device=attention.device)
        layer = residual * eye + (1 - residual) * shares(attention).mean(1)
        out = layer if out is None else layer @ out
    return out


class GradientTimesAttention(NamedTuple):
    """Of one attention."""

    relevance: Tensor  # [b, h, n, m]: gradient x attention, signed; its sum is the loss's slope along the heads
    gradient: Tensor   # [b, h, n, m]: d loss / d map


def gradient_times_attention(loss: Callable, params: Any, *args: Any) -> dict[str, GradientTimesAttention]:
    """How each entry of every attention map moves a loss: A_ij dL/dA_ij, with dL/dA_ij = g_i . v_j and g = dL / d heads.

    No map has to be part of the computation: the gradient with respect to it follows from that of the heads.

    Args:
        loss: loss(params, *args) -> 0-d.
    Returns:
        {"blocks.0.attn": ..., ...}.
    Source: Chefer et al. 2021, arXiv 2103.15679 (their A, and its gradient).
    """
    maps = attention_maps(loss, params, *args)
    names = {f"{scope}.heads" if scope else "heads": scope for scope in maps}
    _, grads = tap_grads(loss, params, *args, names=list(names))
    found = {}
    for tap, scope in names.items():
        one = maps[scope]
        slope = torch.einsum("bhie,bhje->bhij", grads[tap].to(one.map.dtype), one.values)
        found[scope] = GradientTimesAttention(one.map * slope, slope)
    return found


class Context(NamedTuple):
    """How far each query looks back, in positions; 0: at itself."""

    mean: Tensor    # [..., n]: mean distance of what is attended
    reach: Tensor   # [..., n]: the smallest distance within which `share` of the weight lies


def effective_context(attention: Tensor, *, share: float = 0.9) -> Context:
    """The effective context length of each query of a causal map [..., n, m], queries aligned to the end of the keys."""
    n, m = attention.shape[-2:]
    p = shares(attention)
    distance = (torch.arange(m - n, m, device=p.device)[:, None] - torch.arange(m, device=p.device)).clamp(min=0)
    mean = (p * distance).sum(-1)
    # Weight within distance r: a scatter of the row by distance, cumulated.
    near = torch.zeros(*p.shape[:-1], m, dtype=p.dtype, device=p.device).scatter_add(-1, distance.expand(p.shape), p).cumsum(-1)
    reached = near >= share * near[..., -1:] - 1e-12
    return Context(mean, torch.where(near[..., -1] > 0, reached.to(torch.int64).argmax(-1), 0))


def entropy(attention: Tensor) -> Tensor:
    """The entropy of each row's shares in nats, [..., n]: 0 for one key, ln m for all alike."""
    p = shares(attention)
    return -torch.where(p > 0, p * torch.where(p > 0, p, 1.0).log(), 0.0).sum(-1)


class Decay(NamedTuple):
    """alpha = size exp(i phase) at every position; a head forgets half in half_life positions of this kind."""

    size: Tensor       # [b, h, n] or [b, h, n, p]; [b, c, n] for simple_gate_loop
    phase: Tensor      # the same shape; 0 where gates are real
    half_life: Tensor  # the same shape: ln 2 / -ln size


def decay_spectrum(params: Any, x: Tensor) -> Decay:
    """The decays that a gated family chooses on x [b, n, dim]: gate_loop, gate_loop_full with decays, simple_gate_loop."""
    _, seen = taps.harvest(attentions.apply)(params, x)
    return decay_from_taps(params, seen)


def decay_from_taps(params: Any, seen: dict[str, Tensor]) -> Decay:
    """The same from what `taps.harvest` found in one attention."""
    check("a" in seen, "inspect.decay_spectrum: expected a family with gates; got {} with taps {}.", type(params.cfg).__module__,
          sorted(seen), remedy="Use gate_loop, simple_gate_loop, or gate_loop_full with data_dependent_rel_pos=True.")
    a = seen["a"]
    if "kv" in seen:  # real gates, one per channel
        log_size = torch.nn.functional.logsigmoid(a).mT
        phase = torch.zeros_like(log_size)
    else:
        if getattr(params.cfg, "ablate_complex", False):
            a = torch.stack((a[..., 0], torch.zeros_like(a[..., 1])), -1)
        log_size, phase = decay(a)
    return Decay(log_size.exp(), phase, math.log(2) / -log_size)


class TaylorError(NamedTuple):
    """How far 1 + s + s^2 / 2 is from exp(s), per query: [b, h, n]."""

    variation: Tensor  # total variation distance between Taylor's weights and softmax's: 0 equal, 1 disjoint
    largest: Tensor    # largest |s| that the query sees: the series is good below about 1
    relative: Tensor   # largest |1 - (1 + s + s^2 / 2) exp(-s)| among the keys that it sees


def taylor_error(params: Any, x: Tensor, *, mask: Tensor | None = None) -> TaylorError:
    """Taylor attention on x [b, n, dim] against softmax attention with the same scores. Quadratic in the length.

    Rows that see nothing give 0. Source of the series: arXiv 2402.18668, equation 2.
    """
    check(attentions.find(params).name == "taylor", "inspect.taylor_error: expected params of the family taylor; got {}.",
          type(params.cfg).__module__, remedy="Other families take no series.")
    _, seen = taps.harvest(attentions.apply)(params, x, mask=mask)
    return taylor_error_from_taps(params, seen, mask)


def taylor_error_from_taps(params: Any, seen: dict[str, Tensor], mask: Tensor | None = None) -> TaylorError:
    """The same from what `taps.harvest` found in one attention."""
    q, k = seen["q"], seen["k"]
    s = _scores(q, k, q.shape[-1] ** -0.5)
    allowed = torch.ones_like(s, dtype=torch.bool) & _keys(mask)
    if params.cfg.causal:
        allowed = allowed & _past(*s.shape[2:], s.device)
    s = torch.where(allowed, s, 0.0)
    series = torch.where(allowed, 1 + s + s * s / 2, 0.0)
    apart = (shares(series) - weights(s, allowed)).abs().sum(-1) / 2
    relative = torch.where(allowed, (1 - series * (-s).exp()).abs(), 0.0).amax(-1)
    return TaylorError(apart, s.abs().amax(-1), relative)
