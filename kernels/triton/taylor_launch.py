"""How the Triton kernels of Taylor attention are launched: sums of segments, and what rows read of them; see taylor_device.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..native import taylor as native
from . import device_code, power_of_2

# Width of a head, filled up: positions of a segment. Reading the sums then costs about what the [length, length] scores do, and
# they take no more memory than a few copies of the output.
SEGMENT = {16: 128, 32: 256, 64: 1024}
# Wider of d and e, filled up: warps. The other sizes: rows of a program and of the other side, features of a program, entries that
# one product sums over; without TF32 it keeps its operands in registers, so they are few. Compiled for a GPU, only the tangents of
# gradients spill, up to 40 bytes per thread.
WARPS = {16: 4, 32: 4, 64: 4, 128: 8}
TILE = (32, 16, 32, 16)
TILE_DOUBLE = (16, 16, 16, 16)
COLUMNS = 128  # of the sums that one program adds up


class Side(NamedTuple):
    """Rows of one side of the scores, contiguous, and what is summed of them: x [b, rows, n, d], y [b, rows, n, e], z [b, rows, n]."""

    x: Tensor
    y: Tensor
    z: Tensor


class Held(NamedTuple):
    """Sums before each segment in the order of visits, and the last one over all.

    y [b * g, visits, F, e], z [b * g, visits, F]; empty: nothing that a row would read.
    """

    y: Tensor
    z: Tensor
    empty: bool


def tiles(d: int, e: int, dtype: torch.dtype) -> dict[str, int]:
    """The sizes that launches are compiled for."""
    d, e = power_of_2(d), power_of_2(e)
    n, m, f, k = TILE_DOUBLE if dtype == torch.float64 else TILE
    return {"N": n, "M": m, "F": f, "K": k, "D": d, "E": e, "num_warps": WARPS[max(d, e)]}


def _launch(name: str, grid: tuple, side: Side, tensors: tuple, sizes: tuple, leave: str, **flags) -> None:
    """`leave`: the sizes of a tile that the kernel does not ask for."""
    device, lang = device_code("taylor", *side)
    tile = tiles(side.x.shape[3], side.y.shape[3], side.x.dtype)
    tile = {key: value for key, value in tile.items() if key not in tuple(leave)}
    if 0 not in grid:
        with torch.cuda.device_of(side.x):
            getattr(device, name)[grid](*tensors, *sizes, **flags, **tile, ACC=lang.accumulator(side.x.dtype), PRECISION=lang.PRECISION)


def _add_up(sums: Tensor) -> Tensor:
    """Running sums over the second axis, in place."""
    width = sums[0, 0].numel() if sums.numel() else 0
    device, _ = device_code("taylor", sums)
    if width and sums.shape[1] > 1:
        with torch.cuda.device_of(sums):
            device.add_up[sums.shape[0], -(-width // COLUMNS)](sums, sums.shape[1], width, W=COLUMNS, num_warps=1)
    return sums


def states(side: Side, g: int, start: Tensor | None, causal: bool, reverse: bool, along: Side | None = None) -> Held:
    """Sums of psi(x) [y, z] for each of g groups of rows, after `start` [b, g, F, e + 1]; with `along` their change."""
    (b, h, n, d), e = side.x.shape, side.y.shape[3]
    tile, length, features = tiles(d, e, side.x.dtype), SEGMENT[power_of_2(d)], native.features(d)
    segments = -(-n // length)
    y, z = side.y.new_empty(b * g, segments + 1, features, e), side.y.new_empty(b * g, segments + 1, features)
    if start is None:
        y[:, 0], z[:, 0] = 0, 0
    else:
        y[:, 0], z[:, 0] = start[..., :e].flatten(0, 1), start[..., e].flatten(0, 1)
    _launch("states", (b * g * segments, -(-features // tile["F"])), side, (*side, *(along or side), y, z),
            (n, d, e, features, segments, length), "NMD", ALONG=along is not None, REVERSE=reverse, GROUP=h // g)
    if causal:
        return Held(_add_up(y), _add_up(z), start is None and segments == 1)
    return Held(y.sum(1, keepdim=True), z.sum(1, keepdim=True), False)


def _meet(own: Tensor, side: Side, held: Held, t_held: Held | None, causal: bool, reverse: bool) -> tuple[tuple, dict]:
    """Sizes and flags of `gather` and `slope`."""
    (_, rows, n, d), (_, others, m, e) = own.shape, side.y.shape
    count, share = -(-n // tiles(d, e, own.dtype)["N"]), max(1, rows // others) if others else 1
    return ((n, m, d, e, native.features(d), held.y.shape[1], SEGMENT[power_of_2(d)], count),
            dict(INTER=not held.empty or t_held is not None and not t_held.empty, CAUSAL=causal, REVERSE=reverse,
                 ALONG=t_held is not None, SHARE=share, GROUP=1 if share > 1 else others // max(1, rows)))


def gather(own: Tensor, side: Side, held: Held, causal: bool, reverse: bool, eps: float = 0.0, t_own: Tensor | None = None,
            t_side: Side | None = None, t_held: Held | None = None) -> tuple[Tensor, Tensor]:
    """Sums of p [y, z] that rows of `own` see on the other side; divided by that of p z, which counts as eps at
    least, if eps. With t_... their change."""
    out = own.new_empty(*own.shape[:3], side.y.shape[3])
    out_z = own.new_empty(own.shape[:3])
    sizes, flags = _meet(own, side, held, t_held, causal, reverse)
    tensors = (own, *side, own if t_own is None else t_own, *(t_side or side), *held[:2], *(t_held or held)[:2], out, out_z)
    _launch("gather", (own.shape[0] * own.shape[1] * sizes[-1],), side, tensors, sizes, "FD", EPS=eps, **flags)
    return out, out_z


def slope(own: Side, side: Side, held: Held, causal: bool, reverse: bool, t_own: Side | None = None, t_side: Side | None = None,
           t_held: Held | None = None) -> Tensor:
    """Gradient of own.x, where [own.y, own.z] are the cotangents of what `gather` sums for it. With t_... its change."""
    da = torch.empty_like(own.x)
    sizes, flags = _meet(own.x, side, held, t_held, causal, reverse)
    t_own = t_own or own
    tensors = (own.x, *side, *own[1:], t_own.x, *(t_side or side), *t_own[1:], *held[:2], *(t_held or held)[:2], da)
    _launch("slope", (own.x.shape[0] * own.x.shape[1] * sizes[-1],), side, tensors, sizes, "FE", **flags)
    return da
