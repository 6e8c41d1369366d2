"""Triton kernels of softmax attention: value, gradient, tangent and the gradient's tangent, without an [n, m] table.

See softmax_device.py and softmax_second_device.py. Measured: not yet on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..native.softmax import operators
from . import device_code, power_of_2
from . import why_not as triton_why_not

WIDTH = 128
# Widest heads whose gradient moves in the same launch: more would need more shared memory than small GPUs have.
TOGETHER = 64
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
            *tensors: Tensor, source: str = "softmax", **constants: bool) -> None:
    """One program per head and tile of queries (blocks_of "N") or of keys ("M")."""
    device, lang = device_code(source, q, k, v)
    b, h, n, d = q.shape
    g, m, e = k.shape[1], k.shape[2], v.shape[3]
    tile = tiles(d, e, q.dtype)
    grid = (b * h, -(-n // tile["N"])) if blocks_of == "N" else (b * g, -(-m // tile["M"]))
    strides = (0,) * 4 if mask is None else mask.expand(b, h, n, m).stride()
    seen = q if mask is None else mask.view(torch.uint8)
    with torch.cuda.device_of(q):
        getattr(device, name)[grid](q, k, v, seen, *tensors, n, m, d, e, h, g, 0 if start is None else start, scale, *strides,
                                    CAUSAL=start is not None, MASK=mask is not None, **tile, ACC=lang.accumulator(q.dtype),
                                    PRECISION=lang.PRECISION, **constants)


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


def _second(g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, t_out: Tensor, t_lse: Tensor,
            tg: Tensor | None, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, start: int | None,
            scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if tg is not None and max(q.shape[3], v.shape[3]) > TOGETHER:
        parts = (_second(g, q, k, v, mask, out, lse, t_out, t_lse, None, tq, tk, tv, start, scale),
                 _backward(tg, q, k, v, mask, out, lse, start, scale))
        return tuple(a + b for a, b in zip(*parts))
    g, q, k, v, lse, t_lse = (t.contiguous() for t in (g, q, k, v, lse, t_lse))
    tq, tk, tv = (torch.zeros_like(x) if t is None else t.contiguous() for x, t in ((q, tq), (k, tk), (v, tv)))
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    if 0 not in (*q.shape, *k.shape, *v.shape):
        t_delta = (g * t_out).sum(-1) if tg is None else (g * t_out + tg * out).sum(-1)
        given = (g, lse, (g * out).sum(-1), t_lse, t_delta, g if tg is None else tg.contiguous(), tq, tk, tv)
        for name, blocks_of, results in (("second_queries", "N", (dq,)), ("second_keys", "M", (dk, dv))):
            _launch(name, blocks_of, q, k, v, mask, start, scale, *given, *results, source="softmax_second", G_MOVES=tg is not None)
    return dq, dk, dv


def _result(like: Tensor, width: int) -> Tensor:
    return like.new_empty(*like.shape[:3], width)


# Arguments and meaning as in native/softmax.py.
_functions = (_attend, _backward, _tangent, _second)
attend, attend_backward, attend_tangent, attend_second = operators("softmax_triton", _result, cpu=_functions, cuda=_functions)
