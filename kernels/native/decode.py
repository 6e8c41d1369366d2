"""A few queries against keys and values that lie in two places, without joining them: csrc/decode.c.

What `fnattn.ops.cached_attention` runs for a token or a few: the keys are read once, lanes along the channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from .call import address, function, threads

# b batch, h query heads, g key heads, n queries, m keys, d width of q and k, e width of v.


def _call(name: str, before: list[Tensor], parts: list[Tensor], mask: Tensor | None, after: list[Tensor], first: int, m: int,
          scale: float) -> None:
    """The C function of this name and v's dtype; parts: q, k, v, k_late, v_late. What it reads must be contiguous, what it writes is
    `after`."""
    q, _, v, k_late, _ = parts
    (b, h, n, d), (g, room, e) = q.shape, v.shape[1:]
    strides = [0] * 3
    if mask is not None:
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        strides = [stride if size > 1 else 0 for stride, size in zip(mask.stride(), mask.shape[:3])]
    pointers = [*map(address, before), *map(address, parts), address(mask), *map(address, after)]
    call = function("decode", name, v.dtype, "p" * len(pointers) + "i" * 15 + "d")
    if call(*pointers, b, h, g, n, d, e, room, k_late.shape[2], first, m, *strides, m - n, threads(b * h * n * m * (d + e)), scale):
        raise MemoryError(f"cached_attention: no memory for the native kernel's scores ({h // g * n} queries, {m} keys)")


def _attend(q: Tensor, k: Tensor, v: Tensor, k_late: Tensor, v_late: Tensor, mask: Tensor | None, first: int, m: int,
            scale: float) -> Tensor:
    parts = [t.contiguous() for t in (q, k, v, k_late, v_late)]
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    if out.numel():
        _call("try_decode", [], parts, mask, [out], first, m, scale)
    return out


def _attend_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, k_late: Tensor, v_late: Tensor, mask: Tensor | None, first: int, m: int,
                     scale: float) -> tuple[Tensor, ...]:
    parts = [t.contiguous() for t in (q, k, v, k_late, v_late)]
    if not v.shape[1]:
        return tuple(torch.zeros_like(t) for t in parts)
    grads = [torch.empty_like(t) for t in parts]
    _call("try_decode_backward", [g.contiguous()], parts, mask, grads, first, m, scale)
    return tuple(grads)


def _attend_tangent(q: Tensor, k: Tensor, v: Tensor, k_late: Tensor, v_late: Tensor, mask: Tensor | None, tq: Tensor, tk: Tensor,
                    tv: Tensor, tk_late: Tensor, tv_late: Tensor, first: int, m: int, scale: float) -> Tensor:
    parts, moves = ([t.contiguous() for t in given] for given in ((q, k, v, k_late, v_late), (tq, tk, tv, tk_late, tv_late)))
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    if out.numel():
        _call("try_decode_tangent", [], parts, mask, [*moves, out], first, m, scale)
    return out


def _fake(q, k, v, k_late, v_late, mask, *others):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _fake_backward(g, q, k, v, k_late, v_late, *others):
    return tuple(t.new_empty(t.shape) for t in (q, k, v, k_late, v_late))


_PARTS, _NUMBERS = "Tensor q, Tensor k, Tensor v, Tensor k_late, Tensor v_late, Tensor? mask", "SymInt first, SymInt m, float scale"
# out [b, h, n, e]: the queries stand at the end of m keys, the first `first` of which are in k and v. Beside q in float32 the others
# may be bfloat16; derivatives want one dtype.
attend = Operator("decode_native", 3, f"({_PARTS}, {_NUMBERS}) -> Tensor", fake=_fake, cpu=_attend)
# Gradients of q, k, v, k_late, v_late for the cotangent g of out: 0 in rows that are not read.
attend_backward = Operator("decode_backward_native", 1, f"(Tensor g, {_PARTS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
                           fake=_fake_backward, cpu=_attend_backward)
attend_tangent = Operator("decode_tangent_native", 1, f"({_PARTS}, Tensor tq, Tensor tk, Tensor tv, Tensor tk_late, Tensor tv_late, "
                          f"{_NUMBERS}) -> Tensor", fake=_fake, cpu=_attend_tangent)
attend.flops(lambda q, k, v, k_late, v_late, mask, first, m, scale, **kwargs: 2 * q[0] * q[1] * q[2] * m * (q[3] + v[3]))
attend_backward.flops(lambda g, q, k, v, k_late, v_late, mask, first, m, *others, **kwargs:
                      2 * q[0] * q[1] * q[2] * m * (3 * q[3] + 2 * v[3]))
attend_tangent.flops(lambda q, k, v, *others, **kwargs: 2 * q[0] * q[1] * q[2] * others[9] * (3 * q[3] + 2 * v[3]))
attend.split((1, 1, 1, 1, 1, (1,)), (1,))
attend_backward.split((1, 1, 1, 1, 1, 1, (1,)), (1, 1, 1, 1, 1))
attend_tangent.split((1, 1, 1, 1, 1, (1,), 1, 1, 1, 1, 1), (1,))
