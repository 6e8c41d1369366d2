"""How DTensor may split the arguments of an Operator over devices: along the batch, and along axes that operators declare.

Without a rule DTensor refuses an operator that it does not know. An argument that is split in another way is first brought
into one that a rule allows, so that no result depends on how its arguments were laid out.

The rules reach DTensor when the first DTensor reaches an Operator; importing DTensor takes a second that few need. Only under
torch.inference_mode, which bypasses what Operators do before they compute, `register_sharding` has to be called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

PARTIAL = "sum"  # of a result: each device holds a part of a sum
_PENDING: list[Any] = []
_MODULE = "torch.distributed.tensor"
# An axis; (axis,) is one that is shared by all where its size is 1; None: not split.
Axis = int | tuple[int] | str | None


class Split(NamedTuple):
    """One way to split an operator: an axis for each tensor argument, in the order of the schema, and for each result."""

    arguments: tuple[Axis, ...]
    results: tuple[Axis, ...]


def add(operator: Any) -> None:
    """Remembers an operator until DTensor is there."""
    _PENDING.append(operator)


def on_first_use(args: Sequence[Any]) -> None:
    """Registers all operators if one of the arguments is a DTensor."""
    module = sys.modules.get(_MODULE) if _PENDING else None
    if module is not None and any(isinstance(a, getattr(module, "DTensor", ())) for a in args):
        register_sharding()


def register_sharding() -> None:
    """Lets DTensor split every Operator."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding as register

    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    while _PENDING:
        operator = _PENDING.pop()
        register(operator.op)(_rule(operator))
        # DTensor remembers its decisions, and the shapes of results, by the arguments that it is told to look at: by
        # default not by which optional tensor is missing, nor by sizes and flags. All of them matter here.
        known[operator.op] = replace(known[operator.op], static_argnum=0)


def _rule(operator: Any):
    def rule(*args):
        from torch.distributed.tensor import Partial, Replicate, Shard

        tensors = tensor_arguments(operator)
        shapes = [getattr(args[i], "shape", None) for i in tensors]
        devices = next(a.mesh.size() for a in args if hasattr(a, "mesh"))

        def given(axes):
            found = [None] * len(args)
            for i, shape, axis in zip(tensors, shapes, axes):
                found[i] = None if shape is None else Replicate() if axis is None else Shard(axis)
            return found

        def results(axes):
            return [Replicate() if axis is None else Partial() if axis == PARTIAL else Shard(axis) for axis in axes]

        everywhere = Split((None,) * len(tensors), (None,) * count_results(operator))
        ways = [everywhere, *(way for way in map(lambda s: resolve(s, shapes, devices), splits(operator)) if way is not None)]
        return [(results(way.results), given(way.arguments)) for way in ways]

    return rule


def tensor_arguments(operator: Any) -> list[int]:
    """Positions of the arguments that are tensors, or may be."""
    return [i for i, a in enumerate(operator.op._schema.arguments) if "Tensor" in str(a.type)]


def count_results(operator: Any) -> int:
    """How many tensors it returns."""
    return len(operator.op._schema.returns)


def splits(operator: Any) -> list[Split]:
    """Every way to split an operator: along the batch, and as declared."""
    batch = Split(((0,),) * len(tensor_arguments(operator)), (0,) * count_results(operator))
    return [batch, *operator.splits]


def resolve(split: Split, shapes: Sequence[Sequence[int] | None], devices: int) -> Split | None:
    """The split with shared axes taken out, for tensors of these shapes (None: not there); None where it is not possible.

    The first tensor argument has the full size of the axis. Others, such as groups of heads, may have another: each device
    gets whole groups only if all sizes are multiples of the number of devices.
    """
    axes: list[Axis] = []
    sizes = []
    for axis, shape in zip(split.arguments, shapes, strict=True):
        at = axis[0] if isinstance(axis, tuple) else axis
        if shape is None or at is None or isinstance(axis, tuple) and shape[at] == 1:
            axes.append(None)
        else:
            axes.append(at)
            sizes.append(shape[at])
    if not sizes or axes[0] is None or any(size % devices or size == 0 for size in sizes):
        return None
    return Split(tuple(axes), split.results)
