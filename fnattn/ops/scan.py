"""The gated first-order recurrence h_t = a_t h_{t-1} + x_t, real or complex.

The recurrence is closed under differentiation. With G the gradient that reaches h_t from here and from later,

    G_t = g_t + conj(a_{t+1}) G_{t+1}        dx_t = G_t        da_t = G_t conj(h_{t-1})

which is the same recurrence run the other way, so one kernel serves every order.

Source: Blelloch 1990, "Prefix sums and their applications"; the gates of GateLoop, Katsch 2023, arXiv 2311.01927. A scan over any
associative operation is `associative_scan`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from fnattn_kernels import higher_order
from fnattn_kernels.native import scan as native
from fnattn_kernels.triton import scan as triton
from fnattn_kernels.triton import why_not as triton_reason
from torch import Tensor

from ._door import Kernel, cast, choose, native_reason, no_autocast, rows_as_they_are, widen

# b batch, n positions, c channels, m positions of one block
BLOCK = 32


def scan(a: Tensor, x: Tensor, h0: Tensor | None = None, *, reverse: bool = False, pairs: bool = False,
         impl: str = "auto") -> Tensor:
    """Runs a gated memory along the sequence and returns it at every position.

        h_t = a_t h_{t-1} + x_t,    h_{-1} = h0          (h_t = a_t h_{t+1} + x_t, h_n = h0 if reverse)

    Any a is allowed, zero included: nothing is divided by a. Time and memory grow with n c.

    Args:
        a: [b, n, c] gates; with pairs [b, n, c, 2], complex numbers as (re, im).
        x: inputs, of a's shape.
        h0: [b, c] (pairs: [b, c, 2]); zeros if None.
        reverse: run from the last position to the first.
        impl: "reference" is plain torch; "native" insists on the C kernel (CPU), "triton" on Triton's (CUDA), "associative_scan" on
            torch's own higher-order operator; "auto" chooses. See `ops.report()`.
    Returns:
        h, of x's shape and dtype, computed in float32, or in float64 if any input is.
    Raises:
        ValueError: shapes or devices disagree. TypeError: not floating tensors.
        KernelUnavailable: the named kernel cannot serve the call.

    Differentiable any number of times in both modes; batches under vmap without a loop; compiles and exports.
    """
    _check(a, x, h0, pairs)
    kernel = choose("scan", impl, KERNELS, a, x, h0)
    run = reference if kernel is None else kernel.run
    with no_autocast(x):
        args = rows_as_they_are((a, x), h0) if run is run_native else widen(a, x, h0)
        return cast(run(*args, reverse, pairs), x.dtype)


def reference(a: Tensor, x: Tensor, h0: Tensor | None = None, reverse: bool = False, pairs: bool = False) -> Tensor:
    """The same in plain torch: doubling inside blocks of 32, and the same function again for the blocks' last states."""
    if reverse:
        return reference(a.flip(1), x.flip(1), h0, False, pairs).flip(1)
    times = complex_times if pairs else torch.mul
    n = a.shape[1]
    if n == 0:
        return x + a
    if h0 is None and n == 1:
        h0 = torch.zeros_like(x[:, 0])  # so that a has a gradient, 0, at any length
    x = _started(a, x, h0, times)
    if n <= BLOCK:
        return _double(a, x, times)[1]
    blocks = -(-n // BLOCK)
    a, x = (_pad_end(t, 1, blocks * BLOCK - n).unflatten(1, (blocks, BLOCK)) for t in (a, x))  # [b, blocks, m, c]
    a, x = (t.flatten(0, 1) for t in (a, x))
    a, x = _double(a, x, times)
    a, x = (t.unflatten(0, (-1, blocks)) for t in (a, x))
    last = reference(a[:, :, -1], x[:, :, -1], None, False, pairs)  # state after each block
    return (x + times(a, before(last, 1)[:, :, None])).flatten(1, 2)[:, :n]


def _started(a: Tensor, x: Tensor, h0: Tensor | None, times: Callable) -> Tensor:
    """x with what h0 adds at the first position."""
    return x if h0 is None else torch.cat((x[:, :1] + times(a[:, :1], h0[:, None]), x[:, 1:]), 1)


def _double(a: Tensor, x: Tensor, times: Callable) -> tuple[Tensor, Tensor]:
    """Products of the gates up to each position, and the states: after step s both reach over 2^s positions."""
    reach = 1
    while reach < a.shape[1]:
        x = torch.cat((x[:, :reach], x[:, reach:] + times(a[:, reach:], x[:, :-reach])), 1)
        a = torch.cat((a[:, :reach], times(a[:, reach:], a[:, :-reach])), 1)
        reach *= 2
    return a, x


def complex_times(x: Tensor, y: Tensor) -> Tensor:
    """Product of complex numbers stored as (re, im) in the last axis."""
    (a, b), (c, d) = x.unbind(-1), y.unbind(-1)
    return torch.stack((a * c - b * d, a * d + b * c), -1)


def conjugate(x: Tensor) -> Tensor:
    """Conjugate of complex numbers stored as (re, im) in the last axis."""
    return torch.stack((x[..., 0], -x[..., 1]), -1)


def before(t: Tensor, axis: int = 1, first: Tensor | None = None, reverse: bool = False) -> Tensor:
    """t one step later along `axis`: what each position's predecessor holds; `first` (zeros if None) where there is none."""
    size = t.shape[axis]
    if size == 0:
        return t
    edge = torch.zeros_like(t.narrow(axis, 0, 1)) if first is None else first.unsqueeze(axis)
    return torch.cat((t.narrow(axis, 1, size - 1), edge) if reverse else (edge, t.narrow(axis, 0, size - 1)), axis)


def _pad_end(t: Tensor, axis: int, count: int) -> Tensor:
    return F.pad(t, [0, 0] * (t.ndim - axis - 1) + [0, count]) if count else t


def _check(a: Tensor, x: Tensor, h0: Tensor | None, pairs: bool) -> None:
    letters = "[batch, seq, channels, 2]" if pairs else "[batch, seq, channels]"
    for name, t in (("a", a), ("x", x), ("h0", h0)):
        if t is None and name == "h0":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"scan: {name} must be a tensor; got {type(t).__name__}.\n  Convert it: torch.as_tensor({name}).")
        if not t.is_floating_point():
            raise TypeError(f"scan: {name} must be real floating point; got {t.dtype}.\n"
                            f"  Complex numbers come as pairs: torch.view_as_real({name}), pairs=True.")
    if a.ndim != (4 if pairs else 3) or (pairs and a.shape[-1] != 2):
        raise ValueError(f"scan: a must be {letters} (pairs={pairs}); got {list(a.shape)}.\n"
                         f"  Put further axes into the batch or the channels.")
    if x.shape != a.shape:
        raise ValueError(f"scan: a and x must have one shape; got {list(a.shape)} and {list(x.shape)}.\n"
                         f"  Expand the smaller one: a.expand_as(x).")
    if h0 is not None and h0.shape != x.shape[:1] + x.shape[2:]:
        raise ValueError(f"scan: h0 must be {list(x.shape[:1] + x.shape[2:])}; got {list(h0.shape)}.\n"
                         f"  It is one position of x: h0 has no sequence axis.")
    if not a.device == x.device == (x.device if h0 is None else h0.device):
        raise ValueError(f"scan: a, x and h0 must be on one device; got {a.device}, {x.device}"
                         f"{'' if h0 is None else f', {h0.device}'}.\n  Move them: .to(x.device).")


# ------------------------------------------------------------------------------------------------ the kernels


def run_native(a: Tensor, x: Tensor, h0: Tensor | None, reverse: bool, pairs: bool) -> Tensor:
    """The C kernel, differentiable in every way; arguments as in `reference`, or a and x in bfloat16."""
    if x.dtype == torch.bfloat16:
        return native.rounded(a, x, h0, reverse, pairs, False, False)[0]
    return native.scan(a, x, h0, reverse, pairs, False, False)


def run_triton(a: Tensor, x: Tensor, h0: Tensor | None, reverse: bool, pairs: bool) -> Tensor:
    """Triton's kernel, likewise."""
    return triton.scan(a, x, h0, reverse, pairs, False, False)


def run_higher_order(a: Tensor, x: Tensor, h0: Tensor | None, reverse: bool, pairs: bool) -> Tensor:
    """torch's scan over pairs (product of the gates, state): plain operations to every transform."""
    if a.shape[1] < 2 or 0 in a.shape:  # what torch's operator refuses, or gets wrong
        return reference(a, x, h0, reverse, pairs)
    if reverse:
        return run_higher_order(a.flip(1), x.flip(1), h0, False, pairs).flip(1)
    times = _times(pairs)

    def follow(earlier: list[Tensor], later: list[Tensor]) -> list[Tensor]:
        return [times(later[0], earlier[0]), later[1] + times(later[0], earlier[1])]

    return higher_order.associative_scan(follow, [a, _started(a, x, h0, times)], 1)[1]


def _times(pairs: bool) -> Callable:
    return complex_times if pairs else torch.mul


def _back(reverse: bool, pairs: bool, lag: bool, conj: bool) -> tuple[bool, bool, bool, bool]:
    """The recurrence of the gradient: a position's successor comes first, so what was its gate is now that of the row before."""
    return not reverse, pairs, not lag, conj != pairs


def _gradients(needs, args, h: Tensor, total: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Those of a and h0, from the states h and their gradient `total`."""
    a, x, h0, reverse, pairs, lag, conj = args
    times, da, dh0 = _times(pairs), None, None
    if needs[0]:
        if lag:
            sent, held = before(total, 1, None, not reverse), h
        else:
            sent, held = total, before(h, 1, h0, reverse)
        da = times(sent, conjugate(held)) if pairs else sent * held
        if pairs and conj:
            da = conjugate(da)
    if needs[2]:
        start = -1 if reverse else 0
        if lag or x.shape[1] == 0:
            dh0 = total[:, start] if x.shape[1] else torch.zeros_like(h0)
        else:
            gate = a[:, start] if conj or not pairs else conjugate(a[:, start])
            dh0 = times(gate, total[:, start])
    return da, dh0


def _rules(scan: Callable) -> dict[str, Callable]:
    """The derivatives of a kernel `scan(a, x, h0, reverse, pairs, lag, conjugate)`, in terms of itself."""

    def vjp(needs, args, outs, cotangents):
        total = scan(args[0], cotangents[0], None, *_back(*args[3:]))
        da, dh0 = _gradients(needs, args, outs[0], total)
        return da, total if needs[1] else None, dh0, None, None, None, None

    def jvp(args, outs, tangents):
        a, x, h0, reverse, pairs, lag, conj = args
        ta, tx, th0 = tangents[:3]
        push = torch.zeros_like(x) if tx is None else tx
        if ta is not None:
            times = _times(pairs)
            gate = conjugate(ta) if pairs and conj else ta
            if lag:
                push = push + before(times(gate, outs[0]), 1, None, reverse)
            else:
                push = push + times(gate, before(outs[0], 1, h0, reverse))
        return scan(a, push, th0, reverse, pairs, lag, conj)

    return {"vjp": vjp, "jvp": jvp}


def _rounded_vjp(needs, args, outs, cotangents):
    (a, x), (g, g_sums) = args[:2], cotangents
    if g_sums is None:
        rounded, total = native.rounded(a, g, None, *_back(*args[3:]))
    else:
        g = g_sums if g is None else g + g_sums
        total = native.scan(*widen(a, g), None, *_back(*args[3:]))
        rounded = total.to(x.dtype)
    da, dh0 = _gradients(needs, args, outs[1], total)
    return None if da is None else da.to(a.dtype), rounded if needs[1] else None, dh0, None, None, None, None


def _rounded_jvp(args, outs, tangents):
    moved = _rules(native.scan)["jvp"]((*widen(*args[:3]), *args[3:]), outs[1:], widen(*tangents[:3]))
    return moved.to(outs[0].dtype), moved


native.rounded.derive(vjp=_rounded_vjp, jvp=_rounded_jvp)
for _scan in (native.scan, triton.scan):
    _scan.derive(**_rules(_scan))

KERNELS = (
    Kernel("native", run_native, lambda a, x, h0: native_reason("scan", a, x, h0)),
    Kernel("triton", run_triton, triton_reason),
    Kernel("associative_scan", run_higher_order, lambda a, x, h0: higher_order.why_not()),
)
