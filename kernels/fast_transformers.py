"""Causal linear attention by the package pytorch-fast-transformers: its functions on raw memory, not its autograd nodes.

Those nodes (`CausalDotProduct.apply`) refuse torch.func and pass expanded gradients on to code that reads them as if they
were whole. The functions below them take float32 [N, H, L, E] of equal heads, read memory in order whatever the strides
are, and check nothing; so everything is checked, cast and made contiguous here.

On CUDA they start atomic sums on the legacy default stream: the result must be zeroed first, and other streams must wait.
That part is there only if the package was compiled with nvcc. Not yet run on a GPU.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from .contracts import KernelUnavailable, Operator
from .native.causal_dot import flops

# Above it the package's CUDA code divides by zero when it counts threads.
CUDA_WIDTH = 1024
# It counts numbers in 32 bits there.
CUDA_NUMBERS = 1 << 31


@functools.cache
def _package():
    """The class that holds the functions, or the reason why it cannot be imported."""
    try:
        return importlib.import_module("fast_transformers.causal_product").CausalDotProduct, None
    except Exception as error:  # a binary built for another torch fails in many ways
        text = " ".join(str(error).split())[:200]
        return None, (f"the package pytorch-fast-transformers cannot be imported ({type(error).__name__}: {text}); "
                      f"pip install --no-build-isolation pytorch-fast-transformers==0.4.0, after torch")


def missing(device: str) -> str | None:
    """None if the package is here and was built for this kind of device, else the reason."""
    package, reason = _package()
    if package is None:
        return reason
    if package.dot.get(device) is None or package.dot_backward.get(device) is None:
        return f"pytorch-fast-transformers was installed without its functions for {device}"
    return None


# Tracers call this with a constant and must take the answer as one.
missing._dynamo_marked_constant = True


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None if the package can serve causal_dot of these tensors, else the reason."""
    device = q.device.type
    if device not in ("cpu", "cuda"):
        return f"needs CPU or CUDA tensors, got {device}"
    for t in (q, k, v):
        if not t.is_floating_point():
            return f"needs floating point, got {t.dtype}"
        if t.dtype == torch.float64:
            return "computes in float32 only, got float64"
    if device == "cuda" and max(q.shape[3], v.shape[3]) > CUDA_WIDTH:
        return f"needs widths of at most {CUDA_WIDTH} on CUDA, got {q.shape[3]} and {v.shape[3]}"
    many = q.shape[0] * max(q.shape[1], k.shape[1]) * q.shape[2] * max(q.shape[3], v.shape[3])
    if device == "cuda" and many >= CUDA_NUMBERS:
        return f"needs fewer than 2^31 numbers in a tensor on CUDA, got {many}"
    return missing(device)


def _ready(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> None:
    """Foreign code checks nothing: what it would read beyond is refused here."""
    reason = why_not(q, k, v)
    if reason is None and any(t.dtype != torch.float32 for t in (q, k, v, *others)):
        reason = f"needs float32, got {[str(t.dtype) for t in (q, k, v, *others)]}"
    if reason is not None:
        raise KernelUnavailable(f"causal_dot, fast_transformers: {reason}")
    b, h, n, d = q.shape
    g = k.shape[1]
    fits = k.shape == (b, g, n, d) and v.shape[:3] == (b, g, n) and (g == 0 or h % g == 0 or (h > 0 and g % h == 0))
    if not fits or any(t.shape != (b, h, n, v.shape[3]) for t in others):
        shapes = [list(t.shape) for t in (q, k, v, *others)]
        raise ValueError(f"fast_transformers: expected q [b, h, n, d], k [b, g, n, d], v [b, g, n, e], gradient [b, h, n, e] "
                         f"with one of h, g a multiple of the other; got {shapes}.\n  Call fnattn.ops.causal_dot.")


def _whole(t: Tensor, heads: int, reverse: bool) -> Tensor:
    """t in order in memory, with so many heads (each repeated in place), from the end if reverse."""
    t = t.repeat_interleave(heads // t.shape[1], 1) if t.shape[1] != heads else t
    return (t.flip(2) if reverse else t).contiguous()


def _back(t: Tensor, heads: int, reverse: bool) -> Tensor:
    """Undoes `_whole` on a result: repeated heads are summed."""
    t = t if t.shape[1] == heads else t.unflatten(1, (heads, -1)).sum(2)
    return t.flip(2) if reverse else t


def _run(fn, tensors: tuple[Tensor, ...]) -> None:
    if tensors[0].device.type != "cuda":
        fn(*tensors)
        return
    with torch.cuda.device(tensors[0].device):
        here, legacy = torch.cuda.current_stream(), torch.cuda.default_stream()
        legacy.wait_stream(here)
        fn(*tensors)
        here.wait_stream(legacy)


def _dot(q: Tensor, k: Tensor, v: Tensor, reverse: bool) -> Tensor:
    _ready(q, k, v)
    h, heads = q.shape[1], max(q.shape[1], k.shape[1])
    if 0 in q.shape or 0 in v.shape:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    q, k, v = (_whole(t, heads, reverse) for t in (q, k, v))
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    _run(_package()[0].dot[q.device.type], (q, k, v, out))
    return _back(out, h, reverse)


def _dot_back(q: Tensor, k: Tensor, v: Tensor, g: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    _ready(q, k, v, g)
    shapes, heads = (q.shape, k.shape, v.shape), max(q.shape[1], k.shape[1])
    if 0 in q.shape or 0 in v.shape:
        return tuple(torch.zeros_like(t) for t in (q, k, v))
    q, k, v, g = (_whole(t, heads, reverse) for t in (q, k, v, g))
    grads = tuple(torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    _run(_package()[0].dot_backward[q.device.type], (q, k, v, g, *grads))
    return tuple(_back(t, shape[1], reverse) for t, shape in zip(grads, shapes))


# Arguments and meaning as in native/causal_dot.py. Heads that share a key head have it repeated: the package cannot share.
dot = Operator("causal_dot_ft", 1, "(Tensor q, Tensor k, Tensor v, bool reverse) -> Tensor", cpu=_dot, cuda=_dot,
               fake=lambda q, k, v, reverse: q.new_empty(*q.shape[:-1], v.shape[-1]))
# -> the gradients of q, k and v in one sweep each way, given that of the result.
dot_back = Operator("causal_dot_back_ft", 1, "(Tensor q, Tensor k, Tensor v, Tensor g, bool reverse) -> (Tensor, Tensor, Tensor)",
                    cpu=_dot_back, cuda=_dot_back,
                    fake=lambda q, k, v, *rest: tuple(t.new_empty(t.shape) for t in (q, k, v)))
dot.flops(flops)
dot_back.flops(lambda q, k, v, *args, **kwargs: 3 * flops(q, k, v))
dot.split((1, 1, 1), (1,))
dot_back.split((1, 1, 1, 1), (1, 1, 1))
