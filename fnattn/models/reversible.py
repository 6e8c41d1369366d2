"""A reversible stack: two streams, from whose last values the backward pass recomputes all earlier ones.

    y1 = x1 + f(x2),   y2 = x2 + g(y1)            for each block, starting from x1 = x2 = x
    x2 = y2 - g(y1),   x1 = y1 - f(x2)            on the way back

Only the last two streams are kept for the gradient, so the memory of activations does not grow with the number of
blocks; the price is one more forward pass. Upstream's Function receives its parameters behind autograd's back and
replays a global random state, so that it fails in eval mode, under every transform, and silently if two forward passes
come before one backward pass. Here parameters and dropout keys are arguments, and every transform works.

Source: Gomez et al. 2017, arXiv 1707.04585; ReversibleSequence of linformer 0.2.3 (sum) and of dalle-pytorch 1.6.6
(mean).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwad
from fnattn_kernels.watchers import alive
from torch import Tensor

from .. import _closures, taps, tree
from ..core import check

MERGES = ("sum", "mean")


def reversible(blocks: Sequence[tuple[Callable, Callable]], params: Sequence[tuple[Any, Any]], x: Tensor, *shared: Any,
               merge: str = "sum") -> Tensor:
    """x through a stack of reversible blocks, whose activations are recomputed in the backward pass.

        y1 = x1 + f(f_params, x2, *shared),   y2 = x2 + g(g_params, y1, *shared);   the result is y1 + y2 or their mean

    Time: two forward passes and one backward pass for a gradient. Memory: that of one block, whatever their number.

    Args:
        blocks: pairs (f, g) of pure functions f(f_params, x, *shared) -> a tensor of x's shape. They are called again
            in the backward pass, so they must give the same bits twice: randomness comes from keys among their params.
        params: one pair (f_params, g_params) of trees for each block: weights, dropout keys, whatever differs by block.
            A tensor may occur in many places; its gradients add up.
        x: any shape, floating point; both streams start from it.
        shared: trees that every f and g gets, such as a mask or a table of rotary angles.
        merge: "sum" (Linformer) or "mean" (DALLE) of the two streams.
    Returns:
        x's shape and dtype. The streams are added up in float32, or in float64 if x is, also for low-precision x: what
        the backward pass recovers then differs from what the forward pass saw by rounding in that precision only.
    Raises:
        ValueError: as many params as blocks are needed, a known merge, and no gradient may hide in a closure of f or g.

    Every transform works, in any nesting: grad, vjp, jvp, vmap, hessian, double backward; also for params that are
    batched. A second derivative keeps the activations of the first backward pass, and torch.func.grad always prepares
    for one: take gradients with fnattn.tree.grad or torch.func.vjp to save the memory. Under torch.compile it is
    `plain`: the compiler decides there. So it is while taps are harvested or planted.
    """
    blocks, params = list(blocks), list(params)
    _check_pairs(blocks, params)
    check(merge in MERGES, "models.reversible: merge must be 'sum' or 'mean'; got {!r}.", merge,
          remedy="Linformer adds the streams, DALLE takes their mean.")
    # Where no derivative is taken there is nothing to save; a compiler decides itself.
    if torch.compiler.is_compiling() or not _closures.differentiated(tree.leaves((params, x, shared))):
        return plain(blocks, params, x, *shared, merge=merge)
    halves, tensors = _flatten(blocks, params, shared)
    if not halves or taps.in_use():
        return plain(blocks, params, x, *shared, merge=merge)
    return _merged(*_Reversible.apply(_Stack(tuple(halves), x.dtype), _wide(x), *tensors), merge, x.dtype)


def plain(blocks: Sequence[tuple[Callable, Callable]], params: Sequence[tuple[Any, Any]], x: Tensor, *shared: Any,
          merge: str = "sum") -> Tensor:
    """The same recurrence in ordinary torch, which keeps every activation. The specification of `reversible`."""
    y1 = y2 = _wide(x)
    for (f, g), (f_params, g_params) in zip(blocks, params):
        y1 = y1 + f(f_params, y2.to(x.dtype), *shared)
        y2 = y2 + g(g_params, y1.to(x.dtype), *shared)
    return _merged(y1, y2, merge, x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _merged(y1: Tensor, y2: Tensor, merge: str, dtype: torch.dtype) -> Tensor:
    return ((y1 + y2) if merge == "sum" else (y1 + y2) / 2).to(dtype)


# ------------------------------------------------------------------------------------------------ flat form


_WHO, _REMEDY = "models.reversible", "Pass it in params or shared."


class _Half(NamedTuple):
    """One f or g as a function run(x, *tensors) of the tensors at these places in the flat list."""

    run: Callable
    places: tuple[int, ...]


class _Stack(NamedTuple):
    """All halves f0, g0, f1, g1, ..., and the dtype in which they get their stream."""

    halves: tuple[_Half, ...]
    dtype: torch.dtype


def _check_pairs(blocks: Sequence, params: Sequence) -> None:
    check(len(blocks) == len(params), "models.reversible: expected one pair of params for each block; got {} for {} "
          "blocks.", len(params), len(blocks),
          remedy="Pass params=[(f_params, g_params), ...], EMPTY where a half needs none.")
    for pair, pair_params in zip(blocks, params):
        check(len(pair) == 2 and len(pair_params) == 2, "models.reversible: each block is a pair (f, g), with a pair "
              "of params; got {} and {}.", len(pair), len(pair_params),
              remedy="Pass blocks=[(f, g), ...], params=[(f_params, g_params), ...].")


def _flatten(blocks: Sequence, params: Sequence, shared: tuple) -> tuple[list[_Half], list[Tensor]]:
    """The halves, and every tensor that they need, each once."""
    tensors: list[Tensor] = []
    place_of: dict[int, int] = {}
    halves = []
    for pair, pair_params in zip(blocks, params):
        for fn, fn_params in zip(pair, pair_params):
            _closures.check(_WHO, fn, _REMEDY)
            items, form = tree.flatten((fn_params, *shared))
            at = [i for i, item in enumerate(items) if isinstance(item, Tensor)]
            for i in at:
                if id(items[i]) not in place_of:
                    place_of[id(items[i])] = len(tensors)
                    tensors.append(items[i])
            places = tuple(place_of[id(items[i])] for i in at)
            others = [None if isinstance(item, Tensor) else item for item in items]
            halves.append(_Half(functools.partial(_call, fn, form, others, at), places))
    return halves, tensors


def _call(fn: Callable, form: Any, others: list, at: list[int], x: Tensor, *tensors: Tensor) -> Tensor:
    """fn with its trees put together again."""
    items = list(others)
    for i, t in zip(at, tensors):
        items[i] = t
    fn_params, *shared = tree.unflatten(items, form)
    out = fn(fn_params, x, *shared)
    check(isinstance(out, Tensor) and out.shape == x.shape,
          "models.reversible: f and g must return a tensor of x's shape {}; got {}.",
          list(x.shape), list(out.shape) if isinstance(out, Tensor) else type(out).__name__,
          remedy="Return the residual only, without states.")
    return out


# ------------------------------------------------------------------------------------------------ both passes


def _forward(stack: _Stack, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The last values of the two streams."""
    own, other = x, x
    for half in stack.halves:
        # f adds to the first stream what it reads from the second; then the roles change.
        own, other = other, own + half.run(other.to(stack.dtype), *[tensors[i] for i in half.places])
    return own, other


def _backward(stack: _Stack, needs: Sequence[bool], y1: Tensor, y2: Tensor, d1: Tensor, d2: Tensor,
              tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients for x and for each needed tensor, from the last streams and their cotangents."""
    grads: list[Tensor | None] = [None] * len(tensors)
    other, own, d_other, d_own = y1, y2, d1, d2
    for half in reversed(stack.halves):
        wanted = [n for n, i in enumerate(half.places) if needs[i]]
        given = [tensors[i] for i in half.places]

        def part(stream, *chosen, half=half, wanted=wanted, given=given):
            full = list(given)
            for n, t in zip(wanted, chosen):
                full[n] = t
            return half.run(stream.to(stack.dtype), *full)

        added, pull = torch.func.vjp(part, other, *[given[n] for n in wanted])
        d_stream, *d_given = pull(d_own.to(added.dtype))
        for n, grad in zip(wanted, d_given):
            i = half.places[n]
            grads[i] = grad if grads[i] is None else grads[i] + grad
        own, other, d_own, d_other = other, own - added, d_other + d_stream, d_own
    return d_own + d_other, grads


class _Reversible(torch.autograd.Function):
    """(stack, x, *tensors) -> the last values of the two streams. Saves these and the tensors, no activation."""

    generate_vmap_rule = False

    @staticmethod
    def forward(stack, x, *tensors):
        return _closures.run(_WHO, lambda x, *tensors: _forward(stack, x, tensors), (x, *tensors), _REMEDY)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.stack, x, *tensors = inputs
        device = x.device.type
        ctx.autocast = {"device_type": device, "dtype": torch.get_autocast_dtype(device),
                        "enabled": torch.is_autocast_enabled(device)}
        # The outputs are functions of the inputs, and autograd knows: second derivatives through them are right.
        ctx.save_for_backward(*output, *tensors)
        ctx.save_for_forward(x, *tensors)

    @staticmethod
    def backward(ctx, d1, d2):
        # torch.func.vjp pulls back after its level has ended, and leaves saved outputs in wrappers that outer levels
        # trip over.
        y1, y2, *tensors = [alive(t) for t in ctx.saved_tensors]
        # Outside the forward pass's autocast the recomputed values would be others.
        with torch.autocast(**ctx.autocast):
            dx, grads = _backward(ctx.stack, ctx.needs_input_grad[2:], y1, y2, d1, d2, tensors)
        return None, dx, *grads

    @staticmethod
    def jvp(ctx, _, *tangents):
        # Forward mode is off around this call; nested forward-mode levels need it (level=0: see
        # fnattn_kernels.contracts).
        with fwad._set_fwd_grad_enabled(True):
            primals = [torch._VF._unpack_dual(t, level=0)[0] for t in ctx.saved_tensors]
            x, *tensors = [p if t is None else torch._VF._make_dual(p, t, level=0) for p, t in zip(primals, tangents)]
            outs = [torch._VF._unpack_dual(y, level=0) for y in _forward(ctx.stack, x, tensors)]
            return tuple(torch.zeros_like(p) if t is None else t for p, t in outs)

    @staticmethod
    def vmap(info, in_dims, stack, x, *tensors):
        _, x_dim, *dims = in_dims
        x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)

        def mapped(half):
            at = (0, *[dims[i] for i in half.places])
            return _Half(torch.func.vmap(half.run, in_dims=at, randomness=info.randomness), half.places)

        halves = tuple(mapped(half) for half in stack.halves)
        return _Reversible.apply(stack._replace(halves=halves), x, *tensors), (0, 0)
