"""Laws about derivatives and batches of a family. Each is law(family, cfg, key, impl).

Where a config scales gradients on purpose (`frac_gradient...` other than 1) what comes back is not the derivative of the
value, and the laws that compare with differences do not apply; those that compare two ways to the same number do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, func
from torch.autograd import gradcheck

from .. import attentions, random, tree
from ..core import Family
from .autograd_checks import gradgradcheck_at
from .family import family_subject
from .subject import Subject, ripple
from .world import NotApplicable, equal, make_params, make_x, require, same_bits

STEP = 1e-5


def _need_exact(cfg: Any) -> None:
    if not attentions.gradient_is_exact(cfg):
        raise NotApplicable("this config scales gradients on purpose")


def _scalar(s: Subject):
    """The loss as a function of all arguments, and the arguments."""
    return s.part(s.loss, s.args), s.pick(s.args)


def _grads(value, *args: Any) -> list[Tensor]:
    """Gradients of the params' floating leaves; a layout or a position has none."""
    return [g for g in tree.leaves(tree.grad(value)(*args)) if g is not None]


def vmap_over_params(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """An ensemble in one call is the loop over its members: init under vmap, values, gradients."""
    keys = random.split(key, 3)
    same_bits(tree.vmap(lambda k: family.init(k, cfg))(keys), tree.stack([family.init(k, cfg) for k in keys]),
              "init under vmap over keys is not the loop")
    members, x = [make_params(family, cfg, k) for k in keys], make_x(cfg, key)
    stacked = tree.stack(members)

    def value(params, x):
        return family.apply(params, x, impl=impl)[0].sin().sum()

    equal(tree.vmap(lambda p, x: family.apply(p, x, impl=impl)[0], (0, None))(stacked, x),
          torch.stack([family.apply(p, x, impl=impl)[0] for p in members]), "vmap over params")
    equal(tree.vmap(lambda p, x: _grads(value, p, x), (0, None))(stacked, x), tree.stack([_grads(value, p, x) for p in members]),
          "vmap(grad) over params")


def per_sample_gradients(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """Gradients of each sequence's own loss, all at once, are those of the loop."""
    params, x = make_params(family, cfg, key), make_x(cfg, key, batch=3)

    def value(params, row):
        return family.apply(params, row[None], impl=impl)[0].sin().sum()

    equal(tree.vmap(lambda p, row: _grads(value, p, row), (None, 0))(params, x),
          tree.stack([_grads(value, params, row) for row in x]), "per-sample gradients")


def gradients_of_per_sample_gradients(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """Differentiating per-sample gradients, as meta-learning and influence do, is differentiating the loop's.

    torch 2.13 gets this wrong, without an error, for its own F.layer_norm.
    """
    params, x = make_params(family, cfg, key), make_x(cfg, key, batch=2, length=3)

    def value(params, row):
        return family.apply(params, row[None], impl=impl)[0].sin().sum()

    def mapped(x):
        return sum(g.sin().sum() for g in tree.vmap(lambda p, row: _grads(value, p, row), (None, 0))(params, x))

    def looped(x):
        return sum(g.sin().sum() for row in x.unbind() for g in _grads(value, params, row))

    equal(func.grad(mapped)(x), func.grad(looped)(x), "grad of vmap(grad)", rtol=1e-8, atol=1e-9)
    push = x.cos()
    equal(func.jvp(mapped, (x,), (push,))[1], func.jvp(looped, (x,), (push,))[1], "jvp of vmap(grad)", rtol=1e-8, atol=1e-9)


def jvp_is_the_difference(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """The tangent along each param and along x is the central difference, and together they are not zero."""
    _need_exact(cfg)
    s = family_subject(family, cfg, impl, key)
    alive = False
    for i in s.diff:
        direction = ripple(s.args[i], i)

        def along(t, i=i):
            return s.fn(*[t if j == i else a for j, a in enumerate(s.args)])

        tangent = func.jvp(along, (s.args[i],), (direction,))[1]
        numeric = (along(s.args[i] + STEP * direction) - along(s.args[i] - STEP * direction)) / (2 * STEP)
        equal(tangent, numeric, f"the tangent along argument {i}", rtol=1e-6, atol=1e-7)
        # A param may have no effect (a bias on softmax's keys); one that has must have a tangent.
        require(tangent.abs().max() > 1e-6 or numeric.abs().max() <= 1e-6, f"the tangent along argument {i} is zero")
        alive = alive or bool(tangent.abs().max() > 1e-6)
    require(alive, "every tangent is zero")


def hessian_products_agree(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """Forward over reverse is reverse over reverse, and u.Hv is v.Hu."""
    f, args = _scalar(family_subject(family, cfg, impl, key))
    every = tuple(range(len(args)))
    u, v = (tuple(ripple(a, i + shift) for i, a in enumerate(args)) for shift in (0, 11))
    gradient = func.grad(f, every)

    def dot(a, b):
        return sum((x * y).sum() for x, y in zip(a, b))

    forward = func.jvp(lambda *a: gradient(*a), args, v)[1]
    reverse = func.grad(lambda *a: dot(gradient(*a), v), every)(*args)
    equal(forward, reverse, "forward over reverse and reverse over reverse", rtol=1e-7, atol=1e-9)
    require(any(h.abs().max() > 1e-8 for h in forward), "the Hessian-vector product is zero")
    _need_exact(cfg)  # scaled gradients have no Hessian
    other = func.jvp(lambda *a: gradient(*a), args, u)[1]
    equal(dot(u, forward), dot(v, other), "u.Hv and v.Hu", rtol=1e-7, atol=1e-9)


def every_mode_gives_one_gradient(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """autograd, func.grad, vjp, jacrev, jacfwd and plain torch give one gradient."""
    s = family_subject(family, cfg, impl, key)
    f, args = _scalar(s)
    every = tuple(range(len(args)))
    expected = func.grad(f, every)(*args)
    leaves = [a.clone().requires_grad_() for a in args]
    equal(torch.autograd.grad(f(*leaves), leaves, materialize_grads=True), expected, "autograd.grad")
    equal(func.jacrev(f, every)(*args), expected, "jacrev")
    equal(func.jacfwd(f, every)(*args), expected, "jacfwd")
    plain, _ = _scalar(family_subject(family, cfg, "reference", key))
    equal(func.grad(plain, every)(*args), expected, "plain torch")


def gradcheck_passes(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """torch's gradcheck in float64, reverse, forward and batched."""
    _need_exact(cfg)
    s = family_subject(family, cfg, impl, key)
    leaves = [a.clone().requires_grad_() for a in s.pick(s.args)]
    gradcheck(s.part(s.bent, s.args), leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)


def gradgradcheck_passes(family: Family, cfg: Any, key: Tensor, impl: str) -> None:
    """torch's gradgradcheck in float64."""
    _need_exact(cfg)
    s = family_subject(family, cfg, impl, key)
    leaves = [a.clone().requires_grad_() for a in s.pick(s.args)]
    gradgradcheck_at(s.part(s.bent, s.args), leaves)


DERIVATIVE_LAWS = (vmap_over_params, per_sample_gradients, gradients_of_per_sample_gradients, jvp_is_the_difference,
                   hessian_products_agree, every_mode_gives_one_gradient, gradcheck_passes, gradgradcheck_passes)
