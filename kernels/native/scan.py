"""C kernel of the gated first-order recurrence; see csrc/scan.c."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from .call import address, function, sums_dtype, threads


def rows(t: Tensor, tail: int) -> Tensor:
    """t [b, n, ...] with its last `tail` axes packed, so that a row is one stretch of memory; a copy only if need be."""
    expected = 1
    for size, stride in zip(reversed(t.shape[-tail:]), reversed(t.stride()[-tail:])):
        if size != 1 and stride != expected:
            return t.contiguous()
        expected *= size
    return t


def _sums(a: Tensor, x: Tensor, h0: Tensor | None, flags: tuple[bool, ...]) -> tuple[Tensor, Tensor | None]:
    reverse, pairs, lag, conjugate = flags
    tail = 2 if pairs else 1
    a, x, h0 = rows(a, tail), rows(x, tail), None if h0 is None else h0.contiguous()
    b, n, c = x.shape[:3]
    h = torch.empty(x.shape, dtype=sums_dtype(x))
    rounded = None if h.dtype == x.dtype else torch.empty(x.shape, dtype=x.dtype)
    function("scan", "scan", x.dtype, "ppppp" + "i" * 12)(
        address(a), address(x), address(h0), address(h), address(rounded), b, n, c, a.stride(0), a.stride(1), x.stride(0), x.stride(1),
        int(reverse), int(pairs), int(lag), int(conjugate), threads(h.numel()))
    return h, rounded


def _scan(a: Tensor, x: Tensor, h0: Tensor | None, *flags: bool) -> Tensor:
    return _sums(a, x, h0, flags)[0]


def _rounded(a: Tensor, x: Tensor, h0: Tensor | None, *flags: bool) -> tuple[Tensor, Tensor]:
    h, rounded = _sums(a, x, h0, flags)
    return rounded, h


def _fake(a: Tensor, x: Tensor, *rest) -> Tensor:
    return x.new_empty(x.shape)


def _rounded_fake(a: Tensor, x: Tensor, *rest) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=sums_dtype(x))


# a, x [b, n, c] (pairs: [b, n, c, 2]), h0 [b, c] (or [b, c, 2]). h_t = m_t h_before(t) + x_t with m_t = a_t, or, if lag,
# m_t = a_before(t) and 1 at the first row visited; conjugated if conjugate. The flags close it under differentiation.
_ARGUMENTS = "(Tensor a, Tensor x, Tensor? h0, bool reverse, bool pairs, bool lag, bool conjugate)"
scan = Operator("scan_native", 1, _ARGUMENTS + " -> Tensor", fake=_fake, cpu=_scan)
# The same for a and x in bfloat16: h in bfloat16, and h before it was rounded.
rounded = Operator("scan_rounded_native", 1, _ARGUMENTS + " -> (Tensor, Tensor)", fake=_rounded_fake, cpu=_rounded, autocast=None)


def flops(a, x, h0=None, reverse=False, pairs=False, *args, **kwargs) -> int:
    """Operations of one call, from shapes: a product and a sum, of complex numbers if pairs."""
    return x[0] * x[1] * x[2] * (8 if pairs else 2)


scan.flops(flops)
scan.split((2, 2, 1), (2,))
rounded.flops(flops)
rounded.split((2, 2, 1), (2, 2))
