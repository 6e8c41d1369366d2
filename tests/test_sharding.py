"""Operators whose arguments DTensor splits over devices: never other numbers than one device gives."""

from __future__ import annotations

import json

import pytest
import spawned
import torch
from fnattn_kernels import contracts, sharding
from sharded_calls import CALLS
from sharded_worker import PLACES, work
from torch.utils._python_dispatch import TorchDispatchMode
from versions import OLD


class Record(TorchDispatchMode):
    """Keeps what every Operator was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == contracts.NAMESPACE:
            self.calls.append((func, [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def recorded():
    """Every (Operator, arguments) of values, gradients, tangents and Hessian-vector products."""
    calls = []
    for call in CALLS.values():
        moving, others = call.tensors()
        at, along = tuple(range(len(moving))), tuple(t.cos() for t in moving)

        def run(*x, call=call, others=others):
            return call.run(*x, *others)

        def slope(*x, run=run, at=at):
            return torch.func.grad(lambda *y: run(*y).sin().sum(), at)(*x)

        with Record() as record:
            run(*moving), slope(*moving)
            torch.func.grad(lambda *x, slope=slope: sum(t.square().sum() for t in slope(*x)), at)(*moving)
            torch.func.jvp(slope, tuple(moving), along)
            torch.func.jvp(run, tuple(moving), along)
        calls += record.calls
    by_op = {operator.op: operator for operator in contracts.OPERATORS}
    return [(by_op[func], args) for func, args in calls]


def whole_and_parts(operator, args, split):
    """Results at once, and those of two halves joined as the rule says; None where the rule does not apply."""
    tensors = sharding.tensor_arguments(operator)
    found = sharding.resolve(split, [None if args[i] is None else args[i].shape for i in tensors], 2)
    if found is None:
        return None
    halves = []
    for half in range(2):
        part = list(args)
        for i, axis in zip(tensors, found.arguments):
            if axis is not None and args[i] is not None:
                part[i] = args[i].chunk(2, axis)[half]
        out = operator.op(*part)
        halves.append(out if isinstance(out, tuple) else (out,))
    whole = operator.op(*args)
    joined = [a + b if axis == sharding.PARTIAL else torch.cat((a, b), axis) for axis, a, b in zip(found.results, *halves)]
    return whole if isinstance(whole, tuple) else (whole,), joined


def test_halves_of_every_operator_are_halves_of_the_whole(recorded, poisoned_empty):
    """Each rule by itself; entries of saved states that nobody reads are NaN on both sides."""
    seen = set()
    for operator, args in recorded:
        for at, split in enumerate(sharding.splits(operator)):
            both = whole_and_parts(operator, args, split)
            if both is not None:
                seen.add((operator.name, at))
                for whole, joined in zip(*both):
                    torch.testing.assert_close(joined, whole, rtol=1e-12, atol=1e-12, equal_nan=True, msg=f"{operator} {split}")
    native = {operator for operator in contracts.OPERATORS if "native" in operator.name and "random" not in operator.name}
    assert {operator.name for operator, _ in recorded} == {operator.name for operator in native}
    assert seen == {(operator.name, at) for operator in native for at in range(len(sharding.splits(operator)))}


def test_every_operator_declares_as_many_axes_as_it_has_tensors():
    for operator in contracts.OPERATORS:
        for split in sharding.splits(operator):
            assert len(split.arguments) == len(sharding.tensor_arguments(operator)), operator
            assert len(split.results) == sharding.count_results(operator), operator


def test_groups_of_heads_are_never_torn_apart():
    split = sharding.Split((1, 1, (1,)), (1,))
    q, mask = (2, 4, 5, 3), (1, 1, 5, 5)
    assert sharding.resolve(split, [q, (2, 2, 5, 3), mask], 2) == sharding.Split((1, 1, None), (1,))
    assert sharding.resolve(split, [q, (2, 1, 5, 3), mask], 2) is None  # one key head for all
    assert sharding.resolve(split, [q, (2, 2, 5, 3), mask], 4) is None
    assert sharding.resolve(split, [(2, 3, 5, 3)] * 2 + [mask], 2) is None
    assert sharding.resolve(split, [q, q, None], 4) == sharding.Split((1, 1, None), (1,))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes found; see sharded_worker."""
    folder = tmp_path_factory.mktemp("sharding")
    spawned.run(work, 2, 2, str(folder))
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", CALLS)
def test_two_processes_give_the_numbers_of_one(found, name):
    for place in PLACES:
        for transform in ("backward", "grad") if place == "batch" else ("backward",):
            error = found[name][place][transform]
            if OLD and place != "batch" and "Attempted to" in str(error) and "sharded" in str(error):
                continue  # newer versions gather such an axis by themselves
            assert isinstance(error, float) and error < 1e-10, (place, transform, error)


@pytest.mark.parametrize("name", [*CALLS, "plain torch"])
def test_tangents_of_dtensors_are_refused_as_by_torch_itself_or_right(found, name):
    error = found[name]["batch"]["jvp"]
    assert error < 1e-10 if isinstance(error, float) else "does not have a sharding strategy registered" in error and "aten" in error
