"""Every transform as a plain function of tensors, built from a Subject; eager, compiled and traced checks share them.

TRANSFORMS[name](subject) gives (function, inputs): what to call, and with which tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.utils.checkpoint
from torch import Tensor, func

from .subject import Subject, ripple

Built = tuple[Callable, tuple[Tensor, ...]]


# ------------------------------------------------------------------------------------------------ derivatives


def forward(s: Subject) -> Built:
    """f"""
    return s.outs, s.args


def grad(s: Subject) -> Built:
    """grad(f)"""
    return func.grad(s.loss, s.diff), s.args


def vjp(s: Subject) -> Built:
    """vjp(f)"""
    def run(*xs):
        args, pulls = xs[:len(s.args)], xs[len(s.args):]
        out, pull = func.vjp(s.part(s.outs, args), *s.pick(args))
        return out, pull(tuple(pulls))
    return run, s.args + s.pulls


def _with_tangents(s: Subject, use: Callable) -> Built:
    """use(args, tangents) as a function of both."""
    return lambda *xs: use(xs[:len(s.args)], xs[len(s.args):]), s.args + s.tangents


def jvp(s: Subject) -> Built:
    """jvp(f)"""
    return _with_tangents(s, lambda args, t: func.jvp(s.part(s.outs, args), s.pick(args), tuple(t)))


def linearize(s: Subject) -> Built:
    """linearize(f)"""
    def use(args, t):
        out, push = func.linearize(s.part(s.outs, args), *s.pick(args))
        return out, push(*t)
    return _with_tangents(s, use)


def jacrev(s: Subject) -> Built:
    """jacrev(f)"""
    return func.jacrev(s.outs, s.diff), s.args


def jacrev_chunked(s: Subject) -> Built:
    """jacrev(f, chunk_size=2)"""
    return func.jacrev(s.bent, s.diff, chunk_size=2), s.args


def jacfwd(s: Subject) -> Built:
    """jacfwd(f)"""
    return func.jacfwd(s.outs, s.diff), s.args


def hessian(s: Subject) -> Built:
    """hessian(f)"""
    return func.hessian(s.loss, s.diff), s.args


def jacrev_jacrev(s: Subject) -> Built:
    """jacrev(jacrev(f))"""
    return func.jacrev(func.jacrev(s.bent, s.diff), s.diff), s.args


def jacrev_jacfwd(s: Subject) -> Built:
    """jacrev(jacfwd(f))"""
    # Of one number: forward mode inside makes a batch of entries squared for each.
    return func.jacrev(func.jacfwd(s.loss, s.diff), s.diff), s.args


def jacfwd_jacfwd(s: Subject) -> Built:
    """jacfwd(jacfwd(f))"""
    return func.jacfwd(func.jacfwd(s.bent, s.diff), s.diff), s.args


def _slope(fn: Callable, s: Subject, shift: int = 0) -> Callable:
    """The derivative of the scalar function fn along a fixed direction, by reverse mode: again a scalar function."""
    def along(*args):
        grads = func.grad(fn, s.diff)(*args)
        return sum((g * ripple(g, i + shift)).sum() for i, g in enumerate(grads))
    return along


def grad_grad(s: Subject) -> Built:
    """grad(grad(f))"""
    return func.grad(_slope(s.loss, s), s.diff), s.args


def grad_grad_grad(s: Subject) -> Built:
    """grad(grad(grad(f)))"""
    return func.grad(_slope(_slope(s.loss, s), s, 3), s.diff), s.args


def jvp_grad(s: Subject) -> Built:
    """jvp(grad(f))"""
    def use(args, t):
        part = s.part(s.loss, args)
        every = tuple(range(len(s.diff)))
        return func.jvp(lambda *d: func.grad(part, every)(*d), s.pick(args), tuple(t))
    return _with_tangents(s, use)


def grad_jvp(s: Subject) -> Built:
    """grad(jvp(f))"""
    def use(args, t):
        part = s.part(s.loss, args)
        every = tuple(range(len(s.diff)))
        return func.grad(lambda *d: func.jvp(part, d, tuple(t))[1], every)(*s.pick(args))
    return _with_tangents(s, use)


def _pulled_slope(s: Subject, args: tuple) -> tuple[Tensor, ...]:
    """vjp(grad(f)), pulled back when the level of vjp is over, as users do it."""
    part, every = s.part(s.loss, args), tuple(range(len(s.diff)))
    slopes, pull = func.vjp(lambda *d: func.grad(part, every)(*d), *s.pick(args))
    return pull(tuple(ripple(g, i) for i, g in enumerate(slopes)))


def vjp_grad(s: Subject) -> Built:
    """vjp(grad(f))"""
    return lambda *args: _pulled_slope(s, args), s.args


def grad_vjp_grad(s: Subject) -> Built:
    """grad(vjp(grad(f)))"""
    return func.grad(lambda *args: sum((g * ripple(g, i + 3)).sum() for i, g in enumerate(_pulled_slope(s, args))), s.diff), s.args


# ------------------------------------------------------------------------------------------------ batches


def _many(s: Subject, count: int = 3, shared: Callable[[int], bool] = lambda i: False) -> tuple[tuple, tuple]:
    """(arguments, in_dims): floating arguments stacked from `count` variations at odd places, the others shared."""
    args, dims = [], []
    for i, a in enumerate(s.args):
        if shared(i) or not a.is_floating_point():
            args.append(a)
            dims.append(None)
        else:
            dim = (i + 1) % (a.ndim + 1)
            args.append(torch.stack([a + 0.1 * j * ripple(a, i + j) for j in range(count)], dim))
            dims.append(dim)
    return tuple(args), tuple(dims)


def vmap(s: Subject) -> Built:
    """vmap(f)"""
    args, dims = _many(s)
    return func.vmap(s.outs, dims), args


def vmap_shared(s: Subject) -> Built:
    """vmap(f), in_dims with None"""
    if len(s.diff) < 2:  # nothing to share: another place for the mapped axis instead
        return func.vmap(s.outs, _many(s)[1], out_dims=1), _many(s)[0]
    args, dims = _many(s, shared=lambda i: i % 2 == 1)
    return func.vmap(s.outs, dims), args


def vmap_all(s: Subject) -> Built:
    """vmap(f), integers and masks too"""
    args = tuple(torch.stack([a, a], a.ndim) for a in s.args)
    return func.vmap(s.outs, tuple(a.ndim - 1 for a in args)), args


def vmap_vmap(s: Subject) -> Built:
    """vmap(vmap(f))"""
    args, dims = _many(s)
    twice = tuple(a if d is None else torch.stack([a, a * 0.9], 0) for a, d in zip(args, dims))
    return func.vmap(func.vmap(s.outs, dims), tuple(None if d is None else 0 for d in dims)), twice


def vmap_grad(s: Subject) -> Built:
    """vmap(grad(f))"""
    args, dims = _many(s)
    return func.vmap(func.grad(s.loss, s.diff), dims), args


def vmap_vjp_grad(s: Subject) -> Built:
    """vmap(vjp(grad(f)))"""
    args, dims = _many(s)
    return func.vmap(lambda *a: _pulled_slope(s, a), dims), args


def vmap_grad_shared(s: Subject) -> Built:
    """vmap(grad(f)), shared arguments"""
    first = s.diff[0]
    args, dims = _many(s, shared=lambda i: len(s.diff) > 1 and i != first)
    return func.vmap(func.grad(s.loss, s.diff), dims), args


def grad_vmap(s: Subject) -> Built:
    """grad(vmap(f))"""
    args, dims = _many(s)
    return func.grad(lambda *a: func.vmap(s.loss, dims)(*a).sin().sum(), s.diff), args


def grad_vmap_grad(s: Subject) -> Built:
    """grad(vmap(grad(f)))"""
    args, dims = _many(s)
    def run(*a):
        slopes = func.vmap(func.grad(s.loss, s.diff), dims)(*a)
        return sum(g.sin().sum() for g in slopes)
    return func.grad(run, s.diff), args


def vmap_jvp(s: Subject) -> Built:
    """vmap(jvp(f))"""
    args, dims = _many(s)
    def one(*a):
        return func.jvp(s.part(s.outs, a), s.pick(a), tuple(x.cos() for x in s.pick(a)))
    return func.vmap(one, dims), args


def jvp_vmap(s: Subject) -> Built:
    """jvp(vmap(f))"""
    args, dims = _many(s)
    def run(*a):
        chosen = s.pick(a)
        return func.jvp(s.part(func.vmap(s.outs, dims), a), chosen, tuple(x.cos() for x in chosen))
    return run, args


def vmap_hessian(s: Subject) -> Built:
    """vmap(hessian(f))"""
    args, dims = _many(s, 2)
    return func.vmap(func.hessian(s.loss, s.diff), dims), args


def vmap_jacrev(s: Subject) -> Built:
    """vmap(jacrev(f))"""
    args, dims = _many(s, 2)
    return func.vmap(func.jacrev(s.outs, s.diff), dims), args


def vmap_chunked(s: Subject) -> Built:
    """vmap(f, chunk_size=2)"""
    args, dims = _many(s)
    return func.vmap(s.outs, dims, chunk_size=2), args


# ------------------------------------------------------------------------------------------------ together with others


def functionalize(s: Subject) -> Built:
    """functionalize(grad(f))"""
    return func.functionalize(func.grad(s.loss, s.diff)), s.args


def grad_checkpoint(s: Subject) -> Built:
    """grad(checkpoint(f))"""
    def run(*a):
        return torch.utils.checkpoint.checkpoint(s.loss, *a, use_reentrant=False)
    return func.grad(run, s.diff), s.args


EAGER = {build.__doc__: build for build in (
    forward, grad, vjp, jvp, linearize, jacrev, jacrev_chunked, jacfwd, hessian, jacrev_jacrev, jacrev_jacfwd, jacfwd_jacfwd,
    grad_grad, grad_grad_grad, vjp_grad, grad_vjp_grad, jvp_grad, grad_jvp, vmap, vmap_shared, vmap_all, vmap_vmap, vmap_grad,
    vmap_vjp_grad, vmap_grad_shared, grad_vmap, grad_vmap_grad, vmap_jvp, jvp_vmap, vmap_hessian, vmap_jacrev, vmap_chunked,
    functionalize, grad_checkpoint)}

COMPILED = {build.__doc__: build for build in (
    forward, grad, vjp, jvp, vmap, vmap_grad, grad_vmap, jacrev, jacfwd, hessian, grad_grad, jvp_grad, grad_checkpoint)}
