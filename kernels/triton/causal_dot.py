"""Triton kernels of causal linear attention; see causal_dot_device.py. Measured: not yet on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from ..native import causal_dot as native
from . import device_code, power_of_2
from . import why_not as triton_why_not

WIDTH = 128
# Widths of q, filled up: positions of a chunk, columns of v per program, warps. Without TF32 a product keeps its operands in
# registers: larger tiles spill. In float64 chunks and columns are 16.
TILES = {16: (32, 32, 4), 32: (32, 32, 8), 64: (16, 64, 8), 128: (16, 16, 8)}
# Fewer programs than this leave most of a large GPU idle: long sequences are then cut into segments.
PROGRAMS = 512


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None if the kernels can serve causal_dot of these tensors, else the reason."""
    if max(q.shape[3], v.shape[3]) > WIDTH:
        return f"needs widths of at most {WIDTH}, got {q.shape[3]} and {v.shape[3]}"
    return triton_why_not(q, k, v)


def plan(programs: int, chunks: int) -> tuple[int, int]:
    """Segments, and chunks of each: enough segments to make PROGRAMS programs of `programs`, none without a chunk."""
    segments = min(chunks, max(1, PROGRAMS // max(programs, 1)))
    each = -(-chunks // segments)
    return -(-chunks // each), each


def tiles(d: int, e: int, dtype: torch.dtype) -> dict[str, int]:
    """The sizes that a launch is compiled for."""
    width = power_of_2(d)
    chunk, columns, warps = TILES[width] if dtype != torch.float64 else (16, 16, 8)
    return {"C": chunk, "D": width, "E": min(columns, power_of_2(e)), "num_warps": warps}


def _dot(q: Tensor, k: Tensor, v: Tensor, reverse: bool) -> Tensor:
    device, lang = device_code("causal_dot", q, k, v)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    b, h, n, d = q.shape
    g, e = k.shape[1], v.shape[3]
    if 0 in (b, h, g, n, d, e):
        return q.new_zeros(b, h, n, e)
    out = torch.empty((b, h, n, e), dtype=q.dtype, device=q.device)
    tile = tiles(d, e, q.dtype)
    blocks = -(-e // tile["E"])
    segments, chunks = plan(b * h * blocks, -(-n // tile["C"]))
    shape = dict(REVERSE=reverse, GROUP=max(1, g // h), **tile, ACC=lang.accumulator(q.dtype), PRECISION=lang.PRECISION)
    states, held = q, min(h, g)
    with torch.cuda.device_of(q):
        if segments > 1:
            each = torch.empty((b * held, segments, d, e), dtype=q.dtype, device=q.device)
            device.sums[(b * held, segments, blocks)](k, v, each, n, d, e, held, g, chunks, **shape)
            states = torch.cat((torch.zeros_like(each[:, :1]), each[:, :-1].cumsum(1)), 1)
        device.outputs[(b * h, segments, blocks)](q, k, v, states, out, n, d, e, h, g, held, chunks, STATES=segments > 1, **shape)
    return out


# Arguments and meaning as in native/causal_dot.py.
dot = Operator("causal_dot_triton", 1, "(Tensor q, Tensor k, Tensor v, bool reverse) -> Tensor", cpu=_dot, cuda=_dot,
               fake=lambda q, k, v, reverse: q.new_empty(*q.shape[:-1], v.shape[-1]))
dot.flops(native.flops)
dot.split((1, 1, 1), (1,))
