"""Causal linear attention without a normaliser: out_i = sum over j <= i of (q_i . k_j) v_j.

Trilinear, so the operator is its own derivative: with `dot` for the sum and `back` for the same sum over j >= i,

    dq = dot(g, v, k)        dk = back(v, g, q)        dv = back(k, q, g)

and one kernel with a direction flag serves every order of differentiation.

Source: Katharopoulos et al. 2020, arXiv 2006.16236 (their phi(Q), phi(K) are our q, k; their S is our running sum).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fnattn_kernels import fast_transformers
from fnattn_kernels.contracts import reference_vjp
from fnattn_kernels.forward_mode import reference_jvp
from fnattn_kernels.native import causal_dot as native
from fnattn_kernels.triton import causal_dot as triton
from torch import Tensor

from ._door import Kernel, cast, check_heads, choose, native_reason, no_autocast, rows_as_they_are, widen

# b batch, h query heads, g key heads, n positions, d width of q and k, e width of v
CHUNK = 64


def causal_dot(q: Tensor, k: Tensor, v: Tensor, *, reverse: bool = False, impl: str = "auto") -> Tensor:
    """Sums past values, each weighted by how well its key meets the query.

        out_i = sum_{j <= i} (q_i . k_j) v_j          (j >= i if reverse)

    No softmax and no normaliser. Time grows with n d e; no [n, n] table is made.

    Args:
        q: [b, h, n, d], floating point.
        k: [b, g, n, d], h a multiple of g; each key head serves h / g query heads and is not repeated.
        v: [b, g, n, e].
        reverse: sum over the keys from i on instead of those up to i.
        impl: "reference" is plain torch; "native" insists on the C kernel (CPU), "fast_transformers" on the package's (float32;
            heads that share keys get copies of them), "triton" on Triton's (CUDA, d and e up to 128); "auto" chooses. See `ops.report()`.
    Returns:
        [b, h, n, e] in v's dtype, summed in float32, or in float64 if any input is.
    Raises:
        ValueError: shapes or devices disagree. TypeError: not floating tensors.
        KernelUnavailable: the named kernel cannot serve the call.

    "native" gives the same bits for any number of threads: heads go to threads, and where there are more threads than heads,
    the columns of v, a vector register each at least.

    Differentiable any number of times in both modes; batches under vmap without a loop; compiles and exports.
    """
    check_heads("causal_dot", q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"causal_dot: q and k must have one length; got {q.shape[2]} and {k.shape[2]}.\n"
                         f"  Cut or pad the longer one.")
    kernel = choose("causal_dot", impl, KERNELS, q, k, v)
    run = reference if kernel is None else kernel.run
    with no_autocast(v):
        args = rows_as_they_are((q, k, v)) if run is native.dot else widen(q, k, v)
        return cast(run(*args, reverse), v.dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, reverse: bool = False) -> Tensor:
    """The same in plain torch: a masked product inside each chunk of 64, and a running sum of k v^T between chunks."""
    if reverse:
        return reference(q.flip(2), k.flip(2), v.flip(2)).flip(2)
    b, h, n, d = q.shape
    g, e = k.shape[1], v.shape[3]
    if n == 0 or b * h == 0:
        every = (0, 1, 2, 3)  # no numbers, but derivatives find their way
        return q.new_zeros(b, h, n, e) + 0 * sum(t.sum(every, keepdim=True) for t in (q, k, v))
    q = q.unflatten(1, (g, h // g))
    total, outs = None, []
    for q_c, k_c, v_c in zip(q.split(CHUNK, 3), k.split(CHUNK, 2), v.split(CHUNK, 2)):
        scores = torch.einsum("bghid,bgjd->bghij", q_c, k_c).tril()
        out = torch.einsum("bghij,bgje->bghie", scores, v_c)
        if total is not None:
            out = out + torch.einsum("bghid,bgde->bghie", q_c, total)
        outs.append(out)
        more = torch.einsum("bgjd,bgje->bgde", k_c, v_c)
        total = more if total is None else total + more
    return torch.cat(outs, 3).flatten(1, 2)


# ------------------------------------------------------------------------------------------------ the kernels


def _rules(dot: Callable) -> dict[str, Callable]:
    """The derivatives of a kernel `dot(q, k, v, reverse)`, in terms of itself."""

    def vjp(needs, args, outs, cotangents):
        q, k, v, reverse = args
        (g,) = cotangents
        if v.dtype == torch.bfloat16 and torch.is_grad_enabled():  # for derivatives of these, whose terms are rounded once
            grads = vjp(needs, (*widen(q, k, v), reverse), outs, widen(g))
            return *(None if grad is None else cast(grad, v.dtype) for grad in grads[:3]), None
        return (dot(g, v, k, reverse) if needs[0] else None,
                dot(v, g, q, not reverse) if needs[1] else None,
                dot(k, q, g, not reverse) if needs[2] else None, None)

    def jvp(args, outs, tangents):
        *rows, reverse = args
        wide, moves = widen(*rows), [None if t is None else widen(t)[0] for t in tangents[:3]]  # three terms, rounded once
        terms = [dot(*(moves[j] if j == i else wide[j] for j in range(3)), reverse) for i in range(3) if moves[i] is not None]
        return cast(sum(terms[1:], terms[0]), rows[2].dtype)

    return {"vjp": vjp, "jvp": jvp}


for _dot in (native.dot, triton.dot):
    _dot.derive(**_rules(_dot), save_outputs=False)

# The package has a function for all three gradients at once. It is three products of the same kind: so are its derivatives.
_ft_rules = _rules(fast_transformers.dot)


def _ft_vjp(needs, args, outs, cotangents):
    q, k, v, reverse = args
    if all(needs[:3]):
        return *fast_transformers.dot_back(q, k, v, cotangents[0], reverse), None
    return _ft_rules["vjp"](needs, args, outs, cotangents)


def _ft_gradients(q, k, v, g, reverse):
    return _ft_rules["vjp"]((True,) * 3, (q, k, v, reverse), (), (g,))[:3]


fast_transformers.dot.derive(vjp=_ft_vjp, jvp=_ft_rules["jvp"], save_outputs=False)
fast_transformers.dot_back.derive(
    vjp=lambda needs, args, outs, cotangents: reference_vjp(_ft_gradients, needs, args, cotangents),
    jvp=lambda args, outs, tangents: reference_jvp(_ft_gradients, args, tangents), save_outputs=False)

KERNELS = (
    Kernel("native", native.dot, lambda q, k, v: native_reason("causal_dot", q, k, v)),
    Kernel("fast_transformers", fast_transformers.dot, fast_transformers.why_not),
    Kernel("triton", triton.dot, triton.why_not),
)
