"""Causal softmax attention of new positions over a cache whose keys and values lie in two places.

A cache that is never written to has to be copied for each token. Kept in two parts, a long one that all copies share and a
short one with the newest positions, only the short one is copied; `fnattn.attentions._cache` keeps such caches. The native
kernel reads the parts where they are; everything else joins them and calls `softmax_attention`.

Source: Vaswani et al. 2017, arXiv 1706.03762.
"""

from __future__ import annotations

import torch
from fnattn_kernels import crossovers
from fnattn_kernels.contracts import reference_vjp
from fnattn_kernels.forward_mode import reference_jvp
from fnattn_kernels.native import decode as native
from fnattn_kernels.native.build import why_not
from fnattn_kernels.watchers import unwatched
from torch import Tensor
from torch.nn.functional import pad

from ..core import check_int
from ._door import Kernel, cast, check_heads, choose, no_autocast, scale_of, widen
from ._softmax_rules import backward_formula, tangent_formula
from .softmax import KERNELS as SOFTMAX
from .softmax import _check_mask
from .softmax import reference as dense

# b batch, h query heads, g key heads, n queries, m keys, d width of q and k, e width of v, c and w rows of the two parts


def cached_attention(q: Tensor, k: Tensor, v: Tensor, k_late: Tensor, v_late: Tensor, *, first: int, length: int,
                     mask: Tensor | None = None, scale: float | None = None, impl: str = "auto") -> Tensor:
    """Averages the values of all positions so far, weighted by the exponential of how well their key meets the query.

        out_i = sum_{j <= length - n + i} p_ij v_j        p_ij = exp(scale q_i . k_j) / sum over visible j

    Time grows with n m (d + e). "native" makes no [n, m] table; for few queries it does not join the parts either.

    Args:
        q: [b, h, n, d], floating point: the last n of `length` positions.
        k, v: [b, g, c, d] and [b, g, c, e], h a multiple of g: positions 0 to first - 1; later rows are not read.
        k_late, v_late: [b, g, w, d] and [b, g, w, e]: positions first to length - 1; later rows are not read.
        first, length: ints, first <= c and first <= length <= first + w.
        mask: bool, broadcastable to [b, h, n, length], True where a key may be attended; None: everywhere.
        scale: what the products are multiplied by; default d^-1/2.
        impl: "reference" is plain torch; "native" insists on the C kernels (CPU), "sdpa" on torch's, "triton" on Triton's; "auto"
            chooses.
    Returns:
        [b, h, n, e] in v's dtype, computed in float32, or in float64 if any input is. Rows that see no key are 0.
    Raises:
        ValueError: shapes or devices disagree. TypeError: not floating tensors, mask not bool. KernelUnavailable: the named
        kernel cannot serve the call.

    Differentiable any number of times in both modes; batches under vmap without a loop, also over the mask; compiles and
    exports.
    """
    check_heads("cached_attention", q, k, v)
    b, h, n, d = q.shape
    _check(q, k, v, k_late, v_late, first, length)
    mask = _check_mask(mask, (b, h, n, length))
    scale = scale_of("cached_attention", scale, d)
    kernel = choose("cached_attention", impl, KERNELS, q, k, v)
    run = reference if kernel is None else kernel.run
    with no_autocast(v):
        return cast(run(q, k, v, k_late, v_late, mask, first, length, scale), v.dtype)


def _check(q, k, v, k_late, v_late, first, length) -> None:
    for name, t in (("k_late", k_late), ("v_late", v_late)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"cached_attention: {name} must be a floating tensor; got {got}.\n"
                            f"  Where all positions lie in the other part, give one without rows: {name[0]}[:, :, :0].")
        if t.ndim != 4:
            raise ValueError(f"cached_attention: {name} must be [batch, heads, positions, width]; got {list(t.shape)}.\n"
                             f"  Add the missing axes, for example {name}[None, None].")
    check_int("cached_attention", "first", first)
    check_int("cached_attention", "length", length)
    (b, g, c, d), e, w = k.shape, v.shape[3], k_late.shape[2]
    if k_late.shape != (b, g, w, d) or v_late.shape != (b, g, w, e):
        raise ValueError(f"cached_attention: expected k_late [{b}, {g}, w, {d}] and v_late [{b}, {g}, w, {e}], as k and v; "
                         f"got {list(k_late.shape)} and {list(v_late.shape)}.\n  Both parts hold positions of the same heads.")
    if not (0 <= first <= c and max(first, q.shape[2]) <= length <= first + w):
        raise ValueError(f"cached_attention: expected first in [0, {c}] and length from first and {q.shape[2]} (the queries) to "
                         f"first + {w}; got first={first}, length={length}.\n"
                         f"  k and v hold the positions before first, k_late and v_late those from there on.")


def join(part: Tensor, late: Tensor, first: int, length: int) -> Tensor:
    """Rows [.., length, d] of both parts, one after the other."""
    return torch.cat((part.narrow(2, 0, first), late.narrow(2, 0, length - first)), 2)


def _joined(run):
    """An implementation of softmax attention on the joined parts."""

    def attend(q, k, v, k_late, v_late, mask, first, length, scale):
        k, v = join(k, k_late, first, length), join(v, v_late, first, length)
        return run(*widen(q, k, v), mask, length - q.shape[2], scale)

    return attend


reference = _joined(dense)
_BY_NAME = {kernel.name: kernel for kernel in SOFTMAX}
FEW = crossovers.limits("cached_attention", "native, in place")["queries"]
_joined_native, _joined_triton = (_joined(_BY_NAME[name].run) for name in ("native", "triton"))


def _joined_sdpa(q, k, v, k_late, v_late, mask, first, length, scale):
    # torch's kernel adds up blocks of keys in one running sum: for a single query in float32 three times plain torch's error.
    if q.shape[2] <= FEW:
        q, k, v, k_late, v_late = (t.double() for t in (q, k, v, k_late, v_late))
    return _joined(_BY_NAME["sdpa"].run)(q, k, v, k_late, v_late, mask, first, length, scale)


def _native(q, k, v, k_late, v_late, mask, first, length, scale):
    if q.shape[1] // max(k.shape[1], 1) * q.shape[2] > FEW or why_not("decode") is not None:
        return _joined_native(q, k, v, k_late, v_late, mask, first, length, scale)
    parts = (q, k, v, k_late, v_late)
    if all(t.dtype == torch.bfloat16 for t in parts) and unwatched(parts):
        parts = (q.float(), *parts[1:])  # a cache of halves is read where it lies; derivatives want one dtype
    elif len({t.dtype for t in parts}) > 1 or q.dtype not in (torch.float32, torch.float64):
        late = length - first
        parts = widen(q, k[:, :, :first], v[:, :, :first], k_late[:, :, :late], v_late[:, :, :late])
    # One mask per sequence, so that the batch axis means the same in every argument.
    mask = mask if mask is None else mask.expand(q.shape[0], *mask.shape[1:])
    return native.attend(*parts, mask, first, length, scale)


def _gradients(g, q, k, v, k_late, v_late, mask, first, length, scale):
    keys, values = join(k, k_late, first, length), join(v, v_late, first, length)
    dq, dk, dv = backward_formula(g, q, keys, values, mask, None, None, length - q.shape[2], scale)

    def rows(d: Tensor, begin: int, end: int, like: Tensor) -> Tensor:
        """A part's gradient: 0 in the rows that nobody reads."""
        return pad(d.narrow(2, begin, end - begin), (0, 0, 0, like.shape[2] - end + begin))

    return dq, rows(dk, 0, first, k), rows(dv, 0, first, v), rows(dk, first, length, k_late), rows(dv, first, length, v_late)


def _tangent(q, k, v, k_late, v_late, mask, tq, tk, tv, tk_late, tv_late, first, length, scale):
    keys, values, t_keys, t_values = (join(*parts, first, length) for parts in ((k, k_late), (v, v_late), (tk, tk_late), (tv, tv_late)))
    lse = q  # of which the formula takes the dtype alone
    return tangent_formula(q, keys, values, mask, None, lse, tq, t_keys, t_values, length - q.shape[2], scale)[0]


def _vjp(needs, args, outs, cotangents):
    if cotangents[0] is None:
        return (None,) * len(args)
    grads = native.attend_backward(cotangents[0], *args)
    return (*(grad if need else None for grad, need in zip(grads, needs)), *(None for _ in args[5:]))


def _jvp(args, outs, tangents):
    moves = (torch.zeros_like(a) if t is None else t for a, t in zip(args, tangents[:5]))
    return native.attend_tangent(*args[:6], *moves, *args[6:])


def _close(operator, formula) -> None:
    """Derivatives of a derivative: those of the plain formula."""
    operator.derive(vjp=lambda needs, args, outs, cotangents: reference_vjp(formula, needs, args, cotangents),
                    jvp=lambda args, outs, tangents: reference_jvp(formula, args, tangents), save_outputs=False)


native.attend.derive(vjp=_vjp, jvp=_jvp, save_outputs=False)
_close(native.attend_backward, _gradients)
_close(native.attend_tangent, _tangent)


KERNELS = (
    Kernel("native", _native, _BY_NAME["native"].why_not),
    Kernel("sdpa", _joined_sdpa, _BY_NAME["sdpa"].why_not),
    Kernel("triton", _joined_triton, _BY_NAME["triton"].why_not),
)
