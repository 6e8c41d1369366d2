"""Where forward mode is all there is, an Operator's value and tangent are computed below its level; elsewhere at it. Both are right."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.autograd.forward_ad as fwad
from fnattn_kernels import contracts
from fnattn_kernels.contracts import Operator, recording
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from versions import OLD

C = torch._C
BELOW = []  # for each call of `both`, whether it met plain tensors and no level

# The cube of x, alone and with x laid out otherwise. `both` uses the first.
cube = Operator("tests_cube_alone", 1, "(Tensor x) -> Tensor", any_device=lambda x: x ** 3, fake=lambda x: x.new_empty(x.shape))
operator = Operator("tests_cube", 1, "(Tensor x, Tensor? y) -> (Tensor, Tensor)", any_device=lambda x, y: (x ** 3, x.T.contiguous().T),
                    fake=lambda x, y: (x.new_empty(x.shape), x.new_empty(x.shape)))


def both(args, tangents):
    (x, _), (t, _) = args, tangents
    BELOW.append(not C._functorch.is_functorch_wrapped_tensor(x) and not C._functorch.get_dynamic_layer_stack_depth()
                 and not C._is_fwd_grad_enabled() and cube.straight((x,)) is not None)
    if BELOW[-1] and x.isnan().any():
        raise ArithmeticError("as asked")
    return (cube(x), x.T.contiguous().T), (3 * x.square() * t, t)


cube.derive(vjp=lambda needs, args, outs, cotangents: (3 * args[0].square() * cotangents[0],),
            jvp=lambda args, outs, tangents: 3 * args[0].square() * tangents[0])
operator.derive(vjp=lambda needs, args, outs, cotangents: (
                    sum(g * d for g, d in zip(cotangents, (3 * args[0].square(), 1)) if g is not None), None),
                jvp=lambda args, outs, tangents: both(args, tangents)[1], both=both, save_outputs=False)
for made in (cube, operator):
    contracts.OPERATORS.remove(made)  # other tests ask all of them about FLOPs and splits


def fn(x):
    y, same = operator(x.sin(), None)
    return y.cos() + same


def plain(x):
    return (x.sin() ** 3).cos() + x.sin()


def x():
    return torch.linspace(0.2, 1.4, 6, dtype=torch.float64).reshape(2, 3)


def jvp(f, x):
    return torch.func.jvp(f, (x,), (x.cos(),))


def dual(f, x):
    with fwad.dual_level():
        return tuple(fwad.unpack_dual(f(fwad.make_dual(x, x.cos()))))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def states():
    return (C._dispatch_tls_local_include_set().raw_repr(), C._dispatch_tls_local_exclude_set().raw_repr(),
            C._functorch.get_dynamic_layer_stack_depth(), C._is_fwd_grad_enabled(), fwad._current_level)


def compare(task, below):
    BELOW.clear()
    before = states()
    ours = task(fn)
    assert states() == before
    assert BELOW and all(seen is below for seen in BELOW)
    expected = task(plain)
    torch.testing.assert_close(ours, expected)
    assert all(t.abs().min() > 1e-3 for t in expected)


# torch.func of old versions gives zeros under inference_mode, without a word; tree.jvp leaves that mode.
@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, *(() if OLD else (torch.inference_mode,))])
@pytest.mark.parametrize("task", [
    pytest.param(lambda f: jvp(f, x()), id="jvp"),
    pytest.param(lambda f: jvp(torch.vmap(f), x()[None]), id="jvp of vmap"),
    pytest.param(lambda f: jvp(lambda y: f(y).sin() * y, x()), id="among other operations"),
    pytest.param(lambda f: torch.func.jvp(lambda y: f(x() + y).sum(1), (x(),), (x(),)), id="a constant enters"),
])
def test_below_a_level_that_is_alone(task, context):
    with context():
        compare(task, True)


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad])  # torch itself has no duals under inference_mode
def test_below_a_dual_level(context):
    with context():
        compare(lambda f: dual(f, x()), True)


def test_a_gradient_inside_finds_its_level_alone():
    compare(lambda f: jvp(torch.func.grad(lambda y: f(y).square().sum()), x()), True)


@pytest.mark.parametrize("task", [
    pytest.param(lambda f: jvp(lambda y: jvp(f, y)[1], x())[1], id="jvp of jvp"),
    pytest.param(lambda f: torch.func.grad(lambda y: jvp(f, y)[1].sum())(x()), id="grad of jvp"),
    pytest.param(lambda f: torch.vmap(lambda y: jvp(f, y)[1])(x()[None]), id="vmap of jvp"),
    pytest.param(lambda f: torch.func.functionalize(lambda y: jvp(f, y)[1])(x()), id="functionalize of jvp"),
])
def test_at_a_level_that_is_not_alone(task):
    compare(lambda f: (task(f),), False)


def test_gradients_of_torch_flow_through_the_level():
    def task(f):
        leaf = x().requires_grad_()
        return torch.autograd.grad(sum(t.sum() for t in jvp(f, leaf)), leaf)

    compare(task, False)


@pytest.mark.parametrize("context", [recording, Watching, lambda: torch.profiler.profile(acc_events=True)])
def test_who_watches_sees_every_operator(context):
    with context() as seen:
        compare(lambda f: jvp(f, x()), False)
    if context is recording:
        assert seen.count(cube) and seen.count(operator)


def test_tracers_see_every_operator():
    program = make_fx(lambda y: jvp(fn, y)[1])(x())
    assert any(node.target is cube.op for node in program.graph.nodes)
    torch.testing.assert_close(program(x()), jvp(plain, x())[1])
    with FakeTensorMode():
        assert jvp(fn, torch.empty(2, 3))[1].shape == (2, 3)
    compiled = torch.compile(lambda y: jvp(fn, y)[1], backend="aot_eager")
    torch.testing.assert_close(compiled(x()), jvp(plain, x())[1])


def test_an_error_leaves_all_levels_as_they_were():
    bad = x()
    bad[0, 0] = torch.nan
    before = states()
    for run in (jvp, dual):
        with pytest.raises(ArithmeticError):
            run(fn, bad)
        assert states() == before
        torch.testing.assert_close(run(fn, x()), run(plain, x()))


def test_autocast_stays_outside():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(lambda f: jvp(f, x().float()), True)
