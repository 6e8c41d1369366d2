"""Rotary positions: pairs of channels are turned by an angle that grows with the position.

    (x_2c, x_2c+1) -> (x_2c cos a - x_2c+1 sin a, x_2c+1 cos a + x_2c sin a)        a = position * freqs_c

so that the product of a rotated query and a rotated key depends on their distance alone. Neighbouring channels form a pair
(rotary-embedding-torch); another convention in use pairs the first half of the channels with the second.

Positions are integers and angles float32 or wider, never in x's dtype: bfloat16 cannot tell position 257 from 258. Linear in
x, hence its own derivative: the tangent rotates by the same angles, the gradient by the opposite ones.

Source: Su et al. 2021, arXiv 2104.09864; rotary-embedding-torch 0.9.1.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from fnattn_kernels.native import rotary as native
from torch import Tensor

from ..core import check_sizes
from ._door import Kernel, cast, choose, compute_dtype, native_reason, no_autocast, rows_as_they_are, widen

# n positions, d channels, f frequencies, 2 f <= d


def rotary(x: Tensor, positions: Tensor, freqs: Tensor, *, impl: str = "auto") -> Tensor:
    """Turns each pair of channels by position times frequency.

    Args:
        x: [..., n, d], floating point; usually queries or keys [b, h, n, d].
        positions: integers [n], or a 0-d tensor with the position of the first row, the others following it.
        freqs: [f], 2 f <= d; from `lang_freqs`, `pixel_freqs` or learned. The first 2 f channels are turned, the rest kept.
        impl: "reference" is plain torch; "native" insists on the C kernel (CPU), "rotary_embedding_torch" on that package;
            "auto" chooses. See `ops.report()`.
    Returns:
        [..., n, d] in x's dtype, computed in float32 or wider. Angles are float32, or float64 if freqs is.
    Raises:
        ValueError: shapes disagree. TypeError: x not floating, positions not integers.
        KernelUnavailable: the named kernel cannot serve the call.

    Differentiable any number of times in both modes, in x and freqs; batches under vmap, also over positions; compiles and
    exports.
    """
    _check(x)
    if not isinstance(positions, Tensor) or positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"rotary: positions must be an integer tensor; got {got}.\n"
                        f"  Use torch.arange(n); for fractional positions compute angles and call ops.rotate(x, angles).")
    n = x.shape[-2]
    if positions.ndim > 1 or positions.ndim == 1 and positions.shape[0] != n:
        raise ValueError(f"rotary: positions must be [{n}], one per row of x, or 0-d; got {list(positions.shape)}.\n"
                         f"  Use vmap for other positions in each sequence.")
    if not isinstance(freqs, Tensor) or freqs.ndim != 1:
        got = list(freqs.shape) if isinstance(freqs, Tensor) else type(freqs).__name__
        raise ValueError(f"rotary: freqs must be a tensor [f]; got {got}.\n  Use ops.lang_freqs(dim).")
    if not freqs.is_floating_point():
        raise TypeError(f"rotary: freqs must be floating point; got {freqs.dtype}.\n  Cast it: freqs.float().")
    if positions.ndim == 0:
        positions = positions + torch.arange(n, device=x.device)
    freqs = freqs if freqs.dtype == torch.float64 else freqs.float()
    with no_autocast(x):
        return _turn(x, torch.outer(positions, freqs), impl)  # in freqs' dtype, to which the product turns integers


def rotate(x: Tensor, angles: Tensor, *, impl: str = "auto") -> Tensor:
    """Turns each pair of channels by a given angle; for tables that are not position times frequency.

    Args:
        x: [..., n, d], floating point. angles: [n, f] in radians, float32 or float64, 2 f <= d. impl: as in `rotary`.
    Returns, raises, transforms: as `rotary`.
    """
    _check(x)
    if not isinstance(angles, Tensor) or angles.dtype not in (torch.float32, torch.float64):
        got = angles.dtype if isinstance(angles, Tensor) else type(angles).__name__
        raise TypeError(f"rotary: angles must be a float32 or float64 tensor; got {got}.\n"
                        f"  Narrower floats cannot hold large angles: compute them as float32.")
    with no_autocast(x):
        return _turn(x, angles, impl)


def _turn(x: Tensor, angles: Tensor, impl: str) -> Tensor:
    if angles.ndim != 2 or angles.shape[0] != x.shape[-2] or 2 * angles.shape[1] > x.shape[-1]:
        raise ValueError(f"rotary: expected angles [n, f] with n = {x.shape[-2]} rows of x and 2 f <= {x.shape[-1]} channels; "
                         f"got {list(angles.shape)}.\n  Each frequency turns two channels: use lang_freqs(d) or fewer.")
    kernel = choose("rotary", impl, KERNELS, x, angles)
    return (reference if kernel is None else kernel.run)(x, angles)


def lang_freqs(dim: int, theta: float = 10000.0, *, device: object = None) -> Tensor:
    """Frequencies for positions in a text, theta^(-2 c / dim): float32 [dim // 2], for a head of `dim` channels."""
    check_sizes("lang_freqs", 0, dim=dim)
    return 1.0 / (theta ** (torch.arange(0, dim, 2, device=device)[:dim // 2].float() / dim))


def pixel_freqs(dim: int, max_freq: float = 10.0, *, device: object = None) -> Tensor:
    """Frequencies for coordinates in [-1, 1], pi times 1 to max_freq / 2: float32 [dim // 2]."""
    check_sizes("pixel_freqs", 0, dim=dim)
    return torch.linspace(1.0, max_freq / 2, dim // 2, device=device) * math.pi


def _check(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"rotary: x must be a floating point tensor; got {got}.\n  Cast it: x.float().")
    if x.ndim < 2:
        raise ValueError(f"rotary: x must be [..., n, d]; got {list(x.shape)}.\n  Add an axis for the positions: x[None].")


def reference(x: Tensor, angles: Tensor) -> Tensor:
    """The same in plain torch."""
    dtype, f = x.dtype, angles.shape[1]
    x = x.to(compute_dtype(x, angles))
    angles = angles.to(x.dtype)
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., 0:2 * f:2], x[..., 1:2 * f:2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    return torch.cat((turned, x[..., 2 * f:]), -1).to(dtype)


# ------------------------------------------------------------------------------------------------ the native kernel


def _native(x: Tensor, angles: Tensor) -> Tensor:
    wide, angles = rows_as_they_are((x,), angles.unsqueeze(0))
    # Four axes: heads and further ones in the second, so that a view of split heads is read in place.
    if x.ndim < 4:
        wide = wide[(None,) * (4 - x.ndim)]
    elif x.ndim > 4:
        wide = wide.flatten(1, -3)
    out = native.rotate(wide, angles.cos(), angles.sin(), True)
    return cast(out if x.ndim == 4 else out.reshape(x.shape), x.dtype)


def _vjp(needs, args, outs, cotangents):
    x, cos, sin, rest = args
    (g,) = cotangents
    g_x = native.rotate(g, cos, -sin, rest) if needs[0] else None
    g_cos = g_sin = None
    if needs[1] or needs[2]:
        x, g = widen(x, g)
        f = cos.shape[2]
        (x_even, x_odd), (g_even, g_odd) = ((t[..., 0:2 * f:2], t[..., 1:2 * f:2]) for t in (x, g))
        g_cos = (g_even * x_even + g_odd * x_odd).sum(1).sum_to_size(cos.shape)
        g_sin = (g_odd * x_even - g_even * x_odd).sum(1).sum_to_size(sin.shape)
    return g_x, g_cos if needs[1] else None, g_sin if needs[2] else None, None


def _jvp(args, outs, tangents):
    x, cos, sin, rest = args
    t_x, t_cos, t_sin, _ = tangents
    if t_cos is None and t_sin is None:
        return native.rotate(t_x, cos, sin, rest)
    kind = x.dtype
    x, t_x = widen(x, t_x)  # a sum is rounded once
    t_cos, t_sin = (torch.zeros_like(cos) if t is None else t for t in (t_cos, t_sin))
    turned = native.rotate(x, t_cos, t_sin, False)
    return (turned if t_x is None else native.rotate(t_x, cos, sin, rest) + turned).to(kind)


def _batch(info, in_dims, x, cos, sin, rest):
    """The mapped axis becomes part of the batch axis; a table that all members and sequences share is not repeated."""
    size = info.batch_size
    x = x.unsqueeze(0).expand(size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    b = x.shape[1]

    def table(t, dim):
        if dim is None and t.shape[0] == 1:
            return t
        t = t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
        return t.expand(size, b, *t.shape[2:]).flatten(0, 1)

    cos, sin = table(cos, in_dims[1]), table(sin, in_dims[2])
    rows = max(cos.shape[0], sin.shape[0])
    out = native.rotate(x.flatten(0, 1), cos.expand(rows, -1, -1), sin.expand(rows, -1, -1), rest)
    return out.unflatten(0, (size, b)), 0


native.rotate.derive(vjp=_vjp, jvp=_jvp, batch=_batch, save_outputs=False)


# ------------------------------------------------------------------------------------------------ rotary-embedding-torch


def _installed() -> bool:
    return importlib.util.find_spec("rotary_embedding_torch") is not None


_installed._dynamo_marked_constant = True  # a tracer cannot follow the search


def _package_reason(x: Tensor, angles: Tensor) -> str | None:
    if not _installed():
        return "the package is not installed: pip install rotary-embedding-torch==0.9.1"
    return None


def _package(x: Tensor, angles: Tensor) -> Tensor:
    from rotary_embedding_torch import apply_rotary_emb

    wide = x.to(compute_dtype(x, angles))
    return apply_rotary_emb(angles.repeat_interleave(2, -1).to(wide.dtype), wide).to(x.dtype)


KERNELS = (
    # Under a compiler plain torch is fused with what surrounds it.
    Kernel("native", _native, lambda x, angles: native_reason("rotary", x), lambda *args: not torch.compiler.is_compiling()),
    Kernel("rotary_embedding_torch", _package, _package_reason),
)
