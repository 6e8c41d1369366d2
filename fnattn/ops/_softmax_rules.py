"""The derivatives of softmax attention: formulas in plain torch, and rules that close the fused operators under differentiation.

Value, gradient, tangent, and the tangent of the gradient are fused. They close to second order, for with f = g . attend(q, k, v),
whose gradient in (q, k, v) is `attend_backward`, J the Jacobian of attend and H the symmetric Hessian of f in (q, k, v):

    tangent of attend_backward along (tg, t)       attend_second = H t + J^T tg
    pull-back of c through attend_backward         H c for (q, k, v);   J c for g, which is `attend_tangent`
    pull-back of c through attend_tangent          H t of c . attend for (q, k, v);   J^T c for t, which is `attend_backward`

So a Hessian-vector product, in whichever mode, needs no [n, m] table. Where forward mode is all there is, a kernel may give value and
tangent in one: `along`. A tangent of a tangent and third derivatives are those of
the formulas. All recompute the weights from q, k and v: a saved result (out, lse, their tangents) is a function of them, not an
input, and is never differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from fnattn_kernels.contracts import Operator, reference_vjp
from fnattn_kernels.forward_mode import reference_jvp
from torch import Tensor

# b batch, h query heads, g key heads, r = h / g, n queries, m keys, d width of q and k, e width of v


def weights(scores: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Softmax over the last axis among the allowed entries; rows without one are exactly 0, with finite derivatives.

    scores [..., m]; allowed bool, broadcastable to scores. The softmax of every attention in plain torch.
    """
    if scores.shape[-1] == 0:
        return scores
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)
    p = (scores - top).exp()
    # The largest entry of a row is exp(0) = 1, so only the sum of an empty row is below 1; a half keeps its slope at zero.
    return p / p.sum(-1, keepdim=True).clamp_min(0.5)


def _allowed(mask: Tensor | None, start: int | None, n: int, m: int, g: int, device: torch.device) -> Tensor | None:
    """What may be attended, broadcastable to [b, g, h/g, n, m]; None: everything."""
    seen = None
    if mask is not None:
        seen = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (g, mask.shape[1] // g))
    if start is not None:
        past = torch.arange(m, device=device) <= start + torch.arange(n, device=device)[:, None]
        seen = past if seen is None else seen & past
    return seen


def _table(q: Tensor, k: Tensor, mask: Tensor | None, start: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """q grouped by key heads [b, g, r, n, d], and the weights [b, g, r, n, m]."""
    g, m = k.shape[1:3]
    q = q.unflatten(1, (g, q.shape[1] // g if g else 0))
    scores = torch.einsum("bgrid,bgjd->bgrij", q * scale, k)
    return q, weights(scores, _allowed(mask, start, q.shape[3], m, g, q.device))


# ------------------------------------------------------------------------------------------------ formulas
# In the operators' arguments. `out`, `lse`, `t_out` and `t_lse` are there unused: see the head of this file.


def backward_formula(g, q, k, v, mask, out, lse, start, scale, g_lse=None):
    """Gradients of q, k and v for the cotangent g of the value, and that of the log-sum-exp if there is one."""
    q, p = _table(q, k, mask, start, scale)
    g = g.unflatten(1, q.shape[1:3])
    slope = torch.einsum("bgrie,bgje->bgrij", g, v)
    slope = slope - (p * slope).sum(-1, keepdim=True)
    if g_lse is not None:
        slope = slope + g_lse.to(slope.dtype).unflatten(1, q.shape[1:3])[..., None]
    slope = p * slope * scale
    return (torch.einsum("bgrij,bgjd->bgrid", slope, k).flatten(1, 2), torch.einsum("bgrij,bgrid->bgjd", slope, q),
            torch.einsum("bgrij,bgrie->bgje", p, g))


def tangent_formula(q, k, v, mask, out, lse, tq, tk, tv, start, scale):
    """Tangents of the value and of the log-sum-exp along (tq, tk, tv), of which any may be None."""
    q, p = _table(q, k, mask, start, scale)
    moved = torch.zeros_like(p)
    if tq is not None:
        moved = moved + torch.einsum("bgrid,bgjd->bgrij", tq.unflatten(1, q.shape[1:3]), k)
    if tk is not None:
        moved = moved + torch.einsum("bgrid,bgjd->bgrij", q, tk)
    moved = p * moved * scale
    t_lse = moved.sum(-1)
    t_out = torch.einsum("bgrij,bgje->bgrie", moved - t_lse[..., None] * p, v)
    if tv is not None:
        t_out = t_out + torch.einsum("bgrij,bgje->bgrie", p, tv)
    return t_out.flatten(1, 2), t_lse.flatten(1, 2).to(lse.dtype)


def second_formula(g, q, k, v, mask, out, lse, t_out, t_lse, tg, tq, tk, tv, start, scale):
    """The tangents of `backward_formula`'s gradients along (tg, tq, tk, tv), of which any may be None."""
    tg, tq, tk, tv = (torch.zeros_like(x) if t is None else t for x, t in ((g, tg), (q, tq), (k, tk), (v, tv)))
    q, p = _table(q, k, mask, start, scale)
    g, tg, tq = (t.unflatten(1, q.shape[1:3]) for t in (g, tg, tq))
    ts = scale * (torch.einsum("bgrid,bgjd->bgrij", tq, k) + torch.einsum("bgrid,bgjd->bgrij", q, tk))
    tp = p * (ts - (p * ts).sum(-1, keepdim=True))
    slope = torch.einsum("bgrie,bgje->bgrij", g, v)
    t_slope = torch.einsum("bgrie,bgje->bgrij", tg, v) + torch.einsum("bgrie,bgje->bgrij", g, tv)
    t_slope = t_slope - (tp * slope + p * t_slope).sum(-1, keepdim=True)
    slope = slope - (p * slope).sum(-1, keepdim=True)
    ds, tds = scale * p * slope, scale * (tp * slope + p * t_slope)
    dq = torch.einsum("bgrij,bgjd->bgrid", tds, k) + torch.einsum("bgrij,bgjd->bgrid", ds, tk)
    dk = torch.einsum("bgrij,bgrid->bgjd", tds, q) + torch.einsum("bgrij,bgrid->bgjd", ds, tq)
    dv = torch.einsum("bgrij,bgrie->bgje", tp, g) + torch.einsum("bgrij,bgrie->bgje", p, tg)
    return dq.flatten(1, 2), dk, dv


# ------------------------------------------------------------------------------------------------ rules


class Kind(NamedTuple):
    """What fused attention under some kind of mask has beside (q, k, v, mask): one rule set serves all kinds.

    backward, tangent, second: the formulas, in the arguments of the operators of those names.
    shared: where attend, backward, tangent and second have an argument that all sequences may share.
    """

    backward: Callable
    tangent: Callable
    second: Callable
    shared: tuple[int, int, int, int]


DENSE = Kind(backward_formula, tangent_formula, second_formula, (3, 4, 3, 4))


def derive(attend: Operator, backward: Operator, tangent: Operator, second: Operator, along: Operator | None = None,
           kind: Kind = DENSE) -> None:
    """Gives the operators of a kernel their derivatives and vmap rules. along: attend and tangent in one, if there is such.

    Arguments are q, k, v, mask and what the kind has; before them g, after the mask out, lse and tangents, where there are any.
    """
    value_vjp, value_jvp = derive_value(attend, backward, tangent, kind, along)

    def backward_vjp(needs, args, outs, cotangents):
        g, q, k, v, mask, out, lse, *rest = args
        moved = tangent(q, k, v, mask, out, lse, *cotangents, *rest)
        grads = second(g, q, k, v, mask, out, lse, *moved, None, *cotangents, *rest) if any(needs[1:4]) else (None,) * 3
        return (*_where(needs, (moved[0], *grads)), *(None for _ in args[4:]))

    def backward_jvp(args, outs, tangents):
        g, q, k, v, mask, out, lse, *rest = args
        if all(t is None for t in tangents[1:4]):
            return backward(tangents[0], q, k, v, mask, out, lse, *rest)
        moved = tangents[5:7]  # those of out and lse, unless they were saved before anyone moved
        if any(t is None for t in moved):
            moved = tangent(q, k, v, mask, out, lse, *tangents[1:4], *rest)
        return second(g, q, k, v, mask, out, lse, *moved, *tangents[:4], *rest)

    def tangent_vjp(needs, args, outs, cotangents):
        c, c_lse = cotangents
        if c_lse is not None:
            return reference_vjp(kind.tangent, needs, args, cotangents)
        q, k, v, mask, out, lse, tq, tk, tv, *rest = args
        first = second(c, q, k, v, mask, out, lse, *outs, None, tq, tk, tv, *rest) if any(needs[:3]) else (None,) * 3
        moves = backward(c, q, k, v, mask, out, lse, *rest) if any(needs[6:9]) else (None,) * 3
        return (*_where(needs, first), None, None, None, *_where(needs[6:], moves), *(None for _ in rest))

    def tangent_jvp(args, outs, tangents):
        return reference_jvp(kind.tangent, args, tangents)

    def along_vjp(needs, args, outs, cotangents):
        """The sum of what the value and the tangent pass back."""
        q, k, v, mask, tq, tk, tv, *rest = args
        grads = [None] * len(args)
        if any(c is not None for c in cotangents[:2]):
            grads[:3] = value_vjp(needs[:4] + needs[7:], (q, k, v, mask, *rest), outs[:2], cotangents[:2])[:3]
        if any(c is not None for c in cotangents[2:]):
            more = tangent_vjp((*needs[:4], False, False, *needs[4:]), (q, k, v, mask, *outs[:2], tq, tk, tv, *rest), outs[2:],
                               cotangents[2:])
            grads[:3] = (b if a is None else a + b if b is not None else a for a, b in zip(grads, more[:3]))
            grads[4:7] = more[6:9]
        return tuple(grads)

    def along_jvp(args, outs, tangents):
        q, k, v, mask, tq, tk, tv, *rest = args
        moved = value_jvp((q, k, v, mask, *rest), outs[:2], tangents)
        return *moved, *tangent_jvp((q, k, v, mask, *outs[:2], tq, tk, tv, *rest), outs[2:],
                                    (*tangents[:4], None, None, *tangents[4:]))

    at_attend, at_backward, at_tangent, at_second = kind.shared
    backward.derive(vjp=backward_vjp, jvp=backward_jvp, batch=_fold(backward, at_backward), save_outputs=False)
    tangent.derive(vjp=tangent_vjp, jvp=tangent_jvp, batch=_fold(tangent, at_tangent))
    second.derive(vjp=lambda needs, args, outs, cotangents: reference_vjp(kind.second, needs, args, cotangents),
                  jvp=lambda args, outs, tangents: reference_jvp(kind.second, args, tangents),
                  batch=_fold(second, at_second), save_outputs=False)
    if along is not None:
        along.derive(vjp=along_vjp, jvp=along_jvp, batch=_fold(along, at_attend))  # the mask's place is attend's


def derive_value(attend: Operator, backward: Operator, tangent: Operator, kind: Kind = DENSE,
                 along: Operator | None = None) -> tuple[Callable, Callable]:
    """Gives an operator that computes value and log-sum-exp its derivatives, by those of a kernel that has all four; says them."""

    def vjp(needs, args, outs, cotangents):
        q, k, v, mask, *rest = args
        g, g_lse = cotangents
        if g_lse is None:
            grads = backward(g, q, k, v, mask, *outs, *rest)
        else:
            g = torch.zeros_like(outs[0]) if g is None else g
            grads = kind.backward(g, q, k, v, mask, *outs, *rest, g_lse)
        return (*_where(needs, grads), *(None for _ in args[3:]))

    def jvp(args, outs, tangents):
        q, k, v, mask, *rest = args
        return tangent(q, k, v, mask, *outs, *tangents[:3], *rest)

    def both(args, tangents):
        outs = along(*args[:4], *tangents[:3], *args[4:])
        return outs[:2], outs[2:]

    attend.derive(vjp=vjp, jvp=jvp, both=None if along is None else both, batch=_fold(attend, kind.shared[0]))
    return vjp, jvp


def _where(needs, grads) -> tuple:
    return tuple(x if need else None for x, need in zip(grads, needs))


def _fold(operator: Operator, shared: int):
    """The mapped axis becomes part of the batch axis; what all members and sequences share is not repeated."""

    def rule(info, in_dims, *args):
        size = info.batch_size
        b = (args[0] if in_dims[0] is None else args[0].movedim(in_dims[0], 0)[0]).shape[0]

        def merge(i, x, dim):
            if not isinstance(x, Tensor) or i == shared and dim is None and x.shape[0] == 1:
                return x
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.expand(size, b, *x.shape[2:]).flatten(0, 1)

        outs = operator(*[merge(i, x, d) for i, (x, d) in enumerate(zip(args, in_dims))])
        return tuple(out.unflatten(0, (size, b)) for out in outs), (0,) * len(outs)

    return rule
