"""Softmax along rows of scores, among the entries that are there.

The derivatives need no more than the result y, and are the same map for a gradient and for a tangent:

    dx = y (g - sum_j y_j g_j)
"""

from __future__ import annotations

import torch
from fnattn_kernels import deepspeed
from torch import Tensor

from ..core import peek
from ._door import Kernel, choose, no_autocast, widen


def masked_softmax(scores: Tensor, mask: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Turns each row of scores into weights of sum 1.

        y_j = exp(s_j) / sum over allowed i of exp(s_i)

    Args:
        scores: [..., m], floating point. An entry of -infinity is not there, as if masked.
        mask: bool, broadcastable to scores, True where an entry is allowed; None: everywhere.
        impl: "reference" is plain torch; "deepspeed" insists on that package's Triton kernel (CUDA, float32); "auto" chooses.
    Returns:
        [..., m] in scores' dtype, computed in float32, or in float64 if scores is. Masked entries are 0, and so is a row
        without allowed entries; both pass a gradient of 0.
    Raises:
        ValueError: the mask's shape does not fit. TypeError: scores not floating, mask not bool.
        KernelUnavailable: the named kernel cannot serve the call.

    Differentiable any number of times in both modes; batches under vmap without a loop; compiles and exports.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"masked_softmax: scores must be a floating point tensor; got {got}.\n  Cast them: scores.float().")
    if scores.ndim == 0:
        raise ValueError("masked_softmax: scores must be [..., m]; got [].\n  Give them an axis: scores[None].")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"masked_softmax: mask must be a bool tensor, True = allowed; got {got}.\n  Cast it: mask.bool().")
        if mask.ndim > scores.ndim or any(a not in (1, b) for a, b in zip(mask.shape[::-1], scores.shape[::-1])):
            raise ValueError(f"masked_softmax: mask must be broadcastable to scores {list(scores.shape)}; got {list(mask.shape)}.\n"
                             f"  Add the missing axes, for example mask[:, None, None].")
    kernel = choose("masked_softmax", impl, KERNELS, scores)
    run = reference if kernel is None else kernel.run
    with no_autocast(scores):
        return run(*widen(scores), mask).to(scores.dtype)


def reference(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same in plain torch: its softmax, which gives NaN for a row without entries and so meets none."""
    if scores.shape[-1] == 0:
        return scores
    x = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    empty = x.detach().amax(-1, keepdim=True) == -torch.inf
    known = peek(empty) if empty.device.type == "cpu" else None  # another device would be waited for
    if known is not None and not known.any():
        return torch.softmax(x, -1)
    return torch.softmax(x.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


# ------------------------------------------------------------------------------------------------ the kernel


def _slope(y: Tensor, t: Tensor) -> Tensor:
    return y * (t - (y * t).sum(-1, keepdim=True))


deepspeed.softmax.derive(vjp=lambda needs, args, outs, cotangents: (_slope(outs[0], cotangents[0]),),
                         jvp=lambda args, outs, tangents: _slope(outs[0], tangents[0]))


def _deepspeed(scores: Tensor, mask: Tensor | None) -> Tensor:
    x = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return deepspeed.softmax(rows).view(x.shape)


# Not yet measured on a GPU, so not yet chosen there.
KERNELS = (Kernel("deepspeed", _deepspeed, deepspeed.why_not),)
