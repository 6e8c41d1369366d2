"""The operators at the sizes of a large GPU: every implementation, every other side, against what the device can do.

    python -m fnattn bench --device cuda --out FILE.json

Here is what races; gpu_run.py runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from . import case, fla, work
from .case import Work

# b batch, h heads, n positions, d width of a head, e width of a value, c channels, t text, s side of a picture

BF16, F32 = torch.bfloat16, torch.float32
PASSES = ("forward", "forward+backward", "jvp")


class Race(NamedTuple):
    """One operator at growing sizes.

    inputs: sizes, device -> its tensors in float32.
    ours:   ours(sizes, *args, impl=...) -> Tensor.
    work:   sizes -> the least work of a forward, and of a forward with gradients.
    impls:  implementations that may serve it.
    peers:  name -> sizes -> function of the same tensors with the same meaning; may raise upstream.Missing.
    most:   side -> positions above which it is left out: it would take too long there.
    yards:  name -> the same of another meaning: what people use in this place. Not compared.
    check:  sizes of the comparison with float64, where they are not the first of `sizes`; kernels are compiled for the same ones.
    passes: of PASSES.
    tolerance: largest error in float32, as a part of the largest entry.
    """

    name: str
    inputs: Callable[[dict, torch.device], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    work: Callable[[dict], tuple[Work, Work]]
    sizes: tuple[dict[str, int], ...]
    quick: dict[str, int]
    check: dict[str, int]
    impls: tuple[str, ...] = ("triton", "reference")
    peers: dict[str, Callable[[dict], Callable]] = {}
    yards: dict[str, Callable[[dict], Callable]] = {}
    dtypes: tuple[torch.dtype, ...] = (BF16, F32)
    passes: tuple[str, ...] = PASSES
    most: dict[str, int] = {}
    tolerance: float = 1e-4


def normal(name: str, b: int, *shape: int, device: torch.device) -> Tensor:
    """Normal numbers that depend on their name; of each batch element the same, times another factor: drawing takes memory too."""
    steps = torch.arange(b, device=device).view(b, *(1,) * len(shape))
    return case.normal(name, 1, *shape, device=device) * (1 - 0.25 * steps / b)


def _fla(operator: str) -> dict[str, Callable[[dict], Callable]]:
    return {name: lambda s, name=name: fla.peer(operator, name) for name in fla.PEERS[operator]}


def _heads(s: dict, device: torch.device, *names: str) -> tuple[Tensor, ...]:
    """q, k [b, h, n, d], v [b, h, n, e], in memory as projections leave them."""
    widths = {"v": s.get("e", s["d"]), "a": 2}
    return tuple(normal(x, s["b"], s["n"], s["h"], widths.get(x, s["d"]), device=device).transpose(1, 2) for x in names)


def _flash(s: dict, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """torch's fused softmax attention, causal; queries and keys filled up to the width of the values, as it wants them."""
    q, k = (F.pad(t, (0, v.shape[-1] - t.shape[-1])) if t.shape[-1] < v.shape[-1] else t for t in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


FLASH = {"torch SDPA, softmax": lambda s: partial(_flash, s)}


def _real_gates(s: dict, device: torch.device) -> tuple[Tensor, ...]:
    """Positive gates: what simple_gla has too. About 0.98, so that states are long."""
    q, k, v, a = _heads(s, device, "q", "k", "v", "a")
    return q, k, v, torch.stack((a[..., 0].abs() + 3.5, torch.zeros_like(a[..., 1])), -1)


def _channels(s: dict, device: torch.device, *names: str) -> tuple[Tensor, ...]:
    return tuple(normal(name, s["b"], s["n"], s["c"], device=device) for name in names)


def _coor(s: dict, q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
    """Coordinate-descent attention over a table of scores, its rows solved by one implementation of `coor_descent`."""
    n = q.shape[2]
    mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    scores = torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k).float()
    y = ops.coor_descent(scores, 1.0, eps=0.1, eps_init=4.0, eps_decay=0.7, n_iters=20, mask=mask, impl=impl)
    return torch.einsum("bhij,bhjd->bhid", y.to(v.dtype), v)


def _coor_work(s: dict) -> tuple[Work, Work]:
    pairs = s["b"] * s["h"] * work.triangle(s["n"])
    return work.coor(pairs, s["n"], 1.0, 20, 0.1, 4.0, 0.7)


def _picture(s: dict) -> dict[str, int]:
    return {"text_len": s["t"], "image_size": s["s"]}


def _blocks(s: dict, device: torch.device) -> Tensor:
    blocks = s["n"] // 128
    at = torch.arange(blocks, device=device)
    return ((at[:, None] - at) % 4 == 0)[None] | (at < 2)[None]


def _cache(s: dict, device: torch.device) -> tuple[Tensor, ...]:
    q, k, v = _heads(s, device, "q", "k", "v")
    return q[:, :, :1], k[:, :, :-1], v[:, :, :-1], k[:, :, -1:], v[:, :, -1:]


def _attention(pairs: Callable[[dict], float]) -> Callable[[dict], tuple[Work, Work]]:
    return lambda s: work.attention(s["b"], s["h"], s["n"], pairs(s), s["d"])


def _decode_work(s: dict) -> tuple[Work, Work]:
    rows = s["b"] * s["h"] * s["n"]
    return (Work(4 * s["d"] * rows, rows, 8.0 * rows * s["d"]),) * 2


QKV = ("q", "k", "v")
SLOW = {"reference": 2048}  # a loop over positions
WIDE = {"b": 8, "h": 16, "n": 8192, "d": 64}
RACES: dict[str, Race] = {race.name: race for race in (
    Race("taylor", lambda s, on: _heads(s, on, *QKV), lambda s, *a, impl: ops.taylor(*a, impl=impl)[0],
         lambda s: work.taylor(s["b"], s["h"], s["n"], s["d"], s["e"]),
         tuple({"b": 16, "h": 16, "n": n, "d": 16, "e": 64} for n in (2048, 8192, 32768, 131072)),
         {"b": 1, "h": 2, "n": 37, "d": 3, "e": 5}, {"b": 1, "h": 2, "n": 1024}, peers=_fla("taylor"), yards=FLASH,
         most={"reference": 8192, "fla parallel_based": 8192, "torch SDPA, softmax": 32768}),
    Race("gate_loop d1", lambda s, on: _heads(s, on, *QKV, "a"), lambda s, *a, impl: ops.gate_loop(*a, impl=impl)[0],
         lambda s: work.gate_loop_narrow(s["b"], s["n"], s["h"]), ({"b": 8, "h": 2048, "n": 8192, "d": 1},),
         {"b": 1, "h": 3, "n": 37, "d": 1}, {"b": 1, "h": 64, "n": 512}, most=SLOW),
    Race("gate_loop d64", lambda s, on: _heads(s, on, *QKV, "a"), lambda s, *a, impl: ops.gate_loop(*a, impl=impl)[0],
         lambda s: work.gate_loop_wide(s["b"], s["h"], s["n"], s["d"], s["d"]), (WIDE,), {"b": 1, "h": 2, "n": 37, "d": 3},
         {"b": 1, "h": 2, "n": 512}, yards=FLASH),
    Race("gate_loop d64, real gates", _real_gates, lambda s, *a, impl: ops.gate_loop(*a, impl=impl)[0],
         lambda s: work.gate_loop_wide(s["b"], s["h"], s["n"], s["d"], s["d"]), (WIDE,), {"b": 1, "h": 2, "n": 37, "d": 3},
         {"b": 1, "h": 2, "n": 512}, peers=_fla("gate_loop")),
    Race("simple_gate_loop", lambda s, on: _channels(s, on, "q", "kv", "a"), lambda s, *a, impl: ops.simple_gate_loop(*a, impl=impl)[0],
         lambda s: work.simple_gate_loop(s["b"], s["n"], s["c"]), ({"b": 8, "n": 8192, "c": 2048},), {"b": 1, "n": 37, "c": 5},
         {"b": 1, "n": 512, "c": 64}, peers=_fla("simple_gate_loop"), most=SLOW),
    Race("scan", lambda s, on: (_channels(s, on, "a")[0].sigmoid(), *_channels(s, on, "x")), lambda s, *a, impl: ops.scan(*a, impl=impl),
         lambda s: work.simple_gate_loop(s["b"], s["n"], s["c"]), ({"b": 8, "n": 8192, "c": 2048},), {"b": 1, "n": 37, "c": 5},
         {"b": 1, "n": 512, "c": 64}, peers=_fla("scan"), most=SLOW),
    Race("coor_attention T20", lambda s, on: _heads(s, on, *QKV), _coor, _coor_work, ({"b": 4, "h": 16, "n": 2048, "d": 64},),
         {"b": 1, "h": 2, "n": 17, "d": 3}, {"b": 1, "h": 1, "n": 512}, impls=("triton", "colt5", "reference"),
         dtypes=(F32,), tolerance=1e-3),
    Race("dalle conv", lambda s, on: _heads(s, on, *QKV), lambda s, *a, impl: ops.conv_attention(*a, **_picture(s), impl=impl),
         _attention(lambda s: work.conv_pairs(s["t"], s["s"], 5)), ({"b": 16, "h": 8, "n": 1280, "d": 64, "t": 257, "s": 32},),
         {"b": 1, "h": 2, "n": 24, "d": 3, "t": 9, "s": 4}, {"b": 1, "h": 2}, impls=("triton", "bands", "reference"), yards=FLASH),
    Race("block_sparse", lambda s, on: _heads(s, on, *QKV),
         lambda s, *a, impl: ops.block_sparse_attention(*a, _blocks(s, a[0].device), block=128, causal=True, impl=impl),
         _attention(lambda s: float(_blocks(s, torch.device("cpu")).sum()) * 128 ** 2 / 2), ({"b": 16, "h": 8, "n": 4096, "d": 64},),
         {"b": 1, "h": 1, "n": 128, "d": 3}, {"b": 1, "h": 2, "n": 1024}, impls=("triton", "flex", "gather", "reference"), yards=FLASH,
         most={"reference": 2048}),
    Race("softmax_attention", lambda s, on: _heads(s, on, *QKV), lambda s, *a, impl: ops.softmax_attention(*a, causal=True, impl=impl),
         _attention(lambda s: work.triangle(s["n"])), tuple({"b": 4, "h": 16, "n": n, "d": 64} for n in (2048, 8192)),
         {"b": 1, "h": 2, "n": 37, "d": 3}, {"b": 1, "h": 2, "n": 512}, impls=("triton", "sdpa", "reference"), most={"reference": 2048}),
    Race("decode KV", _cache, lambda s, *a, impl: ops.cached_attention(*a, first=s["n"] - 1, length=s["n"], impl=impl), _decode_work,
         ({"b": 16, "h": 8, "n": 1280, "d": 64},), {"b": 1, "h": 2, "n": 7, "d": 3}, {"b": 1, "h": 2},
         impls=("triton", "sdpa", "reference"), passes=("forward",)),
)}
