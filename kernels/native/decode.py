"""A few queries against keys and values that lie in two places, without joining them: csrc/decode.c.

What `fnattn.ops.cached_attention` runs for a token or a few: the keys are read once, lanes along the channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from .call import address, function, threads

# b batch, h query heads, g key heads, n queries, m keys, d width of q and k, e width of v.


def _attend(q: Tensor, k: Tensor, v: Tensor, k_late: Tensor, v_late: Tensor, mask: Tensor | None, first: int, m: int,
            scale: float) -> Tensor:
    q, k, v, k_late, v_late = q.contiguous(), k.contiguous(), v.contiguous(), k_late.contiguous(), v_late.contiguous()
    b, h, n, d = q.shape
    g, room, e = v.shape[1:]
    strides = [0] * 3
    if mask is not None:
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        strides = [stride if size > 1 else 0 for stride, size in zip(mask.stride(), mask.shape[:3])]
    out = torch.empty(b, h, n, e, dtype=q.dtype)
    if b and h and e:
        call = function("decode", "try_decode", q.dtype, "p" * 7 + "i" * 15 + "d")
        if call(address(q), address(k), address(v), address(k_late), address(v_late), address(mask), address(out), b, h, g, n, d, e, room,
                k_late.shape[2], first, m, *strides, m - n, threads(b * h * n * m * (d + e)), scale):
            raise MemoryError(f"cached_attention: no memory for the native kernel's scores ({h // g * n} queries, {m} keys)")
    return out


def _fake(q, k, v, k_late, v_late, mask, first, m, scale):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


# out [b, h, n, e]: the queries stand at the end of m keys, the first `first` of which are in k and v.
attend = Operator("decode_native", 2, "(Tensor q, Tensor k, Tensor v, Tensor k_late, Tensor v_late, Tensor? mask, SymInt first, "
                  "SymInt m, float scale) -> Tensor", fake=_fake, cpu=_attend)
attend.flops(lambda q, k, v, k_late, v_late, mask, first, m, scale, **kwargs: 2 * q[0] * q[1] * q[2] * m * (q[3] + v[3]))
attend.split((1, 1, 1, 1, 1, (1,)), (1,))
