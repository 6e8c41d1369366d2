"""C kernel of causal linear attention; see csrc/causal_dot.c."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from .call import address, function, threads


def _dot(q: Tensor, k: Tensor, v: Tensor, reverse: bool) -> Tensor:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    b, h, n, d = q.shape
    g, e = k.shape[1], v.shape[3]
    out = torch.empty((b, h, n, e), dtype=q.dtype)
    function("causal_dot", "causal_dot", q.dtype, "pppp" + "i" * 8)(
        address(q), address(k), address(v), address(out), b, h, g, n, d, e, int(reverse), threads(out.numel() * d))
    return out


def _fake(q: Tensor, k: Tensor, v: Tensor, reverse: bool) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def flops(q, k, v, *args, **kwargs) -> int:
    """Operations of one call, from shapes."""
    return 4 * q[0] * max(q[1], k[1]) * q[2] * q[3] * v[3]


# q [b, h, n, d], k [b, g, n, d], v [b, g, n, e]: one of h, g divides the other. With fewer query heads than key heads,
# the products of a group of key heads are summed, which makes the operator closed under differentiation.
dot = Operator("causal_dot_native", 2, "(Tensor q, Tensor k, Tensor v, bool reverse) -> Tensor", fake=_fake, cpu=_dot)
dot.flops(flops)
dot.split((1, 1, 1), (1,))
