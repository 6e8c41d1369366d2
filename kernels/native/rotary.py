"""C kernel of rotary positions; see csrc/rotary.c."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from .call import address, function, threads


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rest: bool) -> Tensor:
    b, h, n, d = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty((b, h, n, d), dtype=x.dtype)
    function("rotary", "rotary", x.dtype, "pppp" + "i" * 11)(
        address(x), address(cos), address(sin), address(out), b, h, n, d, cos.shape[2], *x.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0, int(rest), threads(x.numel()))
    return out


def _fake(x: Tensor, cos: Tensor, sin: Tensor, rest: bool) -> Tensor:
    return x.new_empty(x.shape)


# x [b, h, n, d], of the dtype of cos and sin or, beside float32, bfloat16; cos, sin [b or 1, n, f], 2 f <= d. rest: keep the
# other channels; else they are 0, as in a derivative with respect to the angles.
rotate = Operator("rotary_native", 2, "(Tensor x, Tensor cos, Tensor sin, bool rest) -> Tensor", fake=_fake, cpu=_rotate)
rotate.flops(lambda x, cos, sin, *args, **kwargs: 6 * x[0] * x[1] * x[2] * cos[2])
rotate.split((1, None, None), (1,))
