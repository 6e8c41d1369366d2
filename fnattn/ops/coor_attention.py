"""Attention whose weights are a soft choice of k keys (coordinate descent) instead of a softmax.

    s_ij = scale q_i . k_j        y_i = coor_descent(s_i, k_i)        out_i = sum_j y_ij v_j

A row of weights sums to about k_i, not to 1, and to less where fewer keys are visible.

Source: Attention of coordinate-descent-attention 0.0.11; the solver is described in `coor_descent`.
"""

from __future__ import annotations

import torch
from fnattn_kernels.contracts import reference_vjp
from fnattn_kernels.forward_mode import reference_jvp
from fnattn_kernels.native import coor_attention as native
from fnattn_kernels.native.coor_descent import SOURCE
from torch import Tensor

from ..core import check_int
from . import _coor_math as math
from ._door import Kernel, cast, check_heads, choose, native_reason, no_autocast, scale_of
from .coor_descent import check_settings, settings, spread_k

# b batch, h query heads, g key heads, n queries, m keys, d width of q and k, e width of v
TABLE = 1 << 22  # scores that the reference holds at once; beyond, it works through the queries in blocks


def coor_descent_attention(q: Tensor, k: Tensor, v: Tensor, sparsity_k: float | Tensor, *, eps: float = 0.1,
                           eps_init: float | None = None, eps_decay: float = 1.0, n_iters: int = 20, keep: Tensor | None = None,
                           causal: bool = True, nulls: int = 0, offset: int | Tensor | None = None, scale: float | None = None,
                           solver: str = "iterate", impl: str = "auto") -> Tensor:
    """Sums the values of about sparsity_k keys for each query, chosen softly by coordinate descent.

        out_i = sum_j y_ij v_j        y_i = coor_descent(scale q_i . k_j over the visible j, sparsity_k_i)

    Time grows with n m (d + e + n_iters). "native" makes no [n, m] table for the value, the gradient or
    the tangent.

    Args:
        q: [b, h, n, d], floating point.
        k: [b, g, m, d], h a multiple of g; each key head serves h / g query heads and is not repeated.
        v: [b, g, m, e].
        sparsity_k: number, or tensor that broadcasts to [b, h, n].
        eps, eps_init, eps_decay, n_iters, solver: of `coor_descent`.
        keep: bool [b, m]; False keys are not there.
        causal: query i sees key j only if j < nulls or j - nulls <= offset + i.
        nulls: so many first keys have no position and are seen by every query.
        offset: position of the first query, an int, or an int64 tensor [] or [b]; default m - nulls - n, which aligns the
            queries to the end of the keys.
        scale: factor on the scores; default d^-1/2.
        impl: "reference" is plain torch; "native" insists on the C kernel (CPU); "auto" chooses. See `ops.report()`.
    Returns:
        [b, h, n, e] in v's dtype, computed in float32, or in float64 if any input is. A query that sees no key gives 0.
    Raises:
        ValueError: shapes or options that cannot be. TypeError: not tensors of the right kind.
        KernelUnavailable: the named kernel cannot serve the call.

    Differentiable in q, k, v and sparsity_k any number of times in both modes; batches under vmap without a loop; compiles
    and exports.
    """
    who = "coor_descent_attention"
    check_heads(who, q, k, v)
    check_settings(who, eps, eps_init, eps_decay, n_iters, solver)
    _check_mask(keep, k)
    (b, _, n, d), m = q.shape, k.shape[2]
    check_int(who, "nulls", nulls)
    if not 0 <= nulls <= m:
        raise ValueError(f"{who}: nulls must lie in [0, {m}], the number of keys; got {nulls}.\n"
                         f"  Put the keys without a position first: torch.cat((null_k, k), 2).")
    like = k if k.dtype == torch.float64 else v if v.dtype == torch.float64 else q  # of these the widest
    log_or_k = spread_k(who, sparsity_k, q.shape[:3], like, solver)
    wide = log_or_k.dtype
    start = _start(who, offset, m - nulls - n if causal else m, b, q)
    options = (nulls, scale_of(who, scale, d), solver == "exact", *settings(eps, eps_init, eps_decay, n_iters))
    kernel = choose(who, impl, KERNELS, q, k, v)
    run = reference if kernel is None else kernel.run
    with no_autocast(v):
        return cast(run(cast(q, wide), cast(k, wide), cast(v, wide), log_or_k, keep, start, *options), v.dtype)


def _check_mask(keep: Tensor | None, k: Tensor) -> None:
    if keep is None:
        return
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        raise TypeError(f"coor_descent_attention: keep must be a bool tensor, True = is there; "
                        f"got {keep.dtype if isinstance(keep, Tensor) else type(keep).__name__}.\n  Cast it: keep.bool().")
    if keep.ndim != 2 or keep.shape[0] != k.shape[0] or keep.shape[1] != k.shape[2]:
        raise ValueError(f"coor_descent_attention: keep must be [batch, keys] = [{k.shape[0]}, {k.shape[2]}]; "
                         f"got {list(keep.shape)}.\n  Give one bool for each key, null keys included.")


def _start(who: str, offset: int | Tensor | None, default: int, b: int, like: Tensor) -> Tensor:
    """The position of the first query, for each sequence: int64 [b]."""
    if offset is None:
        offset = default
    if isinstance(offset, Tensor):
        if offset.is_floating_point() or offset.dtype == torch.bool or offset.is_complex():
            raise TypeError(f"{who}: offset must be an int or an integer tensor; got {offset.dtype}.\n  Cast it: offset.long().")
        if offset.ndim > 1 or offset.ndim == 1 and offset.shape[0] != 1 and offset.shape[0] != b:
            raise ValueError(f"{who}: offset must be [] or [{b}]; got {list(offset.shape)}.\n  Give one position per sequence.")
        return offset.to(torch.int64).expand(b)
    check_int(who, "offset", offset)
    return like.new_full((b,), offset, dtype=torch.int64)


# ------------------------------------------------------------------------------------------------ plain torch


def reference(q: Tensor, k: Tensor, v: Tensor, log_or_k: Tensor, keep: Tensor | None, start: Tensor, nulls: int, scale: float,
              exact: bool, *schedule) -> Tensor:
    """The same in plain torch; when the table of scores would be large, a block of queries at a time."""
    b, h, n, _ = q.shape
    m = k.shape[2]
    # A compiler plans memory itself, and a size compared here would become a condition of the compiled program.
    if torch.compiler.is_compiling() or b * h * n * m <= TABLE:
        return _attend(q, k, v, log_or_k, keep, start, nulls, scale, exact, *schedule)
    rows = max(1, TABLE // (b * h * m))
    return torch.cat([_attend(q[:, :, i:i + rows], k, v, log_or_k[:, :, i:i + rows], keep, start + i, nulls, scale, exact,
                              *schedule) for i in range(0, n, rows)], 2)


def _attend(q, k, v, log_or_k, keep, start, nulls, scale, exact, *schedule):
    s, grouped = _scores(q, k, keep, start, nulls, scale)
    y = math.exact(s, grouped(log_or_k), schedule[0]) if exact else math.iterate(s, grouped(log_or_k), *schedule)
    return torch.einsum("bgrij,bgje->bgrie", y, v).flatten(1, 2)


def _scores(q, k, keep, start, nulls, scale):
    """Scores [b, g, h/g, n, m], -infinity for keys that a query does not see; and what groups a [b, h, ...] tensor so."""
    g, m = k.shape[1:3]

    def grouped(t):
        return t.unflatten(1, (g, t.shape[1] // g if g else 0))

    position = torch.arange(m, device=k.device) - nulls
    last = start[:, None] + torch.arange(q.shape[2], device=q.device)
    visible = (position < 0) | (position <= last[:, :, None])
    if keep is not None:
        visible = visible & keep[:, None, :]
    s = torch.einsum("bgrid,bgjd->bgrij", grouped(q) * scale, k)
    return s.masked_fill(~visible[:, None, None], -torch.inf), grouped


# ------------------------------------------------------------------------------------------------ the native kernel
# `marks` are functions of the other arguments that only the backward kernel reads, and its own derivatives are taken from
# formulas that compute them anew: so they pass no gradient, and their tangent is never read.


def _backward_formula(q, k, v, log_or_k, keep, start, marks, g, nulls, scale, exact, *schedule):
    s, grouped = _scores(q, k, keep, start, nulls, scale)
    level, g = grouped(log_or_k), grouped(g)
    slope = torch.einsum("bgrie,bgje->bgrij", g, v)
    if exact:
        cut = grouped(marks[..., 0].detach())
        y = math.exact_at(s, level, cut, schedule[0])
        ds, dk_or_log = math.exact_back(s, level, cut, slope, schedule[0])
    else:
        y = math.iterate(s, level, *schedule)
        ds, dk_or_log = math.iterate_back(s, level, slope, *schedule)
    ds = ds * scale
    return (torch.einsum("bgrij,bgjd->bgrid", ds, k).flatten(1, 2), torch.einsum("bgrij,bgrid->bgjd", ds, grouped(q)),
            torch.einsum("bgrij,bgrie->bgje", y, g), dk_or_log.flatten(1, 2))


def _vjp(needs, args, outs, cotangents):
    tensors, options = args[:6], args[6:]
    if cotangents[0] is None:
        return (None,) * len(args)
    grads = native.attention_back(*tensors, outs[1], cotangents[0], *options)
    return (*(x if need else None for x, need in zip(grads, needs)), *(None for _ in args[4:]))


def _tangent_formula(q, k, v, log_or_k, keep, start, marks, tq, tk, tv, tlog_or_k, nulls, scale, exact, *schedule):
    s, grouped = _scores(q, k, keep, start, nulls, scale)
    level, tlevel = grouped(log_or_k), grouped(tlog_or_k)
    ts = scale * (torch.einsum("bgrid,bgjd->bgrij", grouped(tq), k) + torch.einsum("bgrid,bgjd->bgrij", grouped(q), tk))
    if exact:
        cut = grouped(marks[..., 0].detach())
        y, ty = math.exact_at(s, level, cut, schedule[0]), math.exact_tangent(s, level, cut, ts, tlevel, schedule[0])
    else:
        y, ty = math.iterate(s, level, *schedule), math.iterate_tangent(s, level, ts, tlevel, *schedule)
    return (torch.einsum("bgrij,bgje->bgrie", ty, v) + torch.einsum("bgrij,bgje->bgrie", y, tv)).flatten(1, 2)


def _jvp(args, outs, tangents):
    given = (torch.zeros_like(x) if t is None else t for x, t in zip(args[:4], tangents))
    return native.attention_tangent(*args[:6], outs[1], *given, *args[6:]), torch.zeros_like(outs[1])


native.attention.derive(vjp=_vjp, jvp=_jvp)
native.attention_back.derive(
    vjp=lambda needs, args, outs, cotangents: reference_vjp(_backward_formula, needs, args, cotangents),
    jvp=lambda args, outs, tangents: reference_jvp(_backward_formula, args, tangents), save_outputs=False)

native.attention_tangent.derive(
    vjp=lambda needs, args, outs, cotangents: reference_vjp(_tangent_formula, needs, args, cotangents),
    jvp=lambda args, outs, tangents: reference_jvp(_tangent_formula, args, tangents), save_outputs=False)


def _native(*args):
    return native.attention(*args)[0]


KERNELS = (Kernel("native", _native, lambda *tensors: native_reason(SOURCE, *tensors)),)
