"""Checks that go through torch.autograd, FakeTensor, make_fx and export instead of torch.func.

CHECKS[name](subject) gives tensors to compare with the same check of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as fwad
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from . import transforms as t
from .subject import Subject, floating, ripple


def _leaves(s: Subject) -> list[Tensor]:
    return [a.detach().clone().requires_grad_(i in s.diff) for i, a in enumerate(s.args)]


def _slope(grads) -> Tensor:
    return sum((g * ripple(g, i)).sum() for i, g in enumerate(grads))


def _order(s: Subject, order: int):
    args = _leaves(s)
    value = s.loss(*args)
    for _ in range(order - 1):
        value = _slope(torch.autograd.grad(value, s.pick(args), create_graph=True))
    return torch.autograd.grad(value, s.pick(args))


def backward(s: Subject):
    """autograd: backward"""
    return _order(s, 1)


def double_backward(s: Subject):
    """autograd: double backward"""
    return _order(s, 2)


def triple_backward(s: Subject):
    """autograd: triple backward"""
    return _order(s, 3)


def duals(s: Subject):
    """autograd: forward_ad duals"""
    with fwad.dual_level():
        args = list(s.args)
        for i, t in zip(s.diff, s.tangents):
            args[i] = fwad.make_dual(args[i], t)
        tangents = [fwad.unpack_dual(o).tangent for o in s.outs(*args)]
        return [torch.zeros_like(p) if t is None else t.clone() for t, p in zip(tangents, s.pulls)]


def grads_batched(s: Subject):
    """autograd: is_grads_batched"""
    args = _leaves(s)
    outs = [o for o in s.outs(*args) if o.requires_grad]
    pulls = [torch.stack([ripple(o, 2), ripple(o, 5), ripple(o, 8)]) for o in outs]
    return torch.autograd.grad(outs, s.pick(args), pulls, is_grads_batched=True)


def _jacobian(s: Subject, strategy: str):
    return torch.autograd.functional.jacobian(s.part(s.bent, s.args), s.pick(s.args), vectorize=True, strategy=strategy)


def jacobian_reverse(s: Subject):
    """autograd: functional.jacobian, reverse mode"""
    return _jacobian(s, "reverse-mode")


def jacobian_forward(s: Subject):
    """autograd: functional.jacobian, forward mode"""
    return _jacobian(s, "forward-mode")


def _numeric(check, s: Subject, **options) -> Tensor:
    args = _leaves(s)
    check(s.part(s.bent, args), s.pick(args), **options)
    return torch.ones(())


def gradgradcheck_at(fn: Callable, leaves: Sequence[Tensor], **options) -> None:
    """torch's gradgradcheck along one direction through all entries (fast_mode), with cotangents that are the same in every run.

    Those that it would draw itself may happen to hide a fault in few entries.
    """
    outs = fn(*leaves)
    outs = [o for o in (outs if isinstance(outs, tuple) else (outs,)) if isinstance(o, Tensor) and o.requires_grad]
    cotangents = [ripple(o.detach(), i).requires_grad_() for i, o in enumerate(outs)]
    gradgradcheck(fn, tuple(leaves), tuple(cotangents), fast_mode=True, **options)


def gradcheck_reverse(s: Subject):
    """gradcheck: reverse"""
    return _numeric(gradcheck, s)


def gradcheck_forward(s: Subject):
    """gradcheck: forward"""
    return _numeric(gradcheck, s, check_forward_ad=True, check_backward_ad=False)


def gradcheck_batched(s: Subject):
    """gradcheck: batched"""
    # Batches against single ones; numeric differences entry by entry are the two checks above.
    return _numeric(gradcheck, s, check_batched_grad=True, check_forward_ad=True, check_batched_forward_grad=True, fast_mode=True)


def gradgradcheck_reverse(s: Subject):
    """gradgradcheck: reverse over reverse"""
    # fast_mode: a difference along one direction through all entries, which other checks compare with the reference one by one.
    return _numeric(gradgradcheck_at, s)


def gradgradcheck_forward(s: Subject):
    """gradgradcheck: forward over reverse"""
    return _numeric(gradgradcheck_at, s, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False)


def _checkpoint(s: Subject, reentrant: bool):
    args = _leaves(s)
    value = torch.utils.checkpoint.checkpoint(s.loss, *args, use_reentrant=reentrant)
    if not reentrant:
        return torch.autograd.grad(value, s.pick(args))
    value.backward()  # the reentrant form refuses autograd.grad
    return [a.grad for a in s.pick(args)]


def checkpoint(s: Subject):
    """checkpoint, not reentrant"""
    return _checkpoint(s, False)


def checkpoint_reentrant(s: Subject):
    """checkpoint, reentrant"""
    return _checkpoint(s, True)


# ------------------------------------------------------------------------------------------------ shapes without numbers


def _shapes(outs) -> list[Tensor]:
    """Shapes as tensors, which compare like any other result."""
    return [torch.tensor([1, *o.shape], dtype=torch.float64) for o in floating(outs)]


def meta(s: Subject):
    """meta device"""
    return _shapes(s.fn(*[a.to("meta") for a in s.args]))


def _fake(s: Subject, use):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        sizes = [o.shape for o in floating(use([mode.from_tensor(a) for a in s.args]))]
    return [torch.tensor([1, *size], dtype=torch.float64) for size in sizes]  # outside: inside they would be fake too


def fake(s: Subject):
    """FakeTensor"""
    return _fake(s, lambda args: s.fn(*args))


def fake_backward(s: Subject):
    """FakeTensor: backward"""
    def use(args):
        args = [a.requires_grad_(i in s.diff) for i, a in enumerate(args)]
        return torch.autograd.grad(s.loss(*args), s.pick(args))
    return _fake(s, use)


def fx_grad(s: Subject):
    """make_fx(grad), symbolic"""
    fn, args = t.grad(s)
    return make_fx(fn, tracing_mode="symbolic")(*args)(*args)


def fx_hessian(s: Subject):
    """make_fx(hessian)"""
    fn, args = t.hessian(s)
    return make_fx(fn)(*args)(*args)


CHECKS = {check.__doc__: check for check in (
    backward, double_backward, triple_backward, duals, grads_batched, jacobian_reverse, jacobian_forward, gradcheck_reverse,
    gradcheck_forward, gradcheck_batched, gradgradcheck_reverse, gradgradcheck_forward, checkpoint, checkpoint_reentrant, meta,
    fake, fake_backward, fx_grad, fx_hessian)}


def _eagerly(build):
    def run(s: Subject):
        fn, args = build(s)
        return fn(*args)
    return run


# What a reference says without the tool that is on trial, where that gives the same numbers in a fraction of the time: tracing
# a loop over positions takes longer than all else. Checks of one line share their answer, which is worked out once.
_SAME = {
    _eagerly(t.grad): (t.grad, t.functionalize, backward, checkpoint, checkpoint_reentrant, fx_grad),
    _eagerly(t.grad_grad): (t.grad_grad, t.vjp_grad, double_backward),
    _eagerly(t.grad_grad_grad): (t.grad_grad_grad, t.grad_vjp_grad),
    _eagerly(t.jvp): (t.jvp, t.linearize),
    _eagerly(t.jacrev): (t.jacrev, t.jacfwd),
    _eagerly(t.jacrev_chunked): (t.jacrev_chunked, jacobian_reverse, jacobian_forward),
    _eagerly(t.hessian): (t.hessian, t.jacrev_jacfwd, fx_hessian),
    _eagerly(t.jacrev_jacrev): (t.jacrev_jacrev, t.jacfwd_jacfwd),
    _eagerly(t.vmap): (t.vmap, t.vmap_chunked),
    lambda s: _shapes(s.pulls): (meta, fake),
    lambda s: _shapes(s.pick(s.args)): (fake_backward,),
    # A numeric check that passes says 1.
    lambda s: torch.ones(()): (gradcheck_reverse, gradcheck_forward, gradcheck_batched, gradgradcheck_reverse, gradgradcheck_forward),
}
EXPECTED = {check.__doc__: answer for answer, checks in _SAME.items() for check in checks}


# ------------------------------------------------------------------------------------------------ export


class _Module(torch.nn.Module):
    def __init__(self, s: Subject):
        super().__init__()
        self.s = s

    def forward(self, *args):
        return self.s.outs(*args)


def _grow(a: Tensor, axes: dict[int, str]) -> Tensor:
    for axis in axes:
        a = torch.cat([a, a.narrow(axis, 0, 1)], axis)
    return a


def _both_sizes(fn, s: Subject):
    return fn(*s.args), fn(*[_grow(a, axes) for a, axes in zip(s.args, s.dynamic)])


def export(s: Subject):
    """export"""
    return torch.export.export(_Module(s), s.args).module()(*s.args)


def export_free(s: Subject):
    """export, free sizes"""
    free: dict = {}
    for axes in s.dynamic:
        for name in axes.values():
            # A reference that loops over chunks of 64 is one program for each number of chunks; this is about one of them.
            free.setdefault(name, torch.export.Dim(name, min=2, max=64))
    shapes = (tuple({axis: free[name] for axis, name in axes.items()} for axes in s.dynamic),)
    return _both_sizes(torch.export.export(_Module(s), s.args, dynamic_shapes=shapes).module(), s)


def expected_export(s: Subject):
    return s.outs(*s.args)


def expected_export_free(s: Subject):
    return _both_sizes(s.outs, s)
