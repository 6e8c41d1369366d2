"""Softmax attention: each query averages the values, weighted by the exponentials of its scores.

    s_ij = scale q_i . k_j        p_ij = exp(s_ij) / sum over visible j of exp(s_ij)        out_i = sum_j p_ij v_j

A row that sees no key gives exactly 0, with finite derivatives. Derivatives, with r_i = sum_j p_ij ds_ij for a tangent ds:

    tangent    out_i' = sum_j p_ij (ds_ij v_j + v_j') - r_i out_i
    gradient   ds_ij = p_ij (g_i . v_j - g_i . out_i)    dq = scale ds k    dk = scale ds^T q    dv = p^T g

The native kernel computes these without an [n, m] table. Derivatives of the derivatives are those of the plain-torch
formulas below, which recompute the weights from q, k and v: a saved sum is a function of them, not an input.

Source: Vaswani et al. 2017, arXiv 1706.03762; fused forms after Dao et al. 2022, arXiv 2205.14135.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fnattn_kernels.contracts import reference_jvp, reference_vjp
from fnattn_kernels.native import softmax as native
from fnattn_kernels.triton import softmax as triton
from torch import Tensor

from ..core import peek_int
from ._door import Kernel, check_heads, choose, no_autocast, widen

# b batch, h query heads, g key heads, n queries, m keys, d width of q and k, e width of v
TABLE = 1 << 24  # scores that the reference holds at once; beyond, it works through the queries in blocks


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False,
                      scale: float | None = None, offset: int | Tensor | None = None, impl: str = "auto") -> Tensor:
    """Averages values, each weighted by the exponential of how well its key meets the query.

        out_i = sum_j p_ij v_j        p_ij = exp(scale q_i . k_j) / sum over visible j of exp(scale q_i . k_j)

    Time grows with n m (d + e). "native" makes no [n, m] table for the value, the gradient or the tangent.

    Args:
        q: [b, h, n, d], floating point.
        k: [b, g, m, d], h a multiple of g; each key head serves h / g query heads and is not repeated.
        v: [b, g, m, e].
        mask: bool, broadcastable to [b, h, n, m], True where a key may be attended; None: everywhere.
        causal: query i sees the keys j <= offset + i only.
        scale: what the products are multiplied by; default d^-1/2.
        offset: position of the first query among the keys, an int or a 0-d int64 tensor; default m - n, which aligns the
            queries to the end of the keys.
        impl: "reference" is plain torch; "native" insists on the fused kernels (CPU), "triton" on Triton's (CUDA, d and e up to
            128); "auto" chooses. See `ops.report()`.
    Returns:
        [b, h, n, e] in v's dtype, computed in float32, or in float64 if any input is. Rows that see no key are 0.
    Raises:
        ValueError: shapes or devices disagree, or offset without causal. TypeError: not floating tensors, mask not bool,
        offset not an integer. KernelUnavailable: the named kernel cannot serve the call.

    Differentiable any number of times in both modes; batches under vmap without a loop, also over offset and mask; compiles
    and exports.
    """
    check_heads("softmax_attention", q, k, v)
    mask = _check_mask(mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    start, mask = _start(q.shape[2], k.shape[2], mask, causal, offset, q.device)
    scale = q.shape[3] ** -0.5 if scale is None and q.shape[3] else float(1.0 if scale is None else scale)
    kernel = choose("softmax_attention", impl, KERNELS, q, k, v)
    run = reference if kernel is None else kernel.run
    with no_autocast(v):
        return run(*widen(q, k, v), mask, start, scale).to(v.dtype)


def _check_mask(mask: Tensor | None, shape: tuple) -> Tensor | None:
    """The mask with four axes, each 1 or that of the scores, the last one whole."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"softmax_attention: mask must be a bool tensor, True = may be attended; got {got}.\n"
                        f"  Cast it: mask.bool().")
    if mask.ndim > 4 or any(size not in (1, full) for size, full in zip(mask.shape[::-1], shape[::-1])):
        raise ValueError(f"softmax_attention: mask must be broadcastable to [b, h, n, m] = {list(shape)}; "
                         f"got {list(mask.shape)}.\n"
                         f"  A mask of keys needs axes for heads and queries: mask[:, None, None, :].")
    mask = mask[(None,) * (4 - mask.ndim)]
    return mask if mask.shape[3] == shape[3] else mask.expand(*mask.shape[:3], shape[3])


def _start(n: int, m: int, mask: Tensor | None, causal: bool, offset: int | Tensor | None, device: torch.device):
    """Position of the first query as an int, or None with the causal rule as part of the mask."""
    if not causal:
        if offset is not None:
            raise ValueError("softmax_attention: offset places the queries of causal attention; got offset with causal=False.\n"
                             "  Pass causal=True, or leave offset out.")
        return None, mask
    if offset is None:
        return m - n, mask
    if isinstance(offset, Tensor):
        if offset.ndim or offset.is_floating_point() or offset.is_complex() or offset.dtype == torch.bool:
            raise TypeError(f"softmax_attention: offset must be an int or a 0-d integer tensor; "
                            f"got {offset.dtype} of shape {list(offset.shape)}.\n"
                            f"  Use torch.tensor(position), and vmap for one offset per sequence.")
        value = peek_int(offset)
        if value is not None:
            return value, mask
        seen = torch.arange(m, device=device) <= offset + torch.arange(n, device=device)[:, None]
        return None, seen[None, None] if mask is None else mask & seen
    if isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"softmax_attention: offset must be an int or a 0-d integer tensor; got {type(offset).__name__}.\n"
                        f"  Use int(offset), or torch.tensor(offset).")
    return offset, mask


# ------------------------------------------------------------------------------------------------ plain torch


def weights(scores: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Softmax over the last axis among the allowed entries; rows without one are exactly 0, with finite derivatives.

    scores [..., m]; allowed bool, broadcastable to scores. The only softmax in the library.
    """
    if scores.shape[-1] == 0:
        return scores
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    p = (scores - top).exp()
    # The largest entry of a row is exp(0) = 1, so only the sum of an empty row is below 1; a half keeps its slope at zero.
    return p / p.sum(-1, keepdim=True).clamp_min(0.5)


def _allowed(mask: Tensor | None, start: int | None, n: int, m: int, g: int, device: torch.device) -> Tensor | None:
    """What may be attended, broadcastable to [b, g, h/g, n, m]; None: everything."""
    seen = None
    if mask is not None:
        seen = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (g, mask.shape[1] // g))
    if start is not None:
        past = torch.arange(m, device=device) <= start + torch.arange(n, device=device)[:, None]
        seen = past if seen is None else seen & past
    return seen


def _table(q: Tensor, k: Tensor, mask: Tensor | None, start: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """q grouped by key heads [b, g, r, n, d], and the weights [b, g, r, n, m]."""
    g, m = k.shape[1:3]
    q = q.unflatten(1, (g, q.shape[1] // g if g else 0))
    scores = torch.einsum("bgrid,bgjd->bgrij", q * scale, k)
    return q, weights(scores, _allowed(mask, start, q.shape[3], m, g, q.device))


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, start: int | None = None,
              scale: float = 1.0) -> Tensor:
    """The same in plain torch; when the table of scores would be large, a block of queries at a time."""
    b, h, n, _ = q.shape
    m = k.shape[2]
    # A compiler plans memory itself, and a size compared here would become a condition of the compiled program.
    if torch.compiler.is_compiling() or b * h * n * m <= TABLE:
        return _attend(q, k, v, mask, start, scale)
    rows = max(1, TABLE // (b * h * m))
    outs = []
    for i in range(0, n, rows):
        here = slice(i, i + rows)
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, here]
        outs.append(_attend(q[:, :, here], k, v, part, None if start is None else start + i, scale))
    return torch.cat(outs, 2)


def _attend(q, k, v, mask, start, scale):
    _, p = _table(q, k, mask, start, scale)
    return torch.einsum("bgrij,bgje->bgrie", p, v).flatten(1, 2)


# ------------------------------------------------------------------------------------------------ the kernels
# Derivative formulas in the operators' arguments. `out` and `lse` are there unused: see the head of this file.


def _backward_formula(g, q, k, v, mask, out, lse, start, scale, g_lse=None):
    q, p = _table(q, k, mask, start, scale)
    g = g.unflatten(1, q.shape[1:3])
    slope = torch.einsum("bgrie,bgje->bgrij", g, v)
    slope = slope - (p * slope).sum(-1, keepdim=True)
    if g_lse is not None:
        slope = slope + g_lse.unflatten(1, q.shape[1:3])[..., None]
    slope = p * slope * scale
    return (torch.einsum("bgrij,bgjd->bgrid", slope, k).flatten(1, 2), torch.einsum("bgrij,bgrid->bgjd", slope, q),
            torch.einsum("bgrij,bgrie->bgje", p, g))


def _tangent_formula(q, k, v, mask, out, lse, tq, tk, tv, start, scale):
    q, p = _table(q, k, mask, start, scale)
    moved = torch.zeros_like(p)
    if tq is not None:
        moved = moved + torch.einsum("bgrid,bgjd->bgrij", tq.unflatten(1, q.shape[1:3]), k)
    if tk is not None:
        moved = moved + torch.einsum("bgrid,bgjd->bgrij", q, tk)
    moved = p * moved * scale
    t_lse = moved.sum(-1)
    t_out = torch.einsum("bgrij,bgje->bgrie", moved - t_lse[..., None] * p, v)
    if tv is not None:
        t_out = t_out + torch.einsum("bgrij,bgje->bgrie", p, tv)
    return t_out.flatten(1, 2), t_lse.flatten(1, 2)


def _rules(kernel: Any) -> dict[str, Callable]:
    """The derivatives of kernel.attend by kernel.attend_backward and kernel.attend_tangent."""

    def vjp(needs, args, outs, cotangents):
        q, k, v, mask, start, scale = args
        g, g_lse = cotangents
        if g_lse is None:
            grads = kernel.attend_backward(g, q, k, v, mask, *outs, start, scale)
        else:
            g = torch.zeros_like(outs[0]) if g is None else g
            grads = _backward_formula(g, q, k, v, mask, *outs, start, scale, g_lse)
        return (*(x if need else None for x, need in zip(grads, needs)), None, None, None)

    def jvp(args, outs, tangents):
        q, k, v, mask, start, scale = args
        return kernel.attend_tangent(q, k, v, mask, *outs, *tangents[:3], start, scale)

    return {"vjp": vjp, "jvp": jvp}


def _fold(operator, mask_at: int):
    """The mapped axis becomes part of the batch axis; a mask that all members and sequences share is not repeated."""

    def rule(info, in_dims, *args):
        size = info.batch_size
        b = (args[0] if in_dims[0] is None else args[0].movedim(in_dims[0], 0)[0]).shape[0]

        def merge(i, x, dim):
            if not isinstance(x, Tensor) or i == mask_at and dim is None and x.shape[0] == 1:
                return x
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.expand(size, b, *x.shape[2:]).flatten(0, 1)

        outs = operator(*[merge(i, x, d) for i, (x, d) in enumerate(zip(args, in_dims))])
        return tuple(out.unflatten(0, (size, b)) for out in outs), (0,) * len(outs)

    return rule


def _by_formula(operator, formula, mask_at):
    operator.derive(vjp=lambda needs, args, outs, cotangents: reference_vjp(formula, needs, args, cotangents),
                    jvp=lambda args, outs, tangents: reference_jvp(formula, args, tangents),
                    batch=_fold(operator, mask_at), save_outputs=False)


for _kernel in (native, triton):
    _kernel.attend.derive(**_rules(_kernel), batch=_fold(_kernel.attend, mask_at=3))
    _by_formula(_kernel.attend_backward, _backward_formula, mask_at=4)
    _by_formula(_kernel.attend_tangent, _tangent_formula, mask_at=3)


def _native_reason(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    return None if q.device.type == "cpu" else f"needs CPU tensors, got {q.device.type}"


def _native(q, k, v, mask, start, scale):
    return native.attend(q, k, v, mask, start, scale)[0]


def _triton(q, k, v, mask, start, scale):
    return triton.attend(q, k, v, mask, start, scale)[0]


KERNELS = (
    Kernel("native", _native, _native_reason),
    Kernel("triton", _triton, triton.why_not),
)
