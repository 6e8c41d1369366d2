"""A linear map: torch's own, and for the few rows of a step of generation a kernel that reads the weights once."""

from __future__ import annotations

import math

import torch
from fnattn_kernels import crossovers
from fnattn_kernels.native import linear as native
from fnattn_kernels.watchers import unwatched
from torch import Tensor
from torch.nn import functional as F

from ._door import Kernel, cast, choose, native_reason, widen

# b batch, n rows, k width of the input, m of the result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x weight^T + bias, in time n m k.

    Args:
        x: [..., k], floating point.
        weight: [m, k], rows as in torch.nn.Linear. bias: [m], or None for none.
        impl: "reference" is torch's own; "native" insists on the C kernel for few rows (CPU); "auto" chooses: the kernel for a few
            rows with large weights where nothing maps, traces or differentiates. See `ops.report()`.
    Returns:
        [..., m] in x's dtype.
    Raises:
        ValueError: shapes disagree. TypeError: not floating tensors. KernelUnavailable: the named kernel cannot serve the call.

    Differentiable any number of times in both modes; batches under vmap without a loop; compiles and exports.
    """
    _check(x, weight, bias)
    return unchecked(x, weight, bias, impl)


def unchecked(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    """The same for callers that have looked at shapes and dtypes: a step of a model makes many small products."""
    if impl == "auto" and weight.numel() < LARGE:  # what `choose` would find, in a tenth of the time
        return reference(x, weight, bias)
    kernel = choose("linear", impl, KERNELS, x, weight, bias)
    return (reference if kernel is None else kernel.run)(x, weight, bias)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's own. Rows that lie apart are put side by side first: where nothing is differentiated torch would multiply them sequence
    by sequence, which takes twice as long in float32, and tens of times in bfloat16."""
    return F.linear(x.contiguous() if x.ndim > 2 else x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, t in (("x", x), ("weight", weight), *((("bias", bias),) if bias is not None else ())):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"linear: {name} must be a floating point tensor; got {got}.\n  Convert it: torch.as_tensor({name}).float().")
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"linear: expected x [..., k], weight [m, k] and bias [m] or None; got {list(x.shape)}, {list(weight.shape)} "
                         f"and {None if bias is None else list(bias.shape)}.\n  weight has a row for each result, as in torch.nn.Linear.")
    if x.is_meta != weight.is_meta or bias is not None and x.is_meta != bias.is_meta:  # torch's own gives empty memory for some of these
        raise ValueError(f"linear: x, weight and bias must be on one device; got {x.device}, {weight.device} and "
                         f"{None if bias is None else bias.device}.\n  The meta device holds no numbers: draw or load them.")
    other = weight.dtype if x.dtype != weight.dtype else x.dtype if bias is None else bias.dtype
    if x.dtype != other and not torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
        raise TypeError(f"linear: x, weight and bias must have one dtype; got {x.dtype}, {weight.dtype} and "
                        f"{None if bias is None else bias.dtype}.\n  Convert x: x.to(weight.dtype).")


# ------------------------------------------------------------------------------------------------ the native kernel


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    args = x.reshape(1, _rows(x), x.shape[-1]), weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0)
    if weight.dtype == torch.bfloat16 and unwatched([t for t in args if t is not None]):  # read as they lie; derivatives want one dtype
        out = native.linear(args[0].float(), args[1], None if bias is None else args[2].float())
    else:
        out = native.linear(*widen(*args))
    return cast(out.view(*x.shape[:-1], weight.shape[0]), x.dtype)


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if x.dtype != weight.dtype or bias is not None and x.dtype != bias.dtype:
        return f"needs one dtype for all, got {x.dtype}, {weight.dtype}{'' if bias is None else f', {bias.dtype}'}"
    if not torch.compiler.is_compiling() and torch.is_autocast_enabled("cpu"):
        return "autocast wants such products in a narrower dtype"
    return native_reason("linear", x, weight, bias)


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return weight.ndim == 2 and weight.shape[1:] == x.shape[-1:] and (bias is None or bias.shape == weight.shape[:1])


def _worth(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not _fit(x, weight, bias):
        return False  # torch says what is wrong; a kernel would read beyond the end
    few = FEW.get(x.dtype)  # of another dtype the weights would be converted as a whole
    return few is not None and weight.numel() >= LARGE and _rows(x) <= few and native.linear.straight((x, weight, bias)) is not None


_LIMITS = crossovers.limits("linear", "native")
LARGE = _LIMITS["weights"]
FEW = {torch.float32: _LIMITS["rows"], torch.float64: _LIMITS["rows"], torch.bfloat16: _LIMITS["halves"]}


def _vjp(needs, args, outs, cotangents):
    (x, weight, bias), (g,) = args, cotangents
    return (g @ weight if needs[0] else None,
            (g.mT @ x).sum_to_size(weight.shape) if needs[1] else None,
            g.sum(1).sum_to_size(bias.shape) if needs[2] else None)


def _jvp(args, outs, tangents):
    (x, weight, _), (t_x, t_weight, t_bias) = args, tangents
    parts = [] if t_x is None else [native.linear(t_x, weight, None)]
    if t_weight is not None:
        parts.append(x @ t_weight.mT)
    if t_bias is not None:
        parts.append(t_bias.unsqueeze(1).expand_as(outs[0]))
    return sum(parts[1:], parts[0])


def _batch(info, in_dims, x, weight, bias):
    """The mapped axis becomes part of the batch axis; weights that all members share are not repeated."""
    size = info.batch_size
    x = x.unsqueeze(0).expand(size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    b = x.shape[1]

    def shared(t, dim):
        if t is None or dim is None and t.shape[0] == 1:
            return t
        t = t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
        return t.expand(size, b, *t.shape[2:]).flatten(0, 1)

    out = native.linear(x.flatten(0, 1), shared(weight, in_dims[1]), shared(bias, in_dims[2]))
    return out.unflatten(0, (size, b)), 0


native.linear.derive(vjp=_vjp, jvp=_jvp, batch=_batch)

KERNELS = (Kernel("native", _native, _why_not, _worth),)
