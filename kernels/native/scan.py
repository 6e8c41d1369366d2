"""C kernel of the gated first-order recurrence; see csrc/scan.c."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from .call import address, function, threads


def rows(t: Tensor, tail: int) -> Tensor:
    """t [b, n, ...] with its last `tail` axes packed, so that a row is one stretch of memory; a copy only if need be."""
    expected = 1
    for size, stride in zip(reversed(t.shape[-tail:]), reversed(t.stride()[-tail:])):
        if size != 1 and stride != expected:
            return t.contiguous()
        expected *= size
    return t


def _scan(a: Tensor, x: Tensor, h0: Tensor | None, reverse: bool, pairs: bool, lag: bool, conjugate: bool) -> Tensor:
    tail = 2 if pairs else 1
    a, x, h0 = rows(a, tail), rows(x, tail), None if h0 is None else h0.contiguous()
    b, n, c = x.shape[:3]
    h = torch.empty(x.shape, dtype=x.dtype)
    function("scan", "scan", x.dtype, "pppp" + "i" * 12)(
        address(a), address(x), address(h0), address(h), b, n, c, a.stride(0), a.stride(1), x.stride(0), x.stride(1),
        int(reverse), int(pairs), int(lag), int(conjugate), threads(h.numel()))
    return h


def _fake(a: Tensor, x: Tensor, *rest) -> Tensor:
    return x.new_empty(x.shape)


# a, x [b, n, c] (pairs: [b, n, c, 2]), h0 [b, c] (or [b, c, 2]). h_t = m_t h_before(t) + x_t with m_t = a_t, or, if lag,
# m_t = a_before(t) and 1 at the first row visited; conjugated if conjugate. The flags close it under differentiation.
scan = Operator("scan_native", 1, "(Tensor a, Tensor x, Tensor? h0, bool reverse, bool pairs, bool lag, bool conjugate)"
                " -> Tensor", fake=_fake, cpu=_scan)


def flops(a, x, h0=None, reverse=False, pairs=False, *args, **kwargs) -> int:
    """Operations of one call, from shapes: a product and a sum, of complex numbers if pairs."""
    return x[0] * x[1] * x[2] * (8 if pairs else 2)


scan.flops(flops)
scan.split((2, 2, 1), (2,))
