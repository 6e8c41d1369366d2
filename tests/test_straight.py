"""Which calls of an Operator go straight to the function that computes, past the dispatcher: those that nothing watches."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.autograd.forward_ad as fwad
from fnattn_kernels import contracts
from fnattn_kernels.contracts import Operator, recording
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DISPATCHED = []


def note(x, y, factor):
    DISPATCHED.append(torch._C._dispatch_tls_local_exclude_set().has(torch._C._dispatch_key_parse("ADInplaceOrView")))
    return x + (0 if y is None else y) * factor


scaled = Operator("tests_straight", 1, "(Tensor x, Tensor? y, float factor) -> Tensor", cpu=note,
                  fake=lambda x, y, factor: x.new_empty(x.shape))
scaled.derive(vjp=lambda needs, args, outs, cotangents: (cotangents[0], None, None), jvp=lambda args, outs, tangents: tangents[0])
contracts.OPERATORS.remove(scaled)  # other tests ask all of them about FLOPs and splits


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Listening(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


def x():
    return torch.arange(3.0)


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_plain_tensors_go_straight(context):
    with context():
        assert scaled.straight((x(), None, 2.0)) is note
        assert scaled.straight((x(), x(), 2.0)) is note
        torch.testing.assert_close(scaled(x(), x(), 2.0), 3 * x())
    assert DISPATCHED[-1]  # as below the dispatcher: a view of the function's own memory is not a view to autograd


def test_a_parameter_does_where_gradients_are_off():
    with torch.no_grad():
        assert scaled.straight((torch.nn.Parameter(x()), None, 2.0)) is note


@pytest.mark.parametrize("watched", [
    pytest.param(lambda: (contextlib.nullcontext(), x().requires_grad_()), id="requires grad"),
    pytest.param(lambda: (contextlib.nullcontext(), torch.nn.Parameter(x())), id="parameter"),
    pytest.param(lambda: (contextlib.nullcontext(), x().as_subclass(Own)), id="subclass"),
    pytest.param(lambda: (contextlib.nullcontext(), x().to("meta")), id="meta"),
    pytest.param(lambda: (contextlib.nullcontext(), x().to(torch.complex64).conj().imag), id="negated view"),
    pytest.param(lambda: (torch.autocast("cpu"), x()), id="autocast"),
    pytest.param(lambda: (Watching(), x()), id="dispatch mode"),
    pytest.param(lambda: (Listening(), x()), id="function mode"),
    pytest.param(lambda: (fwad.dual_level(), x()), id="forward mode"),
    pytest.param(lambda: (recording(), x()), id="recording"),
    pytest.param(lambda: (torch.profiler.profile(acc_events=True), x()), id="profiler"),
])
def test_what_somebody_watches_does_not(watched):
    context, argument = watched()
    with context:
        assert scaled.straight((argument, None, 2.0)) is None


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: torch.vmap(f)(x[None]),
                                       lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), torch.func.functionalize])
def test_no_transform_is_passed_by(transform):
    seen = []

    def fn(x):
        seen.append(scaled.straight((x, None, 2.0)))
        return scaled(x, None, 2.0).sum()

    transform(fn)(x())
    assert seen == [None]


def test_a_profiler_sees_the_operator_by_its_name():
    with torch.profiler.profile(acc_events=True) as profile:
        scaled(x(), None, 2.0)
    assert any(scaled.qualified in event.key for event in profile.key_averages())


def test_a_dual_tensor_keeps_its_tangent():
    with fwad.dual_level():
        out = scaled(fwad.make_dual(x(), x() + 1), None, 2.0)
        torch.testing.assert_close(fwad.unpack_dual(out).tangent, x() + 1)
