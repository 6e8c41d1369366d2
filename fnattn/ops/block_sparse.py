"""Softmax attention over the blocks that a layout names.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j        over j with layout[i / block, j / block], j <= offset + i if causal

Two plain-torch forms. "reference" spreads the layout to a mask of positions: every transform composes, also over the layout,
at the cost of dense attention. "gather" collects the present key blocks of each row of blocks, rows of like size together:
the time of the blocks that are there; it has to read the layout, so the layout may not be mapped or traced. The kernels in C
(CPU) and by Triton (CUDA, widths to 128, not float64) walk lists of the blocks that are there and hold no table; derivatives
beyond the second are those of "reference". "flex" is the value by torch's FlexAttention (CUDA), from a BlockMask made of the
layout, with the derivatives of the Triton kernels; it compiles for each shape anew, and has not been run on a GPU.

Source: DeepSpeed 0.19.6 sparse self-attention (its layout, causal and key padding masks are ours). Its kernels run on no
torch since 2.0 and were removed in 0.19.7.
"""

from __future__ import annotations

import torch
from fnattn_kernels import crossovers
from fnattn_kernels.deepspeed import sparse_missing
from torch import Tensor
from torch.nn.functional import pad

from ..core import check_sizes, peek
from . import _segment_kernel
from ._door import Kernel, cast, check_heads, choose, no_autocast, scale_of, widen
from .softmax import reference as dense_attention
from .softmax import weights

# b batch, h heads, n queries, m keys, d width of q and k, e width of v, nb blocks of l positions, w blocks gathered per row


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, layout: Tensor, *, block: int, causal: bool = False,
                           keep: Tensor | None = None, scale: float | None = None, impl: str = "auto") -> Tensor:
    """Averages the values of the present blocks, weighted by the exponential of how well their keys meet the query.

    Args:
        q: [b, h, n, d], floating point.
        k, v: [b, h, n, d] and [b, h, n, e].
        layout: bool [h or 1, nb, nb] with nb >= n / block: see `ops.layouts`.
        block: positions per block.
        causal: query i sees keys j <= i only, whatever the layout says.
        keep: bool [b, n], False for keys that are not there.
        scale: what products are multiplied by; default d^-1/2.
        impl: "reference", "gather", "native", "triton", "flex", or "auto": see above and `ops.report()`.
    Returns:
        [b, h, n, e] in v's dtype, computed in float32 or wider. Rows that see no key are 0.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree. KernelUnavailable: the named form cannot serve the call.
    """
    check_heads("block_sparse_attention", q, k, v)
    n = q.shape[2]
    if k.shape[1] != q.shape[1] or k.shape[2] != n:
        raise ValueError(f"block_sparse_attention: q, k and v must have the same heads and length; got q {list(q.shape)}, "
                         f"k {list(k.shape)}.\n  This is self-attention: project q, k and v from one sequence.")
    check_sizes("block_sparse_attention", 1, block=block)
    blocks = -(-n // block)
    if not isinstance(layout, Tensor) or layout.dtype != torch.bool:
        raise TypeError("block_sparse_attention: layout must be a bool tensor; got "
                        f"{layout.dtype if isinstance(layout, Tensor) else type(layout).__name__}.\n"
                        f"  Make one with ops.layouts.make, or cast it: layout.bool().")
    if layout.ndim != 3 or layout.shape[0] not in (1, q.shape[1]) or layout.shape[1] != layout.shape[2] or layout.shape[1] < blocks:
        raise ValueError(f"block_sparse_attention: layout must be [{q.shape[1]} or 1, nb, nb] with nb at least {blocks}, the blocks "
                         f"of {block} in {n} positions; got {list(layout.shape)}.\n"
                         f"  Make it for a longer sequence: layouts.make(cfg, seq_len).")
    if torch.compiler.is_compiling() or layout.shape[1] != blocks:
        layout = layout[:, :blocks, :blocks]
    if keep is not None and not (isinstance(keep, Tensor) and keep.dtype == torch.bool):
        raise TypeError(f"block_sparse_attention: keep must be a bool tensor, True = is there; "
                        f"got {keep.dtype if isinstance(keep, Tensor) else type(keep).__name__}.\n  Cast it: keep.bool().")
    if keep is not None and keep.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"block_sparse_attention: keep must be [batch, positions] = [{q.shape[0]}, {q.shape[2]}]; got "
                         f"{list(keep.shape)}.\n  Give one bool for each position of each sequence.")
    kernel = choose("block_sparse_attention", impl, KERNELS, q, k, v, layout)
    run = reference if kernel is None else kernel.run
    scale = scale_of("block_sparse_attention", scale, q.shape[3])
    with no_autocast(v):
        return cast(run(*widen(q, k, v), layout, block, causal, keep, scale), v.dtype)


def visible(layout: Tensor, rows: Tensor, columns: Tensor, block: int) -> Tensor:
    """The layout at positions: bool [h or 1, rows, columns]."""
    return layout.index_select(1, rows // block).index_select(2, columns // block)


def reference(q: Tensor, k: Tensor, v: Tensor, layout: Tensor, block: int, causal: bool, keep: Tensor | None,
              scale: float) -> Tensor:
    """The layout as a mask of positions."""
    at = torch.arange(q.shape[2], device=q.device)
    mask = visible(layout, at, at, block)[None]
    if keep is not None:
        mask = mask & keep[:, None, None, :]
    return dense_attention(q, k, v, mask, 0 if causal else None, scale)


def gather(q: Tensor, k: Tensor, v: Tensor, layout: Tensor, block: int, causal: bool, keep: Tensor | None, scale: float) -> Tensor:
    """The present key blocks of each row of blocks, rows with about as many blocks together."""
    b, h, n, _ = q.shape
    if n == 0:
        return reference(q, k, v, layout, block, causal, keep, scale)
    nb = layout.shape[1]
    layout = peek(layout)
    layout = (layout.tril() if causal else layout).expand(h, nb, nb)
    extra = nb * block - n
    q, k, v = (pad(t, (0, 0, 0, extra)).unflatten(2, (nb, block)) for t in (q, k, v))
    keep = torch.ones(b, n, dtype=torch.bool, device=q.device) if keep is None else keep
    keep = pad(keep, (0, extra)).unflatten(1, (nb, block))
    counts = layout.sum(-1).amax(0)                      # [nb]: blocks that a row needs, over all heads
    sizes = 2 ** counts.clamp(min=1).double().log2().ceil().long()
    order = layout.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices  # [h, nb, nb]: present blocks first
    head = torch.arange(h, device=q.device)[:, None, None] * nb
    outs, rows_done = [], []
    for size in sorted(set(sizes.tolist())):
        rows = (sizes == size).nonzero().squeeze(-1)     # [r]
        size = min(size, nb)
        columns = order[:, rows, :size]                  # [h, r, w]
        there = layout[:, rows].gather(-1, columns)      # [h, r, w]
        outs.append(_rows(q.index_select(2, rows), _pick(k, head + columns), _pick(v, head + columns), columns, there, rows, keep,
                          block, causal, scale))
        rows_done.append(rows)
    back = torch.cat(rows_done).argsort()
    return torch.cat(outs, 2).index_select(2, back).flatten(2, 3)[:, :, :n]


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Blocks x[:, head, column] of x [b, h, nb, l, d] -> [b, h, r, w l, d]."""
    picked = x.flatten(1, 2).index_select(1, index.flatten())
    return picked.unflatten(1, index.shape).flatten(3, 4)


def _rows(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, there: Tensor, rows: Tensor, keep: Tensor, block: int, causal: bool,
          scale: float) -> Tensor:
    """Attention of the queries [b, h, r, l, d] over their gathered keys [b, h, r, w l, d]."""
    inside = torch.arange(block, device=q.device)
    key_at = (columns[..., None] * block + inside).flatten(-2)                                # [h, r, w l]
    allowed = there[..., None].expand(*there.shape, block).flatten(-2)[:, :, None, :]         # [h, r, 1, w l]
    if causal:
        allowed = allowed & (key_at[:, :, None, :] <= (rows[:, None] * block + inside)[None, :, :, None])
    kept = keep.flatten(1).index_select(1, key_at.flatten()).unflatten(1, key_at.shape)       # [b, h, r, w l]
    p = weights(scale * q @ k.mT, allowed[None] & kept[:, :, :, None, :])
    return p @ v


def _gather_reason(q: Tensor, k: Tensor, v: Tensor, layout: Tensor) -> str | None:
    return "needs to read the layout, which is mapped or traced here" if peek(layout) is None else None


_GATHER = crossovers.limits("block_sparse_attention", "gather")


def _worth_gathering(q: Tensor, k: Tensor, v: Tensor, layout: Tensor) -> bool:
    """Long rows that are mostly absent."""
    values = peek(layout) if q.shape[2] >= _GATHER["length"] else None
    return values is not None and float(values.float().mean()) <= _GATHER["density"]


KERNELS = (
    *_segment_kernel.kernels(_segment_kernel.blocks),
    _segment_kernel.FLEX,
    Kernel("gather", gather, _gather_reason, _worth_gathering),
    # Never runs: its reason is what somebody who asks for DeepSpeed's kernels should read.
    Kernel("deepspeed", reference, lambda *args: sparse_missing()),
)
