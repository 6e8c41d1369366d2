"""What stands around an attention: norms, feed-forward, and the residual block that joins them.

    pre-norm     x = x + attn(norm(x));    x = x + ff(norm(x))
    post-norm    x = norm(x + attn(x));    x = norm(x + ff(x))

Weights are [out, in], as in torch.nn.Linear. Initial values as there too: uniform in +-1/sqrt(fan in), norms 1 and 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import attentions, random, taps
from ..attentions._heads import layer_norm, linear, linear_init, ones_init, rms_norm, uniform_init
from ..core import EMPTY, Empty, check, config
from . import feedforward_coor_descent

# b batch, n positions, hidden = int(dim * ff_mult)


# ------------------------------------------------------------------------------------------------ norms


class RmsNorm(NamedTuple):
    """gamma sqrt(d) x / |x|"""

    gamma: Tensor  # [dim]


class LayerNorm(NamedTuple):
    """weight (x - mean) / std + bias, eps 1e-5"""

    weight: Tensor  # [dim]
    bias: Tensor    # [dim]


NORMS = ("rms", "layer", "none")


def norm_init(kind: str, dim: int, *, dtype: torch.dtype, device: object = None) -> RmsNorm | LayerNorm | Empty:
    """The parameters of a norm of `kind` "rms", "layer" or "none"."""
    scale = ones_init((dim,), dtype=dtype, device=device) if kind != "none" else None
    if kind == "rms":
        return RmsNorm(scale)
    return LayerNorm(scale, torch.zeros_like(scale)) if kind == "layer" else EMPTY


def norm(params: RmsNorm | LayerNorm | Empty, x: Tensor) -> Tensor:
    """x normed over its last axis by whichever norm the params belong to; Empty leaves x as it is."""
    if isinstance(params, RmsNorm):
        return rms_norm(x, params.gamma)
    return layer_norm(x, *params) if isinstance(params, LayerNorm) else x


# ------------------------------------------------------------------------------------------------ feed-forward


@config
class Gelu:
    """The exact GELU between the two projections of a feed-forward."""


ACTIVATIONS = (Gelu, feedforward_coor_descent.CoorDescent)


class FeedForward(NamedTuple):
    """Two projections with biases around an activation."""

    w_in: Tensor   # [hidden, dim]
    b_in: Tensor   # [hidden]
    w_out: Tensor  # [dim, hidden]
    b_out: Tensor  # [dim]


def ff_init(params_key: Tensor, dim: int, mult: float, *, dtype: torch.dtype, device: object = None) -> FeedForward:
    """A feed-forward from dim over int(dim * mult) back to dim, drawn by name."""
    hidden, kind = int(dim * mult), {"dtype": dtype, "device": device}
    return FeedForward(
        w_in=linear_init(params_key, "w_in", hidden, dim, **kind),
        b_in=uniform_init(params_key, "b_in", (hidden,), dim ** -0.5, **kind),
        w_out=linear_init(params_key, "w_out", dim, hidden, **kind),
        b_out=uniform_init(params_key, "b_out", (dim,), hidden ** -0.5, **kind))


def feed_forward(params: FeedForward, x: Tensor, activation: Any) -> Tensor:
    """[b, n, dim] -> [b, n, dim]; `activation` is the config of what happens to the hidden layer."""
    return linear(activate(activation, linear(x, params.w_in, params.b_in)), params.w_out, params.b_out)


def activate(activation: Any, hidden: Tensor) -> Tensor:
    """The hidden layer [b, n, hidden] after the activation that this config describes."""
    if isinstance(activation, Gelu):
        return F.gelu(hidden)
    return feedforward_coor_descent.activate(activation, hidden)


# ------------------------------------------------------------------------------------------------ block


class Block(NamedTuple):
    """One layer of a model: an attention and a feed-forward, each with its norm."""

    attn_norm: RmsNorm | LayerNorm | Empty
    attn: Any
    ff_norm: RmsNorm | LayerNorm | Empty
    ff: FeedForward


def block_init(params_key: Tensor, attention: Any, *, ff_mult: float, attn_norm: str, ff_norm: str, dtype: torch.dtype,
               device: object = None) -> Block:
    """A block around the attention that this config describes, each part drawn by its name."""
    kind = {"dtype": dtype, "device": device}
    return Block(
        norm_init(attn_norm, attention.dim, **kind),
        attentions.init(random.fold_in(params_key, "attn"), attention, **kind),
        norm_init(ff_norm, attention.dim, **kind),
        ff_init(random.fold_in(params_key, "ff"), attention.dim, ff_mult, **kind))


def block(params: Block, x: Tensor, state: Any, *, ff: Any, post_norm: bool, dropout: float, mask: Tensor | None,
          dropout_key: Tensor | None, impl: str) -> tuple[Tensor, Any]:
    """x through one block; the state of its attention goes in and comes out. [b, n, dim] -> [b, n, dim]"""
    keys = {name: None if dropout_key is None else random.fold_in(dropout_key, name)
            for name in ("attn", "attn_out", "ff_out")}

    def attn(x):
        with taps.scope("attn"):
            out, new = attentions.apply(params.attn, x, state, mask=mask, dropout_key=keys["attn"], impl=impl)
        return drop(keys["attn_out"], taps.tap("attn_out", out), dropout), new

    def fed(x):
        return drop(keys["ff_out"], taps.tap("ff_out", feed_forward(params.ff, x, ff)), dropout)

    if post_norm:
        out, state = attn(x)
        x = norm(params.attn_norm, x + out)
        return norm(params.ff_norm, x + fed(x)), state
    out, state = attn(norm(params.attn_norm, x))
    x = x + out
    return x + fed(norm(params.ff_norm, x)), state


def drop(dropout_key: Tensor | None, x: Tensor, p: float) -> Tensor:
    """Dropout with chance p; x itself without a key."""
    return x if dropout_key is None or p == 0.0 else random.dropout(dropout_key, x, p)


def check_norm(who: str, name: str, kind: str) -> None:
    """`kind` must be one of NORMS."""
    check(kind in NORMS, "{}: {} must be one of {}; got {!r}.", who, name, ", ".join(map(repr, NORMS)), kind,
          remedy="Upstream's RMSNorm is 'rms'; torch's LayerNorm is 'layer'.")
