"""Axes without entries: vmap over no members, and Jacobians and Hessians of nothing, have the shapes that they have elsewhere."""

from __future__ import annotations

import pytest
import torch

import fnattn
from fnattn import random, tree
from fnattn.attentions import FAMILIES
from fnattn.bench import implementations
from fnattn.ops.report import CASES

SIZES = {"b": 2, "h": 2, "n": 3, "d": 4}
# Where a tangent is mapped over nothing, torch's own einsum meets an internal assertion of torch.
EINSUM = pytest.mark.xfail(strict=True, raises=RuntimeError, reason="torch's einsum")
BY_EINSUM = {"linformer", "taylor_poly"}


def problem(name):
    """The operator's first result as a function of its floating tensors, and these."""
    fn = implementations.function(name, "auto", SIZES)
    args = implementations.inputs(CASES[name], SIZES, "cpu", torch.float64)
    where = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]

    def call(*xs):
        given = list(args)
        for i, x in zip(where, xs, strict=True):
            given[i] = x
        out = fn(*given)
        return out[0] if isinstance(out, tuple) else out

    return call, [args[i] for i in where]


def gradient(call, count):
    return torch.func.grad(lambda *xs: call(*xs).square().sum(), argnums=tuple(range(count)))


TRANSFORMS = {
    "value": lambda call, xs: (lambda *none: call(*none)),
    "first argument": lambda call, xs: (lambda first, *_: call(first, *xs[1:])),
    "grad": lambda call, xs: gradient(call, len(xs)),
    "jvp": lambda call, xs: (lambda *none: torch.func.jvp(call, tuple(xs), none)[1]),
    "vjp": lambda call, xs: (lambda *none: torch.func.vjp(call, *xs)[1](call(*none))),
    "hvp": lambda call, xs: (lambda *none: torch.func.jvp(gradient(call, len(xs)), tuple(xs), none)[1]),
}


@pytest.mark.parametrize("name, transform", [
    pytest.param(name, transform, marks=EINSUM if transform == "hvp" and name in ("cached_attention", "coor_descent_attention") else ())
    for name in CASES for transform in TRANSFORMS])
def test_vmap_over_no_members(name, transform):
    call, xs = problem(name)
    member = TRANSFORMS[transform](call, xs)
    some, none = (torch.vmap(member)(*(x.unsqueeze(0).expand(count, *x.shape) for x in xs)) for count in (1, 0))
    assert [t.shape[1:] for t in tree.leaves(some)] == [t.shape[1:] for t in tree.leaves(none)]
    assert all(t.shape[0] == 0 for t in tree.leaves(none))


@pytest.mark.parametrize("name", CASES)
def test_derivatives_through_vmap_over_no_members(name):
    call, xs = problem(name)
    none = tuple(x.unsqueeze(0)[:0] for x in xs)
    _, moved = torch.func.jvp(torch.vmap(call), none, none)
    assert moved.shape == (0, *call(*xs).shape)
    leaves = [t.clone().requires_grad_() for t in none]
    grads = torch.autograd.grad(torch.vmap(call)(*leaves).sum(), leaves, allow_unused=name == "masked_softmax")
    assert [g.shape for g in grads if g is not None] == [t.shape for t in leaves]


CONFIGS = [(name, i) for name, family in FAMILIES.items() for i in range(len(family.examples))]


@pytest.mark.parametrize("b, n", [(2, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("name, which", CONFIGS)
def test_every_parameter_and_an_empty_input_have_derivatives(name, which, b, n):
    cfg = FAMILIES[name].examples[which]
    params = fnattn.init(random.key(0), cfg, dtype=torch.float64)
    x = torch.zeros(b, n, cfg.dim, dtype=torch.float64, requires_grad=True)
    out, _ = fnattn.apply(params, x)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape
    if name not in BY_EINSUM and (name, which, n) != ("coor_descent", 1, 0):
        hessian = torch.func.hessian(lambda x: fnattn.apply(params, x)[0].square().sum())(x.detach())
        assert hessian.shape == 2 * x.shape


@pytest.mark.parametrize("hidden", [False, True], ids=["no key", "all keys hidden"])
@pytest.mark.parametrize("name, which", [(name, i) for name, i in CONFIGS if FAMILIES[name].contexts])
def test_a_context_without_a_key_to_attend_to_gives_zeros_without_slope(name, which, hidden):
    cfg = FAMILIES[name].examples[which]
    params = fnattn.init(random.key(0), cfg, dtype=torch.float64)
    x, context = random.normal(random.key(1), (2, 2, 3, cfg.dim), torch.float64)
    given = {"mask": torch.zeros(2, 3, dtype=torch.bool)} if hidden else {}

    def call(params, x, context):
        out, _ = fnattn.apply(params, x, context=context, **given)
        return out

    context = context if hidden else context[:, :0]
    if getattr(cfg, "causal", False):
        with pytest.raises(ValueError, match="cannot take context"):
            call(params, x, context)
        return
    out = call(params, x, context)
    assert out.shape[:2] == x.shape[:2] and not out.any()
    slopes = tree.grad(lambda *args: (call(*args) + 0.3).sin().sum(), (0, 1, 2))(params, x, context)
    assert not any(slope.any() for slope in tree.leaves(slopes))
    moved = torch.func.jvp(lambda x: call(params, x, context), (x,), (torch.ones_like(x),))[1]
    assert not moved.any()
    if not hidden:
        assert not torch.vmap(lambda x: call(params, x[None], context[:1]))(x).any()
