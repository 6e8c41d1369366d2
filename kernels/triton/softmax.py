"""Triton kernels of softmax attention: value, gradient and tangent; see softmax_device.py. Measured: not yet on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from ..native.softmax import declare
from . import device_code, power_of_2
from . import why_not as triton_why_not

WIDTH = 128
# Widest of d and e, filled up: queries and keys of a tile, warps. Without TF32 a product keeps its operands in registers.
TILES = {16: (32, 32, 4), 32: (32, 32, 8), 64: (16, 32, 8), 128: (16, 16, 8)}


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None if the kernels can serve these tensors, else the reason."""
    if max(q.shape[3], v.shape[3]) > WIDTH:
        return f"needs widths of at most {WIDTH}, got {q.shape[3]} and {v.shape[3]}"
    if q.device.type == "cuda" and torch.float64 in (q.dtype, k.dtype, v.dtype):
        return "Triton 3.7 cannot compile two products in a row in float64"
    return triton_why_not(q, k, v)


def tiles(d: int, e: int, dtype: torch.dtype) -> dict[str, int]:
    """The sizes that a launch is compiled for."""
    d, e = power_of_2(d), power_of_2(e)
    n, m, warps = TILES[max(d, e)] if dtype != torch.float64 else (16, 16, 8)
    return {"N": n, "M": m, "D": d, "E": e, "num_warps": warps}


def _launch(name: str, blocks_of: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, start: int | None, scale: float,
            *tensors: Tensor) -> None:
    """One program per head and tile of queries (blocks_of "N") or of keys ("M")."""
    device, lang = device_code("softmax", q, k, v)
    b, h, n, d = q.shape
    g, m, e = k.shape[1], k.shape[2], v.shape[3]
    tile = tiles(d, e, q.dtype)
    grid = (b * h, -(-n // tile["N"])) if blocks_of == "N" else (b * g, -(-m // tile["M"]))
    strides = (0,) * 4 if mask is None else mask.expand(b, h, n, m).stride()
    seen = q if mask is None else mask.view(torch.uint8)
    with torch.cuda.device_of(q):
        getattr(device, name)[grid](q, k, v, seen, *tensors, n, m, d, e, h, g, 0 if start is None else start, scale, *strides,
                                    CAUSAL=start is not None, MASK=mask is not None, **tile, ACC=lang.accumulator(q.dtype),
                                    PRECISION=lang.PRECISION)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, start: int | None, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -torch.inf)
    if 0 not in (*q.shape, *k.shape, *v.shape):
        _launch("attend", "N", q, k, v, mask, start, scale, out, lse)
    return out, lse


def _backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, start: int | None,
              scale: float) -> tuple[Tensor, Tensor, Tensor]:
    g, q, k, v, lse = g.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), lse.contiguous()
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    if 0 not in (*q.shape, *k.shape, *v.shape):
        given = (g, lse, (g * out).sum(-1))
        _launch("backward_queries", "N", q, k, v, mask, start, scale, *given, dq)
        _launch("backward_keys", "M", q, k, v, mask, start, scale, *given, dk, dv)
    return dq, dk, dv


def _tangent(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, tq: Tensor | None, tk: Tensor | None,
             tv: Tensor | None, start: int | None, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v, out, lse = q.contiguous(), k.contiguous(), v.contiguous(), out.contiguous(), lse.contiguous()
    moves = (torch.zeros_like(x) if t is None else t.contiguous() for x, t in ((q, tq), (k, tk), (v, tv)))
    tout, tlse = torch.zeros_like(out), torch.zeros_like(lse)
    if 0 not in (*q.shape, *k.shape, *v.shape):
        _launch("tangent", "N", q, k, v, mask, start, scale, out, lse, *moves, tout, tlse)
    return tout, tlse


# Arguments and meaning as in native/softmax.py.
attend = Operator("softmax_triton", 1, "(Tensor q, Tensor k, Tensor v, Tensor? mask, SymInt? start, float scale) -> (Tensor, Tensor)",
                  cpu=_attend, cuda=_attend,
                  fake=lambda q, k, v, *rest: (q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])))
attend_backward = Operator("softmax_triton_backward", 1, "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, "
                           "Tensor lse, SymInt? start, float scale) -> (Tensor, Tensor, Tensor)", cpu=_backward, cuda=_backward,
                           fake=lambda g, q, k, v, *rest: tuple(t.new_empty(t.shape) for t in (q, k, v)))
attend_tangent = Operator("softmax_triton_tangent", 1, "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
                          "Tensor? tq, Tensor? tk, Tensor? tv, SymInt? start, float scale) -> (Tensor, Tensor)",
                          cpu=_tangent, cuda=_tangent,
                          fake=lambda q, k, v, mask, out, lse, *rest: (out.new_empty(out.shape), lse.new_empty(lse.shape)))
declare(attend, attend_backward, attend_tangent)
