"""What each of two processes does with DTensor; see test_sharding.py."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_calls import CALLS, Call
from torch import Tensor

PLACES = ("batch", "heads", "sequence")  # the axes 0, 1, 2 of every argument that has them


def work(rank: int, world: int, folder: str) -> None:
    """Writes, per call, place and transform, the largest error, or the refusal; and what tangents of plain torch do."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    found = {name: one(call, mesh) for name, call in CALLS.items()}
    found["plain torch"] = one(Call(torch.sin, ((2, 4),)), mesh)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def one(call: Call, mesh) -> dict[str, dict[str, float | str]]:
    """Place -> transform -> error relative to one process."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    moving, others = call.tensors()
    truths = {name: fn(call, moving, others) for name, fn in TRANSFORMS.items()}
    found: dict[str, dict[str, float | str]] = {}
    for at, place in enumerate(PLACES):
        def spread(t: Tensor, given: bool = True, at=at):
            return distribute_tensor(t, mesh, [Shard(at) if given and at < min(t.ndim, 3) else Replicate()])

        found[place] = {}
        for name, fn in TRANSFORMS.items():
            if at and fn is not backward:
                continue
            try:
                result = fn(call, [spread(t) for t in moving], tuple(spread(t, False) for t in others))
                errors = [float((r.full_tensor() - t).abs().max() / t.abs().max()) for r, t in zip(result, truths[name], strict=True)]
                found[place][name] = max(errors)
            except Exception as error:
                found[place][name] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


def backward(call: Call, moving: list, others: tuple) -> list:
    """The value, and gradients by .backward()."""
    moving = [t.detach().requires_grad_() for t in moving]
    out = call.run(*moving, *others)
    out.sin().sum().backward()
    return [out, *(t.grad for t in moving)]


def grad(call: Call, moving: list, others: tuple) -> list:
    """Gradients by torch.func.grad."""
    return list(torch.func.grad(lambda *x: call.run(*x, *others).sin().sum(), tuple(range(len(moving))))(*moving))


def jvp(call: Call, moving: list, others: tuple) -> list:
    """The tangent."""
    return [torch.func.jvp(lambda *x: call.run(*x, *others), tuple(moving), tuple(t.cos() for t in moving))[1]]


TRANSFORMS = {fn.__name__: fn for fn in (backward, grad, jvp)}
