"""Triton kernels of the gated first-order recurrence; see scan_device.py. Measured: not yet on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from ..native.scan import flops
from . import device_code, power_of_2

# Positions of a chunk and channels of a program.
TILE = (32, 32)


def tiles(n: int, c: int) -> dict[str, int]:
    """The sizes that a launch is compiled for."""
    return {"T": min(TILE[0], power_of_2(n, 2)), "C": min(TILE[1], power_of_2(c, 2))}


def _scan(a: Tensor, x: Tensor, h0: Tensor | None, reverse: bool, pairs: bool, lag: bool, conjugate: bool) -> Tensor:
    device, lang = device_code("scan", a, x, h0)
    a, x = a.contiguous(), x.contiguous()
    h0 = x if h0 is None else h0.contiguous()  # x stands for the pointer that is not read
    b, n, c = x.shape[:3]
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return h
    tile = tiles(n, c)
    shape = dict(START=h0 is not x, REVERSE=reverse, LAG=lag, **tile, ACC=lang.accumulator(x.dtype))
    grid = (b, -(-c // tile["C"]))
    with torch.cuda.device_of(x):
        if pairs:
            device.scan_pairs[grid](a, x, h0, h, n, c, CONJUGATE=conjugate, **shape)
        else:
            device.scan[grid](a, x, h0, h, n, c, **shape)
    return h


# Arguments and meaning as in native/scan.py.
scan = Operator("scan_triton", 1, "(Tensor a, Tensor x, Tensor? h0, bool reverse, bool pairs, bool lag, bool conjugate) -> Tensor",
                cpu=_scan, cuda=_scan, fake=lambda a, x, *rest: x.new_empty(x.shape))
scan.flops(flops)
scan.split((2, 2, 1), (2,))
