"""Trees of tensors: one registration for torch.func and optree, names for leaves, and transforms that accept whole trees.

A tree here is NamedTuples (dicts, lists and tuples work too) of tensors, plus static nodes: frozen dataclasses without
leaves, such as a Config, which travel inside a tree without being seen by grad, vmap or an optimiser.

torch.func insists that every leaf is a floating tensor (grad) or a tensor (vmap). The versions here accept integer
tensors, None and Python values as leaves and leave them alone. `value_and_grad` is built on `torch.func.vjp`, because
`torch.func.grad` keeps the graph for a second differentiation alive: about three times the memory. Where no transform is
under way plain autograd does the same in less time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from fnattn_kernels.watchers import alive
from torch import Tensor

from . import _autograd, _closures
from ._trees import (
    NAMESPACE,
    combine,
    flatten,
    from_flat,
    is_differentiable,
    leaves,
    map,
    partition,
    put_together,
    stack,
    static,
    structure,
    take_apart,
    to_flat,
    unflatten,
    unstack,
)

__all__ = ["NAMESPACE", "combine", "flatten", "from_flat", "grad", "is_differentiable", "jvp", "leaves", "map", "partition",
           "put_together", "remat", "stack", "static", "structure", "take_apart", "to_flat", "unflatten", "unstack",
           "value_and_grad", "vmap"]


def _split(tree: Any) -> tuple[list[Tensor], Callable]:
    """Differentiable leaves of a tree, and the function that rebuilds the tree around new ones (None: gradients only)."""
    (items,), (form,) = take_apart(tree)
    places = [i for i, x in enumerate(items) if is_differentiable(x)]

    def merge(new: Iterable[Tensor], others_kept: bool = True) -> Any:
        filled = list(items) if others_kept else [None] * len(items)
        for i, x in zip(places, new):
            filled[i] = x
        return put_together(filled, form)

    return [items[i] for i in places], merge


def value_and_grad(fn: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """The value of a scalar function, and its gradient with respect to whole trees.

    Args:
        fn: returns a 0-d tensor, or (0-d tensor, aux) if has_aux.
        argnums: which argument(s) to differentiate. Integer tensors and other leaves inside are passed on unchanged;
            the gradient has None in their place.
    Returns:
        A function of the same arguments giving (value, grad), or ((value, aux), grad). With a tuple of argnums, grad is a
        tuple. Nests with every transform, torch.autograd included: it may be differentiated by what fn closes over. No
        graph for a second derivative by the arguments is kept.
    """
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def wrapped(*args, **kwargs):
        for number in numbers:
            if not -len(args) <= number < len(args):
                raise ValueError(f"tree.value_and_grad: argnums must name positional arguments; got {number} of {len(args)}.\n"
                                 f"  Pass the arguments to differentiate by position.")
        tensors, merge = _split(tuple(args[n] for n in numbers))
        around: list = []  # structure of aux, and its leaves that are no tensors

        def part(*new):
            full = list(args)
            for n, tree in zip(numbers, merge(new)):
                full[n] = tree
            value, aux = _pair(fn(*full, **kwargs)) if has_aux else (fn(*full, **kwargs), None)
            _check_scalar(value)
            if not has_aux:
                return value, []
            items, form = flatten(aux)
            around[:] = [form, [None if isinstance(x, Tensor) else (x,) for x in items]]
            return value, [x for x in items if isinstance(x, Tensor)]

        quick = _autograd.value_and_grad(part, tensors) if not _taps_in_use() and _autograd.usable(tensors) else None
        value, aux, found = _autograd.by_transform(part, tensors) if quick is None else quick
        grads = merge(found, others_kept=False)
        grads = grads[0] if isinstance(argnums, int) else grads
        if not has_aux:
            return value, grads
        given, (form, constants) = iter(aux), around
        return (value, unflatten([next(given) if c is None else c[0] for c in constants], form)), grads

    return wrapped


def _pair(out: Any) -> tuple[Any, Any]:
    if not isinstance(out, tuple) or len(out) != 2:
        raise ValueError(f"tree.value_and_grad: with has_aux the function must return (value, aux); got {type(out).__name__}.\n"
                         f"  Return a pair, or leave has_aux out.")
    return out


def _check_scalar(value: Any) -> None:
    if not is_differentiable(value) or value.ndim:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"tree.value_and_grad: the function must return a 0-d tensor of floats; got {got}.\n"
                         f"  Reduce it, for example with .mean(), or use torch.func.jacrev.")


def grad(fn: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """The gradient alone; with has_aux (grad, aux). See `value_and_grad`."""

    def wrapped(*args, **kwargs):
        value, grads = value_and_grad(fn, argnums, has_aux)(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return wrapped


def jvp(fn: Callable, primals: tuple, tangents: tuple, has_aux: bool = False) -> tuple:
    """The value of a function, and how it moves while its arguments move along tangents: forward mode over whole trees.

    Args:
        fn: returns a tree, or (tree, aux) if has_aux.
        primals: its arguments.
        tangents: a tree like it for each argument; None for leaves, or for whole arguments, that stay as they are.
    Returns:
        (value, tangent), or (value, tangent, aux). The tangent has the value's structure, with None for what is not floating.
    Raises:
        ValueError: tangents of other structures or shapes. TypeError: of other dtypes.

    Nests with every transform. Where none is under way, torch's forward mode does it without a level of torch.func: the same numbers
    in half the time for small functions; `fn` runs a second time if it takes derivatives of its own by forward mode.
    """
    if not isinstance(primals, tuple) or not isinstance(tangents, tuple) or len(primals) != len(tangents):
        raise ValueError(f"tree.jvp: primals and tangents must be tuples with one entry per argument; got "
                         f"{_length(primals)} and {_length(tangents)}.\n  Put a single argument into a tuple: (x,), (t,).")
    items, form = flatten(primals)
    moves = [t for primal, tangent in zip(primals, tangents) for t in _tangents(primal, tangent)]
    places = [i for i, t in enumerate(moves) if t is not None]
    around: list = []  # the structures of value and aux, and their leaves that are no tensors

    def part(*new: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        full = list(items)
        for i, x in zip(places, new):
            full[i] = x
        value, aux = _pair(fn(*unflatten(full, form))) if has_aux else (fn(*unflatten(full, form)), None)
        both = [flatten(value), flatten(aux)]
        around[:] = [(structure, [None if isinstance(x, Tensor) else (x,) for x in out]) for out, structure in both]
        return tuple([x for x in out if isinstance(x, Tensor)] for out, _ in both)

    xs, ts = [items[i] for i in places], [moves[i] for i in places]
    quick = _autograd.jvp(part, xs, ts) if not _taps_in_use() and _autograd.usable([*xs, *ts]) else None
    value, moved, aux = _autograd.jvp_by_transform(part, xs, ts) if quick is None else quick
    (of_value, constants), (of_aux, others) = around
    given, along, beside = iter(value), iter(moved), iter(aux)
    found = [unflatten([next(given) if c is None else c[0] for c in constants], of_value),
             unflatten([next(along) if c is None else None for c in constants], of_value)]
    return (*found, unflatten([next(beside) if c is None else c[0] for c in others], of_aux)) if has_aux else tuple(found)


def _length(given: Any) -> str:
    return f"{len(given)} entries" if isinstance(given, tuple) else type(given).__name__


def _tangents(primal: Any, tangent: Any) -> list[Tensor | None]:
    """The tangent of each leaf of one argument, or None."""
    items, form = flatten(primal)
    if tangent is None:
        return [None] * len(items)
    moves, of_moves = flatten(tangent)
    if of_moves != form:
        raise ValueError(f"tree.jvp: a tangent must have the structure of its argument, {form}; got {of_moves}.\n"
                         f"  Make it from the argument: tree.map(torch.zeros_like, primal); None stands for a leaf that stays.")
    for x, t in zip(items, moves):
        if t is None:
            continue
        if not is_differentiable(x) or not isinstance(t, Tensor) or t.dtype != x.dtype:
            got = [f"{i.dtype}" if isinstance(i, Tensor) else type(i).__name__ for i in (x, t)]
            raise TypeError(f"tree.jvp: a tangent must be a tensor of its leaf's floating dtype; got {got[1]} for {got[0]}.\n"
                            f"  Cast it, or put None where nothing moves.")
        if t.shape != x.shape:
            raise ValueError(f"tree.jvp: a tangent must have its leaf's shape {list(x.shape)}; got {list(t.shape)}.\n"
                             f"  Expand it: t.expand_as(x).")
    return moves


def vmap(fn: Callable, in_axes: Any = 0, out_axes: int = 0, *, chunk_size: int | None = None,
         randomness: str = "error") -> Callable:
    """torch.vmap for trees that hold None, numbers and static nodes beside tensors.

    Args:
        in_axes: one entry per argument (or one for all): an int, None for "not mapped", or a tree that is a prefix of the
            argument, with ints and Nones at its leaves.
        out_axes: where the mapped axis goes in every result tensor. Leaves that are not tensors come back once.
        chunk_size: map so many at a time, for memory.
    """

    def wrapped(*args):
        axes = in_axes if isinstance(in_axes, (tuple, list)) else (in_axes,) * len(args)
        if len(axes) != len(args):
            raise ValueError(f"tree.vmap: in_axes must have one entry per argument; got {len(axes)} for {len(args)}.\n"
                             f"  Pass one int for all of them, or a tuple of that length.")
        items, form = flatten(tuple(args))
        dims = [d for axis, arg in zip(axes, args) for d in _spread(axis, arg)]
        dims = [d if isinstance(x, Tensor) else None for d, x in zip(dims, items)]
        outer: list = []

        def flat_fn(*new):
            out, out_form = flatten(fn(*unflatten(new, form)))
            outer[:] = [out_form, [None if isinstance(x, Tensor) else (x,) for x in out]]
            return tuple(x for x in out if isinstance(x, Tensor))

        mapped = iter(torch.vmap(flat_fn, in_dims=tuple(dims), out_dims=out_axes, randomness=randomness,
                                 chunk_size=chunk_size)(*items))
        out_form, constants = outer
        return unflatten([next(mapped) if c is None else c[0] for c in constants], out_form)

    return wrapped


def _spread(axis: Any, tree: Any) -> list[int | None]:
    """The axis of every leaf of `tree`, from a prefix tree of ints and Nones."""
    if axis is None or isinstance(axis, int):
        return [axis] * len(leaves(tree))
    if isinstance(axis, dict) and isinstance(tree, dict) and set(axis) == set(tree):
        return [d for key in tree for d in _spread(axis[key], tree[key])]
    if isinstance(axis, (tuple, list)) and isinstance(tree, (tuple, list)) and len(axis) == len(tree):
        return [d for a, t in zip(axis, tree) for d in _spread(a, t)]
    if type(axis) is type(tree) and not leaves(tree):  # a static node on both sides
        return []
    raise ValueError(f"tree.vmap: in_axes must be a prefix of the argument; got {axis!r} for {type(tree).__name__}.\n"
                     f"  Use an int or None for a whole argument, or a tree of the same outer shape.")


_ARGUMENT = "Make it an argument of the function."


class _Remat(torch.autograd.Function):
    """Calls fn now and again in backward; saves its arguments only."""

    generate_vmap_rule = False

    @staticmethod
    def forward(fn, *xs):
        return _closures.run("tree.remat", fn, xs, _ARGUMENT)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.fn, *xs = inputs
        ctx.mark_non_differentiable(*[out for out in output if not is_differentiable(out)])
        ctx.save_for_backward(*xs)
        ctx.save_for_forward(*xs)

    @staticmethod
    def backward(ctx, *cotangents):
        # A pullback may be called when its level is over, inside others that are not.
        xs, fn = [alive(x) for x in ctx.saved_tensors], ctx.fn
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]

        def part(*chosen):
            full = list(xs)
            for i, x in zip(wanted, chosen):
                full[i] = x
            outs = fn(*full)
            moving[:] = [i for i, out in enumerate(outs) if is_differentiable(out)]
            return tuple(outs[i] for i in moving)

        moving: list[int] = []
        _, pull = torch.func.vjp(part, *[xs[i] for i in wanted])
        grads: list = [None] * len(xs)
        for i, g in zip(wanted, pull(tuple(cotangents[i] for i in moving))):
            grads[i] = g
        return (None, *grads)

    @staticmethod
    def jvp(ctx, _, *tangents):
        # Forward mode is off around this call; nested forward-mode levels need it (level=0: see fnattn_kernels.contracts).
        with fwad._set_fwd_grad_enabled(True):
            xs = [torch._VF._unpack_dual(x, level=0)[0] for x in ctx.saved_tensors]
            duals = [x if t is None else torch._VF._make_dual(x, t, level=0) for x, t in zip(xs, tangents)]
            outs = [torch._VF._unpack_dual(out, level=0) for out in ctx.fn(*duals)]
            return tuple((torch.zeros_like(p) if t is None else t) if is_differentiable(p) else None for p, t in outs)

    @staticmethod
    def vmap(info, in_dims, fn, *xs):
        mapped = torch.func.vmap(fn, in_dims=tuple(in_dims[1:]), randomness=info.randomness)
        out = _Remat.apply(mapped, *xs)
        return out, (0,) * len(out)


def _taps_in_use() -> bool:
    from . import taps  # taps stands on this file

    return taps.in_use()


def _check_tensors(outs: list) -> None:
    bad = [type(x).__name__ for x in outs if not isinstance(x, Tensor)]
    if bad:
        raise TypeError(f"tree.remat: the function must return tensors only; got {bad}.\n"
                        f"  Return the other values separately, outside remat.")


def remat(fn: Callable) -> Callable:
    """fn, recomputed in the backward pass instead of keeping its intermediates: memory of its arguments, one more forward.

    Works under every torch.func transform, where torch.utils.checkpoint does not. Every tensor that is to receive a
    gradient must be an argument: one that fn captures is refused. It is plain fn where no derivative is taken, and under
    torch.compile: the compiler decides there. So it is while taps are harvested or planted: the second run would not see what
    was planted.
    """

    def wrapped(*args):
        if torch.compiler.is_compiling() or _taps_in_use():
            return fn(*args)
        items, form = flatten(args)
        if not _closures.differentiated(items):
            out = fn(*args)
            _check_tensors(leaves(out))
            return out
        _closures.check("tree.remat", fn, _ARGUMENT)
        places = [i for i, x in enumerate(items) if isinstance(x, Tensor)]
        fixed = [None if isinstance(x, Tensor) else x for x in items]
        out_form: list = []

        def flat_fn(*tensors):
            full = list(fixed)
            for i, t in zip(places, tensors):
                full[i] = t
            out, form_out = flatten(fn(*unflatten(full, form)))
            _check_tensors(out)
            out_form[:] = [form_out]
            # An argument returned as it is cannot be saved as well; a view of it can.
            return tuple(x.view_as(x) if any(x is t for t in tensors) else x for x in out)

        out = _Remat.apply(flat_fn, *[items[i] for i in places])
        return unflatten(out, out_form[0])

    return wrapped
