"""The right answer of every transform by another route: torch.autograd, one entry at a time, and loops instead of vmap.

No torch.func, no forward mode, no batching: what these give is what the transforms of `transforms.py` must give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .subject import Subject, ripple
from .transforms import Built
from .transforms import grad_vmap as grad_vmap_built
from .transforms import grad_vmap_grad as grad_vmap_grad_built


def _leaves(args: Sequence[Tensor], diff: Sequence[int]) -> list[Tensor]:
    return [a.detach().clone().requires_grad_(i in diff) for i, a in enumerate(args)]


def _grads(value: Tensor, inputs: Sequence[Tensor], **options) -> tuple[Tensor, ...]:
    if not value.requires_grad:  # a value that depends on none of the inputs
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True, **options)


def forward(s: Subject):
    with torch.no_grad():
        return s.outs(*s.args)


def grad(s: Subject):
    args = _leaves(s.args, s.diff)
    return _grads(s.loss(*args), s.pick(args))


def vjp(s: Subject):
    args = _leaves(s.args, s.diff)
    outs = s.outs(*args)
    return tuple(o.detach() for o in outs), _grads(sum((o * c).sum() for o, c in zip(outs, s.pulls)), s.pick(args))


def jvp(s: Subject):
    """Reverse mode twice: the vjp is linear in the cotangent, and its own derivative by the cotangent is the jvp."""
    args = _leaves(s.args, s.diff)
    outs = s.outs(*args)
    pulls = [torch.zeros_like(o, requires_grad=True) for o in outs]
    pulled = _grads(sum((o * c).sum() for o, c in zip(outs, pulls)), s.pick(args), create_graph=True)
    return tuple(o.detach() for o in outs), _grads(sum((g * t).sum() for g, t in zip(pulled, s.tangents)), pulls)


def _rows(outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple:
    """The Jacobian of each of outs with respect to each of inputs, an entry at a time."""
    found = []
    for o in outs:
        rows = [_grads(entry, inputs, retain_graph=True) for entry in o.flatten()]
        found.append(tuple(torch.stack(column).unflatten(0, o.shape) if o.ndim else column[0] for column in zip(*rows)))
    return tuple(found)


def jacobian(s: Subject):
    args = _leaves(s.args, s.diff)
    return _rows(s.outs(*args), s.pick(args))


def hessian(s: Subject):
    args = _leaves(s.args, s.diff)
    return _rows(_grads(s.loss(*args), s.pick(args), create_graph=True), s.pick(args))


def grad_grad(s: Subject):
    args = _leaves(s.args, s.diff)
    slopes = _grads(s.loss(*args), s.pick(args), create_graph=True)
    return _grads(sum((g * ripple(g, i)).sum() for i, g in enumerate(slopes)), s.pick(args))


def grad_grad_grad(s: Subject):
    args = _leaves(s.args, s.diff)
    slopes = _grads(s.loss(*args), s.pick(args), create_graph=True)
    again = _grads(sum((g * ripple(g, i)).sum() for i, g in enumerate(slopes)), s.pick(args), create_graph=True)
    return _grads(sum((g * ripple(g, i + 3)).sum() for i, g in enumerate(again)), s.pick(args))


def jvp_grad(s: Subject):
    args = _leaves(s.args, s.diff)
    slopes = _grads(s.loss(*args), s.pick(args), create_graph=True)
    pulls = [torch.zeros_like(g, requires_grad=True) for g in slopes]
    pulled = _grads(sum((g * c).sum() for g, c in zip(slopes, pulls)), s.pick(args), create_graph=True)
    return tuple(g.detach() for g in slopes), _grads(sum((p * t).sum() for p, t in zip(pulled, s.tangents)), pulls)


def _members(s: Subject, given: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Leaves of the stacked arguments that `transforms._many` makes, and what each member gets of them."""
    args = _leaves(given, s.diff)
    dims = [(i + 1) % (small.ndim + 1) if a.ndim > small.ndim else None for i, (a, small) in enumerate(zip(args, s.args))]
    count = next(a.shape[d] for a, d in zip(args, dims) if d is not None)
    return args, [[a if d is None else a.select(d, j) for a, d in zip(args, dims)] for j in range(count)]


def looped(one: Callable[[Subject], object], build: Callable[[Subject], Built]) -> Callable[[Subject], object]:
    """`one` on each member of what `build` maps over, stacked."""
    def run(s: Subject):
        _, members = _members(s, build(s)[1])
        each = [one(s._replace(args=tuple(a.detach() for a in member))) for member in members]
        return tuple(torch.stack(column) for column in zip(*each))
    return run


def grad_vmap(s: Subject):
    """The gradient of the sum over members of the sine of the loss."""
    args, members = _members(s, grad_vmap_built(s)[1])
    return _grads(sum(s.loss(*member).sin() for member in members), s.pick(args))


def grad_vmap_grad(s: Subject):
    """The gradient of the sum over members of the sines of all gradients."""
    args, members = _members(s, grad_vmap_grad_built(s)[1])
    slopes = [_grads(s.loss(*member), s.pick(member), create_graph=True) for member in members]
    return _grads(sum(g.sin().sum() for each in slopes for g in each), s.pick(args))
