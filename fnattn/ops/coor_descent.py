"""Coordinate descent: a soft choice of k among n, y in [0, 1] with sum y about k, along the last axis.

    maximise <s, y> + eps * entropy(y)   subject to   sum y = k,  0 <= y <= 1

Upstream runs a fixed number of iterations, which are part of its models: solver="iterate". Their limit has a closed form,
a softmax capped at 1: solver="exact". The formulas are in `_coor_math`.

Source: coor_descent of colt5-attention 0.11.2 (their a is our -m, their b is min(m - s, 0)); Wright 2015, arXiv 1502.04759;
Ainslie et al. 2023 (CoLT5), arXiv 2303.09752; epsilon scaling: Schmitzer 2016, arXiv 1610.06519.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from math import log
from typing import NamedTuple

import torch
from fnattn_kernels import colt5
from fnattn_kernels.contracts import reference_vjp
from fnattn_kernels.forward_mode import reference_jvp
from fnattn_kernels.native import coor_descent as native
from fnattn_kernels.triton import coor_descent as triton
from fnattn_kernels.watchers import unwatched
from torch import Tensor

from . import _coor_math as math
from ._door import Kernel, cast, choose, compute_dtype, native_reason, no_autocast

SOLVERS = ("iterate", "exact")
# Below it log k would leave the range of numbers; upstream's bound.
LEAST_K = 1e-20


def coor_descent(s: Tensor, k: float | Tensor, *, eps: float = 0.1, eps_init: float | None = None, eps_decay: float = 1.0,
                 n_iters: int = 20, mask: Tensor | None = None, solver: str = "iterate", impl: str = "auto") -> Tensor:
    """Chooses about k of n entries, softly: large scores get 1, small ones 0, those between a fraction.

        y_j = min(1, exp((s_j - m) / eps))        with m such that sum y = k

    solver="iterate" takes n_iters steps towards m and stops there, as upstream does: sum y is then below or above k, and the
    result depends on n_iters, eps_init and eps_decay. eps starts at max(eps_init, eps), is multiplied by eps_decay after each
    step but stays at least eps, and its last value is used for y. solver="exact" gives the limit, in which only eps counts.
    Not `k * softmax(s)`, which exceeds 1.

    Time grows with n * n_iters, memory with n; the C kernel leaves out first iterations of which it is known that they cannot matter.
    k = 1 gives softmax(s / eps). A row with no more than k entries is all ones,
    one without entries all zeros.

    Args:
        s: [..., n] scores, floating point. An entry of -infinity is not there, as if masked.
        k: number, or tensor that broadcasts to [...]; less than 1e-20 counts as 1e-20.
        eps: temperature, above 0.
        eps_init: first temperature of the iteration; None: eps.
        eps_decay: factor on the temperature after each iteration.
        n_iters: iterations, at least 1.
        mask: bool, broadcasts to s; False entries get 0 and pass no gradient.
        solver: "iterate" or "exact".
        impl: "reference" is plain torch; "native" insists on the C kernel (CPU), "triton" on Triton's (CUDA, n up to 32768, a row in
            the registers of one block), "colt5" on that package's (CUDA, float32, solver="iterate"); "auto" chooses. See
            `ops.report()`.
    Returns:
        y [..., n] in s's dtype, computed in float32, or in float64 if s or k is.
    Raises:
        ValueError: shapes or options that cannot be. TypeError: not tensors of the right kind.
        KernelUnavailable: the named kernel cannot serve the call.

    Differentiable in s and k any number of times in both modes, except where an entry is exactly at the cap; batches under
    vmap without a loop; compiles and exports.
    """
    s, log_or_k = _prepare(s, k, mask, eps, eps_init, eps_decay, n_iters, solver)
    kernel = choose("coor_descent", impl, KERNELS, s, log_or_k, solver)
    with no_autocast(s):
        wide = cast(s, log_or_k.dtype)
        if solver == "exact":
            run = math.exact if kernel is None else kernel.run.exact
            return cast(run(wide, log_or_k, float(eps)), s.dtype)
        run = math.iterate if kernel is None else kernel.run.iterate
        return cast(run(wide, log_or_k, *settings(eps, eps_init, eps_decay, n_iters)), s.dtype)


def settings(eps: float, eps_init: float | None, eps_decay: float, n_iters: int) -> tuple[float, float, float, int]:
    """The schedule's numbers as operators take them."""
    return float(eps), float(eps if eps_init is None else eps_init), float(eps_decay), int(n_iters)


def _prepare(s, k, mask, eps, eps_init, eps_decay, n_iters, solver) -> tuple[Tensor, Tensor]:
    """Checked: s with -infinity where masked, and log k (k for the exact solver) of s's leading shape, wide."""
    if not isinstance(s, Tensor) or not s.is_floating_point():
        raise TypeError(f"coor_descent: s must be a floating point tensor; got {_kind(s)}.\n"
                        f"  Convert it: torch.as_tensor(s).float().")
    if s.ndim == 0:
        raise ValueError("coor_descent: s must be [..., n]; got [].\n  Give it an axis to choose along: s[None].")
    check_settings("coor_descent", eps, eps_init, eps_decay, n_iters, solver)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"coor_descent: mask must be a bool tensor, True = may be chosen; got {_kind(mask)}.\n"
                            f"  Cast it: mask.bool().")
        if not _broadcasts(mask.shape, s.shape):
            raise ValueError(f"coor_descent: mask must broadcast to s {list(s.shape)}; got {list(mask.shape)}.\n"
                             f"  Add the missing axes, for example mask[:, None].")
        s = s.masked_fill(~mask, -torch.inf)
    return s, spread_k("coor_descent", k, s.shape[:-1], s, solver)


def _of_rows(k: float, solver: str) -> float:
    least = max(k, LEAST_K)
    return least if solver == "exact" else log(least)


def spread_k(who: str, k: float | Tensor, shape: torch.Size, like: Tensor, solver: str) -> Tensor:
    """log k (k itself for the exact solver) as a wide tensor of this shape."""
    if not isinstance(k, Tensor):
        if not isinstance(k, (numbers.Real, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{who}: k must be a number or a tensor; got {type(k).__name__}.\n  Convert it: torch.as_tensor(k).")
        if k != k:
            raise ValueError(f"{who}: k must be a number; got nan.\n  It says how many entries of a row are to come near 1.")
    # One call of torch in place of five.
    if not isinstance(k, Tensor) and not torch.compiler.is_compiling():
        return like.new_full(shape, _of_rows(float(k), solver), dtype=compute_dtype(like))
    if isinstance(k, Tensor) and k.ndim == 0 and k.is_floating_point() and unwatched((k,)):
        return like.new_full(shape, _of_rows(k.item(), solver), dtype=compute_dtype(like, k))
    if not isinstance(k, Tensor):
        k = like.new_full((), float(k), dtype=torch.float64)  # of like's kind: a DTensor if it is one
        dtype = compute_dtype(like)
    else:
        if k.dtype == torch.bool or k.is_complex():
            raise TypeError(f"{who}: k must be real numbers; got {k.dtype}.\n  Cast it: k.float().")
        dtype = compute_dtype(like, k)
    if not _broadcasts(k.shape, shape):
        raise ValueError(f"{who}: k must broadcast to {list(shape)}, one number per row; got {list(k.shape)}.\n"
                         f"  Give one number for all rows, or drop the last axis: k[..., 0].")
    k = cast(k, dtype).clamp(min=LEAST_K)
    k = k if solver == "exact" else k.log()
    # A tracer would make a condition of the comparison.
    return k.expand(shape) if torch.compiler.is_compiling() or k.shape != shape else k


def check_settings(who: str, eps, eps_init, eps_decay, n_iters, solver) -> None:
    """The solver's options are numbers that it can work with."""
    if solver not in SOLVERS:
        raise ValueError(f"{who}: solver must be one of {', '.join(map(repr, SOLVERS))}; got {solver!r}.\n"
                         f'  Use solver="iterate" for upstream\'s iterations, solver="exact" for their limit.')
    for name, value in (("eps", eps), ("eps_init", eps if eps_init is None else eps_init), ("eps_decay", eps_decay)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{who}: {name} must be a Python number; got {_kind(value)}.\n  Pass a constant: float({name}).")
        if not value > 0:
            raise ValueError(f"{who}: {name} must be above 0; got {value}.\n"
                             f"  Upstream's values: eps=0.1, eps_init=4, eps_decay=0.7.")
    if not isinstance(n_iters, int) or n_iters < 1:
        raise ValueError(f"{who}: n_iters must be at least 1; got {n_iters!r}.\n  Use 20, or solver=\"exact\" for the limit.")


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _broadcasts(shape, to) -> bool:
    # Spelt out: a tracer compares a size that may vary by ==, but not by `in`.
    if len(shape) > len(to):
        return False
    for a, b in zip(reversed(shape), reversed(to)):
        if not (a == 1 or a == b):
            return False
    return True


# ------------------------------------------------------------------------------------------------ the kernels


def _along_rows(operator) -> Callable:
    """The operator's first result, for scores [..., n] and log k (or k) [...]."""

    def run(s: Tensor, log_or_k: Tensor, *options) -> Tensor:
        if s.ndim == 2:
            return operator(s, log_or_k, *options)[0]
        rows = s.flatten(0, -2) if s.ndim > 1 else s[None]
        return operator(rows, log_or_k.flatten(), *options)[0].view(s.shape)

    return run


# What else operators return besides y - thresholds m, marks - are functions of s and log_k that only their backward reads, and
# its own derivatives are taken from a formula that computes them anew: so these pass no gradient, and their tangent is not read.


def _derive_iterate(iterate, backward: Callable, tangent: Callable) -> None:
    """backward(s, log_k, outs, g, *schedule) -> ds, dlogk; tangent(s, log_k, outs, ts, tlog_k, *schedule) -> ty."""

    def vjp(needs, args, outs, cotangents):
        s, log_k, *options = args
        if cotangents[0] is None:
            return (None,) * len(args)
        ds, dlogk = backward(s, log_k, outs, cotangents[0], *options)
        return (ds if needs[0] else None, dlogk if needs[1] else None, *(None for _ in options))

    def jvp(args, outs, tangents):
        s, log_k, *options = args
        return tangent(s, log_k, outs, *_both(s, log_k, tangents), *options), torch.zeros_like(outs[1])

    iterate.derive(vjp=vjp, jvp=jvp)


def _both(s, log_k, tangents):
    """The tangents of s and log_k, 0 where there is none."""
    return (torch.zeros_like(x) if t is None else t for x, t in zip((s, log_k), tangents))


def _derive_by_formula(operator, formula: Callable, *unread: int) -> None:
    """Derivatives of a plain-torch formula, which takes the operator's arguments without those at these places."""

    def without(*args):
        return formula(*(a for i, a in enumerate(args) if i not in unread))

    operator.derive(vjp=lambda needs, args, outs, cotangents: reference_vjp(without, needs, args, cotangents),
                    jvp=lambda args, outs, tangents: reference_jvp(without, args, tangents), save_outputs=False)


def _tangent_formula(s, log_or_k, m, ts, tlog_or_k, exact, *schedule):
    if exact:
        return math.exact_tangent(s, log_or_k, m[:, 0].detach(), ts, tlog_or_k, schedule[0])
    return math.iterate_tangent(s, log_or_k, ts, tlog_or_k, *schedule)


def _derive_exact(exact, backward: Callable, tangent: Callable) -> None:
    """backward(s, k, cut, m, g, eps) -> ds, dk; tangent(s, k, cut, m, ts, tk, eps) -> ty."""

    def vjp(needs, args, outs, cotangents):
        s, k, eps = args
        if cotangents[0] is None:
            return None, None, None
        ds, dk = backward(s, k, outs[1], outs[2], cotangents[0], eps)
        return ds if needs[0] else None, dk if needs[1] else None, None

    def jvp(args, outs, tangents):
        s, k, eps = args
        _, cut, m = outs
        return tangent(s, k, cut, m, *_both(s, k, tangents), eps), torch.zeros_like(cut), torch.zeros_like(m)

    exact.derive(vjp=vjp, jvp=jvp)


_derive_iterate(native.iterate, lambda s, log_k, outs, *rest: native.iterate_back(s, log_k, outs[1], *rest),
                lambda s, log_k, outs, ts, tlog_k, *rest: native.tangent(s, log_k, outs[1], ts, tlog_k, False, *rest))
_derive_by_formula(native.iterate_back, math.iterate_back, 2)   # s, log_k, [m], g, ...
_derive_by_formula(native.tangent, _tangent_formula)
_derive_exact(native.exact, native.exact_back, lambda s, k, cut, m, ts, tk, eps: native.tangent(
    s, k, torch.stack((cut, m), 1), ts, tk, True, eps, eps, 1.0, 1))
_derive_by_formula(native.exact_back, math.exact_back, 3)       # s, k, cut, [m], g, eps

_derive_iterate(triton.iterate, lambda s, log_k, outs, *rest: triton.iterate_back(s, log_k, outs[1], *rest),
                lambda s, log_k, outs, *rest: triton.tangent(s, log_k, outs[1], *rest))
_derive_by_formula(triton.iterate_back, math.iterate_back, 2)
_derive_by_formula(triton.tangent, math.iterate_tangent, 2)      # s, log_k, [m], ts, tlog_k, ...

_derive_exact(triton.exact, triton.exact_back, triton.exact_tangent)
_derive_by_formula(triton.exact_back, math.exact_back, 3)
_derive_by_formula(triton.exact_tangent, math.exact_tangent, 3)  # s, k, cut, [m], ts, tk, eps

# The package has no tangent: that is plain torch.
_derive_iterate(colt5.iterate, lambda s, log_k, outs, *rest: colt5.iterate_back(s, log_k, *outs, *rest),
                lambda s, log_k, outs, *rest: math.iterate_tangent(s, log_k, *rest))
_derive_by_formula(colt5.iterate_back, math.iterate_back, 2, 3)  # s, log_k, [y, marks], g, ...


class Solvers(NamedTuple):
    """A kernel's two solvers; None: it has none of this kind."""

    iterate: Callable
    exact: Callable | None = None


def _iterates(why_not: Callable) -> Callable:
    """why_not(s, log_k) for a kernel without the exact solver."""
    return lambda s, log_or_k, solver: 'has solver="iterate" only' if solver == "exact" else why_not(s, log_or_k)


KERNELS = (
    Kernel("native", Solvers(_along_rows(native.iterate), _along_rows(native.exact)),
           lambda s, log_or_k, solver: native_reason(native.SOURCE, s)),
    Kernel("triton", Solvers(_along_rows(triton.iterate), _along_rows(triton.exact)), lambda s, *others: triton.why_not(s)),
    Kernel("colt5", Solvers(_along_rows(colt5.iterate)), _iterates(colt5.why_not)),
)
