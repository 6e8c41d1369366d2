"""Running totals under any associative operation, for recurrences that no kernel knows.

Source: Blelloch 1990, "Prefix sums and their applications"; the interface of jax.lax.associative_scan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import tree


def associative_scan(op: Callable[[Any, Any], Any], elems: Any, *, reverse: bool = False, axis: int = 1) -> Any:
    """All running totals of `elems` under any associative operation.

        out_t = op(... op(op(e_0, e_1), e_2) ..., e_t)          (from the last element down to t if reverse)

    Takes n - 1 to 2 n applications of op to single elements, in about 2 log2(n) calls.

    Args:
        op: op(earlier, later) -> total; maps two trees like `elems` to one, position by position along `axis`, for any
            number of positions. With reverse, "earlier" are the elements nearer to the end.
        elems: a tree of tensors with one common length of at least 1 along `axis`.
    Returns:
        A tree like `elems`.
    Raises:
        ValueError: no tensor, or lengths that differ or are 0.

    Plain torch around op: every transform that op supports works.
    """
    flat, structure = tree.flatten(elems)
    lengths = sorted({t.shape[axis] for t in flat})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(f"associative_scan: expected tensors with one length >= 1 along axis {axis}; got lengths {lengths}.\n"
                         f"  Give every leaf the same number of positions.")
    if reverse:
        flat = [t.flip(axis) for t in flat]

    def combine(earlier: list, later: list) -> list:
        return tree.leaves(op(tree.unflatten(earlier, structure), tree.unflatten(later, structure)))

    flat = _pairwise(combine, flat, axis)
    if reverse:
        flat = [t.flip(axis) for t in flat]
    return tree.unflatten(flat, structure)


def _pairwise(combine: Callable, flat: list[Tensor], axis: int) -> list[Tensor]:
    """Totals of neighbouring pairs, scanned, are the totals at odd positions; one more step each gives the even ones."""
    n = flat[0].shape[axis]
    if n == 1:
        return flat

    def part(ts: list[Tensor], start: int, stop: int, step: int) -> list[Tensor]:
        return [t.movedim(axis, 0)[start:stop:step].movedim(0, axis) for t in ts]

    odd = _pairwise(combine, combine(part(flat, 0, n - 1, 2), part(flat, 1, n, 2)), axis)
    first = [t.narrow(axis, 0, 1) for t in flat]
    if n == 2:
        return [torch.cat(ts, axis) for ts in zip(first, odd)]
    inner = combine([t.narrow(axis, 0, (n - 1) // 2) for t in odd], part(flat, 2, n, 2))
    even = [torch.cat(ts, axis) for ts in zip(first, inner)]
    return [_interleave(e, o, axis) for e, o in zip(even, odd)]


def _interleave(even: Tensor, odd: Tensor, axis: int) -> Tensor:
    axis %= even.ndim
    count = odd.shape[axis]
    mixed = torch.stack((even.narrow(axis, 0, count), odd), axis + 1).flatten(axis, axis + 1)
    return mixed if even.shape[axis] == count else torch.cat((mixed, even.narrow(axis, count, 1)), axis)
