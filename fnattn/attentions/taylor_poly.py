"""Order-2 polynomial attention with Taylor weights: attention over pairs of keys, still linear in the length.

    out_i = sum_j A_ij (sum_k B_jk v_k) / (sum_j A_ij sum_k B_jk + eps),    A = p(q1, q2),  B = p(q2, q3),  p = 1 + s + s^2 / 2

Two passes of Taylor attention: q2 reads (q3, v) and then serves as key for q1, weighted by how much mass it has read. Not
causal, no 1/sqrt(d): queries and keys are RMS-normed instead. Memory n d^2 + d^3 per head, so keep heads narrow.

Source: TaylorSeriesPolyAttention of taylor-series-linear-attention 0.2.0; arXiv 2602.02422.
Different here: the distinct second-order features only, whatever `remove_even_power_dups` says; the same values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops, taps
from ..core import EMPTY, Empty, Family, check, check_init, check_input, check_sizes, config, config_of, refuse
from ..ops._door import only_plain
from ..ops.taylor.reference import features
from ._heads import linear_init, merge_heads, ones_init, rms_norm, split_heads, uniform_init

# b batch, h heads, n positions, d width of a head, f features of a head


@config
class Config:
    """Options of polynomial Taylor attention.

    dim:        width of x.
    heads:      number of heads. dim_head: width of one head.
    remove_even_power_dups: upstream's storage option; the same values either way.
    include_pass1_mass: weight a key of the second pass by the mass that it read in the first; else each first pass is
                normalised by itself.
    prenorm:    RMSNorm on x before the queries q1 (and gates), not before keys and values, as upstream.
    multiply_root_value: multiply the result by a second value of each position, through a sigmoid if
                use_root_value_as_attn_gate.
    attn_gate:  multiply the result by a sigmoid gate per channel.
    use_rotary_embed: rotary positions on q1, q2 and q3.
    causal:     refused: upstream has no such form.
    eps:        added to the denominator; lower bound of the mass of a first pass.
    """

    dim: int
    heads: int = 8
    dim_head: int = 64
    remove_even_power_dups: bool = False
    include_pass1_mass: bool = True
    prenorm: bool = False
    multiply_root_value: bool = False
    use_root_value_as_attn_gate: bool = True
    attn_gate: bool = False
    use_rotary_embed: bool = True
    causal: bool = False
    eps: float = 1e-6

    def __post_init__(self):
        check_sizes("taylor_poly.Config", 1, dim=self.dim, dim_head=self.dim_head, heads=self.heads)
        check(not self.causal, "taylor_poly.Config: causal must be False; got True.",
              remedy="Use the family taylor for causal attention: taylor.Config(causal=True, ...).")
        check(not self.use_rotary_embed or self.dim_head % 2 == 0,
              "taylor_poly.Config: use_rotary_embed needs an even dim_head; got {}.", self.dim_head,
              remedy="Rotary positions turn pairs of channels.")


class Params(NamedTuple):
    """Weights are [out, in], as in torch.nn.Linear."""

    cfg: Config
    to_q: Tensor                    # [h d, dim], or [2 h d, dim] with gates: (queries | gates)
    to_kv1: Tensor                  # [h d, dim] for q2, or [2 h d, dim] with root values: (q2 | root values)
    to_kv2: Tensor                  # [2 h d, dim]: (q3 | values)
    q_norms: tuple                  # 3 x [d]
    to_out: Tensor                  # [dim, h d]
    to_out_bias: Tensor             # [dim]
    norm: Tensor | Empty = EMPTY    # [dim]; Empty unless prenorm


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key: uniform in +-1/sqrt(fan in), norms 1."""
    check_init("taylor_poly.init", cfg, Config, dtype)
    inner, kind = cfg.heads * cfg.dim_head, {"dtype": dtype, "device": device}
    return Params(
        cfg,
        to_q=linear_init(params_key, "to_q", inner * (2 if cfg.attn_gate else 1), cfg.dim, **kind),
        to_kv1=linear_init(params_key, "to_kv1", inner * (2 if cfg.multiply_root_value else 1), cfg.dim, **kind),
        to_kv2=linear_init(params_key, "to_kv2", 2 * inner, cfg.dim, **kind),
        q_norms=tuple(ones_init((cfg.dim_head,), **kind) for _ in range(3)),
        to_out=linear_init(params_key, "to_out", cfg.dim, inner, **kind),
        to_out_bias=uniform_init(params_key, "to_out_bias", (cfg.dim,), inner ** -0.5, **kind),
        norm=ones_init((cfg.dim,), **kind) if cfg.prenorm else EMPTY)


def init_state(params: Params, batch: int, *, capacity: int = 0) -> Empty:
    """Refuses: a polynomial query sees later keys, so no prefix has a final answer."""
    check(False, "taylor_poly.init_state: cannot stream. A query sees later keys, so no prefix has a final answer.",
          remedy="Call apply(params, x) on the whole sequence, or use the family taylor with causal=True.")
    return EMPTY


def apply(params: Params, x: Tensor, state: Empty = EMPTY, *, mask: Tensor | None = None, context: Tensor | None = None,
          dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Empty]:
    """Attends over pairs of keys with polynomial weights. Time and memory grow linearly with the length.

    Args:
        params: from `init`.
        x: [b, n, dim].
        state, context: refused.
        mask: bool [b, n]; False positions are not keys, and their own result is 0.
        dropout_key: accepted; this attention drops nothing.
        impl: "auto" or "reference": plain torch.
    Returns:
        out [b, n, dim] in x's dtype, and EMPTY.
    """
    cfg = config_of("taylor_poly.apply", params, Params)
    check_input("taylor_poly.apply", x, cfg.dim, like=params.to_q, mask=mask)
    refuse("taylor_poly.apply", "A query sees later keys, so no prefix has a final answer.",
           "Call apply(params, x) on the whole sequence, or use the family taylor with causal=True.", state=state)
    refuse("taylor_poly.apply", "Queries of the second pass are keys of the first and come from x.",
           "Use the family taylor with causal=False for cross attention.", context=context)
    only_plain("taylor_poly.apply", impl, "this family is plain torch")
    q1, *gates = F.linear(rms_norm(x, params.norm, impl) if cfg.prenorm else x, params.to_q).split(cfg.heads * cfg.dim_head, -1)
    q2, *roots = F.linear(x, params.to_kv1).split(cfg.heads * cfg.dim_head, -1)
    q3, v = F.linear(x, params.to_kv2).chunk(2, -1)
    q1, q2, q3, v = (split_heads(t, cfg.heads) for t in (q1, q2, q3, v))
    q1, q2, q3 = (rms_norm(q, gamma, impl) for q, gamma in zip((q1, q2, q3), params.q_norms))
    if cfg.use_rotary_embed:
        positions, freqs = torch.arange(x.shape[1], device=x.device), ops.lang_freqs(cfg.dim_head, device=x.device)
        q1, q2, q3 = (ops.rotary(q, positions, freqs, impl=impl) for q in (q1, q2, q3))
    q1, q2, q3, v = taps.tap("q1", q1), taps.tap("q2", q2), taps.tap("q3", q3), taps.tap("v", v)
    out = taps.tap("heads", poly_attention(q1, q2, q3, v, mask, cfg.include_pass1_mass, cfg.eps))
    if cfg.multiply_root_value:
        root = split_heads(roots[0], cfg.heads)
        out = out * (root.sigmoid() if cfg.use_root_value_as_attn_gate else root)
    if cfg.attn_gate:
        out = out * split_heads(gates[0], cfg.heads).sigmoid()
    out = F.linear(merge_heads(out), params.to_out, params.to_out_bias)
    return (out if mask is None else out.masked_fill(~mask[..., None], 0.0)), EMPTY


def poly_attention(q1: Tensor, q2: Tensor, q3: Tensor, v: Tensor, mask: Tensor | None = None, include_pass1_mass: bool = True,
                   eps: float = 1e-6) -> Tensor:
    """The formula at the head of this file: q1, q2, q3 [b, h, n, d], v [b, h, n, e], mask bool [b, n] -> [b, h, n, e] like v."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    q1, q2, q3, v1 = (t.to(wide) for t in (q1, q2, q3, F.pad(v, (0, 1), value=1.0)))
    keep = 1.0 if mask is None else mask[:, None, :, None].to(wide)
    # phi(q) . psi(k) is the polynomial weight; the last column of v1 carries the mass.
    read = features(q2, False) @ ((features(q3, True) * keep).mT @ v1)  # [b, h, n, e + 1]
    if not include_pass1_mass:
        read = torch.cat((read[..., :-1] / read[..., -1:].clamp(min=eps), torch.ones_like(read[..., -1:])), -1)
    total = features(q1, False) @ ((features(q2, True) * keep).mT @ read)
    out = total[..., :-1] / (total[..., -1:] + eps)
    return (out if mask is None else out * keep).to(v.dtype)


FAMILY = Family(
    name="taylor_poly", config=Config, init=init, init_state=init_state, apply=apply, streams=False, masks=True, contexts=False,
    source="taylor-series-linear-attention 0.2.0, TaylorSeriesPolyAttention; arXiv 2602.02422",
    examples=(Config(dim=7, heads=3, dim_head=4), Config(dim=5, heads=2, dim_head=3, use_rotary_embed=False, attn_gate=True,
                                                         prenorm=True, multiply_root_value=True, include_pass1_mass=False)))
