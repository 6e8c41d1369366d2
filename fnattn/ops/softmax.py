"""Softmax attention: each query averages the values, weighted by the exponentials of its scores.

    s_ij = scale q_i . k_j        p_ij = exp(s_ij) / sum over visible j of exp(s_ij)        out_i = sum_j p_ij v_j

A row that sees no key gives exactly 0, with finite derivatives. Derivatives, with r_i = sum_j p_ij ds_ij for a tangent ds:

    tangent    out_i' = sum_j p_ij (ds_ij v_j + v_j') - r_i out_i
    gradient   ds_ij = p_ij (g_i . v_j - g_i . out_i)    dq = scale ds k    dk = scale ds^T q    dv = p^T g

The fused kernels compute these, and the tangent of the gradient, without an [n, m] table: Hessian-vector products too have linear
memory. Further derivatives are those of plain-torch formulas; see `_softmax_rules`.

Source: Vaswani et al. 2017, arXiv 1706.03762; fused forms after Dao et al. 2022, arXiv 2205.14135.
"""

from __future__ import annotations

import torch
from fnattn_kernels.native import sdpa
from fnattn_kernels.native import softmax as native
from fnattn_kernels.triton import softmax as triton
from torch import Tensor

from ..core import peek_int
from ._door import Kernel, cast, check_heads, choose, no_autocast, scale_of, widen
from ._softmax_rules import _table, derive
from ._softmax_rules import weights as weights

# b batch, h query heads, g key heads, n queries, m keys, d width of q and k, e width of v
TABLE = 1 << 24  # scores that the reference holds at once; beyond, it works through the queries in blocks


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False,
                      scale: float | None = None, offset: int | Tensor | None = None, impl: str = "auto") -> Tensor:
    """Averages values, each weighted by the exponential of how well its key meets the query.

        out_i = sum_j p_ij v_j        p_ij = exp(scale q_i . k_j) / sum over visible j of exp(scale q_i . k_j)

    Time grows with n m (d + e). The kernels make no [n, m] table for value, gradient, tangent or
    Hessian-vector product.

    Args:
        q: [b, h, n, d], floating point.
        k: [b, g, m, d], h a multiple of g; each key head serves h / g query heads and is not repeated.
        v: [b, g, m, e].
        mask: bool, broadcastable to [b, h, n, m], True where a key may be attended; None: everywhere.
        causal: query i sees the keys j <= offset + i only.
        scale: what the products are multiplied by; default d^-1/2.
        offset: position of the first query among the keys, an int or a 0-d int64 tensor; default m - n, which aligns the
            queries to the end of the keys.
        impl: "reference" is plain torch; "native" insists on the fused kernels (CPU), "sdpa" on torch's own (CPU), "triton"
            on Triton's (CUDA, d and e up to 128); "auto" chooses. See `ops.report()`.
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
    scale = scale_of("softmax_attention", scale, q.shape[3])
    kernel = choose("softmax_attention", impl, KERNELS, q, k, v)
    run = reference if kernel is None else kernel.run
    with no_autocast(v):
        return cast(run(*widen(q, k, v), mask, start, scale), v.dtype)


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
    mask = mask if mask.ndim == 4 else mask[(None,) * (4 - mask.ndim)]
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

for _kernel in (native, sdpa, triton):
    derive(_kernel.attend, _kernel.attend_backward, _kernel.attend_tangent, _kernel.attend_second,
           getattr(_kernel, "attend_along", None))


def _native(q, k, v, mask, start, scale):
    return native.attend(q, k, v, mask, start, scale)[0]


def _sdpa(q, k, v, mask, start, scale):
    return sdpa.attend(q, k, v, mask, start, scale)[0]


def _triton(q, k, v, mask, start, scale):
    return triton.attend(q, k, v, mask, start, scale)[0]


KERNELS = (
    Kernel("native", _native, sdpa.why_not),
    Kernel("sdpa", _sdpa, sdpa.why_not),
    Kernel("triton", _triton, triton.why_not),
)
