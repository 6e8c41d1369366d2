"""The derivatives of Taylor attention's kernels, the same for all of them.

Value, gradient and tangent are kernels, and so is the tangent of the gradient, which serves both ways to a Hessian-vector
product. Beyond that, and for the gradient of soft weights of keys, derivatives are those of the plain-torch forms.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from fnattn_kernels.contracts import reference_vjp
from fnattn_kernels.forward_mode import reference_jvp

from .reference import gradients, reference, tangents
from .second import gradient_tangents


def _of_plain_torch(fn: Callable) -> dict[str, Callable]:
    """Both rules of an operator whose plain-torch form is fn."""
    return dict(vjp=lambda needs, args, outs, cotangents: reference_vjp(fn, needs, args, cotangents),
                jvp=lambda args, outs, moves: reference_jvp(fn, args, moves), save_outputs=False)


def derive(kernel: ModuleType) -> None:
    """Gives kernel.forward, .backward, .tangent and .second their derivatives, and .both and .backward_both if there are such.

    See native/taylor.py.
    """

    def vjp(needs, args, outs, cotangents):
        q, k, v, keep, sums, *options = args
        out, den, _ = outs
        grad, grad_den, grad_sums = cotangents
        if grad_den is not None:  # nobody outside reads den, so this serves direct calls of the operator only
            return reference_vjp(reference, needs, args, cotangents)
        grad = torch.zeros_like(out) if grad is None else grad
        grads = kernel.backward(q, k, v, keep, sums, out, den, grad, grad_sums, *options)
        return (*(g if need else None for g, need in zip(grads, needs)), *(None for _ in options))

    def jvp(args, outs, moves):
        return kernel.tangent(*args[:5], outs[0], outs[1], *moves[:5], *args[5:])

    def backward_vjp(needs, args, outs, cotangents):
        """Hessian times vector: backward is a gradient, so its transposed derivative is its derivative."""
        q, k, v, keep, sums, out, den, grad, grad_sums, *options = args
        cq, ck, cv, _, csums = cotangents
        if keep is not None and not options[0]:
            return reference_vjp(gradients, needs, args, cotangents)
        csums = None if sums is None else csums
        tout, tden, ttotal = kernel.tangent(q, k, v, keep, sums, out, den, cq, ck, cv, None, csums, *options)
        dq, dk, dv, dsums = kernel.second(q, k, v, keep, sums, out, den, grad, grad_sums, tout, tden, cq, ck, cv, csums, None, None,
                                          *options)
        grads = (dq, dk, dv, None, dsums, None, None, tout, ttotal)
        return (*(g if need else None for g, need in zip(grads, needs)), *(None for _ in options))

    def backward_jvp(args, outs, moves):
        q, k, v, keep, sums, out, den, grad, grad_sums, *options = args
        tq, tk, tv, _, tsums, tout, tden, tgrad, tgrad_sums = moves[:9]
        if keep is not None and not options[0]:
            return reference_jvp(gradients, args, moves)
        if tout is None or tden is None:
            tout, tden, _ = kernel.tangent(q, k, v, keep, sums, out, den, tq, tk, tv, None, tsums, *options)
        dq, dk, dv, dsums = kernel.second(q, k, v, keep, sums, out, den, grad, grad_sums, tout, tden, tq, tk, tv, tsums, tgrad, tgrad_sums,
                                          *options)
        return dq, dk, dv, q.new_empty(q.shape[0], 0), dsums

    def both(args, moves):
        outs = kernel.both(*args[:5], *moves[:5], *args[5:])
        return outs[:3], outs[3:]

    def backward_both(args, moves):
        q, _, _, keep, *_, hard, _, _, _ = args
        if (keep is not None and not hard) or moves[5] is None or moves[6] is None:
            return kernel.backward(*args), backward_jvp(args, None, moves)
        tq, tk, tv, _, tsums, tout, tden, tgrad, tgrad_sums = moves[:9]
        *outs, dsums, tdq, tdk, tdv, tdsums = kernel.backward_both(*args[:9], tout, tden, tq, tk, tv, tsums, tgrad, tgrad_sums, *args[9:])
        none = q.new_empty(q.shape[0], 0)
        return (*outs, none, dsums), (tdq, tdk, tdv, none.clone(), tdsums)

    together = hasattr(kernel, "both")
    kernel.forward.derive(vjp=vjp, jvp=jvp, both=both if together else None)
    kernel.backward.derive(vjp=backward_vjp, jvp=backward_jvp, both=backward_both if together else None, save_outputs=False)
    # The plain-torch forms of the operators that are given out and den compute them from q, k, v again: what forward saved is a
    # function of those, and derivatives must not be lost there.
    kernel.tangent.derive(**_of_plain_torch(tangents))
    kernel.second.derive(**_of_plain_torch(gradient_tangents))
    if together:
        kernel.both.derive(**_of_plain_torch(_value_and_tangent))
        kernel.backward_both.derive(**_of_plain_torch(_gradient_and_tangent))


def _value_and_tangent(q, k, v, keep, sums, tq, tk, tv, tkeep, tsums, *options):
    return (*reference(q, k, v, keep, sums, *options),
            *tangents(q, k, v, keep, sums, None, None, tq, tk, tv, tkeep, tsums, *options))


def _gradient_and_tangent(q, k, v, keep, sums, out, den, grad, grad_sums, *rest):
    options = rest[-4:]
    dq, dk, dv, _, dsums = gradients(q, k, v, keep, sums, out, den, grad, grad_sums, *options)
    return dq, dk, dv, dsums, *gradient_tangents(q, k, v, keep, sums, out, den, grad, grad_sums, *rest)
