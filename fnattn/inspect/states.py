"""Gradients through states: what later outputs owe to a state, and how far back a cache remembers.

For every family or model that streams: run(params, x, state) -> (out, state), as `attentions.apply` or `lm.apply` is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import attentions, tree
from ..core import check
from ._vectors import floating

# b batch, n positions of the call, m positions before it, e outputs per position


def state_jacobian(params: Any, x: Tensor, state: Any, *, apply: Callable = attentions.apply, chunk_size: int | None = None) -> Any:
    """d out / d state: a tree like the state whose leaves are [b, n, e, *leaf]; None for integers and bools.

    Time of b n e gradients: for small cases. Across sequences of the batch it is 0.

    Args:
        x: what comes after the state, [b, n, dim] (ids for a language model). chunk_size: rows of the Jacobian at a time.
    """
    leaves, rebuild = floating(state)

    def out(*new: Tensor) -> Tensor:
        return apply(params, x, rebuild(new))[0]

    jacobian = torch.func.jacrev(out, argnums=tuple(range(len(leaves))), chunk_size=chunk_size)(*leaves)
    return tree.map(lambda old, j: j if tree.is_differentiable(old) else None, state, rebuild(jacobian))


def state_influence(params: Any, x: Tensor, state: Any, *, apply: Callable = attentions.apply, chunk_size: int | None = None) -> Tensor:
    """How strongly each output after a state depends on it: the Frobenius norm of d out_t / d state, [b, n].

    Falls with t as fast as the state is forgotten. One backward pass per output number: b n e of them, chunk_size at a time.
    """
    leaves, rebuild = floating(state)
    out, pull = torch.func.vjp(lambda *new: apply(params, x, rebuild(new))[0], *leaves)
    rows = torch.eye(out.numel(), dtype=out.dtype, device=out.device).unflatten(1, out.shape)

    def one(cotangent: Tensor) -> Tensor:
        return sum(g.square().sum() for g in pull(cotangent))

    square = torch.vmap(one, chunk_size=chunk_size)(rows)
    return square.unflatten(0, out.shape).sum(-1).sqrt()


class Memory(NamedTuple):
    """How much the last output depends on each input before it."""

    norm: Tensor      # [b, m]: Frobenius norm of d out_last / d x_j
    distance: Tensor  # [m]: positions between x_j and the last one
    reach: Tensor     # [b]: the smallest distance within which `share` of the squared norms lies


def memory(params: Any, x: Tensor, *, apply: Callable | None = None, cut: int | None = None, share: float = 0.9,
           chunk_size: int | None = None) -> Memory:
    """How far back a cache remembers: the last output's Jacobian with respect to each earlier input, through the state.

    The sequence is read in two calls, up to `cut` and from there on, so that everything before the cut acts through the state
    alone; the result does not depend on where it is cut. e backward passes.

    Args:
        x: [b, m, dim], floating. For a language model give vectors: apply = a function of embedded tokens.
        apply: apply(params, x, state) -> (out, state), with the family's init_state; default the family's own.
        cut: how many positions go into the state; default all but the last.
    """
    length = x.shape[1]
    check(x.is_floating_point() and length >= 2, "inspect.memory: x must be floating [b, m, dim] with m >= 2; got {} {}.", x.dtype,
          list(x.shape), remedy="Embed tokens first.")
    cut = length - 1 if cut is None else cut
    run = attentions.apply if apply is None else apply
    start = attentions.init_state(params, x.shape[0], capacity=length)

    def last(x: Tensor) -> Tensor:
        _, state = run(params, x[:, :cut], start)
        return run(params, x[:, cut:], state)[0][:, -1]  # [b, e]

    out, pull = torch.func.vjp(last, x)
    rows = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)[:, None]

    def one(cotangent: Tensor) -> Tensor:
        return pull(cotangent.expand(out.shape))[0].square().sum(-1)

    square = torch.vmap(one, chunk_size=chunk_size)(rows).sum(0)  # [b, m]
    near = square.flip(1).cumsum(1)
    reach = (near >= share * near[:, -1:]).to(torch.int64).argmax(1)
    return Memory(square.sqrt(), torch.arange(length - 1, -1, -1, device=x.device), reach)
