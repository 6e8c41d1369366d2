"""C kernel of a linear map of few rows; see csrc/linear.c."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from .call import address, function, threads


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (b, n, k), m = x.shape, weight.shape[1]
    x = x if x.stride(2) == 1 or k == 1 else x.contiguous()
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    out = torch.empty((b, n, m), dtype=x.dtype)
    function("linear", "linear", weight.dtype, "pppp" + "i" * 9)(
        address(x), address(weight), address(bias), address(out), b, n, m, k, x.stride(0), x.stride(1), _step(weight), _step(bias),
        threads(b * n * m * k))
    return out


def _step(t: Tensor | None) -> int:
    """From one batch entry to the next; 0 where all have the same."""
    return 0 if t is None or t.shape[0] == 1 else t.stride(0)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[1])


# x [b, n, k], weight [1 or b, m, k], bias [1 or b, m] -> [b, n, m], all in one dtype, float32 or float64. Beside x and bias in float32
# the weights may be bfloat16; derivatives want one dtype.
linear = Operator("linear_native", 1, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", fake=_fake, cpu=_linear, autocast=None)
linear.flops(lambda x, weight, *args, **kwargs: 2 * x[0] * x[1] * x[2] * weight[1])
linear.split((1, None, None), (1,))
