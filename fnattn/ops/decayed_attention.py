"""Attention scores that decay and turn on the way from key to query, by amounts that depend on the data.

    s_ij = sum_p Re(prod_{j < t <= i} alpha_tp) (q_ip . k_jp),     j <= i

over pairs p of channels, with one complex alpha per position and pair, |alpha| < 1. With L and T the running sums of
log|alpha| and arg alpha, the product is exp(L_i - L_j) cos(T_i - T_j), a product of a factor of i and a factor of j. Each
block of queries measures L from its own first position, so that no factor exceeds exp of one block's decay: stable for any
length, where dividing by a cumulative product is not.

Plain torch; every transform composes. Time n^2 d, memory n d per block of queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .softmax import weights as safe_softmax

# b batch, h heads, n queries, m keys, p pairs of channels, d = 2 p, e value width
BLOCK = 64


def decay(a: Tensor) -> tuple[Tensor, Tensor]:
    """log-magnitude and phase of alpha = sigmoid(|a|) exp(i arg a) for raw a [..., 2]; at a = 0: log(1/2) and 0, gradients 0."""
    re, im = a[..., 0], a[..., 1]
    square = re * re + im * im
    zero = square == 0
    m = torch.where(zero, 1.0, square).sqrt()
    log_magnitude = torch.where(zero, torch.nn.functional.logsigmoid(torch.zeros_like(m)), torch.nn.functional.logsigmoid(m))
    phase = torch.atan2(torch.where(zero, 0.0, im), torch.where(zero, 1.0, re))
    return log_magnitude, phase


def decayed_attention(q: Tensor, k: Tensor, v: Tensor, log_sum_q: Tensor, phase_sum_q: Tensor, log_sum_k: Tensor,
                      phase_sum_k: Tensor, *, offset: Tensor | int = 0, softmax: bool = False) -> Tensor:
    """Causal attention with decaying, turning scores.

    Args:
        q: [b, h, n, d], already scaled. k: [b, h, m, d]. v: [b, h, m, e].
        log_sum_q, phase_sum_q: [b, h, n, p] running sums of log|alpha| and arg alpha up to and with each query.
        log_sum_k, phase_sum_k: [b, h, m, p] the same at each key.
        offset: absolute position of the first query, where the keys start at 0; query i sees key j if j <= offset + i.
        softmax: normalise the scores of a row; else they are the weights as they are.
    Returns:
        [b, h, n, e] in v's dtype; computed in float32 or wider. A row that sees nothing is 0.
    """
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    n, m = q.shape[2], k.shape[2]
    q, k, v_wide = q.to(wide).unflatten(-1, (-1, 2)), k.to(wide).unflatten(-1, (-1, 2)), v.to(wide)
    keys = torch.arange(m, device=q.device)
    outs = []
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        at = offset + torch.arange(rows.start, rows.stop, device=q.device)
        seen = keys <= at[:, None]  # [i, m]
        # Keys after the block's first position decay from it too: their factor exceeds 1, by one block's decay at most.
        reference = log_sum_q[:, :, start:start + 1], phase_sum_q[:, :, start:start + 1]
        turned_q = _turn(q[:, :, rows], log_sum_q[:, :, rows] - reference[0], phase_sum_q[:, :, rows] - reference[1], 1.0)
        turned_k = _turn(k, (reference[0] - log_sum_k).clamp(max=BLOCK * 0.7), reference[1] - phase_sum_k, -1.0)
        scores = torch.einsum("bhix,bhjx->bhij", turned_q.to(wide), turned_k.to(wide))
        weights = safe_softmax(scores, seen) if softmax else torch.where(seen, scores, 0.0)
        outs.append(torch.einsum("bhij,bhje->bhie", weights, v_wide))
    if outs:
        return torch.cat(outs, 2).to(v.dtype)
    rows = q.sum((-1, -2)) + log_sum_q.sum(-1) + phase_sum_q.sum(-1)  # none, but derivatives find their way
    return (rows.unsqueeze(-1) * (v_wide + k.sum((-1, -2)).unsqueeze(-1)).sum(2, keepdim=True)).to(v.dtype)


def _turn(x: Tensor, log_size: Tensor, angle: Tensor, sign: float) -> Tensor:
    """x [..., p, 2] times exp(log_size) (cos angle, sign * sin angle): the features whose product is the decayed score."""
    size = log_size.exp().unsqueeze(-1)
    angle = angle.unsqueeze(-1)
    return torch.cat((x * (size * angle.cos()).to(x.dtype), x * (sign * size * angle.sin()).to(x.dtype)), -1).flatten(-2)
