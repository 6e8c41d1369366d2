"""Root-mean-square normalisation: rows of one length, scaled channel by channel.

Source: Zhang and Sennrich 2019, arXiv 1910.07467; here as upstream's RMSNorm, sqrt(d) x / max(|x|, 1e-12).
"""

from __future__ import annotations

import math

import torch
from fnattn_kernels import crossovers
from fnattn_kernels.contracts import Operator, reference_vjp
from fnattn_kernels.forward_mode import reference_jvp
from fnattn_kernels.native import rms_norm as native
from fnattn_kernels.watchers import mapping
from torch import Tensor

from ._door import Kernel, cast, choose, native_reason, widen

# b batch, n rows, d channels
TINY = 1e-24  # of the square of a row's length: below it rows are scaled by a constant


def rms_norm(x: Tensor, gamma: Tensor, *, impl: str = "auto") -> Tensor:
    """gamma sqrt(d) x / max(|x|, 1e-12) along the last axis: x by its root mean square, in time and memory of n d.

    0 stays 0, with a gradient of 1e12 sqrt(d) gamma there: no number is divided by 0.

    Args:
        x: [..., d], floating point.
        gamma: [d].
        impl: "reference" is plain torch; "native" insists on the C kernel (CPU); "auto" chooses. See `ops.report()`.
    Returns:
        Of x's shape and dtype; float32 inside if that is narrower.
    Raises:
        ValueError: shapes disagree. TypeError: not floating tensors. KernelUnavailable: the named kernel cannot serve the call.

    Differentiable any number of times in both modes; batches under vmap without a loop; compiles and exports.
    """
    for name, t in (("x", x), ("gamma", gamma)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"rms_norm: {name} must be a floating point tensor; got {got}.\n  Convert it: torch.as_tensor({name}).float().")
    return unchecked(x, gamma, impl)


def unchecked(x: Tensor, gamma: Tensor, impl: str = "auto") -> Tensor:
    """The same for callers that have looked at dtypes."""
    if x.ndim < 1 or gamma.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: expected x [..., d] and gamma [d]; got {list(x.shape)} and {list(gamma.shape)}.\n"
                         f"  gamma has a number for each channel of x.")
    kernel = choose("rms_norm", impl, KERNELS, x, gamma)
    return (reference if kernel is None else kernel.run)(x, gamma)


def reference(x: Tensor, gamma: Tensor) -> Tensor:
    """The same in plain torch."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    # As F.normalize(eps=1e-12), but on the square, so that the gradient at x = 0 is not 0/0. Divided by d after the sum: its
    # gradient then passes over the small tensor.
    d = max(x.shape[-1], 1)
    scale = (wide.square().sum(-1, keepdim=True) / d).clamp(min=TINY / d).rsqrt()
    normed = wide * scale
    return (normed if normed.dtype == x.dtype else normed.to(x.dtype)) * gamma


# ------------------------------------------------------------------------------------------------ the native kernel


_LIMITS = crossovers.limits("rms_norm", "native")
# MANY rows of a batch entry make one more sum over entries, for gamma's gradient, cheaper than two views, of x and the result.
MAPPED, MANY = _LIMITS["numbers"], _LIMITS["rows"]


def _native(x: Tensor, gamma: Tensor) -> Tensor:
    if x.ndim == 3 and not torch.compiler.is_compiling() and x.shape[1] >= MANY:
        return cast(native.norm(*widen(x, gamma.unsqueeze(0))), x.dtype)
    rows, scale = widen(x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1]), gamma.unsqueeze(0))
    return cast(native.norm(rows, scale).view(x.shape), x.dtype)


def _why_not(x: Tensor, gamma: Tensor) -> str | None:
    if x.dtype != gamma.dtype:
        return f"needs one dtype for both, got {x.dtype}, {gamma.dtype}"
    return native_reason("rms_norm", x, gamma)


def _formula(x: Tensor, gamma: Tensor) -> Tensor:
    """In the operator's arguments: x [b, n, d], gamma [1 or b, d]."""
    return reference(x, gamma.unsqueeze(1))


def _backward_formula(x: Tensor, gamma: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    d = max(x.shape[-1], 1)
    mean = x.square().sum(-1, keepdim=True) / d
    scale, u = mean.clamp(min=TINY / d).rsqrt(), g * gamma.unsqueeze(1)
    along = torch.where(mean >= TINY / d, scale.square() * (x * u).sum(-1, keepdim=True) / d, 0.0)
    return scale * (u - x * along), (g * x * scale).sum(1)


def _vjp(needs, args, outs, cotangents):
    x, gamma = args
    dx, dgamma = native.backward(x, gamma, cotangents[0])
    if dgamma.shape[0] != gamma.shape[0]:
        dgamma = dgamma.sum(0, keepdim=True)
    return dx if needs[0] else None, dgamma if needs[1] else None


def _fold(operator: Operator):
    """The mapped axis becomes part of the batch axis; a gamma that all share is not repeated."""

    def rule(info, in_dims, *args):
        size = info.batch_size
        b = (args[0] if in_dims[0] is None else args[0].movedim(in_dims[0], 0)[0]).shape[0]

        def merge(i, t, dim):
            if i == 1 and dim is None and t.shape[0] == 1:
                return t
            t = t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
            return t.expand(size, b, *t.shape[2:]).flatten(0, 1)

        out = operator(*(merge(i, t, dim) for i, (t, dim) in enumerate(zip(args, in_dims))))
        if isinstance(out, tuple):
            return tuple(o.unflatten(0, (size, b)) for o in out), (0,) * len(out)
        return out.unflatten(0, (size, b)), 0

    return rule


native.norm.derive(vjp=_vjp, jvp=lambda args, outs, tangents: reference_jvp(_formula, args, tangents), batch=_fold(native.norm),
                   save_outputs=False)
native.backward.derive(vjp=lambda needs, args, outs, cotangents: reference_vjp(_backward_formula, needs, args, cotangents),
                       jvp=lambda args, outs, tangents: reference_jvp(_backward_formula, args, tangents),
                       batch=_fold(native.backward), save_outputs=False)


def _worth(x: Tensor, gamma: Tensor) -> bool:
    if torch.compiler.is_compiling():  # which fuses plain torch with what surrounds it
        return False
    return x.numel() >= MAPPED or not mapping()


KERNELS = (Kernel("native", _native, _why_not, _worth),)
