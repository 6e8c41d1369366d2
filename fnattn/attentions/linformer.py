"""Linformer: keys and values are mixed along the sequence down to k rows, so that attention is linear in its length.

    K' = E^T (C W_k),   V' = F^T (C W_v),   out = softmax(q K'^T / sqrt(d)) V'          C the context, or x itself

E and F [seq_len, k] are learned; a shorter context uses their first rows. Every one of the k rows mixes all positions:
there is no causal form, and hence no state.

Source: LinformerSelfAttention of linformer 0.2.3; Wang et al. 2020, arXiv 2006.04768 (their E, F are our proj_k,
proj_v). Different here: a key padding mask, which upstream swallows; the sums are associated as (E^T C) W where that
takes fewer operations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops, taps
from ..core import EMPTY, Empty, Family, check, check_init, check_input, check_sizes, config, config_of
from ..ops._door import only_plain
from ..ops.softmax import weights
from ._heads import dropout, linear, linear_init, merge_heads, split_heads, uniform_init

# b batch, h query heads, g key heads (h, or 1 if one_kv_head), n queries, m keys, d width of a head, k mixed rows

NOT_CAUSAL = "Its projection mixes all positions, so no prefix has a final answer."
STREAMS = "Call apply(params, x) on the whole sequence, or choose a streaming family: full, gate_loop, taylor."


@config
class Config:
    """Options of Linformer attention.

    dim:        width of x.
    seq_len:    the longest context.
    k:          rows that the context is mixed down to.
    heads:      number of query heads.
    dim_head:   width of a head; default dim / heads.
    one_kv_head: one key and value head serves all query heads.
    share_kv:   values are the keys themselves, mixed by the same projection.
    dropout:    chance of zeroing an entry of the attention matrix, when a dropout_key is passed.
    """

    dim: int
    seq_len: int
    k: int = 256
    heads: int = 8
    dim_head: int | None = None
    one_kv_head: bool = False
    share_kv: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        check_sizes("linformer.Config", 1, dim=self.dim, seq_len=self.seq_len, k=self.k, heads=self.heads)
        if self.dim_head is not None:
            check_sizes("linformer.Config", 0, dim_head=self.dim_head)
        check(self.dim % self.heads == 0 if self.dim_head is None else self.dim_head >= 1,
              "linformer.Config: heads must divide dim={}, or dim_head be positive; got heads={}, dim_head={}.",
              self.dim, self.heads, self.dim_head, remedy="Choose a divisor, or give dim_head.")
        check(0.0 <= self.dropout <= 1.0, "linformer.Config: dropout must lie in [0, 1]; got {}.", self.dropout,
              remedy="It is the chance of zeroing an entry.")

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.dim // self.heads if self.dim_head is None else self.dim_head

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return 1 if self.one_kv_head else self.heads


class Params(NamedTuple):
    """Weights are [out, in], as in torch.nn.Linear."""

    cfg: Config
    to_q: Tensor                     # [h d, dim]
    to_k: Tensor                     # [g d, dim]
    proj_k: Tensor                   # [seq_len, k]
    to_out: Tensor                   # [dim, h d]
    to_out_bias: Tensor              # [dim]
    to_v: Tensor | Empty = EMPTY     # [g d, dim]; Empty if share_kv
    proj_v: Tensor | Empty = EMPTY   # [seq_len, k]; Empty if share_kv


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name: uniform in +-1/sqrt(fan in), proj_k and proj_v in +-1/sqrt(k)."""
    check_init("linformer.init", cfg, Config, dtype)
    inner, kv = cfg.heads * cfg.head_width, cfg.kv_heads * cfg.head_width
    kind = {"dtype": dtype, "device": device}

    def proj(name):
        return uniform_init(params_key, name, (cfg.seq_len, cfg.k), cfg.k ** -0.5, **kind)

    return Params(
        cfg,
        to_q=linear_init(params_key, "to_q", inner, cfg.dim, **kind),
        to_k=linear_init(params_key, "to_k", kv, cfg.dim, **kind),
        proj_k=proj("proj_k"),
        to_out=linear_init(params_key, "to_out", cfg.dim, inner, **kind),
        to_out_bias=uniform_init(params_key, "to_out_bias", (cfg.dim,), inner ** -0.5, **kind),
        to_v=EMPTY if cfg.share_kv else linear_init(params_key, "to_v", kv, cfg.dim, **kind),
        proj_v=EMPTY if cfg.share_kv else proj("proj_v"))


def init_state(params: Params, batch: int, *, capacity: int = 0) -> Empty:
    """Raises ValueError: this family has no state."""
    raise ValueError(f"linformer.init_state: cannot stream. {NOT_CAUSAL}\n  {STREAMS}")


def apply(params: Params, x: Tensor, state: Empty = EMPTY, *, mask: Tensor | None = None, context: Tensor | None = None,
          dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Empty]:
    """Attends to k learned mixtures of the context. Time and memory grow linearly with both lengths. Not causal.

    Args:
        params: from `init`.
        x: [b, n, dim]; of any length if a context is given, else n <= cfg.seq_len.
        state: refused.
        mask: bool [b, keys]; rows of the context (of x, if none is given) that are False enter the mixtures as zeros.
            Masking the end of a sequence equals cutting it off.
        context: [b, keys, dim], keys <= cfg.seq_len, to attend to instead of x.
        dropout_key: drops entries of the attention matrix if cfg.dropout > 0.
        impl: passed to `ops.softmax_attention`; where entries are dropped, plain torch is all there is.
    Returns:
        out [b, n, dim] in x's dtype, 0 where no key is visible; EMPTY.
    """
    cfg = config_of("linformer.apply", params, Params)
    check_input("linformer.apply", x, cfg.dim, like=params.to_q, mask=mask, context=context)
    if not isinstance(state, Empty):
        raise ValueError(f"linformer.apply: cannot stream. {NOT_CAUSAL}\n  {STREAMS}")
    given = x if context is None else context
    check(given.shape[1] <= cfg.seq_len, "linformer.apply: {} must have at most cfg.seq_len={} positions; got {}.",
          "x" if context is None else "context", cfg.seq_len, given.shape[1],
          remedy="Shorten it, or train with a larger seq_len.")
    if mask is None and given.shape[1] == 0:  # no key at all: as if all were hidden
        mask = torch.zeros_like(given[..., 0], dtype=torch.bool)
    if mask is not None:
        given = torch.where(mask[..., None], given, torch.zeros_like(given))

    given = taps.tap("context", given)
    q = taps.tap("q", split_heads(linear(x, params.to_q, impl=impl), cfg.heads))
    k = _mix(given, params.proj_k, params.to_k, impl)
    v = k if cfg.share_kv else _mix(given, params.proj_v, params.to_v, impl)
    k, v = taps.tap("k", split_heads(k, cfg.kv_heads)), taps.tap("v", split_heads(v, cfg.kv_heads))
    if dropout_key is None or cfg.dropout == 0.0:
        out = ops.softmax_attention(q, k, v, impl=impl)
    else:
        only_plain("linformer.apply", impl, "dropping entries of the attention matrix is plain torch: no kernel makes that matrix")
        out = _dropped_attention(q, k, v, dropout_key, cfg.dropout)
    out = F.linear(merge_heads(taps.tap("heads", out)), params.to_out, params.to_out_bias)
    if mask is not None:
        out = torch.where(mask.any(1)[:, None, None], out, torch.zeros_like(out))
    return out, EMPTY


def _mix(context: Tensor, proj: Tensor, weight: Tensor, impl: str) -> Tensor:
    """proj^T context weight^T [b, k, g d], in the order that takes fewer multiplications. context [b, m, dim]."""
    proj = proj[:context.shape[1]]
    # Not `proj.T @ context`: where a gradient may be asked for, matmul makes one product of the batch, from a transposed copy of context.
    mixing = proj.T.expand(context.shape[0], -1, -1)
    if mixes_first(context.shape[1], context.shape[2], weight.shape[0], proj.shape[1]):
        return F.linear(torch.bmm(mixing, context), weight)
    return torch.bmm(mixing, linear(context, weight, impl=impl))


def mixes_first(m: int, dim: int, kv: int, k: int) -> bool:
    """Whether (E^T C) W takes fewer products than E^T (C W): m positions of width dim become k rows of width kv."""
    return m * k * dim + k * dim * kv < m * dim * kv + m * k * kv


def _dropped_attention(q: Tensor, k: Tensor, v: Tensor, dropout_key: Tensor, p: float) -> Tensor:
    """Softmax attention with dropout on its matrix."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    attn = weights(torch.einsum("bgrnd,bgkd->bgrnk", grouped * q.shape[3] ** -0.5, k))
    attn = dropout(dropout_key, "attn", attn.flatten(1, 2), p).unflatten(1, grouped.shape[1:3])
    return torch.einsum("bgrnk,bgkd->bgrnd", attn, v).flatten(1, 2).to(v.dtype)


FAMILY = Family(
    name="linformer", config=Config, init=init, init_state=init_state, apply=apply, streams=False, masks=True,
    contexts=True, source="linformer 0.2.3, LinformerSelfAttention; arXiv 2006.04768",
    examples=(
        Config(dim=6, seq_len=64, k=5, heads=3, dropout=0.25),
        Config(dim=7, seq_len=64, k=3, heads=2, dim_head=5, one_kv_head=True),
        Config(dim=6, seq_len=64, k=7, heads=2, share_kv=True),
        Config(dim=5, seq_len=64, k=2, heads=1, dim_head=3, one_kv_head=True, share_kv=True, dropout=0.25),
    ))
