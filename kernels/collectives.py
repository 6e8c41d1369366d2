"""What processes of a group exchange, as operators: pure functions of what every process brings.

Each has a leading batch axis, into which vmap folds its own, and names the group by a string, which traced programs can hold.
Processes must call the same operators in the same order, as with torch.distributed itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .contracts import Operator

_HALVES = (torch.bfloat16, torch.float16)


def resolve(name: str) -> Any:
    """The group of this name."""
    import torch.distributed as dist

    return dist.distributed_c10d._resolve_process_group(name)


def _call(name: str, out: Tensor, sent: Tensor, group: str) -> None:
    """A function of torch.distributed by its newer name, or the one of torch 2.11."""
    import torch.distributed as dist

    old = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}
    (getattr(dist, name, None) or getattr(dist, old[name]))(out, sent, group=resolve(group))


def _gather(x: Tensor, world: int, group: str) -> Tensor:
    out = x.new_empty(world, *x.shape)
    if x.numel():
        _call("all_gather_single", out.flatten(0, 1), x.contiguous(), group)
    return out.transpose(0, 1).contiguous()


def _gather_fake(x: Tensor, world: int, group: str) -> Tensor:
    return x.new_empty(x.shape[0], world, *x.shape[1:])


def _scatter(x: Tensor, group: str) -> Tensor:
    wide = x.float() if x.dtype in _HALVES else x
    out = wide.new_empty(x.shape[0], *x.shape[2:])
    if out.numel():
        _call("reduce_scatter_single", out, wide.transpose(0, 1).contiguous().flatten(0, 1), group)
    return out.to(x.dtype)


def _scatter_fake(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[0], *x.shape[2:])


def _exchange(x: Tensor, group: str) -> Tensor:
    import torch.distributed as dist

    sent = x.transpose(0, 1).contiguous()
    out = torch.empty_like(sent)
    if x.numel():
        dist.all_to_all_single(out, sent, group=resolve(group))
    return out.transpose(0, 1).contiguous()


def _exchange_fake(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _add(x: Tensor, group: str) -> Tensor:
    import torch.distributed as dist

    out = x.to(torch.float32 if x.dtype in _HALVES else x.dtype, copy=True, memory_format=torch.contiguous_format)
    if x.numel():
        dist.all_reduce(out, group=resolve(group))
    return out.to(x.dtype)


def _add_fake(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


# [b, ...] -> [b, world, ...]: what each process brought.
gather = Operator("collective_gather", 1, "(Tensor x, int world, str group) -> Tensor", fake=_gather_fake, any_device=_gather,
                  autocast=None)
# [b, world, ...] -> [b, ...]: the sum over processes of what they brought for this one. Halves are added in float32.
scatter = Operator("collective_scatter", 1, "(Tensor x, str group) -> Tensor", fake=_scatter_fake, any_device=_scatter, autocast=None)
# [b, world, ...] -> the same: entry s is what process s brought for this one.
exchange = Operator("collective_exchange", 1, "(Tensor x, str group) -> Tensor", fake=_exchange_fake, any_device=_exchange,
                    autocast=None)
# [b, ...] -> the same: the sum over processes.
add = Operator("collective_add", 1, "(Tensor x, str group) -> Tensor", fake=_add_fake, any_device=_add, autocast=None)
for operator in (gather, scatter, exchange, add):
    operator.flops(lambda *shapes, **options: 0)
