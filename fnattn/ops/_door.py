"""The door between mathematics and machines: which kernel serves a call, and why the others do not.

A request by name is served or refused with the reasons; it never falls back. `impl="auto"` takes the first kernel that
can serve the call and is worth it at this size (`fnattn_kernels.crossovers`, as measured), else the reference.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from fnattn_kernels import crossovers
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.native import build
from torch import Tensor

REFERENCE = "reference"
# Every name that some operator has a kernel of: what is none of these is a mistake in the name, not a missing kernel.
NAMES = ("native", "triton", "flex", "fast_transformers", "colt5", "deepspeed", "sdpa", "gather", "bands", "associative_scan",
         "rotary_embedding_torch")
_NOTHING = nullcontext()


class Kernel(NamedTuple):
    """One implementation of one operator.

    name:    what impl= calls it.
    run:     the function that computes, differentiable and mappable in every way; arguments are the operator's own.
    why_not: None if it can serve these arguments on this machine, else the reason. Reads shapes, dtypes, devices only.
    worth:   whether impl="auto" should take it for these arguments, by the limits in `fnattn_kernels.crossovers`; None: what
             that table says for all arguments.
    """

    name: str
    run: Callable
    why_not: Callable[..., str | None]
    worth: Callable[..., bool] | None = None


def worthwhile(operator: str, kernel: Kernel, *args) -> bool:
    """Whether impl="auto" should take this kernel, if it can serve the call."""
    return crossovers.fixed(operator, kernel.name) if kernel.worth is None else kernel.worth(*args)


def choose(operator: str, impl: str, kernels: Sequence[Kernel], *args) -> Kernel | None:
    """The kernel that serves this call; None means the reference.

    Raises:
        ValueError: no operator has a kernel of this name.
        KernelUnavailable: the named kernel cannot serve the call, or this operator has none of this name.
    """
    if impl == REFERENCE:
        return None
    if impl == "auto":
        for kernel in kernels:
            if worthwhile(operator, kernel, *args) and kernel.why_not(*args) is None:
                return kernel
        return None
    for kernel in kernels:
        if kernel.name == impl:
            reason = kernel.why_not(*args)
            if reason is None:
                return kernel
            raise _unavailable(operator, impl, reason)
    names = [repr(kernel.name) for kernel in kernels]
    _known(operator, impl, names)
    raise _unavailable(operator, impl, f"{operator} has no such kernel, only {', '.join(names)}")


def only_plain(who: str, impl: str, reason: str) -> None:
    """Raises as `choose` does unless impl is "auto" or "reference", for what no kernel can do; the reason says what that is."""
    if impl not in ("auto", REFERENCE):
        _known(who, impl, map(repr, NAMES))
        raise _unavailable(who, impl, reason)


def _known(who: str, impl: str, names: Iterable[str]) -> None:
    if impl not in NAMES:
        known = ", ".join(("'auto'", repr(REFERENCE), *names))
        raise ValueError(f"{who}: impl must be one of {known}; got {impl!r}.\n"
                         f'  Use impl="auto" to let the library choose.')


def _unavailable(who: str, impl: str, reason: str) -> KernelUnavailable:
    return KernelUnavailable(f"{who}: impl={impl!r} cannot serve this call.\n  {impl}: {reason}\n"
                             f'  Use impl="auto" to let the library choose, or impl="reference" for plain torch.')


def native_reason(source: str, *tensors: Tensor | None) -> str | None:
    """Why the C kernel csrc/<source>.c cannot take these tensors; None if it can.

    Tensors on the meta device have no numbers: there the operator gives shapes and dtypes, at no cost and without a compiler.
    """
    meta = False
    for t in tensors:
        if t is None:
            continue
        if not t.is_cpu:  # much cheaper to ask than a device
            meta = meta or t.is_meta
            if not t.is_meta:
                return f"needs CPU tensors, got {t.device.type}"
        if not t.is_floating_point():
            return f"needs floating point, got {t.dtype}"
    return None if meta else build.why_not(source)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What sums run in: float64 if any tensor is, else float32."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def widen(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in one dtype wide enough to sum in: float64 if any is, else float32."""
    dtype = compute_dtype(*tensors)
    return tuple(None if t is None else cast(t, dtype) for t in tensors)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), without a call where that is t itself."""
    return t if t.dtype == dtype else t.to(dtype)


def rows_as_they_are(rows: Sequence[Tensor], *states: Tensor | None) -> tuple[Tensor | None, ...]:
    """Arguments of a kernel that reads rows of bfloat16 itself: rows unchanged if all are bfloat16, else all in one wide dtype."""
    if all(t.dtype == torch.bfloat16 for t in rows) and compute_dtype(*states) == torch.float32:
        return *rows, *widen(*states)
    return widen(*rows, *states)


def no_autocast(t: Tensor) -> AbstractContextManager:
    """A context in which autocast leaves sums and products alone."""
    device = "cuda" if t.is_cuda else "cpu"
    # Entering it costs as much as a small operator, so not for nothing.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


def scale_of(who: str, scale: float | None, width: int) -> float:
    """What scores are multiplied by: a number, by default width^-1/2.

    No tensor: kernels take it as a number, and a derivative with respect to it would be zero without a word.
    """
    if scale is None:
        return width ** -0.5 if width else 1.0
    if isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{who}: scale must be a number or None; got {type(scale).__name__}.\n"
                        f"  To learn it, or to have one for each head, multiply the queries: q * scale, with scale=1.0.")
    return float(scale)


def check_heads(who: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [b, h, n, d], k [b, g, m, d], v [b, g, m, e] with h a multiple of g, one floating dtype family, one device."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{who}: {name} must be a tensor; got {type(t).__name__}.\n  Convert it: torch.as_tensor({name}).")
        if not t.is_floating_point():
            raise TypeError(f"{who}: {name} must be floating point; got {t.dtype}.\n  Cast it: {name}.float().")
        if t.ndim != 4:
            raise ValueError(f"{who}: {name} must be [batch, heads, seq, width]; got {list(t.shape)}.\n"
                             f"  Add the missing axes, for example {name}[None, None], or use vmap for further ones.")
    (b, h, _, d), (b_k, g, m, d_k), (b_v, g_v, m_v, _) = q.shape, k.shape, v.shape
    if b_k != b or d_k != d or b_v != b_k or g_v != g or m_v != m or (h % g if g else h):
        raise ValueError(f"{who}: expected q [b, h, n, d], k [b, g, m, d], v [b, g, m, e] with h a multiple of g; "
                         f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}.\n"
                         f"  Check the axes' order: heads come before the sequence.")
    if not (q.is_cpu and k.is_cpu and v.is_cpu) and not q.device == k.device == v.device:
        raise ValueError(f"{who}: q, k and v must be on one device; got {q.device}, {k.device}, {v.device}.\n"
                         f"  Move them: .to(q.device).")
