"""What processes exchange, as pure functions with every derivative.

Each is linear, so that forward mode is the same exchange of tangents, and reverse mode the transposed one: `all_gather` and
`reduce_scatter` are each other's, `all_to_all` and `all_reduce` their own. What is differentiated is always the sum of what all
processes compute: a gradient of something that all of them hold alike, such as parameters, comes out in parts, which
`data_parallel.total` adds.

All processes of a group must make the same calls in the same order, derivatives and `vmap` included. They do if they run one
program on tensors of one shape, and if what one of them makes of a result depends on it on all others too: take a part by
torch.where, not by an if.

Without torch.distributed, or before its init_process_group, there is one process, and these change nothing but shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from fnattn_kernels import collectives as kernels
from torch import Tensor

from ..core import check, check_int, kind_of


def _gather_vjp(needs, args, outs, cotangents):
    return kernels.scatter(cotangents[0], args[2]), None, None


def _scatter_vjp(needs, args, outs, cotangents):
    return kernels.gather(cotangents[0], args[0].shape[1], args[1]), None


def _own_vjp(operator):
    return lambda needs, args, outs, cotangents: (operator(cotangents[0], args[1]), None)


def _same(operator):
    """A linear operator's tangent: itself of the tangent."""
    return lambda args, outs, tangents: operator(tangents[0], *args[1:])


kernels.gather.derive(vjp=_gather_vjp, jvp=_same(kernels.gather), save_outputs=False)
kernels.scatter.derive(vjp=_scatter_vjp, jvp=_same(kernels.scatter), save_outputs=False)
kernels.exchange.derive(vjp=_own_vjp(kernels.exchange), jvp=_same(kernels.exchange), save_outputs=False)
kernels.add.derive(vjp=_own_vjp(kernels.add), jvp=_same(kernels.add), save_outputs=False)


def _group(group: Any) -> Any:
    """The group, given by itself or by name, that of all processes for None; None if there is no other process."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized():
        return None
    if group is None:
        return dist.group.WORLD
    found = kernels.resolve(group) if isinstance(group, str) else group
    check(dist.get_rank(found) >= 0, "fnattn.distributed: this process must be in the group; it is process {} of all, and not in {!r}.",
          dist.get_rank(), group, remedy="Call it on the group's processes only, or leave group out.")
    return found


def world_size(group: Any = None) -> int:
    """Number of processes in the group; 1 without torch.distributed."""
    group = _group(group)
    return 1 if group is None else torch.distributed.get_world_size(group)


def rank(group: Any = None) -> int:
    """Number of this process in the group, from 0."""
    group = _group(group)
    return 0 if group is None else torch.distributed.get_rank(group)


def all_gather(x: Tensor, axis: int = 0, group: Any = None) -> Tensor:
    """What all processes brought, one after the other along an axis: x [..., n, ...] -> [..., world n, ...].

    Args:
        x: the same shape and dtype on every process; bools and whole numbers too.
        axis: where they are joined.
        group: of torch.distributed; None is that of all processes.
    Cost: world times x is received. Transposed: `reduce_scatter`.
    """
    axis = _axis("all_gather", x, axis)
    world = world_size(group)
    if world == 1:
        return x
    sent = x.to(torch.uint8) if x.dtype == torch.bool else x
    out = kernels.gather(sent.unsqueeze(0), world, _group(group).group_name)
    return out.squeeze(0).movedim(0, axis).flatten(axis, axis + 1).to(x.dtype)


def reduce_scatter(x: Tensor, axis: int = 0, group: Any = None) -> Tensor:
    """The sum over processes, of which each keeps its part along an axis: x [..., world n, ...] -> [..., n, ...].

    Args and cost as for `all_gather`, which is its transposed; numbers of 16 bits are added in float32.
    Raises ValueError where the axis cannot be cut into as many parts as there are processes.
    """
    axis = _axis("reduce_scatter", x, axis)
    world = world_size(group)
    parts = _parts("reduce_scatter", x, axis, world)
    return x if world == 1 else kernels.scatter(parts.unsqueeze(0), _group(group).group_name).squeeze(0)


def all_to_all(x: Tensor, split: int, join: int, group: Any = None) -> Tensor:
    """Part r of each x along `split` goes to process r, which joins what it got along `join`; a transposition across processes.

    x [..., world n, ..., m, ...] -> [..., n, ..., world m, ...]. Cost: x is sent and received. Transposed: itself with
    split and join swapped.
    """
    split, join = _axis("all_to_all", x, split), _axis("all_to_all", x, join)
    world = world_size(group)
    parts = _parts("all_to_all", x, split, world)
    if world == 1:
        return x
    got = kernels.exchange(parts.unsqueeze(0), _group(group).group_name).squeeze(0)
    return got.movedim(0, join).flatten(join, join + 1)


def all_reduce(x: Tensor, group: Any = None) -> Tensor:
    """The sum over processes, for all of them. Cost: x is sent and received twice. Transposed: itself.

    Numbers of 16 bits are added in float32.
    """
    _tensor("all_reduce", x)
    return x if world_size(group) == 1 else kernels.add(x.unsqueeze(0), _group(group).group_name).squeeze(0)


def broadcast(x: Tensor, source: int = 0, group: Any = None) -> Tensor:
    """What process `source` brought, for all of them; the others bring a tensor of the same shape. Cost as `all_reduce`."""
    _tensor("broadcast", x)
    check_int("broadcast", "source", source)
    check(0 <= source < world_size(group), "broadcast: source must be a process in [0, {}); got {}.", world_size(group), source,
          remedy="Count processes from 0.")
    own = torch.full((), rank(group) == source, device=x.device)
    if x.dtype == torch.bool:
        return broadcast(x.to(torch.uint8), source, group).bool()
    return all_reduce(torch.where(own, x, torch.zeros_like(x)), group)


def _tensor(who: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{who}: x must be a tensor; got {kind_of(x)}.\n  Convert it: torch.as_tensor(x).")


def _axis(who: str, x: Tensor, axis: int) -> int:
    _tensor(who, x)
    check_int(who, "axis", axis)
    check(-x.ndim <= axis < x.ndim, "{}: axis must be one of the {} axes of x; got {}.", who, x.ndim, axis,
          remedy="Count axes from 0.")
    return axis % x.ndim


def _parts(who: str, x: Tensor, axis: int, world: int) -> Tensor:
    """x [..., world n, ...] as [world, ..., n, ...]."""
    n = x.shape[axis]
    check(n % world == 0, "{}: axis {} must be a multiple of the {} processes; got {}.", who, axis, world, n,
          remedy="Pad it, or use fewer processes.")
    return x.unflatten(axis, (world, n // world)).movedim(axis, 0)
