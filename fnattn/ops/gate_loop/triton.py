"""The gated loops by Triton: derivatives of its operators, and how the public functions call them.

Gradients and tangents have kernels; what is beyond them is taken from the formulas in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fnattn_kernels.contracts import reference_vjp
from fnattn_kernels.forward_mode import reference_jvp
from fnattn_kernels.triton import gate_loop_channels as channels
from fnattn_kernels.triton import gate_loop_heads as heads
from fnattn_kernels.triton import scan as triton_scan
from torch import Tensor

from ..scan import before, complex_times
from . import backward, tangent


def _zeros(t: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if t is None else t


def _needed(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(grads, needs))


def _derive_from(operator, fn: Callable) -> None:
    """Derivatives of the second kind of operator: those of `fn`, the same in plain torch."""

    def jvp(args, outs, tangents):
        # A tangent must lie in memory like its value.
        return tuple(t.clone(memory_format=torch.contiguous_format) for t in reference_jvp(fn, args, tangents))

    operator.derive(vjp=lambda needs, args, outs, cotangents: reference_vjp(fn, needs, args, cotangents), jvp=jvp,
                    save_outputs=False)


# Marks and the product are functions of the other arguments and are computed anew where a derivative of these operators is
# taken: their own gradients are 0 there, and the marks' tangent is never read.

# ------------------------------------------------------------------------------------------------ one complex number per channel


def _narrow_vjp(needs, args, outs, cotangents):
    return _needed(channels.narrow_backward(*args, outs[3], outs[2], *cotangents[:3]), needs)


def _narrow_jvp(args, outs, tangents):
    out, last, logs = channels.narrow_tangent(*args, outs[3], *tangents)
    return out, last, complex_times(outs[2], logs), torch.zeros_like(outs[3])


def _narrow_backward_formula(q, k, v, a, h0, marks, product, g, g_last, g_product):
    state = a[:, 0]
    return backward.narrow(q, k, v, a, _zeros(h0, state), _zeros(g, q), _zeros(g_last, state), _zeros(g_product, state),
                           triton_scan.scan)


def _narrow_tangent_formula(q, k, v, a, h0, marks, *tangents):
    return tangent.narrow(q, k, v, a, h0, *tangents, triton_scan.scan)


channels.narrow.derive(vjp=_narrow_vjp, jvp=_narrow_jvp)
_derive_from(channels.narrow_backward, _narrow_backward_formula)
_derive_from(channels.narrow_tangent, _narrow_tangent_formula)


# ------------------------------------------------------------------------------------------------ one real number per channel


def _simple_vjp(needs, args, outs, cotangents):
    *tensors, reverse = args
    return *_needed(channels.simple_backward(*tensors, outs[2], *cotangents[:2], reverse), needs), None


def _simple_jvp(args, outs, tangents):
    *tensors, reverse = args
    return *channels.simple_tangent(*tensors, outs[2], *tangents[:4], reverse), torch.zeros_like(outs[2])


def _simple_backward_formula(q, kv, a, h0, marks, g, g_last, reverse):
    gate = torch.sigmoid(a)
    h = triton_scan.scan(gate, kv, h0, reverse, False, False, False)
    g = _zeros(g, q)
    read = q * g
    if g_last is not None:
        last = (read[:, 0 if reverse else -1] + g_last)[:, None]
        read = torch.cat((last, read[:, 1:]) if reverse else (read[:, :-1], last), 1)
    total = triton_scan.scan(gate, read, None, not reverse, False, True, False)  # gradient of h_t from here and from later
    start = -1 if reverse else 0
    return g * h, total, total * before(h, 1, h0, reverse) * gate * (1 - gate), gate[:, start] * total[:, start]


def _simple_tangent_formula(q, kv, a, h0, marks, tq, tkv, ta, th0, reverse):
    gate = torch.sigmoid(a)
    h = triton_scan.scan(gate, kv, h0, reverse, False, False, False)
    push = _zeros(tkv, kv)
    if ta is not None:
        push = push + ta * gate * (1 - gate) * before(h, 1, h0, reverse)
    th = triton_scan.scan(gate, push, th0, reverse, False, False, False)
    return q * th if tq is None else q * th + tq * h, th[:, 0 if reverse else -1]


channels.simple.derive(vjp=_simple_vjp, jvp=_simple_jvp)
_derive_from(channels.simple_backward, _simple_backward_formula)
_derive_from(channels.simple_tangent, _simple_tangent_formula)


# ------------------------------------------------------------------------------------------------ a complex number per head


def _wide_vjp(needs, args, outs, cotangents):
    return _needed(heads.wide_backward(*args, *cotangents), needs)


def _wide_jvp(args, outs, tangents):
    out, last, logs = heads.wide_tangent(*args, *tangents)
    return out, last, complex_times(outs[2], logs)


def _wide_backward_formula(q, k, v, a, h0, g, g_last, g_product):
    outer = q[:, :, 0, :, None, None] * v[:, :, 0, None, :, None]
    state = torch.cat((outer, outer), -1)
    return backward.wide(q, k, v, a, _zeros(h0, state), _zeros(g, v), _zeros(g_last, state), _zeros(g_product, a[:, :, 0]))


heads.wide.derive(vjp=_wide_vjp, jvp=_wide_jvp)
_derive_from(heads.wide_backward, _wide_backward_formula)
_derive_from(heads.wide_tangent, tangent.wide)
