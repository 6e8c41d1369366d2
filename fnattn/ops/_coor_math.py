"""Coordinate descent in plain torch: what its kernels compute, as functions that differentiate in every mode.

Upstream alternates a = eps (log k - logsumexp((s + b) / eps)) and b = -relu(s + a). With m = -a that is s + b = min(s, m), so
a row's whole state is one number m, and the iteration a fixed point:

    m_1 = eps_1 (log n - log k)        m_t = eps_t (logsumexp(min(s, m_{t-1}) / eps_t) - log k)
    y   = exp(min(s - m_T, 0) / eps_{T+1})

An entry of -infinity is not there: its y is 0, and so is every derivative with respect to it. Where s = m, min(s, m) counts
as s, which is what relu's gradient of 0 at 0 means upstream.
"""

from __future__ import annotations

import torch
from fnattn_kernels.native.coor_descent import schedule
from torch import Tensor

# s [..., n] scores; log_k, k, cut [...]; g [..., n] cotangent of y


def _entries(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s with 0 for entries that are not there, which ones are, and which ones sums run over.

    Sums over a row without entries run over all of it: their logarithms and gradients are then finite, and unused.
    """
    there = s != -torch.inf
    return torch.where(there, s, 0.0), there, there | ~there.any(-1, keepdim=True)


def _spoil(y: Tensor, s: Tensor) -> Tensor:
    """NaN in all entries of a row that has one NaN score: comparisons would have hidden it."""
    return torch.where(s.isnan().any(-1, keepdim=True), torch.nan, y)


def iterate(s: Tensor, log_k: Tensor, eps: float, eps_init: float, eps_decay: float, n_iters: int) -> Tensor:
    """y after n_iters iterations; eps decays after each, and once more before y is taken."""
    s, there, counted = _entries(s)
    epsilons = schedule(eps, eps_init, eps_decay, n_iters)
    m = _thresholds(s, counted, log_k.unsqueeze(-1), epsilons)[-1]
    return _spoil(torch.where(there, (torch.where(s <= m, s - m, 0.0) / epsilons[-1]).exp(), 0.0), s)


def _thresholds(s: Tensor, counted: Tensor, log_k: Tensor, epsilons: list[float]) -> list[Tensor]:
    """m_1 ... m_T, each [..., 1]."""
    found = [epsilons[0] * (counted.sum(-1, keepdim=True).to(s.dtype).log() - log_k)]
    for eps in epsilons[1:-1]:
        scaled = torch.where(s <= found[-1], s, found[-1]) / eps
        found.append(eps * (torch.where(counted, scaled, -torch.inf).logsumexp(-1, keepdim=True) - log_k))
    return found


def iterate_back(s: Tensor, log_k: Tensor, g: Tensor, eps: float, eps_init: float, eps_decay: float,
                 n_iters: int) -> tuple[Tensor, Tensor]:
    """The gradients of `iterate` with respect to s and log_k, from the thresholds alone: memory of one row, not n_iters.

        h_j  = y_j g_j / eps_{T+1} [s_j <= m_T]              mu_T = -sum_j h_j
        w_tj = exp((min(s_j, m_{t-1}) - m_t) / eps_t - log k)
        ds_j = h_j + sum_t mu_t w_tj [s_j <= m_{t-1}]        mu_{t-1} = mu_t sum_j w_tj [s_j > m_{t-1}]
        dlogk = -sum_t mu_t eps_t
    """
    s, there, counted = _entries(s)
    log_k = log_k.unsqueeze(-1)
    epsilons = schedule(eps, eps_init, eps_decay, n_iters)
    m = _thresholds(s, counted, log_k, epsilons)
    active = there & (s <= m[-1])
    ds = torch.where(active, (torch.where(active, s - m[-1], 0.0) / epsilons[-1]).exp() * g / epsilons[-1], 0.0)
    mu = -ds.sum(-1, keepdim=True)
    dlogk = torch.zeros_like(mu)
    for t in range(n_iters - 1, 0, -1):
        below = s <= m[t - 1]
        exponent = (torch.where(below, s, m[t - 1]) - m[t]) / epsilons[t] - log_k
        part = mu * torch.where(counted, torch.where(counted, exponent, 0.0).exp(), 0.0)
        dlogk = dlogk - mu * epsilons[t]
        ds = ds + torch.where(below & there, part, 0.0)
        mu = torch.where(below, 0.0, part).sum(-1, keepdim=True)
    return ds, (dlogk - mu * epsilons[0]).squeeze(-1)


def iterate_tangent(s: Tensor, log_k: Tensor, ds: Tensor, dlogk: Tensor, eps: float, eps_init: float, eps_decay: float,
                    n_iters: int) -> Tensor:
    """The tangent of `iterate` along ds and dlogk.

        m_1' = -eps_1 dlogk      m_t' = sum_j w_tj (ds_j if s_j <= m_{t-1} else m_{t-1}') - eps_t dlogk
        y_j' = y_j (ds_j - m_T') / eps_{T+1} [s_j <= m_T]
    """
    s, there, counted = _entries(s)
    ds, log_k, dlogk = torch.where(there, ds, 0.0), log_k.unsqueeze(-1), dlogk.unsqueeze(-1)
    epsilons = schedule(eps, eps_init, eps_decay, n_iters)
    m = _thresholds(s, counted, log_k, epsilons)
    dm = -epsilons[0] * dlogk
    for t in range(1, n_iters):
        below = s <= m[t - 1]
        exponent = (torch.where(below, s, m[t - 1]) - m[t]) / epsilons[t] - log_k
        w = torch.where(counted, torch.where(counted, exponent, 0.0).exp(), 0.0)
        dm = (w * torch.where(below, ds, dm)).sum(-1, keepdim=True) - epsilons[t] * dlogk
    active = there & (s <= m[-1])
    return torch.where(active, (torch.where(active, s - m[-1], 0.0) / epsilons[-1]).exp() * (ds - dm) / epsilons[-1], 0.0)


# ------------------------------------------------------------------------------------------------ the fixed point


def exact(s: Tensor, k: Tensor, eps: float) -> Tensor:
    """The fixed point of the iteration: y = min(1, exp((s - m) / eps)) with sum y = k."""
    return exact_at(s, k, find_cut(s.detach(), k.detach(), eps), eps)


def find_cut(s: Tensor, k: Tensor, eps: float) -> Tensor:
    """The largest entry that is not capped at 1: -infinity if the row has no more than k entries. Not differentiable.

    If c entries are capped, m_c = eps (logsumexp of the others / eps - log(k - c)). The answer is the smallest c for which
    the largest of the others does not exceed m_c.
    """
    if s.shape[-1] == 0:
        return torch.full_like(k, -torch.inf)
    kind = s.dtype
    s, k = s.double(), k.double().unsqueeze(-1)
    there = s != -torch.inf
    ordered = s.sort(-1, descending=True).values
    # Entries that are not there come last; far below all others they add nothing.
    scaled = torch.where(ordered != -torch.inf, ordered, -1e30) / eps
    tail = scaled.flip(-1).logcumsumexp(-1).flip(-1)
    room = k - torch.arange(s.shape[-1], device=s.device)
    m = eps * (tail - room.clamp(min=1e-20).log())
    possible = room > 0
    fits = possible & (ordered <= m)
    # Rounding may leave no c that fits, when k - c runs towards 0: the last one with room is meant then.
    last = possible.sum(-1, keepdim=True) - 1
    first = torch.where(fits.any(-1, keepdim=True), fits.to(torch.int64).argmax(-1, keepdim=True), last)
    cut = ordered.gather(-1, first.clamp(min=0))
    return torch.where(there.sum(-1, keepdim=True) <= k, -torch.inf, cut).squeeze(-1).to(kind)


def exact_at(s: Tensor, k: Tensor, cut: Tensor, eps: float) -> Tensor:
    """The closed form, given which entries are capped: those above `cut`. As such differentiable in s and k."""
    return _spoil(_closed(s, k, cut, eps)[0], s)


def _closed(s: Tensor, k: Tensor, cut: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and y of the entries that are not capped (0 elsewhere)."""
    s, there, _ = _entries(s)
    active = there & (s <= cut.unsqueeze(-1))
    capped = there & ~active
    some = active.any(-1, keepdim=True)
    total = torch.where(active | ~some, s / eps, -torch.inf).logsumexp(-1, keepdim=True)
    room = k.unsqueeze(-1) - capped.sum(-1, keepdim=True)
    m = eps * (total - torch.where(some, room, 1.0).clamp(min=1e-20).log())
    y = torch.where(active, (torch.where(active, s - m, 0.0) / eps).exp(), 0.0)
    return torch.where(capped, 1.0, y), y


def exact_back(s: Tensor, k: Tensor, cut: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of `exact` with respect to s and k. With a the entries that are not capped:

        dk = sum y_a g_a / sum y_a        ds = y_a / eps (g_a - dk)
    """
    y = _closed(s, k, cut, eps)[1]
    weight = y.sum(-1, keepdim=True)
    dk = (y * g).sum(-1, keepdim=True) / torch.where(weight > 0, weight, 1.0)
    return y / eps * (g - dk), dk.squeeze(-1)


def exact_tangent(s: Tensor, k: Tensor, cut: Tensor, ds: Tensor, dk: Tensor, eps: float) -> Tensor:
    """The tangent of `exact`: y_a' = y_a (ds_a - m') / eps with m' = (sum y_a ds_a - eps dk) / sum y_a; 0 where capped."""
    y = _closed(s, k, cut, eps)[1]
    weight = y.sum(-1, keepdim=True)
    dm = ((y * ds).sum(-1, keepdim=True) - eps * dk.unsqueeze(-1)) / torch.where(weight > 0, weight, 1.0)
    return y / eps * (ds - dm)
