"""Sequences that are spread over processes, and operators that want whole ones: each process takes some of the heads instead.

    q, k, v [b, h, n / world, d]  --all_to_all-->  [b, h / world, n, d]  --operator-->  [b, h / world, n, e]  --all_to_all-->
    [b, h, n / world, e]

Works for every operator of `fnattn.ops` whose heads do not meet, with every derivative, since an exchange has every derivative.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core import check
from .collectives import all_to_all, world_size


def to_heads(t: Tensor, group: Any = None) -> Tensor:
    """[b, h, n / world, d] with all heads of some positions -> [b, h / world, n, d] with all positions of some heads."""
    _check("distributed.to_heads", t, 1, group)
    return all_to_all(t, split=1, join=2, group=group)


def to_positions(t: Tensor, group: Any = None) -> Tensor:
    """[b, h / world, n, d] with all positions of some heads -> [b, h, n / world, d] with all heads of some positions."""
    _check("distributed.to_positions", t, 2, group)
    return all_to_all(t, split=2, join=1, group=group)


def over_heads(operator: Callable[..., Tensor], group: Any = None) -> Callable[..., Tensor]:
    """The operator on sequences that are spread over processes.

    Args:
        operator: takes tensors [b, heads, n, ...], treats each head by itself, and returns one such tensor; for example
            `lambda q, k, v: ops.softmax_attention(q, k, v, causal=True)`.
    Returns:
        The same function of tensors [b, h, n / world, ...] on every process. Heads, those of keys too, must be a multiple of
        the number of processes: groups of query heads then stay with their key head.
    """
    def spread(*tensors: Tensor) -> Tensor:
        return to_positions(operator(*(to_heads(t, group) for t in tensors)), group)

    return spread


def _check(who: str, t: Tensor, axis: int, group: Any) -> None:
    check(t.ndim >= 3, "{}: expected [batch, heads, seq, ...]; got {}.", who, list(t.shape), remedy="Add the missing axes.")
    world = world_size(group)
    check(t.shape[axis] % world == 0, "{}: the {} must be a multiple of the {} processes; got {}.", who,
          "heads" if axis == 1 else "positions", world, t.shape[axis],
          remedy="Use fewer processes, or repeat key heads." if axis == 1 else "Pad the sequence.")
