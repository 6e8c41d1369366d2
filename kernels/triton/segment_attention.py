"""Triton kernels of attention over static lists: value, gradient, tangent, and the tangent of the gradient.

One program is a tile of queries of a head, or of keys of a key head, and walks its own list: see segment_attention_device.py and
segment_second_device.py. Memory beyond the results is that of the lists. Measured: not yet on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..native.segment_attention import SegmentOperators, declare
from . import device_code, power_of_2
from . import why_not as triton_why_not

# b batch, h query heads, g key heads, n positions, d width of q and k, e width of v, G groups of lists, t tiles
WIDTH = 128
# Widest of d and e, filled up: queries and keys of a tile (at most 32: the bits of a word), warps.
TILES = {16: (32, 32, 4), 32: (32, 32, 8), 64: (16, 32, 8), 128: (16, 16, 8)}


class Walk(NamedTuple):
    """What the tiles of one side walk; tensors are int32, on the device of the inputs."""

    positions: Tensor  # [t, N] those of each tile, -1 where it has no more
    tiles: Tensor      # [G, t, 2] where its list begins in runs and words, and how many runs it has
    runs: Tensor       # run r: positions r run, ..., r run + run - 1, of which those below n count
    words: Tensor      # which members of the tile a run belongs to
    run: int
    causal: bool       # no query sees a later key, whatever the words say
    free: int          # queries before this position see keys that `keep` denies


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


def operators(name: str, walk: Callable[..., Walk]) -> SegmentOperators:
    """The operators of native/segment_attention.py, by Triton.

    walk(pattern, n, layout, size, keys, device) makes what tiles of `size` queries (keys: of keys) walk; layout and pattern are
    those of the operators. It runs when the kernel does, and keeps what it can.
    """

    def launch(kernel: str, keys: bool, q, k, v, keep, layout, pattern, scale, *tensors) -> None:
        device, lang = device_code("segment_second" if kernel.startswith("second") else "segment_attention", q, k, v)
        (b, h, n, d), g, e = q.shape, k.shape[1], v.shape[3]
        if 0 in (b, h, n):
            return
        tile = tiles(d, e, q.dtype)
        found = walk(tuple(pattern), n, layout, tile["M" if keys else "N"], keys, q.device)
        group_b, group_h = (0, 0) if layout is None else (layout.shape[1] if layout.shape[0] > 1 else 0, int(layout.shape[1] > 1))
        seen = q if keep is None else keep.contiguous().view(torch.uint8)
        with torch.cuda.device_of(q):
            getattr(device, kernel)[(b * (g if keys else h), len(found.positions))](
                q, k, v, seen, *found[:4], *tensors, n, d, e, h, g, group_b, group_h, found.free, scale, CAUSAL=found.causal,
                KEEP=keep is not None, RUN=found.run, **tile, ACC=lang.accumulator(q.dtype), PRECISION=lang.PRECISION)

    def attend(q, k, v, keep, layout, pattern, scale):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])
        launch("attend", False, q, k, v, keep, layout, pattern, scale, out, lse)
        return out, lse

    def backward(g, q, k, v, keep, out, lse, layout, pattern, scale):
        g, q, k, v, lse = g.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), lse.contiguous()
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        common, given = (q, k, v, keep, layout, pattern, scale), (g, lse, (g * out).sum(-1))
        launch("backward_queries", False, *common, *given, dq)
        launch("backward_keys", True, *common, *given, dk, dv)
        return dq, dk, dv

    def tangent(q, k, v, keep, out, lse, tq, tk, tv, layout, pattern, scale):
        q, k, v, out, lse = q.contiguous(), k.contiguous(), v.contiguous(), out.contiguous(), lse.contiguous()
        tout, tlse = torch.empty_like(out), torch.empty_like(lse)
        launch("tangent", False, q, k, v, keep, layout, pattern, scale, out, lse, *_moves((q, tq), (k, tk), (v, tv)), tout, tlse)
        return tout, tlse

    def second(g, q, k, v, keep, out, lse, tout, tlse, tg, tq, tk, tv, layout, pattern, scale):
        q, k, v, g, lse, tlse = (t.contiguous() for t in (q, k, v, g, lse, tlse))
        tq, tk, tv, tg = _moves((q, tq), (k, tk), (v, tv), (g, tg))
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        common = (q, k, v, keep, layout, pattern, scale)
        given = (g, lse, (g * out).sum(-1), tq, tk, tv, tg, tlse, (tg * out + g * tout).sum(-1))
        launch("second_queries", False, *common, *given, dq)
        launch("second_keys", True, *common, *given, dk, dv)
        return dq, dk, dv

    return declare(name, {key: (attend, backward, tangent, second) for key in ("cpu", "cuda")})


def _moves(*pairs: tuple[Tensor, Tensor | None]) -> list[Tensor]:
    """The tangents, zeros for those that are not there."""
    return [torch.zeros_like(x) if t is None else t.contiguous() for x, t in pairs]
