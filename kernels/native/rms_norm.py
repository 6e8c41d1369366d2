"""C kernels of root-mean-square normalisation; see csrc/rms_norm.c."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from .call import address, function, threads


def _norm(x: Tensor, gamma: Tensor) -> Tensor:
    x, gamma = x.contiguous(), gamma.contiguous()
    (b, n, d), y = x.shape, torch.empty_like(x)
    function("rms_norm", "rms_norm", x.dtype, "ppp" + "iiiii")(
        address(x), address(gamma), address(y), b, n, d, _step(gamma), threads(2 * x.numel()))
    return y


def _backward(x: Tensor, gamma: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    x, gamma, g = x.contiguous(), gamma.contiguous(), g.contiguous()
    (b, n, d), dx = x.shape, torch.empty_like(x)
    dgamma = torch.empty(b, d, dtype=x.dtype)
    if function("rms_norm", "try_rms_norm_back", x.dtype, "ppppp" + "iiiii")(
            address(x), address(gamma), address(g), address(dx), address(dgamma), b, n, d, _step(gamma), threads(5 * x.numel())):
        raise MemoryError(f"rms_norm: no memory for the native kernel's sums over {n} rows of {d}")
    return dx, dgamma


def _step(gamma: Tensor) -> int:
    """From one batch entry to the next; 0 where all have the same."""
    return 0 if gamma.shape[0] == 1 else gamma.stride(0)


# x [b, n, d], gamma [1 or b, d] -> [b, n, d], all in one dtype, float32 or float64
norm = Operator("rms_norm_native", 1, "(Tensor x, Tensor gamma) -> Tensor", cpu=_norm, fake=lambda x, gamma: x.new_empty(x.shape))
norm.flops(lambda x, *args, **kwargs: 4 * x[0] * x[1] * x[2])
norm.split((1, None), (1,))
# and its gradient g [b, n, d] -> those of x, and of gamma for each batch entry [b, d]
backward = Operator("rms_norm_backward_native", 1, "(Tensor x, Tensor gamma, Tensor g) -> (Tensor, Tensor)", cpu=_backward,
                    fake=lambda x, gamma, g: (x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2])))
backward.flops(lambda x, *args, **kwargs: 10 * x[0] * x[1] * x[2])
backward.split((1, None, 1), (1, "sum"))
