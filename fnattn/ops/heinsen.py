"""The gated recurrence through logarithms (Heinsen 2023, arXiv 2311.06281): for comparison with upstream only.

    log h_t = A_t + logcumsumexp_t(log kv_s - A_s),     A_t = sum_{s <= t} log a_s

with complex logarithms, so that kv may be negative. The sums grow with the length and cancel: in float32 the error is
about 2.5e-6 at 64 positions and 4e-4 at 4096, where the scan has 3e-7. Use `ops.scan`.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-20  # upstream's clamp of gates and inputs before the logarithm


def heinsen_gate_loop(q: Tensor, kv: Tensor, a: Tensor, h0: Tensor | None = None, *,
                      reverse: bool = False) -> tuple[Tensor, Tensor]:
    """out_t = q_t h_t with h_t = sigmoid(a_t) h_{t-1} + kv_t, computed through complex logarithms.

    Args:
        q, kv, a: [b, n, c]. h0: [b, c], the state before the first position, or None.
        reverse: run from the last position to the first.
    Returns:
        out [b, n, c] in q's dtype; h after the last position read, [b, c], float32 or wider.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    gate, kv = a.to(wide).sigmoid(), kv.to(wide)
    if reverse:
        gate, kv = gate.flip(1), kv.flip(1)
    if h0 is not None:  # as upstream: a first element that is the state
        gate, kv = torch.cat((torch.ones_like(h0)[:, None], gate), 1), torch.cat((h0[:, None].to(wide), kv), 1)
    log_gate = gate.clamp(min=TINY).log().cumsum(1)
    size = torch.where(kv < 0, -1.0, 1.0) * kv.abs().clamp(min=TINY)
    log_kv = size.to(torch.complex128 if wide == torch.float64 else torch.complex64).log()
    h = (log_gate + torch.logcumsumexp(log_kv - log_gate, 1)).exp().real
    last = h[:, -1] if h.shape[1] else (h.new_zeros(h.shape[0], h.shape[2]))
    h = h if h0 is None else h[:, 1:]
    return ((q.to(wide) * (h.flip(1) if reverse else h)).to(q.dtype), last)
