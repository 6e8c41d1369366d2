"""Taylor linear attention: softmax's exponential replaced by its second-order Taylor polynomial.

p(s) = 1 + s + s^2/2 with s = scale q.k is an inner product phi(q).psi(k) of finite features, so the sum over past keys
is a running sum; inside a chunk the polynomial itself is cheaper. p = ((1 + s)^2 + 1) / 2 >= 1/2 is never negative, so
the normaliser needs no maximum subtracted and the clamp at EPS acts only on queries that see no key.

Source: Zhang, Bhatia, Kumbong, Re 2024, arXiv 2402.04347, and Arora et al. 2024, arXiv 2402.18668 (Based), as in the
package taylor-series-linear-attention 0.2.0; their feature map has d^2 second-order entries, this one the d (d + 1) / 2
distinct ones.
"""

from __future__ import annotations

import torch
from fnattn_kernels import crossovers
from fnattn_kernels.native import taylor as native
from fnattn_kernels.triton import taylor as triton
from torch import Tensor

from .._door import Kernel, cast, check_heads, choose, compute_dtype, native_reason, no_autocast, scale_of
from .reference import CHUNK, EPS, reference
from .rules import derive

# b batch, h query heads, g key heads, r = h / g, n queries, m keys, d width of q and k, e width of v,
# F = 1 + d + d (d + 1) / 2 features


def taylor(q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None = None, sums: Tensor | None = None,
           causal: bool = True, scale: float | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Attention with the polynomial 1 + s + s^2/2 of the score s = scale q.k as weight, in time linear in the length.

        out_i = sum_j p_ij v_j / max(sum_j p_ij, 1e-5)        j <= i if causal

    A query that sees no key gives 0. Time grows with n F (e + 1), memory with n; only plain torch, and only up to
    256 positions or in an exported program, makes an [n, n] table.

    Args:
        q: [b, h, n, d], floating point.
        k: [b, g, m, d], h a multiple of g; each key head serves h / g query heads and is not repeated. m = n if causal.
        v: [b, g, m, e].
        keep: [b, m], bool (False: the key is not there) or floating point (the weight of each key).
        sums: [b, g, F, e + 1], what earlier calls returned; None for the start of a sequence.
        causal: whether query i sees the keys up to i only. Earlier calls' keys are seen by all.
        scale: factor on q.k; default d^-1/2.
        impl: "reference" is plain torch; "native" insists on the C kernel (CPU), "triton" on Triton's (CUDA, d up to 64, e up to
            128); "auto" chooses. See `ops.report()`.
    Returns:
        out: [b, h, n, e] in v's dtype, summed in float32, or in float64 if any input is.
        sums: [b, g, F, e + 1] in the dtype of summation: sum_j psi(k_j) [v_j, 1]^T over earlier keys and these, where
            psi(k) = [1, k_i, w_ij k_i k_j (i <= j, row-major)], w = 1/2 for i = j and 1 otherwise.
    Raises:
        ValueError: shapes or devices disagree. TypeError: not floating tensors.
        KernelUnavailable: the named kernel cannot serve the call.

    Differentiable any number of times in both modes, the returned sums too; batches under vmap without a loop; compiles
    and exports.
    """
    _check(q, k, v, keep, sums, causal)
    kernel = choose("taylor", impl, KERNELS, q, k, v)
    dtype = compute_dtype(q, k, v, sums)
    hard = keep is not None and not keep.is_floating_point()
    scale = scale_of("taylor", scale, q.shape[3])
    q_w, k_w, v_w, keep, sums = (None if t is None else cast(t, dtype) for t in (q, k, v, keep, sums))
    with no_autocast(v):
        if kernel is not None:
            out, _, total = kernel.run(q_w, k_w, v_w, keep, sums, hard, bool(causal), scale, EPS)
        else:
            chunk = _quadratic_up_to(q, k) if impl == "auto" else CHUNK
            out, _, total = reference(q_w, k_w, v_w, keep, sums, hard, bool(causal), scale, EPS, chunk)
    return cast(out, v.dtype), total


_QUADRATIC = crossovers.limits("taylor", "reference, quadratic")


def _quadratic_up_to(q: Tensor, k: Tensor) -> int:
    """The chunk for plain torch: all of a sequence so short that its [n, n] table costs less than reading the sums."""
    length, limit = max(q.shape[2], k.shape[2]), _QUADRATIC["length"]
    return CHUNK if torch.compiler.is_exporting() or length > limit else max(length, 1)


def _check(q, k, v, keep, sums, causal) -> None:
    check_heads("taylor", q, k, v)
    (b, _, n, d), (_, g, m, e) = q.shape, v.shape
    if d == 0:
        raise ValueError("taylor: q and k must have at least one channel; got width 0.\n"
                         "  Give heads a width of 1 or more.")
    if causal and n != m:
        raise ValueError(f"taylor: expected as many keys as queries when causal; got {n} queries, {m} keys.\n"
                         f"  Pass earlier keys as sums=, or causal=False to let every query see every key.")
    if keep is not None:
        if not isinstance(keep, Tensor) or not (keep.dtype == torch.bool or keep.is_floating_point()):
            got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
            raise TypeError(f"taylor: keep must be a bool or floating tensor; got {got}.\n  Cast it: keep.bool().")
        if keep.shape != (b, m):
            raise ValueError(f"taylor: keep must be [batch, keys] = {[b, m]}; got {list(keep.shape)}.\n"
                             f"  Use one row per sequence: keep.expand({b}, {m}).")
    if sums is not None:
        if not isinstance(sums, Tensor) or sums.dtype not in (torch.float32, torch.float64):
            got = sums.dtype if isinstance(sums, Tensor) else type(sums).__name__
            raise TypeError(f"taylor: sums must be a float32 or float64 tensor; got {got}.\n  Cast it: sums.float().")
        if sums.shape != (b, g, native.features(d), e + 1):
            raise ValueError(f"taylor: sums must be [b, g, F, e + 1] = {[b, g, native.features(d), e + 1]}; got "
                             f"{list(sums.shape)}.\n  Pass what an earlier call with the same heads and widths gave.")


# ------------------------------------------------------------------------------------------------ the kernels
for _kernel in (native, triton):
    derive(_kernel)

KERNELS = (
    Kernel("native", native.forward, lambda q, k, v: native_reason("taylor", q, k, v)),
    Kernel("triton", triton.forward, triton.why_not),
)
