"""The attention map of every family from its tapped q, k, v (and gates), as directly as its formula says.

Each function takes the family's params, the tapped values, the mask of keys and returns the map [b, h, n, m] in float32 or wider.
Quadratic in the length, also for the families that are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..attentions import _picture, full, sparse_axial, sparse_conv
from ..ops.block_sparse import visible
from ..ops.decayed_attention import decay
from ..ops.softmax import weights
from ..ops.taylor.reference import EPS

# b batch, h query heads, g key heads, n queries, m keys, d width of a head, p pairs of channels, z null keys

Seen = Mapping[str, Tensor]


def wide(*tensors: Tensor) -> list[Tensor]:
    """In float32, or in float64 if any of them is."""
    kind = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(kind) for t in tensors]


def each_head(x: Tensor, heads: int) -> Tensor:
    """[b, g, m, d] -> [b, h, m, d]: key heads repeated for the query heads that they serve."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def _scores(q: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
    q, k = wide(q, k)
    return torch.einsum("bhid,bhjd->bhij", q * scale, each_head(k, q.shape[1]))


def _past(n: int, m: int, device: torch.device) -> Tensor:
    """[n, m]: key j is not after query i, where queries end with the keys."""
    return torch.arange(m, device=device) <= m - n + torch.arange(n, device=device)[:, None]


def _keys(mask: Tensor | None) -> Tensor | bool:
    return True if mask is None else mask[:, None, None, :]


def taylor(params: Any, seen: Seen, mask: Tensor | None) -> Tensor:
    """(1 + s + s^2 / 2) / max(sum, eps)"""
    q, k = seen["q"], seen["k"]
    s = _scores(q, k, q.shape[-1] ** -0.5)
    allowed = torch.ones_like(s, dtype=torch.bool) & _keys(mask)
    if params.cfg.causal:
        allowed = allowed & _past(s.shape[2], s.shape[3], s.device)
    p = torch.where(allowed, 1 + s + s * s / 2, 0.0)
    return p / p.sum(-1, keepdim=True).clamp(min=EPS)


def taylor_poly(params: Any, seen: Seen, mask: Tensor | None) -> Tensor:
    """Two passes: A B, normalised by the mass that arrives."""
    cfg = params.cfg
    first, second = (_scores(seen[a], seen[b]) for a, b in (("q1", "q2"), ("q2", "q3")))
    a, b = (torch.where(torch.ones_like(s, dtype=torch.bool) & _keys(mask), 1 + s + s * s / 2, 0.0) for s in (first, second))
    if not cfg.include_pass1_mass:
        b = b / b.sum(-1, keepdim=True).clamp(min=cfg.eps)
        found = a @ b / (a.sum(-1, keepdim=True) + cfg.eps)
    else:
        found = a @ b
        found = found / (found.sum(-1, keepdim=True) + cfg.eps)
    return found if mask is None else torch.where(mask[:, None, :, None], found, 0.0)


def _decays(a: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of the running sums of log|alpha| and arg alpha, query minus key, in float64: [b, h, n, n, ...]."""
    sums = [t.double().cumsum(2) for t in decay(a)]
    return tuple(t.unsqueeze(3) - t.unsqueeze(2) for t in sums)  # type: ignore[return-value]


def _carried(a: Tensor) -> Tensor:
    """Re of the product of alpha from key to query, 0 for later keys: [b, h, n, n, ...]."""
    log_size, angle = _decays(a)
    past = _past(a.shape[2], a.shape[2], a.device)
    past = past if log_size.ndim == 4 else past[..., None]
    return torch.where(past, torch.where(past, log_size, 0.0).exp() * angle.cos(), 0.0)


def gate_loop(params: Any, seen: Seen, mask: Tensor | None) -> Tensor:
    """(q . k) times the real part of the product of alpha after the key."""
    cfg = params.cfg
    s = _scores(seen["q"], seen["k"])
    if cfg.ablate_state_transition:
        return s.tril()
    a = seen["a"]
    if cfg.ablate_complex:
        a = torch.stack((a[..., 0], torch.zeros_like(a[..., 1])), -1)
    return s * _carried(a).to(s.dtype)


def gate_loop_full(params: Any, seen: Seen, mask: Tensor | None) -> Tensor:
    """Scores that decay and turn per pair of channels, normalised or not."""
    cfg = params.cfg
    q, k = wide(seen["q"], seen["k"])
    n = q.shape[2]
    if cfg.decays:
        pairs = torch.einsum("bhipc,bhjpc->bhijp", q.unflatten(-1, (-1, 2)), k.unflatten(-1, (-1, 2)))
        s = (pairs * _carried(seen["a"]).to(q.dtype)).sum(-1)
    else:
        s = _scores(q, k)
    past = _past(n, n, q.device)
    return weights(s, past) if cfg.softmax else torch.where(past, s, 0.0)


def simple_gate_loop(params: Any, seen: Seen, mask: Tensor | None) -> Tensor:
    """q_t times the product of the gates since the key, a map per channel: [b, c, n, n]."""
    q, a = (x.mT for x in wide(seen["q"], seen["a"]))  # [b, c, n]
    if params.cfg.reverse:
        q, a = q.flip(-1), a.flip(-1)
    log_sum = torch.nn.functional.logsigmoid(a.double()).cumsum(-1)
    past = _past(q.shape[-1], q.shape[-1], q.device)
    gap = torch.where(past, log_sum.unsqueeze(-1) - log_sum.unsqueeze(-2), 0.0)
    found = q.unsqueeze(-1) * torch.where(past, gap.exp(), 0.0).to(q.dtype)
    return found.flip(-1, -2) if params.cfg.reverse else found


def linformer(params: Any, seen: Seen, mask: Tensor | None) -> Tensor:
    """softmax over the k mixtures, spread over the positions that they mix: P E^T."""
    p = weights(_scores(seen["q"], seen["k"], seen["q"].shape[-1] ** -0.5))
    proj = params.proj_k if params.cfg.share_kv else params.proj_v
    return p @ proj[:seen["context"].shape[1]].T.to(p.dtype)


def softmax_full(params: Any, seen: Seen, mask: Tensor | None) -> Tensor:
    """Softmax over what the static mask, causality and the mask of keys leave."""
    cfg = params.cfg
    q, k = seen["q"], seen["k"]
    s = _scores(q, k, q.shape[-1] ** -0.5)
    n, m = s.shape[2:]
    allowed = torch.ones_like(s, dtype=torch.bool) & _keys(mask)
    if cfg.causal:
        allowed = allowed & _past(n, m, s.device)
    if cfg.static_mask is not None:
        allowed = allowed & full._static(cfg.static_mask).to(s.device)[:n, :m]
    return weights(s, allowed)


def picture(params: Any, seen: Seen, mask: Tensor | None) -> Tensor:
    """Softmax over the text and the pixels that the pattern lets see."""
    cfg = params.cfg
    pattern = (sparse_conv if isinstance(cfg, sparse_conv.Config) else sparse_axial)._pattern(cfg)
    s = _scores(seen["q"], seen["k"], cfg.dim_head ** -0.5)
    at = torch.arange(s.shape[2], device=s.device)
    pixel, row, column = _picture._place(cfg, at)
    near = pattern.sees(row[:, None], column[:, None], row, column)
    allowed = (at <= at[:, None]) & (~pixel[:, None] | ~pixel | near)
    if mask is None:
        return weights(s, allowed)
    # Upstream's mask hides text from pixels only.
    kept = mask[:, None, :] | (~pixel[:, None] | pixel) if cfg.compat_mask else mask[:, None, :]
    return weights(s, (allowed & kept)[:, None])


def block_sparse(params: Any, seen: Seen, mask: Tensor | None) -> Tensor:
    """Softmax over the blocks of the layout."""
    cfg = params.cfg
    s = _scores(seen["q"], seen["k"], cfg.dim_head ** -0.5)
    at = torch.arange(s.shape[2], device=s.device)
    allowed = visible(params.layout, at, at, cfg.block_size)[None] & _keys(mask)
    return weights(s, allowed & _past(s.shape[2], s.shape[3], s.device) if cfg.causal else allowed)


def coor_descent(params: Any, seen: Seen, mask: Tensor | None) -> Tensor:
    """The coordinate-descent weights y (or softmax), null keys first."""
    cfg = params.cfg
    q, k = seen["q"], with_nulls(params.null_kv[0], seen["k"])
    n, z = q.shape[2], cfg.attn_null_kv
    s = _scores(q, k, cfg.dim_head ** -0.5)
    allowed = _past(n, n, s.device) & _keys(mask)
    allowed = torch.cat((torch.ones_like(allowed[..., :1]).expand(*allowed.shape[:-1], z), allowed), -1).expand(s.shape)
    if not cfg.use_coor_descent:
        return weights(s, allowed)
    sparsity = seen.get("sparsity_k")
    k_of = torch.full_like(s[..., 0], cfg.coor_descent_sparsity_k) if sparsity is None else sparsity.to(s.dtype)
    y = ops.coor_descent(s, k_of, eps=cfg.coor_descent_eps, eps_init=cfg.coor_descent_eps_init,
                         eps_decay=cfg.coor_descent_eps_decay, n_iters=cfg.coor_descent_iters, mask=allowed, solver=cfg.solver)
    if not cfg.normalize:
        return y
    total = y.sum(-1, keepdim=True)
    return y / torch.where(total > 0, total, torch.ones_like(total))


def with_nulls(nulls: Tensor, x: Tensor) -> Tensor:
    """x [b, h, m, d] behind null keys or values [h, z, d]."""
    return torch.cat((nulls.to(x.dtype).expand(x.shape[0], *nulls.shape), x), 2)


FORMULAS: dict[str, Callable[[Any, Seen, Tensor | None], Tensor]] = {
    "block_sparse": block_sparse, "coor_descent": coor_descent, "full": softmax_full, "gate_loop": gate_loop,
    "gate_loop_full": gate_loop_full, "linformer": linformer, "simple_gate_loop": simple_gate_loop, "sparse_axial": picture,
    "sparse_conv": picture, "taylor": taylor, "taylor_poly": taylor_poly}
