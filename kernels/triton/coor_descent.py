"""Triton kernels of coordinate descent along rows; see coor_descent_device.py. Measured: not yet on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from ..native.coor_descent import flops, schedule
from . import device_code, power_of_2
from . import why_not as triton_why_not

COLUMNS = 32768  # a row is held in the registers of one block


def why_not(s: Tensor) -> str | None:
    """None if the kernels can serve these scores, else the reason."""
    return f"needs rows of at most {COLUMNS}, got {s.shape[-1]}" if s.shape[-1] > COLUMNS else triton_why_not(s)


def tiles(n: int) -> dict[str, int]:
    """The sizes that a launch is compiled for."""
    width = power_of_2(n)
    return {"N": width, "num_warps": min(32, max(1, width // 256))}


def _launch(name: str, s: Tensor, log_k: Tensor, options: tuple, *tensors: Tensor) -> None:
    device, lang = device_code("coor_descent", s, log_k)
    rows, n = s.shape
    epsilons = torch.tensor(schedule(*options), dtype=s.dtype, device=s.device)
    with torch.cuda.device_of(s):
        getattr(device, name)[(rows,)](s, log_k, epsilons, *tensors, n, options[3], ACC=lang.accumulator(s.dtype), **tiles(n))


def _iterate(s: Tensor, log_k: Tensor, *options) -> tuple[Tensor, Tensor]:
    s, log_k = s.contiguous(), log_k.contiguous()
    y, m = torch.empty_like(s), s.new_zeros(s.shape[0], options[3])
    if s.numel():
        _launch("iterate", s, log_k, options, y, m)
    return y, m


def _iterate_back(s: Tensor, log_k: Tensor, m: Tensor, g: Tensor, *options) -> tuple[Tensor, Tensor]:
    s, log_k, m, g = s.contiguous(), log_k.contiguous(), m.contiguous(), g.contiguous()
    ds, dlog_k = torch.empty_like(s), torch.zeros_like(log_k)
    if s.numel():
        _launch("iterate_back", s, log_k, options, m, g, ds, dlog_k)
    return ds, dlog_k


def _tangent(s: Tensor, log_k: Tensor, m: Tensor, ts: Tensor, tlog_k: Tensor, *options) -> Tensor:
    s, log_k, m, ts, tlog_k = s.contiguous(), log_k.contiguous(), m.contiguous(), ts.contiguous(), tlog_k.contiguous()
    ty = torch.empty_like(s)
    if s.numel():
        _launch("tangent", s, log_k, options, m, ts, tlog_k, ty)
    return ty


def _launch_exact(name: str, s: Tensor, k: Tensor, eps: float, *tensors: Tensor) -> None:
    device, lang = device_code("coor_descent", s, k)
    rows, n = s.shape
    epsilons = torch.tensor([eps], dtype=s.dtype, device=s.device)
    with torch.cuda.device_of(s):
        getattr(device, name)[(rows,)](s, k, epsilons, *tensors, n, ACC=lang.accumulator(s.dtype), **tiles(n))


def _exact(s: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    s, k = s.contiguous(), k.contiguous()
    y, cut, m = torch.empty_like(s), torch.zeros_like(k), torch.zeros_like(k)
    if s.numel():
        _launch_exact("exact", s, k, eps, y, cut, m)
    return y, cut, m


def _exact_back(s: Tensor, k: Tensor, cut: Tensor, m: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    s, k, cut, m, g = (t.contiguous() for t in (s, k, cut, m, g))
    ds, dk = torch.empty_like(s), torch.zeros_like(k)
    if s.numel():
        _launch_exact("exact_back", s, k, eps, cut, m, g, ds, dk)
    return ds, dk


def _exact_tangent(s: Tensor, k: Tensor, cut: Tensor, m: Tensor, ts: Tensor, tk: Tensor, eps: float) -> Tensor:
    s, k, cut, m, ts, tk = (t.contiguous() for t in (s, k, cut, m, ts, tk))
    ty = torch.empty_like(s)
    if s.numel():
        _launch_exact("exact_tangent", s, k, eps, cut, m, ts, tk, ty)
    return ty


_SCHEDULE = "float eps, float eps_init, float eps_decay, int n_iters"

# Arguments and meaning as in native/coor_descent.py.
iterate = Operator("coor_iterate_triton", 1, f"(Tensor s, Tensor log_k, {_SCHEDULE}) -> (Tensor, Tensor)", cpu=_iterate,
                   cuda=_iterate, fake=lambda s, log_k, eps, eps_init, eps_decay, n_iters: (
                       s.new_empty(s.shape), s.new_empty(s.shape[0], n_iters)))
iterate_back = Operator("coor_iterate_back_triton", 1,
                        f"(Tensor s, Tensor log_k, Tensor m, Tensor g, {_SCHEDULE}) -> (Tensor, Tensor)", cpu=_iterate_back,
                        cuda=_iterate_back, fake=lambda s, log_k, *rest: (s.new_empty(s.shape), log_k.new_empty(log_k.shape)))
tangent = Operator("coor_tangent_triton", 1, f"(Tensor s, Tensor log_k, Tensor m, Tensor ts, Tensor tlog_k, {_SCHEDULE}) -> Tensor",
                   cpu=_tangent, cuda=_tangent, fake=lambda s, *rest: s.new_empty(s.shape))
exact = Operator("coor_exact_triton", 1, "(Tensor s, Tensor k, float eps) -> (Tensor, Tensor, Tensor)", cpu=_exact, cuda=_exact,
                 fake=lambda s, k, eps: (s.new_empty(s.shape), k.new_empty(k.shape), k.new_empty(k.shape)))
exact_back = Operator("coor_exact_back_triton", 1,
                      "(Tensor s, Tensor k, Tensor cut, Tensor m, Tensor g, float eps) -> (Tensor, Tensor)", cpu=_exact_back,
                      cuda=_exact_back, fake=lambda s, k, *rest: (s.new_empty(s.shape), k.new_empty(k.shape)))
exact_tangent = Operator("coor_exact_tangent_triton", 1,
                         "(Tensor s, Tensor k, Tensor cut, Tensor m, Tensor ts, Tensor tk, float eps) -> Tensor", cpu=_exact_tangent,
                         cuda=_exact_tangent, fake=lambda s, *rest: s.new_empty(s.shape))
iterate.flops(flops(4, 1))
iterate_back.flops(flops(6, 2))
tangent.flops(flops(7, 2))
exact.flops(flops(-1, 1))
exact_back.flops(flops(-1, 2))
exact_tangent.flops(flops(-1, 2))
