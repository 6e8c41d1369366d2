"""Data parallel training as pure functions: every process differentiates its part of a batch, and they average.

    part        = distributed.shard(batch)                                  rank r gets rows r n / world ... (r + 1) n / world
    loss, grads = distributed.value_and_grad(loss_of_params)(params, part)  the same on all processes
    updates, opt_state = optimizer.update(grads, opt_state, params)

Parameters stay whole on every process, as long as all start from the same ones (`broadcast` sends them round) and see the same
gradients. Average of what: of the losses of the parts, in proportion to `weight`, such as their numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..core import check, check_int
from . import collectives
from .collectives import rank, world_size

BUCKET = 1 << 25  # bytes: small leaves travel together, large ones do not have to be copied into one


def shard(batch: Any, axis: int = 0, group: Any = None) -> Any:
    """This process's part of every tensor of a tree along an axis, which must divide by the number of processes.

    Raises ValueError, naming the leaf, where it does not: a part of another size would need another weight.
    """
    check_int("distributed.shard", "axis", axis)
    world, here = world_size(group), rank(group)

    def part(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        check(-leaf.ndim <= axis < leaf.ndim, "distributed.shard: axis must be one of the {} axes of leaf {!r}; got {}.", leaf.ndim,
              name, axis, remedy="Count axes from 0.")
        check(leaf.shape[axis] % world == 0, "distributed.shard: axis {} of leaf {!r} must be a multiple of the {} processes; got {}.",
              axis, name, world, leaf.shape[axis], remedy="Pad the batch or drop its last rows.")
        return leaf.tensor_split(world, axis)[here]

    return tree.from_flat({name: part(name, leaf) for name, leaf in tree.to_flat(batch).items()}, batch)


def total(values: Any, group: Any = None) -> Any:
    """The sum over processes of every floating tensor of a tree; other leaves stay as they are. Small leaves travel together.

    Differentiable and mappable as `all_reduce`; needs a copy of about 32 MiB at a time.
    """
    items, form = tree.flatten(values)
    if world_size(group) == 1:
        return values
    out = list(items)
    for places in _buckets(items):
        flat = torch.cat([items[i].reshape(-1) for i in places]) if len(places) > 1 else items[places[0]]
        summed = collectives.all_reduce(flat, group)
        parts = summed.split([items[i].numel() for i in places]) if len(places) > 1 else [summed]
        for i, part in zip(places, parts):
            out[i] = part.reshape(items[i].shape)
    return tree.unflatten(out, form)


def mean(values: Any, weight: Tensor | float = 1.0, group: Any = None) -> Any:
    """The average over processes of every floating tensor of a tree, each process counting `weight` times."""
    if world_size(group) == 1:
        return values
    first = next((x for x in tree.leaves(values) if tree.is_differentiable(x)), None)
    if first is None:
        return values
    own = torch.as_tensor(weight, dtype=torch.float64 if first.dtype == torch.float64 else torch.float32, device=first.device)
    share = own / collectives.all_reduce(own, group)
    return total(tree.map(lambda x: x * share.to(x.dtype) if tree.is_differentiable(x) else x, values), group)


def broadcast(values: Any, source: int = 0, group: Any = None) -> Any:
    """A tree as process `source` has it, for all processes; the others bring one of the same structure and shapes."""
    return tree.map(lambda x: collectives.broadcast(x, source, group) if isinstance(x, Tensor) else x, values)


def value_and_grad(fn: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False, *,
                   weight: Callable[..., Any] | None = None, group: Any = None) -> Callable:
    """`tree.value_and_grad` of the average over processes of fn(*args), where each has its own part of the batch in args.

    Args:
        fn, argnums, has_aux: as there. What fn computes may itself gather from other processes, as `sequence` does.
        weight: weight(*args) -> how often this process counts, a number or 0-d tensor; for example its number of tokens where
            these differ. None: all alike.
    Returns:
        A function of the same arguments giving value and gradient, alike on all processes; aux is this process's own.
    """
    local = tree.value_and_grad(fn, argnums, has_aux)

    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        value, grads = local(*args, **kwargs)
        counts = 1.0 if weight is None else weight(*args, **kwargs)
        if not has_aux:
            return mean((value, grads), counts, group)
        loss, aux = value
        loss, grads = mean((loss, grads), counts, group)
        return (loss, aux), grads

    return wrapped


def _buckets(items: list) -> list[list[int]]:
    """Places of the floating tensors, those of one dtype and device in groups of up to BUCKET bytes."""
    full: list[list[int]] = []
    filling: dict[tuple, tuple[list[int], int]] = {}
    for i, x in enumerate(items):
        if not tree.is_differentiable(x):
            continue
        kind, size = (x.dtype, x.device), x.numel() * x.element_size()
        places, held = filling.get(kind, ([], 0))
        if places and held + size > BUCKET:
            full.append(places)
            places, held = [], 0
        filling[kind] = ([*places, i], held + size)
    return full + [places for places, _ in filling.values()]
