"""Coordinate descent by the package colt5-attention: its two Triton kernels, without its autograd node.

That node refuses torch.func and the CPU, and its rows without entries are NaN. The kernels are launched from here instead,
on CUDA tensors, or on CPU tensors in Triton's interpreter. Forward keeps the state (a, b) at the start of each of a few
segments of iterations; backward computes the rest anew, segment by segment, in time that grows with the square of a
segment's length. Measured: not yet on a GPU.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from .contracts import KernelUnavailable, Operator
from .native.coor_descent import flops, schedule
from .triton import missing as triton_missing
from .triton import power_of_2

COLUMNS = 131072   # the widest row that one block of the kernels holds
KEPT = 1 << 31     # numbers that the kernels count in 32 bits
SEGMENT = 5        # iterations from one kept state to the next, as upstream's router has it


@functools.cache
def _package():
    """The module that holds the kernels, or the reason why it cannot be imported."""
    try:
        return importlib.import_module("colt5_attention.triton_coor_descent"), None
    except Exception as error:  # its binary parts may be missing in many ways
        text = " ".join(str(error).split())[:200]
        return None, (f"the package colt5-attention cannot be imported ({type(error).__name__}: {text}); "
                      f"pip install colt5-attention==0.11.2 triton")


def missing(device: str) -> str | None:
    """None if the package and Triton can run on this kind of device here, else the reason."""
    return triton_missing(device) or _package()[1]


# Tracers call this with a constant and must take the answer as one.
missing._dynamo_marked_constant = True


def why_not(s: Tensor, log_k: Tensor) -> str | None:
    """None if the kernels can serve these scores, else the reason."""
    if torch.float64 in (s.dtype, log_k.dtype):
        return "computes in float32 only, got float64"
    if s.shape[-1] > COLUMNS:
        return f"needs rows of at most {COLUMNS}, got {s.shape[-1]}"
    return missing(s.device.type)


def _ready(s: Tensor, log_k: Tensor, *others: Tensor) -> None:
    reason = why_not(s, log_k)
    if reason is None and any(t.dtype != torch.float32 for t in (s, log_k, *others)):
        reason = f"needs float32, got {[str(t.dtype) for t in (s, log_k, *others)]}"
    if reason is not None:
        raise KernelUnavailable(f"coor_descent, colt5: {reason}")


def segments(n_iters: int) -> list[int]:
    """Iterations of each segment, the longer ones first, as upstream divides them."""
    count = max(1, n_iters // SEGMENT)
    return [n_iters // count + int(i < n_iters % count) for i in range(count)]


def _few(rows: int, n: int, parts: list[int]) -> None:
    if rows * (len(parts) + 1) * (n + 1) >= KEPT:
        raise KernelUnavailable(f"coor_descent, colt5: needs fewer than 2^31 kept numbers, got {len(parts) + 1} for each of {rows} x {n}")


def _launch(kernel, s: Tensor, *args) -> None:
    n = s.shape[1]
    block = power_of_2(n, 1)
    with torch.cuda.device_of(s):
        kernel[(s.shape[0],)](*args, n, BLOCK_SIZE=block, num_warps=_package()[0].calc_num_warps(block))


def _iterate(s: Tensor, log_k: Tensor, eps: float, eps_init: float, eps_decay: float, n_iters: int) -> tuple[Tensor, Tensor]:
    _ready(s, log_k)
    rows, n = s.shape
    parts = segments(n_iters)
    _few(rows, n, parts)
    marks = s.new_zeros(rows, len(parts) + 1, n + 1)
    if s.numel() == 0:
        return torch.empty_like(s), marks[:, 1:].contiguous()
    s, k = s.contiguous(), log_k.exp().contiguous()
    there = s != -torch.inf
    mask, epsilons = there.int(), schedule(eps, eps_init, eps_decay, n_iters)
    a = s.new_zeros(len(parts) + 1, rows)
    b = marks[:, :, :n]
    b[:, 0] = torch.where(there, -s, 0.0)
    done = 0
    for i, count in enumerate(parts):
        _launch(_package()[0].coor_descent_kernel_forward, s, a[i], b[:, i], s, mask, k, rows, b.stride(0), b.stride(1), n, n, count,
                epsilons[done], eps_decay, eps)
        done += count
    marks[:, :, n] = a.T
    y = torch.where(there, ((a[-1, :, None] + b[:, -1] + s) / epsilons[-1]).exp(), 0.0)
    return torch.where(s.isnan().any(-1, keepdim=True), torch.nan, y), marks[:, :-1].contiguous()


def _iterate_back(s: Tensor, log_k: Tensor, y: Tensor, marks: Tensor, g: Tensor, eps: float, eps_init: float, eps_decay: float,
                  n_iters: int) -> tuple[Tensor, Tensor]:
    _ready(s, log_k, y, marks, g)
    rows, n = s.shape
    if s.numel() == 0:
        return torch.zeros_like(s), torch.zeros_like(log_k)
    s, k, marks = s.contiguous(), log_k.exp().contiguous(), marks.contiguous()
    there = s != -torch.inf
    mask, epsilons = there.int(), schedule(eps, eps_init, eps_decay, n_iters)
    a, b = marks[:, :, n].T.contiguous(), marks[:, :, :n]
    ds = torch.where(there, g * y / epsilons[-1], 0.0)
    db, dlogk, no_da = ds.clone(), torch.zeros_like(k), torch.zeros_like(k)
    last_da = ds.sum(-1)
    parts = segments(n_iters)
    starts = [sum(parts[:i]) for i in range(len(parts))]
    for i in reversed(range(len(parts))):
        _launch(_package()[0].coor_descent_kernel_backward, s, dlogk, s, a[i], b[:, i], mask, ds, db, k,
                last_da if i == len(parts) - 1 else no_da, n, b.stride(0), n, n, n, parts[i], epsilons[starts[i]], eps_decay, eps)
    # b starts as -s. In a row without entries the kernel divides 0 by 0.
    ds = torch.where(there, ds - db, 0.0)
    return ds, torch.where(there.any(-1), dlogk, 0.0)


_SCHEDULE = "float eps, float eps_init, float eps_decay, int n_iters"

# Arguments and results as in native/coor_descent.py, but for what backward reads: y, and (b, a) at the start of each segment,
# [rows, segments, n + 1].
iterate = Operator("coor_iterate_colt5", 1, f"(Tensor s, Tensor log_k, {_SCHEDULE}) -> (Tensor, Tensor)", cpu=_iterate,
                   cuda=_iterate, fake=lambda s, log_k, eps, eps_init, eps_decay, n_iters: (
                       s.new_empty(s.shape), s.new_empty(s.shape[0], len(segments(n_iters)), s.shape[1] + 1)))
iterate_back = Operator("coor_iterate_back_colt5", 1,
                        f"(Tensor s, Tensor log_k, Tensor y, Tensor marks, Tensor g, {_SCHEDULE}) -> (Tensor, Tensor)",
                        cpu=_iterate_back, cuda=_iterate_back,
                        fake=lambda s, log_k, y, marks, g, *options: (s.new_empty(s.shape), log_k.new_empty(log_k.shape)))
iterate.flops(flops(4, 1))
iterate_back.flops(flops(7, 2))
