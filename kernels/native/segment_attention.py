"""Softmax attention driven by lists of the keys that each block of queries reads, on CPU; see csrc/segment_attention.c.

A pattern that is static, like a window in a picture or a layout of blocks, becomes lists once; the kernel then walks them for
every head, and touches no pair that its block does not need. Memory beyond the results is that of one block.

Measured in ms of one AVX-512 core, float32, 2 x 8 heads of width 64, 256 text positions and 32 x 32 pixels, value (value and
gradient), beside plain torch: window 10 (33) and 64 (204), rows or columns 10 (32) and 37 (102), 16-blocks of which 56 % are
there 13 (42) and 384 (954); tangent 29, 28, 38; Hessian-vector product of the window 120. The lists take 10 ms, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..contracts import Operator
from .call import address, function, merged, numbers, rows, threads

# b batch, h query heads, g key heads, n positions, d width of q and k, e width of v, G groups of blocks, c blocks in a group
SPAN = 32   # queries in a block
KEYS = 64   # most keys in a tile; KEYS in csrc/softmax_tile.h


class Lists(NamedTuple):
    """What the kernel walks, all int32 on CPU; csrc/segment_tile.h says what the numbers mean."""

    blocks: Tensor        # [G, c, 5] rows, positions, first tile, end of tiles, whether it ignores keep
    tiles: Tensor         # [t, 6] start, stride, count, half, index, mask
    data: Tensor          # [.] positions, indices, masks
    group: Tensor | None  # [b h] the group that each head reads; None: all read the first
    pairs: int            # scores of the largest group, for choosing the number of threads
    row: int              # keys in the tiles of the longest block


class SegmentOperators(NamedTuple):
    """The operators over one way to make lists; see `operators`."""

    attend: Operator
    backward: Operator
    tangent: Operator
    second: Operator


def _call(name: str, lists: Lists, keep: Tensor | None, tensors: tuple, q: Tensor, v: Tensor, products: int, scale: float) -> None:
    """Calls the C function; the layout of its arguments is that of segment_call in csrc/segment_tile.h."""
    (b, h, n, d), (_, g, _, e) = q.shape, v.shape
    keep = None if keep is None else keep.contiguous()
    given = [b, h, g, n, d, e, lists.blocks.shape[1], lists.row, threads(b * h * lists.pairs * (d + e) * products // 2)]
    given += [address(t) or 0 for t in (keep, lists.group, lists.blocks, lists.tiles, lists.data)]
    function("segment_attention", name, q.dtype, "pd")(numbers(given, tensors), scale)


def operators(name: str, lists: Callable[..., Lists]) -> SegmentOperators:
    """Operators for the patterns that lists(batch, heads, n, layout, pattern) understands.

    layout: Tensor or None, [b or 1, h or 1, nb, nb]; pattern: integers. Both reach `lists` when the kernel runs, so a traced
    program holds the pattern and not its lists.
    """

    def made(q: Tensor, layout: Tensor | None, pattern: list[int]) -> Lists:
        return lists(q.shape[0], q.shape[1], q.shape[2], layout, tuple(pattern))

    def attend(q, k, v, keep, layout, pattern, scale):
        q, k, v = rows(q, k, v)
        out, lse = merged(q, v.shape[3]), torch.empty(*q.shape[:3], dtype=torch.float64)
        _call("segment_attention", made(q, layout, pattern), keep, (q, k, v, out, lse), q, v, 2, scale)
        return out, lse

    def backward(g, q, k, v, keep, out, lse, layout, pattern, scale):
        g, q, k, v, out = rows(g, q, k, v, out)
        grads = tuple(merged(t, t.shape[3]) for t in (q, k, v))
        _call("segment_attention_backward", made(q, layout, pattern), keep, (g, q, k, v, out, lse, *grads), q, v, 5, scale)
        return grads

    def tangent(q, k, v, keep, out, lse, tq, tk, tv, layout, pattern, scale):
        q, k, v, out, tq, tk, tv = rows(q, k, v, out, tq, tk, tv)
        moved = merged(out, out.shape[3]), torch.empty(lse.shape, dtype=lse.dtype)
        _call("segment_attention_tangent", made(q, layout, pattern), keep, (q, k, v, out, lse, tq, tk, tv, *moved), q, v, 5, scale)
        return moved

    def second(g, q, k, v, keep, out, lse, t_out, t_lse, tg, tq, tk, tv, layout, pattern, scale):
        g, q, k, v, out, t_out, tg, tq, tk, tv = rows(g, q, k, v, out, t_out, tg, tq, tk, tv)
        grads = tuple(merged(t, t.shape[3]) for t in (q, k, v))
        _call("segment_attention_second", made(q, layout, pattern), keep,
              (g, q, k, v, out, lse, t_out, t_lse, tg, tq, tk, tv, *grads), q, v, 12, scale)
        return grads

    return declare(name, {"cpu": (attend, backward, tangent, second)}, merged, wide=True)


def _contiguous(like: Tensor, width: int) -> Tensor:
    return like.new_empty(*like.shape[:3], width)


def declare(name: str, functions: dict[str, tuple[Callable, ...]],
            result: Callable[[Tensor, int], Tensor] = _contiguous, wide: bool = False) -> SegmentOperators:
    """The operators `name`, of which functions["cpu"] and ["cuda"] compute value, gradient, tangent and the gradient's tangent.

    result(like, width): an empty [b, heads, n, width] as the functions lay out theirs, for tracing. wide: lse and its tangent are
    float64 whatever the arguments are, else as wide as they; see csrc/softmax_tile.h.
    """
    of = [{device: four[i] for device, four in functions.items()} for i in range(4)]
    def fake_level(like):
        return like.new_empty(like.shape[:3], dtype=torch.float64 if wide else like.dtype)

    rest = "Tensor? layout, SymInt[] pattern, float scale) -> "
    found = SegmentOperators(
        # out [b, h, n, e] and the scores' log-sum-exp [b, h, n] (0 for a row that sees nothing).
        Operator(name, 3, f"(Tensor q, Tensor k, Tensor v, Tensor? keep, {rest}(Tensor, Tensor)", **of[0],
                 fake=lambda q, k, v, *_: (result(q, v.shape[3]), fake_level(q))),
        # Gradients of q, k, v given g, that of out.
        Operator(f"{name}_backward", 3, "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor out, Tensor lse, "
                 f"{rest}(Tensor, Tensor, Tensor)", **of[1],
                 fake=lambda g, q, k, v, *_: tuple(result(t, t.shape[3]) for t in (q, k, v))),
        # Tangents of out and lse given those of q, k, v.
        Operator(f"{name}_tangent", 3, "(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor out, Tensor lse, Tensor? tq, "
                 f"Tensor? tk, Tensor? tv, {rest}(Tensor, Tensor)", **of[2],
                 fake=lambda q, k, v, keep, out, lse, *_: (result(out, out.shape[3]), fake_level(q))),
        # Tangents of backward's gradients, given those of out and lse, and of g, q, k, v.
        Operator(f"{name}_second", 3, "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor out, Tensor lse, "
                 f"Tensor t_out, Tensor t_lse, Tensor? tg, Tensor? tq, Tensor? tk, Tensor? tv, {rest}"
                 "(Tensor, Tensor, Tensor)", **of[3],
                 fake=lambda g, q, k, v, *_: tuple(result(t, t.shape[3]) for t in (q, k, v))))
    found.attend.flops(lambda q, k, v, *_, **__: _flops(2, q, v))
    found.backward.flops(lambda g, q, k, v, *_, **__: _flops(5, q, v))
    found.tangent.flops(lambda q, k, v, *_, **__: _flops(5, q, v))
    found.second.flops(lambda g, q, k, v, *_, **__: _flops(12, q, v))
    shared = (1,)  # a layout for all heads
    found.attend.split((1, 1, 1, None, shared), (1, 1))
    found.backward.split((1, 1, 1, 1, None, 1, 1, shared), (1, 1, 1))
    found.tangent.split((1, 1, 1, None, 1, 1, 1, 1, 1, shared), (1, 1))
    found.second.split((1, 1, 1, 1, None, *(1,) * 8, shared), (1, 1, 1))
    return found


def _flops(products: int, q, v) -> int:
    """`products` products of widths d and e together over all pairs of positions: an upper bound, for shapes alone are known."""
    return products * q[0] * q[1] * q[2] * q[2] * (q[3] + v[3])
