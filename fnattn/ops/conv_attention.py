"""Convolution-like sparse attention: a pixel sees the text and a window of pixels above and to the left of it.

The sequence is a text of text_len positions, then a picture of image_size^2 pixels in raster order. Position i attends
to

    text i:            j <= i among the text
    pixel (row, col):  all text, and pixels (row', col') with row - row' and col - col' in {0, dilation, ...,
    (kernel_size - 1) dilation}

Source: SparseConvCausalAttention of dalle-pytorch 1.6.6, which unfolds keys and values into kernel_size^2 copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import check_sizes
from . import _segment_kernel
from ._door import Kernel, cast, check_heads, choose, no_autocast, scale_of, widen
from ._picture import attend, attend_bands, bands_reason, check_mask, check_picture

# b batch, h query heads, g key heads, n positions, d width of q and k, e width of v


def conv_attention(q: Tensor, k: Tensor, v: Tensor, *, text_len: int, image_size: int, kernel_size: int = 5,
                   dilation: int = 1, mask: Tensor | None = None, text_sees_all: bool = False,
                   scale: float | None = None, impl: str = "auto") -> Tensor:
    """Softmax attention over a text and, for pixels, a square window whose lower right corner is the pixel itself.

    Causal. Time grows with n (text_len + kernel_size * image_size) (d + e), memory of scores likewise; keys and values
    are not copied.

    Args:
        q: [b, h, n, d], floating point; n from 0 to text_len + image_size^2, the beginning of text and picture.
        k: [b, g, n, d], h a multiple of g; each key head serves h / g query heads and is not repeated.
        v: [b, g, n, e].
        text_len: positions of the text. image_size: side of the picture.
        kernel_size: pixels along each side of the window. dilation: distance between them.
        mask: bool [b, n]; False keys are not there.
        text_sees_all: text queries ignore the mask, as upstream's do.
        scale: what the products are multiplied by; default d^-1/2.
        impl: "reference" is plain torch; "native" (CPU) and "triton" (CUDA, d and e up to 128, not float64) are one fused kernel, to
            second derivatives; "bands" gives bands of the picture to the fused softmax kernel (CPU); "auto" chooses. See
            `ops.report()`.
    Returns:
        [b, h, n, e] in v's dtype, computed in float32, or in float64 if any input is. Rows that see no key are 0.
    Raises:
        ValueError: shapes or sizes disagree. TypeError: not floating tensors, mask not bool.

    Differentiable any number of times in both modes; batches under vmap without a loop; compiles and exports.
    """
    check_heads("conv_attention", q, k, v)
    check_picture("conv_attention", q.shape[2], text_len, image_size)
    check_mask("conv_attention", mask, q.shape[0], q.shape[2])
    check_sizes("conv_attention", 1, "A window of one pixel has kernel_size=1.", kernel_size=kernel_size, dilation=dilation)
    # No two pixels are further apart than that: what follows may take time that grows with these.
    kernel_size, dilation = min(kernel_size, image_size), min(dilation, image_size)
    scale = scale_of("conv_attention", scale, q.shape[3])
    kernel = choose("conv_attention", impl, KERNELS, q, k, v)
    run = reference if kernel is None else kernel.run
    with no_autocast(v):
        return cast(run(*widen(q, k, v), mask, text_len, image_size, kernel_size, dilation, scale, text_sees_all), v.dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, text_len: int, image_size: int, kernel_size: int,
              dilation: int, scale: float, text_sees_all: bool = False) -> Tensor:
    """The same in plain torch: one matrix product for each row that the window reaches."""
    shifts, near = _window(q, image_size, kernel_size, dilation)
    return attend(q, k, v, mask, text_len, image_size, scale, False, shifts, near, text_sees_all)


def _bands(q, k, v, mask, text_len, image_size, kernel_size, dilation, scale, text_sees_all):
    shifts, near = _window(q, image_size, kernel_size, dilation)
    return attend_bands(q, k, v, mask, text_len, image_size, scale, False, shifts, near, text_sees_all)


def _window(q: Tensor, image_size: int, kernel_size: int, dilation: int) -> tuple[tuple[int, ...], Tensor]:
    """How many rows back the window's rows are, and which columns see which, [S, S]."""
    place = torch.arange(image_size, device=q.device)
    return tuple(range(0, kernel_size * dilation, dilation)), in_window(place[:, None] - place, kernel_size, dilation)


def in_window(distance: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Whether a distance along one side is one of 0, dilation, ..., (kernel_size - 1) dilation."""
    return (distance >= 0) & (distance <= (kernel_size - 1) * dilation) & (distance % dilation == 0)


KERNELS = (*_segment_kernel.kernels(_segment_kernel.conv), Kernel("bands", _bands, bands_reason))
