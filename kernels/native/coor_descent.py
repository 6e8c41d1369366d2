"""C kernels of coordinate descent along rows; see csrc/coor_descent.c."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..contracts import Operator
from .call import address, function, threads

SOURCE = "coor_descent"


def schedule(eps: float, eps_init: float, eps_decay: float, n_iters: int) -> list[float]:
    """eps of each iteration, and after its last decay that of the result: n_iters + 1 numbers, in Python's floats."""
    values = [max(eps_init, eps)]
    for _ in range(n_iters):
        values.append(max(values[-1] * eps_decay, eps))
    return values


@functools.lru_cache(maxsize=256)
def c_schedule(eps: float, eps_init: float, eps_decay: float, n_iters: int) -> ctypes.Array:
    """The schedule as an array of C doubles, which kernels read; the caller keeps it alive during the call."""
    values = schedule(eps, eps_init, eps_decay, n_iters)
    return (ctypes.c_double * len(values))(*values)


def _iterate(s: Tensor, log_k: Tensor, eps: float, eps_init: float, eps_decay: float, n_iters: int) -> tuple[Tensor, Tensor]:
    s, log_k = s.contiguous(), log_k.contiguous()
    rows, n = s.shape
    y, m = torch.empty_like(s), s.new_empty(rows, n_iters)
    values = c_schedule(eps, eps_init, eps_decay, n_iters)
    function(SOURCE, "coor_iterate", s.dtype, "pppp" + "ii" + "p" + "ii")(
        address(s), address(log_k), address(y), address(m), rows, n, ctypes.addressof(values), n_iters,
        threads(s.numel() * n_iters))
    return y, m if n else m.zero_()


def _iterate_back(s: Tensor, log_k: Tensor, m: Tensor, g: Tensor, eps: float, eps_init: float, eps_decay: float,
                  n_iters: int) -> tuple[Tensor, Tensor]:
    s, log_k, m, g = s.contiguous(), log_k.contiguous(), m.contiguous(), g.contiguous()
    rows, n = s.shape
    ds, dlogk = torch.empty_like(s), torch.empty_like(log_k)
    values = c_schedule(eps, eps_init, eps_decay, n_iters)
    function(SOURCE, "coor_iterate_back", s.dtype, "pppppp" + "ii" + "p" + "ii")(
        address(s), address(log_k), address(m), address(g), address(ds), address(dlogk), rows, n, ctypes.addressof(values),
        n_iters, threads(s.numel() * n_iters))
    return ds, dlogk if n else dlogk.zero_()


def _exact(s: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    s, k = s.contiguous(), k.contiguous()
    rows, n = s.shape
    y, cut, m = torch.empty_like(s), torch.empty_like(k), torch.empty_like(k)
    function(SOURCE, "coor_exact", s.dtype, "ppppp" + "iidi")(
        address(s), address(k), address(y), address(cut), address(m), rows, n, eps, threads(s.numel() * 8))
    return (y, cut, m) if n else (y, cut.zero_(), m.zero_())


def _exact_back(s: Tensor, k: Tensor, cut: Tensor, m: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    s, cut, m, g = s.contiguous(), cut.contiguous(), m.contiguous(), g.contiguous()
    rows, n = s.shape
    ds, dk = torch.empty_like(s), torch.empty_like(m)
    function(SOURCE, "coor_exact_back", s.dtype, "pppppp" + "iidi")(
        address(s), address(cut), address(m), address(g), address(ds), address(dk), rows, n, eps, threads(s.numel() * 4))
    return ds, dk if n else dk.zero_()


def _tangent(s: Tensor, log_k: Tensor, m: Tensor, ts: Tensor, tlog_k: Tensor, exact: bool, eps: float, eps_init: float,
             eps_decay: float, n_iters: int) -> Tensor:
    s, log_k, m, ts, tlog_k = s.contiguous(), log_k.contiguous(), m.contiguous(), ts.contiguous(), tlog_k.contiguous()
    rows, n = s.shape
    ty = torch.empty_like(s)
    values = c_schedule(eps, eps_init, eps_decay, n_iters)
    function(SOURCE, "coor_tangent", s.dtype, "pppppp" + "iii" + "p" + "ii")(
        address(s), address(log_k), address(m), address(ts), address(tlog_k), address(ty), rows, n, int(exact),
        ctypes.addressof(values), n_iters, threads(s.numel() * n_iters))
    return ty


def _new(t: Tensor) -> Tensor:
    """What the kernels return for t's shape: contiguous, whatever t's strides."""
    return t.new_empty(t.shape)


_SCHEDULE = "float eps, float eps_init, float eps_decay, int n_iters"

# s [rows, n] with -inf for entries that are not there, log_k [rows] -> y [rows, n], thresholds of all iterations [rows, n_iters].
iterate = Operator("coor_iterate_native", 1, f"(Tensor s, Tensor log_k, {_SCHEDULE}) -> (Tensor, Tensor)", cpu=_iterate,
                   fake=lambda s, log_k, eps, eps_init, eps_decay, n_iters: (_new(s),
                                                                             s.new_empty(s.shape[0], n_iters)))
# -> gradients of s and log_k. m is what `iterate` left; it is a function of s and log_k and carries no gradient of its own.
iterate_back = Operator("coor_iterate_back_native", 1,
                        f"(Tensor s, Tensor log_k, Tensor m, Tensor g, {_SCHEDULE}) -> (Tensor, Tensor)", cpu=_iterate_back,
                        fake=lambda s, log_k, m, g, *schedule: (_new(s), _new(log_k)))
# s [rows, n], k [rows] -> y, cut [rows] (largest entry that is not capped, or above it), m [rows] (threshold).
exact = Operator("coor_exact_native", 1, "(Tensor s, Tensor k, float eps) -> (Tensor, Tensor, Tensor)", cpu=_exact,
                 fake=lambda s, k, eps: (_new(s), _new(k), _new(k)))
exact_back = Operator("coor_exact_back_native", 1,
                      "(Tensor s, Tensor k, Tensor cut, Tensor m, Tensor g, float eps) -> (Tensor, Tensor)", cpu=_exact_back,
                      fake=lambda s, k, cut, m, g, eps: (_new(s), _new(k)))
# s, log_k (k if exact), m [rows, n_iters] (cut and threshold [rows, 2] if exact), tangents of s and log_k (k) -> tangent of y.
tangent = Operator(
    "coor_tangent_native", 1, f"(Tensor s, Tensor log_k, Tensor m, Tensor ts, Tensor tlog_k, bool exact, {_SCHEDULE}) -> Tensor",
    cpu=_tangent, fake=lambda s, *others: _new(s))


def flops(n_iters_at: int, rounds: int):
    """A FLOP formula: `rounds` times the work of an iteration, for each of them and once for the result. An iteration adds the
    cap, divides by eps, takes the largest off, exponentiates, sums and adds the threshold. The exact solver counts as one.
    """
    def formula(s, *args, **kwargs):
        n_iters = args[n_iters_at] if n_iters_at >= 0 else 1
        return 6 * rounds * s[0] * s[1] * (n_iters + 1)
    return formula


iterate.flops(flops(4, 1))
iterate_back.flops(flops(6, 2))
exact.flops(flops(-1, 1))
exact_back.flops(flops(-1, 2))
tangent.flops(lambda s, log_k, m, *args, **kwargs: flops(0, 2)(s, 1 if args[2] else args[6]))
