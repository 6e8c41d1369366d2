"""What the checks look at: a function of tensors, its arguments, and which of them are differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor


class Subject(NamedTuple):
    """A function under test.

    fn:       function of tensors; its result may be a tensor or any tree of tensors.
    args:     tensors, floating ones in float64.
    diff:     which arguments are differentiated.
    pulls:    one cotangent per floating result.
    dynamic:  for export: per argument {axis: name of a free size}.
    """

    fn: Callable
    args: tuple[Tensor, ...]
    diff: tuple[int, ...]
    pulls: tuple[Tensor, ...]
    dynamic: tuple[dict[int, str], ...] | None = None

    def outs(self, *args: Tensor) -> tuple[Tensor, ...]:
        """Floating results, flattened."""
        return floating(self.fn(*args))

    def bent(self, *args: Tensor) -> tuple[Tensor, ...]:
        """Few numbers that depend on every result, with derivatives of every order that are not zero."""
        return tuple(_narrow((o + 0.3).sin()) for o in self.outs(*args))

    def loss(self, *args: Tensor) -> Tensor:
        """One number with derivatives of every order that are not zero, and a different cotangent for each entry."""
        return sum((o + 0.3).sin().sum() for o in self.outs(*args))

    def part(self, fn: Callable, args: Sequence[Tensor]) -> Callable:
        """fn as a function of the differentiated arguments alone."""
        def of(*chosen: Tensor):
            full = list(args)
            for i, x in zip(self.diff, chosen):
                full[i] = x
            return fn(*full)
        return of

    def pick(self, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The differentiated ones."""
        return tuple(args[i] for i in self.diff)

    @property
    def tangents(self) -> tuple[Tensor, ...]:
        """A direction for each differentiated argument."""
        return tuple(ripple(self.args[i], i) for i in self.diff)


def subject(fn: Callable, args: Sequence[Tensor], *, like: Callable, diff: Sequence[int] | None = None,
            dynamic: Sequence[dict[int, str]] | None = None) -> Subject:
    """A Subject whose results look like those of `like` (the reference)."""
    args = tuple(args)
    if diff is None:
        diff = [i for i, a in enumerate(args) if a.is_floating_point()]
    with torch.no_grad():
        pulls = tuple(ripple(o, 7 + i) for i, o in enumerate(floating(like(*args))))
    return Subject(fn, args, tuple(diff), pulls, None if dynamic is None else tuple(dynamic))


def floating(tree: Any) -> tuple[Tensor, ...]:
    """The floating tensors of a tree, in order."""
    return tuple(x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point())


def ripple(t: Tensor, phase: int) -> Tensor:
    """A tensor shaped like t whose entries all differ: the same on every machine and in every process."""
    steps = torch.arange(t.numel(), dtype=torch.float64, device=t.device).reshape(t.shape)
    return (steps * 1.7 + phase + 0.5).sin().to(t.dtype)


def _narrow(o: Tensor) -> Tensor:
    return o.flatten(0, -2).sum(0) if o.ndim > 1 else o


class Mismatch(AssertionError):
    """The numbers differ; the text says by how much."""


def compare(actual: Any, expected: Any, rtol: float) -> float:
    """The largest error of any tensor, relative to that tensor's largest entry.

    Raises:
        Mismatch: the error is above rtol, shapes or dtypes differ, or all of `expected` is zero, so that nothing was tested.
    """
    a, e = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    a, e = [x for x in a if isinstance(x, Tensor)], [x for x in e if isinstance(x, Tensor)]
    if [tuple(x.shape) for x in a] != [tuple(x.shape) for x in e]:
        raise Mismatch(f"wrong shapes: {[tuple(x.shape) for x in a]} instead of {[tuple(x.shape) for x in e]}")
    if [x.dtype for x in a] != [x.dtype for x in e]:
        raise Mismatch(f"wrong dtypes: {[x.dtype for x in a]} instead of {[x.dtype for x in e]}")
    a, e = [x.detach().double() for x in a if x.numel()], [y.detach().double() for y in e if y.numel()]
    sizes = [y.abs().max().item() for y in e]
    if not any(sizes):
        raise Mismatch("nothing tested: the expected value is zero everywhere; choose other arguments")
    worst = 0.0
    for x, y, size in zip(a, e, sizes):
        # A tensor that is rounding noise beside the others has no relative error to speak of.
        error = (x - y).abs().max().item() / max(size, 1e-4 * max(sizes))
        if not error <= rtol:  # also NaN
            kind = "zero instead of the true value" if size and not x.any() else f"wrong by {error:.1e}"
            raise Mismatch(f"{kind} (relative, at most {rtol:.0e} allowed)")
        worst = max(worst, error)
    return worst
