"""Gradients of the complex gated loop, written out in plain torch: what the fused C backward computes, made differentiable.

A rule that runs inside forward mode may not call torch.func, so the derivative of the backward kernel cannot be taken
from `reference` by torch.func.vjp; it is taken from these formulas.

With S = q k^T, dS = g v^T and D_ts = p_t / p_s, the loss sees the gates only through the sums L_t of log alpha:

    dL/d Re L_t = q_t . dq_t - k_t . dk_t        dL/d Im L_t = -q_t . dq'_t + k_t . dk'_t

where ' puts the imaginary part of the decay in the place of the real one. What lies behind the chunk counts through the
state that leaves it, H, and that state's gradient, R: Re(conj(R) H) and Im(conj(H) R). Starting the sum anew at each chunk
keeps rounding errors from piling up along the sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fnattn_kernels.native import scan as native_scan
from torch import Tensor

from ..scan import before, complex_times, conjugate
from .reference import chunks, decays, gate, over_chunks, polar, product, split, states


def to_raw(a: Tensor, log_size: Tensor, angle: Tensor) -> Tensor:
    """Gradient of a [..., 2] from the gradients of log |alpha| and arg alpha: the first acts along a, the second across."""
    m, direction, inverse, zero = polar(a)
    along = torch.where(zero, torch.zeros_like(m), torch.sigmoid(-m) * log_size)
    across = inverse * angle
    x, y = direction.unbind(-1)
    return torch.stack((x * along - y * across, y * along + x * across), -1)


def narrow(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor, g: Tensor, g_state: Tensor, g_product: Tensor,
           scan: Callable = native_scan.scan) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, a, h0 for one channel per head; shapes as in reference.narrow."""
    alpha, kv = gate(a), k * v
    h = scan(alpha, torch.stack((kv, torch.zeros_like(kv)), -1), h0, False, True, False, False)
    read = torch.stack((q * g, torch.zeros_like(kv)), -1)
    read = torch.cat((read[:, :-1], (read[:, -1] + g_state)[:, None]), 1)
    total = scan(alpha, read, None, True, True, True, True)  # gradient of H_t from here and from later
    through = complex_times(total, conjugate(before(h, 1, h0)))  # gradient of alpha_t
    logs = complex_times(conjugate(alpha), through) + complex_times(g_product, conjugate(product(alpha, 1)))[:, None]
    return (g * h[..., 0], v * total[..., 0], k * total[..., 0], to_raw(a, logs[..., 0], logs[..., 1]),
            complex_times(conjugate(alpha[:, 0]), total[:, 0]))


def wide(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor, g: Tensor, g_state: Tensor,
         g_product: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, a, h0; shapes as in reference.wide."""
    n = q.shape[2]
    q, k, v, p = chunks(q, k, v, a)
    m = q.shape[3]
    g = split(g, m, -n % m)
    (now_re, now_im), to_end = decays(p)
    pr, pi = p[..., :1], p[..., 1:]
    zr, zi = to_end[..., :1], to_end[..., 1:]
    after, entering = states(k, v, p, to_end, h0)

    # R, the gradient of the state: entering a chunk, and leaving it.
    own = torch.stack(((q * pr).mT @ g, -(q * pi).mT @ g), -1)
    r_entering = over_chunks(conjugate(p[:, :, :, -1]), own, g_state, reverse=True)
    r_after = before(r_entering, 2, g_state, reverse=True)

    scores, d_scores = q @ k.mT, g @ v.mT
    d_now = d_scores * now_re
    read_re, read_im = g @ entering[..., 0].mT, g @ entering[..., 1].mT
    sent_re, sent_im = v @ r_after[..., 0].mT, v @ r_after[..., 1].mT
    dq = d_now @ k + pr * read_re - pi * read_im
    dk = d_now.mT @ q + zr * sent_re + zi * sent_im
    dv = (scores * now_re).mT @ g + (k * zr) @ r_after[..., 0] + (k * zi) @ r_after[..., 1]

    turn = d_scores * scores * now_im
    log_size = (q * dq).sum(-1) - (k * dk).sum(-1)
    angle = (turn.sum(-2) - turn.sum(-1) - (q * (pi * read_re + pr * read_im)).sum(-1)
             + (k * (zi * sent_re - zr * sent_im)).sum(-1))
    behind = complex_times(conjugate(after), r_after).sum((-3, -2))[:, :, :, None]  # [b, h, c, 1, 2]
    sums = torch.stack((log_size, angle), -1).flip(-2).cumsum(-2).flip(-2) + behind
    whole = complex_times(g_product, conjugate(product(p[:, :, :, -1], 2)))[:, :, None]
    sums = sums.flatten(2, 3)[:, :, :n] + whole
    return (*(t.flatten(2, 3)[:, :, :n] for t in (dq, dk, dv)), to_raw(a, sums[..., 0], sums[..., 1]),
            r_entering[:, :, 0])
