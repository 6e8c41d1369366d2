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
from .call import address, function, threads

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


class SegmentOperators(NamedTuple):
    """The operators over one way to make lists; see `operators`."""

    attend: Operator
    backward: Operator
    tangent: Operator
    second: Operator


def _plain(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _call(name: str, lists: Lists, before: tuple, after: tuple, q: Tensor, v: Tensor, products: int, scale: float) -> None:
    """Calls the C function: tensors, lists, tensors (contiguous; None: a null pointer), sizes."""
    (b, h, n, d), (_, g, _, e) = q.shape, v.shape
    tensors = (*before, lists.group, lists.blocks, lists.tiles, lists.data, *after)
    work = b * h * lists.pairs * (d + e) * products // 2
    function("segment_attention", name, q.dtype, "p" * len(tensors) + "i" * 8 + "d")(
        *map(address, tensors), b, h, g, n, d, e, lists.blocks.shape[1], threads(work), scale)


def operators(name: str, lists: Callable[..., Lists]) -> SegmentOperators:
    """Operators for the patterns that lists(batch, heads, n, layout, pattern) understands.

    layout: Tensor or None, [b or 1, h or 1, nb, nb]; pattern: integers. Both reach `lists` when the kernel runs, so a traced
    program holds the pattern and not its lists.
    """

    def made(q: Tensor, layout: Tensor | None, pattern: list[int]) -> Lists:
        return lists(q.shape[0], q.shape[1], q.shape[2], layout, tuple(pattern))

    def attend(q, k, v, keep, layout, pattern, scale):
        q, k, v, keep = _plain(q, k, v, keep)
        out, lse = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype), torch.empty(q.shape[:3], dtype=q.dtype)
        _call("segment_attention", made(q, layout, pattern), (q, k, v, keep), (out, lse), q, v, 2, scale)
        return out, lse

    def backward(g, q, k, v, keep, out, lse, layout, pattern, scale):
        g, q, k, v, keep, out, lse = _plain(g, q, k, v, keep, out, lse)
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _call("segment_attention_backward", made(q, layout, pattern), (g, q, k, v, keep), (out, lse, *grads), q, v, 5, scale)
        return grads

    def tangent(q, k, v, keep, out, lse, tq, tk, tv, layout, pattern, scale):
        q, k, v, keep, out, lse, tq, tk, tv = _plain(q, k, v, keep, out, lse, tq, tk, tv)
        moved = torch.empty_like(out), torch.empty_like(lse)
        _call("segment_attention_tangent", made(q, layout, pattern), (q, k, v, keep), (out, lse, tq, tk, tv, *moved), q, v, 5,
              scale)
        return moved

    def second(g, q, k, v, keep, out, lse, t_out, t_lse, tg, tq, tk, tv, layout, pattern, scale):
        g, q, k, v, keep, *rest = _plain(g, q, k, v, keep, out, lse, t_out, t_lse, tg, tq, tk, tv)
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _call("segment_attention_second", made(q, layout, pattern), (g, q, k, v, keep), (*rest, *grads), q, v, 12, scale)
        return grads

    return declare(name, {"cpu": (attend, backward, tangent, second)})


def declare(name: str, functions: dict[str, tuple[Callable, ...]]) -> SegmentOperators:
    """The operators `name`, of which functions["cpu"] and ["cuda"] compute value, gradient, tangent and the gradient's tangent."""
    of = [{device: four[i] for device, four in functions.items()} for i in range(4)]
    rest = "Tensor? layout, SymInt[] pattern, float scale) -> "
    found = SegmentOperators(
        # out [b, h, n, e] and the scores' log-sum-exp [b, h, n] (0 for a row that sees nothing).
        Operator(name, 1, f"(Tensor q, Tensor k, Tensor v, Tensor? keep, {rest}(Tensor, Tensor)", **of[0],
                 fake=lambda q, k, v, *_: (q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1]))),
        # Gradients of q, k, v given g, that of out.
        Operator(f"{name}_backward", 1, "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor out, Tensor lse, "
                 f"{rest}(Tensor, Tensor, Tensor)", **of[1],
                 fake=lambda g, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))),
        # Tangents of out and lse given those of q, k, v.
        Operator(f"{name}_tangent", 1, "(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor out, Tensor lse, Tensor? tq, "
                 f"Tensor? tk, Tensor? tv, {rest}(Tensor, Tensor)", **of[2],
                 fake=lambda q, k, v, keep, out, lse, *_: (q.new_empty(out.shape), q.new_empty(lse.shape))),
        # Tangents of backward's gradients, given those of out and lse, and of g, q, k, v.
        Operator(f"{name}_second", 1, "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor out, Tensor lse, "
                 f"Tensor t_out, Tensor t_lse, Tensor? tg, Tensor? tq, Tensor? tk, Tensor? tv, {rest}"
                 "(Tensor, Tensor, Tensor)", **of[3],
                 fake=lambda g, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))))
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
