"""gate_loop: causal linear attention with a complex gate per head, read through the real part of its state.

Source: Katsch 2023, "GateLoop", arXiv 2311.01927 (our alpha is their a, our H their h; q, k, v as there).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from fnattn_kernels.contracts import reference_vjp
from fnattn_kernels.forward_mode import reference_jvp
from fnattn_kernels.native import gate_loop as native
from fnattn_kernels.native import gate_loop_tangent as native_tangent
from torch import Tensor

from .._door import Kernel, cast, check_heads, choose, compute_dtype, native_reason, no_autocast, rows_as_they_are, widen
from ..scan import complex_times
from . import backward, reference, tangent, triton

# b batch, h heads, g key heads, n positions, d width of q and k, e width of v


class GateLoopState(NamedTuple):
    """What a sequence leaves behind for its continuation.

    H: [b, h, d, e, 2] the state, as (re, im).
    A: [b, h, 2] product of all gates so far: two stretches join as (A2 A1, A2 H1 + H2).
    """

    H: Tensor
    A: Tensor


def gate_loop(q: Tensor, k: Tensor, v: Tensor, a: Tensor, *, state: tuple[Tensor, Tensor] | None = None,
              impl: str = "auto") -> tuple[Tensor, GateLoopState]:
    """Causal linear attention whose memory decays and turns by a gate that depends on the data.

        alpha_t = sigmoid(|a_t|) e^{i arg a_t}       H_t = alpha_t H_{t-1} + k_t v_t^T       out_t = q_t^T Re(H_t)

    Time grows with n d e, in real arithmetic and without trigonometry; no [n, n] table and no state per position is made,
    except for width-1 heads, where the state is one number. |alpha| is at least 1/2. At a = 0 alpha is 1/2 and the gradient
    of a is 0 (so for |a| < 2^-100: the phase's derivative is not representable).

    Args:
        q: [b, h, n, d], floating point.
        k: [b, g, n, d], h a multiple of g.
        v: [b, g, n, e].
        a: [b, h, n, 2] raw gates as (re, im).
        state: (H [b, h, d, e, 2], A [b, h, 2]) that a previous call returned; None at the start of a sequence.
        impl: "reference" is plain torch; "native" insists on the C kernels (CPU), "triton" on Triton's (CUDA, d and e up to 128):
            a parallel scan for width 1, chunks of 64 for wider heads; "auto" chooses. See `ops.report()`.
    Returns:
        out [b, h, n, e] in v's dtype, and the state in float32, or in float64 if any input is; sums run in the latter.
    Raises:
        ValueError: shapes or devices disagree. TypeError: not floating tensors.
        KernelUnavailable: the named kernel cannot serve the call.

    "native" gives the same bits for any number of threads: heads go to threads, and where there are more threads than heads,
    the parts of a head's states, then its chunks (tangents and second derivatives: heads only).

    Differentiable any number of times in both modes, through the state too; batches under vmap without a loop; compiles
    and exports.
    """
    check_heads("gate_loop", q, k, v)
    _check(q, k, v, a, state)
    h0, a0 = (None, None) if state is None else state
    kernel = choose("gate_loop", impl, KERNELS, q, k, v, a, h0, a0)
    dtype = compute_dtype(q, k, v, a, h0, a0)
    with no_autocast(v):
        repeat = q.shape[1] // max(k.shape[1], 1)
        if repeat != 1:
            k, v = (t.unsqueeze(2).expand(-1, -1, repeat, -1, -1).flatten(1, 2) for t in (k, v))
        run, narrow, found = plain if kernel is None else kernel.run, _is_narrow(q, v), None
        if run is run_native and narrow and q.numel() and (a0 is None or a0.dtype == h0.dtype):
            found = native.narrow_heads(q, k, v, a, h0)
        if found is None:
            args = rows_as_they_are((q, k, v, a), h0, a0)[:5] if run is run_native and narrow else _cast((q, k, v, a, h0), dtype)
            found = run(*args)
        out, last, product = found
        if a0 is not None:
            product = complex_times(product, cast(a0, dtype))
    return cast(out, v.dtype), GateLoopState(last, product)


def combine(earlier: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor]) -> GateLoopState:
    """The state of two stretches in a row from the state of each alone; associative. Shapes as in `gate_loop`."""
    (h1, a1), (h2, a2) = earlier, later
    return GateLoopState(complex_times(a2[..., None, None, :], h1) + h2, complex_times(a2, a1))


def _cast(tensors, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else cast(t, dtype) for t in tensors]


def plain(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The reference: out, last state, product of the gates of this call; arguments in one wide dtype."""
    return _narrowly(reference.narrow, q, k, v, a, h0) if _is_narrow(q, v) else reference.wide(q, k, v, a, h0)


def _is_narrow(q: Tensor, v: Tensor) -> bool:
    return q.shape[-1] == 1 and v.shape[-1] == 1


def _narrowly(run, q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of width 1 as channels: [b, h, n, 1] is read as [b, n, h], a view where the heads come from one projection."""
    q, k, v = (t.squeeze(-1).transpose(1, 2) for t in (q, k, v))
    out, last, product = run(q, k, v, a.transpose(1, 2), None if h0 is None else h0[:, :, 0, 0])[:3]
    return out.transpose(1, 2).unsqueeze(-1), last[:, :, None, None], product


def _check(q: Tensor, k: Tensor, v: Tensor, a: Tensor, state) -> None:
    b, h, n, d = q.shape
    if k.shape[2] != n:
        raise ValueError(f"gate_loop: q and k must have one length; got {n} and {k.shape[2]}.\n  Cut or pad the longer one.")
    expected = [("a", a, (b, h, n, 2))]
    if state is not None:
        parts = len(state) if isinstance(state, (tuple, list)) else None
        if parts is None:
            raise TypeError(f"gate_loop: state must be (H, A); got {type(state).__name__}.\n  Pass on what the last call returned.")
        if parts != 2:
            raise ValueError(f"gate_loop: state must be (H, A); got {parts} parts.\n  Pass on what the last call returned.")
        expected += [("state H", state[0], (b, h, d, v.shape[3], 2)), ("state A", state[1], (b, h, 2))]
    for name, t, shape in expected:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(f"gate_loop: {name} must be a real floating tensor; got "
                            f"{t.dtype if isinstance(t, Tensor) else type(t).__name__}.\n"
                            f"  Complex numbers come as pairs: torch.view_as_real(a).")
        if tuple(t.shape) != shape:
            raise ValueError(f"gate_loop: {name} must be {list(shape)}; got {list(t.shape)}.\n"
                             f"  One complex number (re, im) per head and position; states as the last call returned them.")
        if t.device != q.device:
            raise ValueError(f"gate_loop: {name} must be on q's device {q.device}; got {t.device}.\n  Move it: .to(q.device).")


# ------------------------------------------------------------------------------------------------ the native kernels


def run_native(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The C kernels, differentiable in every way; arguments as in `plain`, or, for width 1, rows of bfloat16."""
    if q.shape[2] == 0 or q.shape[0] * q.shape[1] == 0:
        return plain(*widen(q, k, v, a, h0))
    return _narrowly(native.narrow, q, k, v, a, h0) if _is_narrow(q, v) else native.wide(q, k, v, a, h0)


def _narrow_jvp(args, outs, tangents):
    out, last, logs, marks = native_tangent.narrow(*widen(*args, *tangents))
    return out.to(outs[0].dtype), last, complex_times(outs[2], logs), marks


def _narrow_tangent_reference(q, *rest):
    # Marks only ever reach the kernels of backward, whose own derivatives do not read them: no derivative here.
    b, n, c = q.shape
    return *tangent.narrow(q, *rest), q.new_zeros(b, n // native.EVERY + 2, 2, c)


def _narrow_backward_jvp(args, outs, tangents):
    *moved, moved_state = native_tangent.narrow_hessian(*widen(*args, *tangents))
    return *(t.to(args[0].dtype) for t in moved), moved_state


def _narrow_hessian_reference(*args):
    def filled(part):
        q, k, v, a, h0, _, _, g, g_last, g_product = part
        like = args[0], args[1], args[2], args[3], state, args[0], state, state
        return [_zeros(t, x) for t, x in zip((q, k, v, a, h0, g, g_last, g_product), like)]

    state = args[3][:, 0]
    return tangent.narrow_backward(*filled(args[:10]), *filled(args[10:]))


def _wide_jvp(args, outs, tangents):
    out, last, logs = native_tangent.wide(*args, *tangents)
    return out, last, complex_times(outs[2], logs)


def _wide_both(args, tangents):
    results = native_tangent.wide_both(*args, *tangents)
    return results[:3], results[3:]


def _wide_both_reference(q, k, v, a, h0, *tangents):
    out, last, product = reference.wide(q, k, v, a, h0)
    *along, logs = tangent.wide(q, k, v, a, h0, *tangents)
    return out, last, product, *along, complex_times(product, logs)


def _narrow_vjp(needs, args, outs, cotangents):
    q, k, v, a, h0 = args
    _, _, product, marks = outs
    grads = native.narrow_backward(q, k, v, a, h0, marks, product, *cotangents[:3])
    return tuple(g if need else None for g, need in zip(grads, needs))


def _narrow_backward_reference(q, k, v, a, h0, marks, product, g, g_last, g_product):
    # marks and product are functions of the other arguments and are computed anew: their own gradient is 0 here.
    kind = q.dtype
    q, k, v, a, h0, g, g_last, g_product = widen(q, k, v, a, h0, g, g_last, g_product)
    state = a[:, 0]
    *grads, dh0 = backward.narrow(q, k, v, a, _zeros(h0, state), _zeros(g, q), _zeros(g_last, state), _zeros(g_product, state))
    return *(t.to(kind) for t in grads), dh0


def _wide_vjp(needs, args, outs, cotangents):
    grads = native.wide_backward(*args, *cotangents)
    return tuple(g if need else None for g, need in zip(grads, needs))


def _wide_backward_vjp(needs, args, outs, cotangents):
    """Hessian times vector: backward is a gradient, so its transposed derivative is its derivative."""
    q, k, v, a, h0, *given = args
    moves = [*cotangents[:4], None if h0 is None else cotangents[4]]
    grads = [None] * 5
    if any(needs[:5]):
        grads = native_tangent.wide_hessian(*args, *moves, None, None, None)
    if any(needs[5:]):  # it is linear in the cotangents it is given: what they meet is the forward pass's tangent
        out, last, logs = native_tangent.wide(q, k, v, a, h0, *moves)
        product = complex_times(reference.product(reference.gate(a), 2), logs) if needs[7] else None
        given = [out, last, product]
    return tuple(g if need else None for g, need in zip((*grads, *given), needs))


def _wide_backward_jvp(args, outs, tangents):
    return native_tangent.wide_hessian(*args, *tangents)


def _wide_backward_both(args, tangents):
    results = native_tangent.wide_backward_both(*args, *tangents)
    return results[:5], results[5:]


def _filled(args):
    """The arguments of wide_backward, and the tangents behind them, with zeros for what is not there."""
    state = args[0][:, :, 0, :, None, None] * args[2][:, :, 0, None, :, None] * args[3][:, :, :1, :].unsqueeze(2)
    like = args[0], args[1], args[2], args[3], state, args[2], state, args[3][:, :, 0]
    return [_zeros(t, x) for t, x in zip(args, like * (len(args) // 8))]


def _wide_hessian_reference(*args):
    return tangent.wide_backward(*_filled(args))


def _wide_backward_both_reference(*args):
    return *backward.wide(*_filled(args[:8])), *tangent.wide_backward(*_filled(args))


def _zeros(t: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if t is None else t


def _derive_from(operator, fn, heads_inside: tuple[int, ...] = ()) -> None:
    """Derivatives of the second kind of operator: those of `fn`, the same in plain torch.

    `heads_inside`: which results, by number, lie in memory as [b, n, h, width]. A tangent must lie like its value:
    torch copies one that does not, and a compiled program cannot.
    """

    def jvp(args, outs, tangents):
        results = reference_jvp(fn, args, tangents)
        return tuple(like_rows(t) if i in heads_inside else packed(t) for i, t in enumerate(results))

    operator.derive(vjp=lambda needs, args, outs, cotangents: reference_vjp(fn, needs, args, cotangents), jvp=jvp,
                    save_outputs=False)


def packed(t: Tensor) -> Tensor:
    """A copy of t in memory of its own, rows side by side."""
    return t.clone(memory_format=torch.contiguous_format)


def like_rows(t: Tensor) -> Tensor:
    """A copy of t [b, h, n, w] that lies in memory as [b, n, h, w]."""
    return packed(t.transpose(1, 2)).transpose(1, 2)


native.narrow.derive(vjp=_narrow_vjp, jvp=_narrow_jvp)
native.wide.derive(vjp=_wide_vjp, jvp=_wide_jvp, both=_wide_both)
native.narrow_backward.derive(
    vjp=lambda needs, args, outs, cotangents: reference_vjp(_narrow_backward_reference, needs, args, cotangents),
    jvp=_narrow_backward_jvp, save_outputs=False)
native.wide_backward.derive(vjp=_wide_backward_vjp, jvp=_wide_backward_jvp, both=_wide_backward_both, save_outputs=False)
_derive_from(native_tangent.narrow, _narrow_tangent_reference)
_derive_from(native_tangent.narrow_hessian, _narrow_hessian_reference)
_derive_from(native_tangent.wide, tangent.wide, (0,))
_derive_from(native_tangent.wide_both, _wide_both_reference, (0, 3))
_derive_from(native_tangent.wide_hessian, _wide_hessian_reference, (0, 1, 2, 3))
_derive_from(native_tangent.wide_backward_both, _wide_backward_both_reference, (0, 1, 2, 3, 5, 6, 7, 8))


def run_triton(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Triton's kernels, likewise."""
    if q.numel() == 0 or v.numel() == 0:
        return plain(q, k, v, a, h0)
    if _is_narrow(q, v):
        return _narrowly(triton.channels.narrow, q, k, v, a, h0)
    return triton.heads.wide(q, k, v, a, h0)


KERNELS = (
    Kernel("native", run_native, lambda *args: native_reason("gate_loop", *args)),
    Kernel("triton", run_triton, triton.heads.why_not),
)
