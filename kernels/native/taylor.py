"""C kernels of Taylor linear attention: forward, backward and the tangents of both; see csrc/taylor.c and the headers it includes.

Arguments of all: q [b, h, n, d], k [b, g, m, d], v [b, g, m, e], keep [b, m] in the same dtype or None, sums
[b, g, F, e+1] or None; hard: keep is 0 or 1 and keys with 0 may hold anything, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import crossovers
from ..contracts import Operator
from .call import address, function, threads


def _plain(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def features(d: int) -> int:
    """Number of symmetric second-order features of d channels: 1 + d + d (d + 1) / 2."""
    return 1 + d + d * (d + 1) // 2


_QUADRATIC = crossovers.limits("taylor", "native, quadratic")


def _near(name: str, n: int, d: int, e: int) -> int:
    """How many positions read earlier ones pair by pair, in units of the pairs that cost as much as reading a state.

    That is about d^2 / 4. A gradient that does so for a whole sequence keeps no states, and gains by that up to about d^2.
    """
    pairs = features(d) * (e + 1) / (d + e + 1)
    if name != "backward":
        return int(_QUADRATIC["value"] * pairs)
    return n if n <= _QUADRATIC["whole"] * pairs else int(_QUADRATIC["gradient"] * pairs)


def _run(name: str, tensors: list[Tensor | None], hard: bool, causal: bool, scale: float, eps: float) -> None:
    q, k, v = tensors[:3]
    (b, h, n, d), (_, g, m, e) = q.shape, v.shape
    work = b * max(h * n, g * m) * features(d) * (e + 1)
    sizes = (b, h, g, n, m, d, e) + (() if name == "second" else (_near(name, n, d, e),))
    call = function("taylor", f"try_taylor_{name}", q.dtype, "p" * len(tensors) + "i" * (len(sizes) + 2) + "ddi")
    if call(*map(address, tensors), *sizes, int(hard), int(causal), scale, eps, threads(work)):
        raise MemoryError(f"taylor: no memory for the native kernel's workspace (d={d}, e={e})")


def _forward(q, k, v, keep, sums, hard: bool, causal: bool, scale: float, eps: float):
    q, k, v, keep, sums = _plain(q, k, v, keep, sums)
    outs = [torch.empty(s, dtype=q.dtype) for s in _forward_shapes(q, k, v)]
    if q.shape[0] and k.shape[1]:
        _run("forward", [q, k, v, keep, sums, *outs], hard, causal, scale, eps)
    return tuple(outs)


def _forward_shapes(q, k, v):
    (b, h, n, d), (_, g, _, e) = q.shape, v.shape
    return (b, h, n, e), (b, h, n), (b, g, features(d), e + 1)


def _backward(q, k, v, keep, sums, out, den, grad, grad_sums, hard: bool, causal: bool, scale: float, eps: float):
    inputs = _plain(q, k, v, keep, sums, out, den, grad, grad_sums)
    q, k, v, keep, sums = inputs[:5]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    b, g, m, _ = k.shape
    dkeep = None if keep is None or hard else torch.empty((b, g, m), dtype=q.dtype)
    dsums = None if sums is None else torch.empty_like(sums)
    if b and g:
        _run("backward", [*inputs, dq, dk, dv, dkeep, dsums], hard, causal, scale, eps)
    return (dq, dk, dv, q.new_empty(b, 0) if dkeep is None else dkeep.sum(1),
            q.new_empty(b, 0, 0, 0) if dsums is None else dsums)


def _tangent(q, k, v, keep, sums, out, den, tq, tk, tv, tkeep, tsums, hard: bool, causal: bool, scale: float, eps: float):
    inputs = _plain(q, k, v, keep, sums, out, den, tq, tk, tv, tkeep, tsums)
    outs = [torch.empty(s, dtype=q.dtype) for s in _forward_shapes(q, k, v)]
    if q.shape[0] and k.shape[1]:
        _run("tangent", [*inputs, *outs, None], hard, causal, scale, eps)
    return tuple(outs)


def _both(q, k, v, keep, sums, tq, tk, tv, tkeep, tsums, hard: bool, causal: bool, scale: float, eps: float):
    inputs, moves = _plain(q, k, v, keep, sums), _plain(tq, tk, tv, tkeep, tsums)
    out, den, total, *along = [torch.empty(s, dtype=q.dtype) for s in 2 * _forward_shapes(q, k, v)]
    if q.shape[0] and k.shape[1]:
        _run("tangent", [*inputs, out, den, *moves, *along, total], hard, causal, scale, eps)
    return out, den, total, *along


def _both_fake(q, k, v, *rest):
    return tuple(q.new_empty(s) for s in 2 * _forward_shapes(q, k, v))


def _tangent_fake(q, k, v, keep, sums, out, den, tq, tk, tv, tkeep, tsums, hard, causal, scale, eps):
    return tuple(q.new_empty(s) for s in _forward_shapes(q, k, v))


def _second(*args):
    return _second_call(args, own=False)


def _backward_both(*args):
    return _second_call(args, own=True)


def _second_call(args: tuple, own: bool) -> tuple[Tensor, ...]:
    """The tangents of dq, dk, dv, dsums; behind those four gradients themselves if `own`."""
    inputs, options = _plain(*args[:17]), args[17:]
    q, k, v, _, sums = inputs[:5]
    along = _second_fake(q, k, v, None, sums)
    grads = _second_fake(q, k, v, None, sums) if own else (None,) * 4
    if q.shape[0] and k.shape[1]:
        outs = [*along, *grads]
        _run("second", [*inputs, *(None if sums is None and i % 4 == 3 else t for i, t in enumerate(outs))], *options)
    return (*grads, *along) if own else along


def _second_fake(q, k, v, keep, sums, *rest):
    return (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape),
            q.new_empty(q.shape[0], 0, 0, 0) if sums is None else sums.new_empty(sums.shape))


def _backward_both_fake(*args):
    return *_second_fake(*args), *_second_fake(*args)


def _forward_fake(q, k, v, keep, sums, hard, causal, scale, eps):
    return tuple(q.new_empty(s) for s in _forward_shapes(q, k, v))


def _backward_fake(q, k, v, keep, sums, out, den, grad, grad_sums, hard, causal, scale, eps):
    b = q.shape[0]
    return (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape),
            q.new_empty(b, 0) if keep is None or hard else keep.new_empty(keep.shape),
            q.new_empty(b, 0, 0, 0) if sums is None else sums.new_empty(sums.shape))


_OPTIONS = "bool hard, bool causal, float scale, float eps"
# out [b, h, n, e], den [b, h, n] (sum of p before the clamp), sums [b, g, F, e+1] with this call's keys in them
forward = Operator(
    "taylor_native", 2, "(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? sums, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=_forward_fake, cpu=_forward)
# gradients of q, k, v, keep ([b, 0] if keep is None or hard) and sums ([b, 0, 0, 0] if None) for the cotangents of out
# and of the returned sums
backward = Operator(
    "taylor_backward_native", 1, "(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? sums, Tensor out, Tensor den, "
    f"Tensor grad, Tensor? grad_sums, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake, cpu=_backward)
# tangents of forward's three results when q, k, v, keep and sums move along tq, tk, tv, tkeep, tsums (None: do not move)
tangent = Operator(
    "taylor_tangent_native", 1, "(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? sums, Tensor out, Tensor den, "
    f"Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tkeep, Tensor? tsums, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=_tangent_fake, cpu=_tangent)
# forward's three results and the tangent of each: what value and tangent share is made once
both = Operator(
    "taylor_both_native", 1, "(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? sums, Tensor? tq, Tensor? tk, Tensor? tv, "
    f"Tensor? tkeep, Tensor? tsums, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", fake=_both_fake, cpu=_both)
# tangents of backward's results dq, dk, dv, dsums when q, k, v, sums, grad and grad_sums move (None: do not move); tout and
# tden are those of out and den. keep must be None or hard
_SECOND = ("(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? sums, Tensor out, Tensor den, Tensor grad, Tensor? grad_sums, "
           "Tensor tout, Tensor tden, Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tsums, Tensor? tgrad, Tensor? tgrad_sums, "
           f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor")
second = Operator("taylor_second_native", 1, f"{_SECOND})", fake=_second_fake, cpu=_second)
# dq, dk, dv and dsums themselves, then the tangent of each
backward_both = Operator("taylor_backward_both_native", 1, f"{_SECOND}, Tensor, Tensor, Tensor, Tensor)", fake=_backward_both_fake,
                         cpu=_backward_both)


def _flops(products_q: int, products_k: int):
    """A FLOP formula: so many products with the state [F, e + 1] per query and per key."""
    def formula(q, k, v, *args, **kwargs):
        return 2 * q[0] * features(q[3]) * (v[3] + 1) * (products_q * q[1] * q[2] + products_k * k[1] * k[2])
    return formula


forward.flops(_flops(1, 1))
backward.flops(_flops(2, 3))
tangent.flops(_flops(2, 3))
both.flops(_flops(3, 3))
second.flops(_flops(6, 8))
backward_both.flops(_flops(6, 9))
forward.split((1, 1, 1, None, 1), (1, 1, 1))
backward.split((1, 1, 1, None, 1, 1, 1, 1, 1), (1, 1, 1, "sum", 1))  # the heads share keep
tangent.split((1, 1, 1, None, 1, 1, 1, 1, 1, 1, None, 1), (1, 1, 1))
both.split((1, 1, 1, None, 1, 1, 1, 1, None, 1), (1,) * 6)
second.split((1, 1, 1, None, *(1,) * 13), (1,) * 4)
backward_both.split((1, 1, 1, None, *(1,) * 13), (1,) * 8)
