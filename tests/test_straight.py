"""Which calls of an Operator go straight to the function that computes, past the dispatcher: those that nothing watches.

So do calls whose only watcher is plain reverse mode, in an autograd node.
"""

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


# ------------------------------------------------------------------------------------------------ plain reverse mode


def weighed(x, y, factor):
    DISPATCHED.append("weighed")
    return x * y * factor, x.sin()


def weighed_vjp(needs, args, outs, cotangents):
    (x, y, factor), (g, h) = args, cotangents
    assert torch.equal(outs[1], x.sin())
    dx = None if g is None else g * y * factor
    if h is not None:
        dx = h * x.cos() if dx is None else dx + h * x.cos()
    return dx if needs[0] else None, g * x * factor if needs[1] and g is not None else None, None


product = Operator("tests_weighed", 1, "(Tensor x, Tensor y, float factor) -> (Tensor, Tensor)", cpu=weighed,
                   fake=lambda x, y, factor: (x.new_empty(x.shape), x.new_empty(x.shape)))
product.derive(vjp=weighed_vjp, jvp=lambda args, outs, tangents: (
    sum(t * a * args[2] for t, a in zip(tangents[:2], (args[1], args[0])) if t is not None),
    torch.zeros_like(args[0]) if tangents[0] is None else tangents[0] * args[0].cos()))
contracts.OPERATORS.remove(product)


def plain(x, y, factor):
    return x * y * factor, x.sin()


def leaves():
    return [x().double().add(1).requires_grad_(), x().double().cos().requires_grad_()]


def test_plain_reverse_mode_passes_the_dispatcher_by(monkeypatch):
    monkeypatch.setattr(product, "packet", None)
    a, b = leaves()
    out, _ = product(a, b, 3.0)
    out.sum().backward()
    torch.testing.assert_close([a.grad, b.grad], [3 * b.detach(), 3 * a.detach()])


@pytest.mark.parametrize("context", [lambda: recording(), Listening, Watching, lambda: torch.autocast("cpu"), fwad.dual_level])
def test_reverse_mode_that_somebody_watches_does_not(context, monkeypatch):
    monkeypatch.setattr(product, "_reverse", None)
    with context():
        out, _ = product(*leaves(), 3.0)
    assert out.requires_grad


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_derivatives_of_plain_reverse_mode_of_every_order(which):
    def derivatives(fn):
        args = leaves()
        for i, a in enumerate(args):
            a.requires_grad_(i in which)
        some, found = [args[i] for i in which], []
        value = sum(out.exp().sum() for out in fn(*args, 3.0))
        for _ in range(3):
            grads = torch.autograd.grad(value, some, create_graph=True)
            found += [value, *grads]
            value = sum(g.square().sum() for g in grads)
        return [t.detach() for t in found]

    torch.testing.assert_close(derivatives(product), derivatives(plain))


def test_plain_reverse_mode_takes_part_in_what_autograd_offers():
    def both(task):
        return task(product), task(plain)

    def one_output(fn):
        args = leaves()
        return torch.autograd.grad(fn(*args, 3.0)[1].sum(), args, allow_unused=True)

    def batched(fn):
        args = leaves()
        out = fn(*args, 3.0)[0]
        return torch.autograd.grad(out, args, torch.eye(3, dtype=torch.float64), is_grads_batched=True)

    def recomputed(fn):
        args = leaves()
        out = torch.utils.checkpoint.checkpoint(lambda *a: sum(fn(*a, 3.0)).sum(), *args, use_reentrant=False)
        return torch.autograd.grad(out, args)

    def duals(fn):
        args = leaves()
        outs = fn(*args, 3.0)
        with fwad.dual_level():
            moved = torch.autograd.grad(outs[0], args, fwad.make_dual(torch.ones(3).double(), x().double()), create_graph=True)
            return [fwad.unpack_dual(t).tangent.detach() for t in moved]

    for task in (one_output, batched, recomputed, duals):
        ours, theirs = both(task)
        torch.testing.assert_close(ours, theirs)


def test_plain_reverse_mode_keeps_its_arguments_from_being_overwritten():
    a, b = leaves()
    out, _ = product(a, b, 3.0)
    with torch.no_grad():
        b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("schema", ["(float factor, Tensor x) -> Tensor", "(Tensor[] x) -> Tensor",
                                    "(Tensor x, int n, Tensor? y) -> Tensor"])
def test_tensors_where_no_rule_would_look_are_refused(schema):
    with pytest.raises(ValueError, match="tensors must be the first arguments"):
        Operator("tests_order", 1, schema, cpu=lambda *args: None, fake=lambda *args: None)
    assert not hasattr(torch.ops.fnattn, "tests_order_v1")


def test_an_operator_without_derivatives_refuses_plain_reverse_mode():
    raw = Operator("tests_raw", 1, "(Tensor x) -> Tensor", cpu=lambda x: x + 1, fake=lambda x: x.new_empty(x.shape))
    contracts.OPERATORS.remove(raw)
    with pytest.raises(contracts.DerivativeUnsupported):
        raw(x().requires_grad_())
