"""Attention over static segments of keys in C and by Triton, as conv_attention, axial_attention and block_sparse_attention use it.

Value, gradient, tangent, and the tangent of the gradient are fused, by the rules of dense attention (`_softmax_rules`); further
derivatives are those of its formulas under the pattern's mask of positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from fnattn_kernels import flex
from fnattn_kernels.native import segment_attention as native
from fnattn_kernels.triton import segment_attention as triton
from torch import Tensor

from . import _segment_tiles, _segments
from . import _softmax_rules as rules
from ._door import Kernel, native_reason

NATIVE = native.operators("segment_attention_native", _segments.lists)
TRITON = triton.operators("segment_attention_triton", _segment_tiles.walk)


# ------------------------------------------------------------------------------------------------ formulas


def _mask(q: Tensor, keep: Tensor | None, layout: Tensor | None, pattern) -> Tensor:
    return _segments.table(tuple(pattern), layout, keep, q.shape[2], q.device)


def _of_backward(g, q, k, v, keep, out, lse, layout, pattern, scale, g_lse=None):
    return rules.backward_formula(g, q, k, v, _mask(q, keep, layout, pattern), out, lse, None, scale, g_lse)


def _of_tangent(q, k, v, keep, *others):
    *results_and_moves, layout, pattern, scale = others
    return rules.tangent_formula(q, k, v, _mask(q, keep, layout, pattern), *results_and_moves, None, scale)


def _of_second(g, q, k, v, keep, *others):
    *results_and_moves, layout, pattern, scale = others
    return rules.second_formula(g, q, k, v, _mask(q, keep, layout, pattern), *results_and_moves, None, scale)


# ------------------------------------------------------------------------------------------------ rules

SEGMENTS = rules.Kind(_of_backward, _of_tangent, _of_second, shared=(4, 7, 9, 13))  # the layout
for _ops in (NATIVE, TRITON):
    rules.derive(*_ops, kind=SEGMENTS)
rules.derive_value(flex.attend, TRITON.backward, TRITON.tangent, SEGMENTS)


# ------------------------------------------------------------------------------------------------ kernels of three operators


def _native_reason(q: Tensor, k: Tensor, v: Tensor, *_) -> str | None:
    return native_reason("segment_attention", q, k, v)


def _triton_reason(q: Tensor, k: Tensor, v: Tensor, *_) -> str | None:
    return triton.why_not(q, k, v)


def _flex_reason(q: Tensor, k: Tensor, v: Tensor, *_) -> str | None:
    return flex.why_not(q, k, v)


def conv(attend, q, k, v, mask, text_len, image_size, kernel_size, dilation, scale, text_sees_all, *_):
    """The result of `conv_attention` by one of the operators above."""
    return attend(q, k, v, mask, None, _segments.conv(text_len, image_size, kernel_size, dilation, text_sees_all), scale)[0]


def axial(attend, q, k, v, mask, text_len, image_size, axis, scale, text_sees_all, *_):
    """The result of `axial_attention` by one of the operators above."""
    return attend(q, k, v, mask, None, _segments.axial(text_len, image_size, axis, text_sees_all), scale)[0]


def blocks(attend, q, k, v, layout, block, causal, keep, scale):
    """The result of `block_sparse_attention` by one of the operators above."""
    return attend(q, k, v, keep, layout[None], _segments.blocks(block, causal), scale)[0]


def kernels(run: Callable) -> tuple[Kernel, Kernel]:
    """"native" and "triton" of the operator that run(attend, ...) computes."""
    return (Kernel("native", functools.partial(run, NATIVE.attend), _native_reason),
            Kernel("triton", functools.partial(run, TRITON.attend), _triton_reason))


FLEX = Kernel("flex", functools.partial(blocks, flex.attend), _flex_reason)
