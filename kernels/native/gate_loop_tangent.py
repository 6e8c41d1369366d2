"""C kernels for forward mode through the gated loops; see csrc/gate_loop_tangent.h.

Arguments are those of the loop, then one tangent each, None for zero. `logs` is the tangent of the logarithm of the
product of all gates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from .call import address, function, threads
from .gate_loop import EVERY, GATE, _heads, _like_rows, _narrow_backward_fake, _packed, _strides, _strides3, _wide_backward_fake, flops
from .scan import rows


def _rows(t: Tensor | None, tail: int) -> Tensor | None:
    return None if t is None else rows(t, tail)


def _simple(q, x, a, h0, tq, tx, ta, th0, reverse: bool) -> tuple[Tensor, Tensor]:
    q, x, a, tq, tx, ta = (_rows(t, 1) for t in (q, x, a, tq, tx, ta))
    h0, th0 = _packed(h0), _packed(th0)
    b, n, c = q.shape
    out, last = (torch.empty(s, dtype=q.dtype) for s in ((b, n, c), (b, c)))
    function("gate_loop", "simple_gate_loop_tangent", q.dtype, "p" * 10 + "i" * 17)(
        *map(address, (q, x, a, h0, tq, tx, ta, th0, out, last)), b, n, c, *_strides(q, x, a, tq, tx, ta), int(reverse),
        threads(GATE * out.numel()))
    return out, last


def _simple_fake(q, *rest) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2])


def _narrow(q, k, v, a, h0, tq, tk, tv, ta, th0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, tq, tk, tv = (_rows(t, 1) for t in (q, k, v, tq, tk, tv))
    a, ta, h0, th0 = _rows(a, 2), _rows(ta, 2), _packed(h0), _packed(th0)
    b, n, c = q.shape
    shapes = (b, n, c), (b, c, 2), (b, c, 2), (b, n // EVERY + 2, 2, c)
    out, last, logs, marks = (torch.empty(s, dtype=q.dtype) for s in shapes)
    function("gate_loop", "gate_loop_narrow_tangent", q.dtype, "p" * 14 + "i" * 20)(
        *map(address, (q, k, v, a, h0, tq, tk, tv, ta, th0, out, last, logs, marks)), b, n, c,
        *_strides(q, k, v, a, tq, tk, tv, ta), threads(2 * GATE * out.numel()))
    return out, last, logs, marks


def _narrow_fake(q, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, n, c = q.shape
    return (q.new_empty(b, n, c), q.new_empty(b, c, 2), q.new_empty(b, c, 2),
            q.new_empty(b, n // EVERY + 2, 2, c))


def _narrow_hessian(q, k, v, a, h0, marks, product, g, g_last, g_product,
                    tq, tk, tv, ta, th0, t_marks, t_product, tg, tg_last, tg_product) -> tuple[Tensor, ...]:
    q, k, v, g, tq, tk, tv, tg = (_rows(t, 1) for t in (q, k, v, g, tq, tk, tv, tg))
    a, ta = _rows(a, 2), _rows(ta, 2)
    marks, product, g_last, g_product = (_packed(t) for t in (marks, product, g_last, g_product))
    t_marks, t_product, tg_last, tg_product = (_packed(t) for t in (t_marks, t_product, tg_last, tg_product))
    b, n, c = q.shape
    grads = tuple(torch.empty(s, dtype=q.dtype) for s in (*((b, n, c),) * 3, (b, n, c, 2), (b, c, 2)))
    pointers = (q, k, v, a, marks, product, g, g_last, g_product, tq, tk, tv, ta, t_marks, t_product, tg, tg_last, tg_product)
    function("gate_loop", "gate_loop_narrow_hessian", q.dtype, "p" * 23 + "i" * 24)(
        *map(address, (*pointers, *grads)), b, n, c, *_strides(q, k, v, a, g, tq, tk, tv, ta, tg),
        threads(4 * GATE * q.numel()))
    return grads


def _wide_call(value: tuple[Tensor | None, ...], q, k, v, a, h0, tq, tk, tv, ta, th0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, a, tq, tk, tv, ta = (_heads(t) for t in (q, k, v, a, tq, tk, tv, ta))
    h0, th0 = _packed(h0), _packed(th0)
    (b, h, n, d), e = q.shape, v.shape[3]
    along = _wide_fake(q, k, v)
    function("gate_loop", "gate_loop_wide_tangent", q.dtype, "p" * 16 + "i" * 33)(
        *map(address, (q, k, v, a, h0, tq, tk, tv, ta, th0, *along, *value)), b, h, n, d, e,
        *_strides3(q, k, v, a, tq, tk, tv, ta, along[0]), threads(8 * b * h * n * d * e))
    return along


def _wide(*args: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _wide_call((None, None, None), *args)


def _wide_both(*args: Tensor | None) -> tuple[Tensor, ...]:
    value = _wide_fake(*args)
    return *value, *_wide_call(value, *args)


def _wide_both_fake(*args) -> tuple[Tensor, ...]:
    return *_wide_fake(*args), *_wide_fake(*args)


def _wide_fake(q, k, v, *rest) -> tuple[Tensor, Tensor, Tensor]:
    b, h, _, d = q.shape
    return _like_rows(q, v.shape[3]), q.new_empty(b, h, d, v.shape[3], 2), q.new_empty(b, h, 2)


def _hessian_call(own, q, k, v, a, h0, g, g_last, g_product, tq, tk, tv, ta, th0, tg, tg_last, tg_product) -> tuple[Tensor, ...]:
    q, k, v, a, g, tq, tk, tv, ta, tg = (_heads(t) for t in (q, k, v, a, g, tq, tk, tv, ta, tg))
    h0, g_last, g_product, th0, tg_last, tg_product = (_packed(t) for t in (h0, g_last, g_product, th0, tg_last, tg_product))
    (b, h, n, d), e = q.shape, v.shape[3]
    along = _wide_backward_fake(q, k, v)
    function("gate_loop", "gate_loop_wide_hessian", q.dtype, "p" * 26 + "i" * 48)(
        *map(address, (q, k, v, a, h0, g, g_last, g_product, tq, tk, tv, ta, th0, tg, tg_last, tg_product, *along, *own)), b, h, n, d, e,
        *_strides3(q, k, v, a, g, tq, tk, tv, ta, tg, *along[:4]), threads(24 * b * h * n * d * e))
    return along


def _wide_hessian(*args: Tensor | None) -> tuple[Tensor, ...]:
    return _hessian_call((None,) * 5, *args)


def _wide_backward_both(*args: Tensor | None) -> tuple[Tensor, ...]:
    grads = _wide_backward_fake(*args)
    return *grads, *_hessian_call(grads, *args)


def _wide_backward_both_fake(*args) -> tuple[Tensor, ...]:
    return *_wide_backward_fake(*args), *_wide_backward_fake(*args)


_FIVE = "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? h0, Tensor? tq, Tensor? tk, Tensor? tv, Tensor? ta, Tensor? th0)"
simple = Operator("simple_gate_loop_tangent_native", 1,
                  "(Tensor q, Tensor x, Tensor a, Tensor? h0, Tensor? tq, Tensor? tx, Tensor? ta, Tensor? th0, bool reverse)"
                  " -> (Tensor, Tensor)", fake=_simple_fake, cpu=_simple)
# Also gives the tangents of the marks, which the Hessian-vector product starts from.
narrow = Operator("gate_loop_narrow_tangent_native", 1, _FIVE + " -> (Tensor, Tensor, Tensor, Tensor)", fake=_narrow_fake,
                  cpu=_narrow)
# The arguments of gate_loop_narrow_backward, then one tangent each.
narrow_hessian = Operator(
    "gate_loop_narrow_hessian_native", 1,
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? h0, Tensor marks, Tensor product, Tensor? g, Tensor? g_last,"
    " Tensor? g_product, Tensor? tq, Tensor? tk, Tensor? tv, Tensor? ta, Tensor? th0, Tensor? t_marks, Tensor? t_product,"
    " Tensor? tg, Tensor? tg_last, Tensor? tg_product) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_narrow_backward_fake, cpu=_narrow_hessian)
wide = Operator("gate_loop_wide_tangent_native", 1, _FIVE + " -> (Tensor, Tensor, Tensor)", fake=_wide_fake, cpu=_wide)
# The loop's results and the tangent of each: products that value and tangent share are taken once.
wide_both = Operator("gate_loop_wide_both_native", 1, _FIVE + " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
                     fake=_wide_both_fake, cpu=_wide_both)
# The arguments of gate_loop_wide_backward, then one tangent each.
_EIGHT = ("(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? h0, Tensor? g, Tensor? g_last, Tensor? g_product, Tensor? tq, Tensor? tk,"
          " Tensor? tv, Tensor? ta, Tensor? th0, Tensor? tg, Tensor? tg_last, Tensor? tg_product)"
          " -> (Tensor, Tensor, Tensor, Tensor, Tensor")
wide_hessian = Operator("gate_loop_wide_hessian_native", 1, f"{_EIGHT})", fake=_wide_backward_fake, cpu=_wide_hessian)
# The gradients themselves, then the tangent of each.
wide_backward_both = Operator("gate_loop_wide_backward_both_native", 1, f"{_EIGHT}, Tensor, Tensor, Tensor, Tensor, Tensor)",
                              fake=_wide_backward_both_fake, cpu=_wide_backward_both)
simple.flops(flops(12))
narrow.flops(flops(30))
narrow_hessian.flops(flops(90))
wide.flops(flops(30, heads=True))
wide_both.flops(flops(40, heads=True))
wide_hessian.flops(flops(90, heads=True))
wide_backward_both.flops(flops(100, heads=True))
simple.split((2, 2, 2, 1, 2, 2, 2, 1), (2, 1))
narrow.split((2, 2, 2, 2, 1, 2, 2, 2, 2, 1), (2, 1, 1, 3))
narrow_hessian.split((2, 2, 2, 2, 1, 3, 1, 2, 1, 1, 2, 2, 2, 2, 1, 3, 1, 2, 1, 1), (2, 2, 2, 2, 1))
wide.split((1,) * 10, (1, 1, 1))
wide_both.split((1,) * 10, (1,) * 6)
wide_hessian.split((1,) * 16, (1,) * 5)
wide_backward_both.split((1,) * 16, (1,) * 10)
