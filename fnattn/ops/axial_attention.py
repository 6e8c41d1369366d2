"""Axial sparse attention: a pixel sees the text and the pixels before it in its row, or above it in its column.

The sequence is a text of text_len positions, then a picture of image_size^2 pixels in raster order. Position i attends
to

    text i:            j <= i among the text
    pixel (row, col):  all text, and  axis 0: (row, col') with col' <= col;   axis 1: (row', col) with row' <= row

Source: SparseAxialCausalAttention of dalle-pytorch 1.6.6; Ho et al. 2019, arXiv 1912.12180.
"""

from __future__ import annotations

import torch
from fnattn_kernels import crossovers
from fnattn_kernels.native.build import narrower_than_torch
from torch import Tensor

from . import _segment_kernel
from ._door import Kernel, cast, check_heads, choose, no_autocast, scale_of, widen
from ._picture import attend, attend_bands, bands_reason, check_mask, check_picture

# b batch, h query heads, g key heads, n positions, d width of q and k, e width of v


def axial_attention(q: Tensor, k: Tensor, v: Tensor, *, text_len: int, image_size: int, axis: int = 0,
                    mask: Tensor | None = None, text_sees_all: bool = False, scale: float | None = None,
                    impl: str = "auto") -> Tensor:
    """Softmax attention over a text and, for pixels, the part of their row or column up to themselves.

    Causal. Time grows with n (text_len + image_size) (d + e).

    Args:
        q: [b, h, n, d], floating point; n from 0 to text_len + image_size^2, the beginning of text and picture.
        k: [b, g, n, d], h a multiple of g; each key head serves h / g query heads and is not repeated.
        v: [b, g, n, e].
        text_len: positions of the text. image_size: side of the picture.
        axis: 0 for the pixel's row, 1 for its column.
        mask: bool [b, n]; False keys are not there.
        text_sees_all: text queries ignore the mask, as upstream's do.
        scale: what the products are multiplied by; default d^-1/2.
        impl: "reference" is plain torch; "native" (CPU) and "triton" (CUDA, d and e up to 128, not float64) are one fused kernel, to
            second derivatives; "bands" gives bands of the picture to the fused softmax kernel (CPU); "auto" chooses. See
            `ops.report()`.
    Returns:
        [b, h, n, e] in v's dtype, computed in float32, or in float64 if any input is. Rows that see no key are 0.
    Raises:
        ValueError: shapes or sizes disagree, axis not 0 or 1. TypeError: not floating tensors, mask not bool.

    Differentiable any number of times in both modes; batches under vmap without a loop; compiles and exports.
    """
    check_heads("axial_attention", q, k, v)
    check_picture("axial_attention", q.shape[2], text_len, image_size)
    check_mask("axial_attention", mask, q.shape[0], q.shape[2])
    if axis not in (0, 1):
        raise ValueError(f"axial_attention: axis must be 0 (along a row) or 1 (along a column); got {axis}.\n"
                         f"  Use conv_attention for a window of both.")
    scale = scale_of("axial_attention", scale, q.shape[3])
    kernel = choose("axial_attention", impl, KERNELS, q, k, v)
    run = reference if kernel is None else kernel.run
    with no_autocast(v):
        return cast(run(*widen(q, k, v), mask, text_len, image_size, axis, scale, text_sees_all), v.dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, text_len: int, image_size: int, axis: int,
              scale: float, text_sees_all: bool = False) -> Tensor:
    """The same in plain torch: rows (columns) of the picture as a batch of short causal sequences."""
    near = _line(q, text_len, image_size, axis)
    return attend(q, k, v, mask, text_len, image_size, scale, bool(axis), (0,), near, text_sees_all)


def _bands(q, k, v, mask, text_len, image_size, axis, scale, text_sees_all):
    near = _line(q, text_len, image_size, axis)
    return attend_bands(q, k, v, mask, text_len, image_size, scale, bool(axis), (0,), near, text_sees_all)


def _line(q: Tensor, text_len: int, image_size: int, axis: int) -> Tensor:
    """Which places of a line see which: those up to themselves. A column is as long as there are rows so far."""
    rows = -(-max(q.shape[2] - text_len, 0) // image_size)
    length = rows if axis else image_size
    return torch.ones(length, length, dtype=torch.bool, device=q.device).tril()


_WIDTH = crossovers.limits("axial_attention", "native")["width"]


def _wide_enough(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether C is as fast as torch's own matrix products."""
    *_, width = q.shape
    return width < _WIDTH or not narrower_than_torch()


_native, _triton = _segment_kernel.kernels(_segment_kernel.axial)
KERNELS = (_native._replace(worth=_wide_enough), _triton, Kernel("bands", _bands, bands_reason, _wide_enough))
