"""Linformer: a stack of attention and feed-forward over sequences of bounded length, and a model of tokens on top.

    sequential   x = x + attn(norm(x));    x = x + ff(norm(x))
    reversible   y1 = x1 + attn(norm(x2)); y2 = x2 + ff(norm(y1));    the result is y1 + y2

`encode` is the stack on vectors, `apply` embeds tokens and positions before it and gives logits after it. Not causal,
as upstream is not: every position sees all others, so training it on the next token would let it copy the answer.

Source: Linformer and LinformerLM of linformer 0.2.3. Sequential and reversible stacks of the same params are different
functions. Different here: masks, GLU feed-forwards, gradients of the reversible stack in every mode
(`models.reversible`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import random, taps
from ..attentions import linformer
from ..attentions._heads import dropout, linear_init, uniform_init
from ..core import EMPTY, Empty, check, check_ids, check_input, config
from .block import FeedForward, LayerNorm, norm, norm_init
from .reversible import reversible

# b batch, n positions, v num_tokens, hidden = dim * ff_mult

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


@config
class Config:
    """Options of the Linformer stack and language model.

    num_tokens: size of the vocabulary; 0 for the stack alone, on vectors.
    dim, seq_len, k, heads, dim_head, one_kv_head, share_kv: as in `attentions.linformer.Config`.
    depth:      number of layers.
    reversible: two streams whose activations are recomputed in the backward pass; memory then does not grow with depth.
    dropout:    chance of zeroing an entry of the attention matrix and of the hidden layer, when a dropout_key is
                passed.
    ff_mult:    hidden width of the feed-forward, in multiples of dim.
    ff_glu:     the activation of one half of the hidden layer gates the other half.
    ff_activation: "gelu" (exact), "relu", "silu" or "tanh".
    """

    num_tokens: int = 0
    dim: int
    seq_len: int
    depth: int
    k: int = 256
    heads: int = 8
    dim_head: int | None = None
    one_kv_head: bool = False
    share_kv: bool = False
    reversible: bool = False
    dropout: float = 0.0
    ff_mult: int = 4
    ff_glu: bool = False
    ff_activation: str = "gelu"

    def __post_init__(self):
        check(self.num_tokens >= 0 and self.depth >= 1 and self.ff_mult >= 1, "linformer_lm.Config: num_tokens must be "
              "at least 0, depth and ff_mult at least 1; got {}, {} and {}.", self.num_tokens, self.depth, self.ff_mult,
              remedy="Use num_tokens=0 for a stack without embeddings.")
        check(self.ff_activation in ACTIVATIONS, "linformer_lm.Config: ff_activation must be one of {}; got {!r}.",
              ", ".join(map(repr, ACTIVATIONS)), self.ff_activation, remedy="Upstream uses 'gelu'.")
        self.attention  # noqa: B018 - its own checks

    @property
    def attention(self) -> linformer.Config:
        """The config of each layer's attention."""
        return linformer.Config(dim=self.dim, seq_len=self.seq_len, k=self.k, heads=self.heads, dim_head=self.dim_head,
                                one_kv_head=self.one_kv_head, share_kv=self.share_kv, dropout=self.dropout)


class Layer(NamedTuple):
    """An attention and a feed-forward, each after its norm."""

    attn_norm: LayerNorm
    attn: linformer.Params
    ff_norm: LayerNorm
    ff: FeedForward  # w_in [hidden (2 hidden with GLU), dim]


class Params(NamedTuple):
    """Everything that is learned."""

    cfg: Config
    layers: tuple[Layer, ...]
    token_emb: Tensor | Empty = EMPTY       # [v, dim]; this and the following Empty if num_tokens is 0
    pos_emb: Tensor | Empty = EMPTY         # [seq_len, dim]
    to_logits: Tensor | Empty = EMPTY       # [v, dim]
    to_logits_bias: Tensor | Empty = EMPTY  # [v]


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name: embeddings normal, the rest uniform in +-1/sqrt(fan in), norms 1 and 0."""
    kind = {"dtype": dtype, "device": device}
    layers_key = random.fold_in(params_key, "layers")
    layers = tuple(_init_layer(random.fold_in(layers_key, i), cfg, **kind) for i in range(cfg.depth))
    if not cfg.num_tokens:
        return Params(cfg, layers)
    return Params(cfg, layers, token_emb=_normal(params_key, "token_emb", (cfg.num_tokens, cfg.dim), **kind),
                  pos_emb=_normal(params_key, "pos_emb", (cfg.seq_len, cfg.dim), **kind),
                  to_logits=linear_init(params_key, "to_logits", cfg.num_tokens, cfg.dim, **kind),
                  to_logits_bias=uniform_init(params_key, "to_logits_bias", (cfg.num_tokens,), cfg.dim ** -0.5, **kind))


def _init_layer(key: Tensor, cfg: Config, **kind: Any) -> Layer:
    hidden, ff_key = cfg.dim * cfg.ff_mult, random.fold_in(key, "ff")
    wide = 2 * hidden if cfg.ff_glu else hidden
    return Layer(
        norm_init("layer", cfg.dim, **kind), linformer.init(random.fold_in(key, "attn"), cfg.attention, **kind),
        norm_init("layer", cfg.dim, **kind),
        FeedForward(linear_init(ff_key, "w_in", wide, cfg.dim, **kind),
                    uniform_init(ff_key, "b_in", (wide,), cfg.dim ** -0.5, **kind),
                    linear_init(ff_key, "w_out", cfg.dim, hidden, **kind),
                    uniform_init(ff_key, "b_out", (cfg.dim,), hidden ** -0.5, **kind)))


def _normal(key: Tensor, name: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: object) -> Tensor:
    if device is not None and torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    wide = torch.promote_types(dtype, torch.float32)
    return random.normal(random.fold_in(key, name), shape, wide).to(dtype=dtype, device=device)


def apply(params: Params, ids: Tensor, state: Empty = EMPTY, *, mask: Tensor | None = None,
          dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Empty]:
    """Logits for each position, each computed from the whole sequence.

    Args:
        params: from `init`, with cfg.num_tokens > 0.
        ids: int64 [b, n], n <= cfg.seq_len, each in [0, num_tokens).
        state: refused; nothing here can be computed from a prefix.
        mask: bool [b, n]; False tokens are not attended to.
        dropout_key: drops if cfg.dropout > 0.
        impl: passed to the attention.
    Returns:
        logits [b, n, num_tokens] in the params' dtype; EMPTY.
    """
    cfg = params.cfg
    check(cfg.num_tokens > 0, "linformer_lm.apply: the config has no vocabulary; got num_tokens=0.",
          remedy="Call encode on vectors.")
    check(not isinstance(ids, Tensor) or ids.ndim == 2 and not ids.is_floating_point(),
          "linformer_lm.apply: ids must be integers [batch, seq]; got {} {}.", getattr(ids, "dtype", ""), list(getattr(ids, "shape", ())),
          remedy="Call encode on vectors.")
    check_ids("linformer_lm.apply", ids, cfg.num_tokens, mask=mask)
    _check_stack("linformer_lm.apply", cfg, ids.shape[1], state)
    x = F.embedding(ids, params.token_emb) + params.pos_emb[:ids.shape[1]]
    x = encode(params, x, mask=mask, dropout_key=dropout_key, impl=impl)
    return F.linear(x, params.to_logits, params.to_logits_bias), EMPTY


def encode(params: Params, x: Tensor, state: Empty = EMPTY, *, mask: Tensor | None = None,
           dropout_key: Tensor | None = None, impl: str = "auto") -> Tensor:
    """The stack of layers on vectors: [b, n, dim] -> [b, n, dim]. Arguments as in `apply`."""
    cfg = params.cfg
    check_input("linformer_lm.encode", x, cfg.dim, like=params.layers[0].attn_norm[0], mask=mask)
    _check_stack("linformer_lm.encode", cfg, x.shape[1], state)

    def attn(layer_params, x, mask):
        norm_params, attn_params, key = layer_params
        with taps.scope("attn"):
            return linformer.apply(attn_params, norm(norm_params, x), mask=mask, dropout_key=key, impl=impl)[0]

    def ff(layer_params, x, mask):
        norm_params, ff_params, key = layer_params
        return feed_forward(ff_params, norm(norm_params, x), glu=cfg.ff_glu, activation=cfg.ff_activation,
                            p=cfg.dropout, dropout_key=key)

    keys = [_layer_keys(dropout_key, i) for i in range(cfg.depth)]
    halves = [((layer.attn_norm, layer.attn, attn_key), (layer.ff_norm, layer.ff, ff_key))
              for layer, (attn_key, ff_key) in zip(params.layers, keys)]
    blocks = [(_scoped(i, attn), _scoped(i, ff)) for i in range(cfg.depth)]
    if cfg.reversible:
        return reversible(blocks, halves, x, mask, merge="sum")
    for (f, g), (attn_params, ff_params) in zip(blocks, halves):
        x = x + f(attn_params, x, mask)
        x = x + g(ff_params, x, mask)
    return x


def _scoped(i: int, fn):
    """fn with its taps named after layer i."""
    def run(*args):
        with taps.scope(f"layers.{i}"):
            return fn(*args)

    return run


def _layer_keys(dropout_key: Tensor | None, i: int) -> tuple[Tensor | None, Tensor | None]:
    if dropout_key is None:
        return None, None
    key = random.fold_in(random.fold_in(dropout_key, "layers"), i)
    return random.fold_in(key, "attn"), random.fold_in(key, "ff")


def _check_stack(who: str, cfg: Config, n: int, state: Any) -> None:
    if not isinstance(state, Empty):
        raise ValueError(f"{who}: cannot stream. {linformer.NOT_CAUSAL}\n"
                         f"  Call {who.split('.')[1]} on the whole sequence, or use models.lm.")
    check(n <= cfg.seq_len, "{}: expected at most cfg.seq_len={} positions; got {}.", who, cfg.seq_len, n,
          remedy="Shorten the sequence, or train with a larger seq_len.")


def feed_forward(params: FeedForward, x: Tensor, *, glu: bool = False, activation: str = "gelu", p: float = 0.0,
                 dropout_key: Tensor | None = None) -> Tensor:
    """w_out act(w_in x), or with glu w_out (act(a) * v), [a, v] = w_in x; dropout before w_out. [b, n, dim] -> same."""
    hidden = F.linear(x, params.w_in, params.b_in)
    act = ACTIVATIONS[activation]
    if glu:
        gate, value = hidden.chunk(2, -1)
        hidden = act(gate) * value
    else:
        hidden = act(hidden)
    return F.linear(dropout(dropout_key, "hidden", hidden, p), params.w_out, params.b_out)
