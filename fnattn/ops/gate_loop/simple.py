"""simple_gate_loop: a gated memory per channel, with real gates, read by multiplication.

Source: the simple gate loop layer of Katsch 2023, arXiv 2311.01927, with one state per channel.
"""

from __future__ import annotations

import torch
from fnattn_kernels.contracts import reference_vjp
from fnattn_kernels.forward_mode import reference_jvp
from fnattn_kernels.native import gate_loop as native
from fnattn_kernels.native import gate_loop_tangent as native_tangent
from fnattn_kernels.native import scan as native_scan
from fnattn_kernels.triton import why_not as triton_why_not
from torch import Tensor

from .._door import Kernel, cast, choose, native_reason, no_autocast, rows_as_they_are, widen
from ..scan import before
from ..scan import reference as scan_reference
from . import triton

# b batch, n positions, c channels


def simple_gate_loop(q: Tensor, kv: Tensor, a: Tensor, h0: Tensor | None = None, *, reverse: bool = False,
                     impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Runs a gated memory along the sequence in every channel and reads it with q.

        h_t = sigmoid(a_t) h_{t-1} + kv_t        out_t = q_t h_t          (t + 1 in the place of t - 1 if reverse)

    Time and memory grow with n c.

    Args:
        q, kv, a: [b, n, c], floating point; a before the sigmoid.
        h0: [b, c] state before the first position visited; zeros if None.
        reverse: run from the last position to the first.
        impl: "reference" is plain torch; "native" insists on the C kernel (CPU), "triton" on Triton's (CUDA), a parallel scan;
            "auto" chooses. See `ops.report()`.
    Returns:
        out [b, n, c] in kv's dtype, and the state [b, c] after the last position visited, in float32, or in float64 if any
        input is; sums run in the latter.
    Raises:
        ValueError: shapes or devices disagree. TypeError: not floating tensors.
        KernelUnavailable: the named kernel cannot serve the call.

    Differentiable any number of times in both modes; batches under vmap without a loop; compiles and exports.
    """
    _check(q, kv, a, h0)
    kernel = choose("simple_gate_loop", impl, KERNELS, q, kv, a, h0)
    run = reference if kernel is None else kernel.run
    with no_autocast(kv):
        args = rows_as_they_are((q, kv, a), h0) if run is run_native else widen(q, kv, a, h0)
        out, last = run(*args, reverse)
    return cast(out, kv.dtype), last


def reference(q: Tensor, kv: Tensor, a: Tensor, h0: Tensor | None = None, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    h = scan_reference(torch.sigmoid(a), kv, h0, reverse)
    if q.shape[1] == 0:
        return q * h, torch.zeros_like(kv.sum(1)) if h0 is None else h0.clone()
    return q * h, h[:, 0 if reverse else -1]


def _check(q: Tensor, kv: Tensor, a: Tensor, h0: Tensor | None) -> None:
    given = ("q", q), ("kv", kv), ("a", a), *(() if h0 is None else (("h0", h0),))
    for name, t in given:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(f"simple_gate_loop: {name} must be a real floating tensor; got "
                            f"{t.dtype if isinstance(t, Tensor) else type(t).__name__}.\n  Convert it: {name}.float().")
    for name, t in given:
        shape = kv.shape[:1] + kv.shape[2:] if name == "h0" else kv.shape
        if kv.ndim != 3 or t.shape != shape:
            raise ValueError(f"simple_gate_loop: expected q, kv, a [batch, seq, channels] of one shape and h0 [batch, channels]; "
                             f"got {name} {list(t.shape)} with kv {list(kv.shape)}.\n  Use vmap for further axes.")
        if t.device != kv.device:
            raise ValueError(f"simple_gate_loop: {name} must be on kv's device {kv.device}; got {t.device}.\n"
                             f"  Move it: .to(kv.device).")


# ------------------------------------------------------------------------------------------------ the native kernel


def run_native(q: Tensor, kv: Tensor, a: Tensor, h0: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """The C kernel, differentiable in every way; arguments as in `reference`, or rows of bfloat16."""
    if kv.numel() == 0:
        return reference(*widen(q, kv, a, h0), reverse)
    return native.simple(q, kv, a, h0, reverse)[:2]


def _vjp(needs, args, outs, cotangents):
    q, kv, a, h0, reverse = args
    grads = native.simple_backward(q, kv, a, h0, outs[2], *cotangents[:2], reverse)
    return (*(g if need else None for g, need in zip(grads, needs)), None)


def _states(gate, x, h0, reverse):
    return native_scan.scan(gate, x, h0, reverse, False, False, False)


def _jvp(args, outs, tangents):
    out, last = native_tangent.simple(*widen(*args[:4], *tangents[:4]), args[4])
    # The marks only ever reach the backward kernel, whose derivative does not read them.
    return out.to(outs[0].dtype), last, torch.zeros_like(outs[2])


def _tangent_reference(q, kv, a, h0, tq, tkv, ta, th0, reverse):
    gate = torch.sigmoid(a)
    h = _states(gate, kv, h0, reverse)
    push = torch.zeros_like(kv) if tkv is None else tkv
    if ta is not None:
        push = push + ta * gate * (1 - gate) * before(h, 1, h0, reverse)
    th = _states(gate, push, th0, reverse)
    out = q * th if tq is None else q * th + tq * h
    return out, th[:, 0 if reverse else -1].clone(memory_format=torch.contiguous_format)


def _backward_reference(q, kv, a, h0, marks, g, g_last, reverse):
    # marks are a function of the other arguments and are computed anew: their own gradient is 0 here.
    kind = q.dtype
    q, kv, a, h0, g, g_last = widen(q, kv, a, h0, g, g_last)
    gate = torch.sigmoid(a)
    h = _states(gate, kv, h0, reverse)
    g = torch.zeros_like(q) if g is None else g
    end = 0 if reverse else -1
    read = q * g
    if g_last is not None:
        last = (read[:, end] + g_last)[:, None]
        read = torch.cat((last, read[:, 1:]) if reverse else (read[:, :-1], last), 1)
    total = native_scan.scan(gate, read, None, not reverse, False, True, False)  # gradient of h_t from here and from later
    start = -1 if reverse else 0
    dh0 = gate[:, start] * total[:, start]
    grads = g * h, total, total * before(h, 1, h0, reverse) * gate * (1 - gate)
    return *(t.to(kind) for t in grads), dh0


native.simple.derive(vjp=_vjp, jvp=_jvp)
for operator, fn in ((native.simple_backward, _backward_reference), (native_tangent.simple, _tangent_reference)):
    operator.derive(vjp=lambda needs, args, outs, cotangents, fn=fn: reference_vjp(fn, needs, args, cotangents),
                    jvp=lambda args, outs, tangents, fn=fn: reference_jvp(fn, args, tangents), save_outputs=False)


def run_triton(q: Tensor, kv: Tensor, a: Tensor, h0: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """Triton's kernel, likewise."""
    return reference(q, kv, a, h0, reverse) if kv.numel() == 0 else triton.channels.simple(q, kv, a, h0, reverse)[:2]


KERNELS = (
    Kernel("native", run_native, lambda *args: native_reason("gate_loop", *args)),
    Kernel("triton", run_triton, triton_why_not),
)
