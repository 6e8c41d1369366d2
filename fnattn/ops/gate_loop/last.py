"""The state that a stretch leaves behind, without its outputs: two products where the whole loop makes six."""

from __future__ import annotations

import torch
from torch import Tensor

from .._door import cast, compute_dtype, no_autocast
from ..scan import complex_times, scan
from .complex import GateLoopState, combine
from .reference import gate

# b batch, h heads, n positions, d width of k, e width of v


def gate_loop_state(k: Tensor, v: Tensor, a: Tensor, state: tuple[Tensor, Tensor]) -> GateLoopState:
    """What `gate_loop` returns as its state.

        A = alpha_n ... alpha_1 A_0      H = sum_t (alpha_n ... alpha_{t+1}) k_t v_t^T + (alpha_n ... alpha_1) H_0

    Time grows with n d e, for wide heads a third of that of `gate_loop`; no state per position is made.

    Args:
        k: [b, h, n, d], v: [b, h, n, e], a: [b, h, n, 2]: as there, a key head for every head.
        state: (H [b, h, d, e, 2], A [b, h, 2]) of what came before.
    Returns:
        The state in float32, or in float64 if any input is.

    Differentiable any number of times in both modes; batches under vmap without a loop; compiles and exports.
    """
    dtype = compute_dtype(k, v, a, *state)
    k, v, a, *state = (cast(t, dtype) for t in (k, v, a, *state))
    b, h, n, _ = k.shape
    with no_autocast(v):
        alpha = gate(a.transpose(1, 2))  # [b, n, h, 2]
        one = torch.tensor((1.0, 0.0), dtype=dtype, device=a.device).expand(b, 1, h, 2)
        if n == 0:
            return GateLoopState(*state)
        # later_t = alpha_n ... alpha_{t+1}, from the end: nothing is divided by what may have become 0.
        inputs = torch.cat((torch.zeros_like(alpha[:, 1:]), one), 1)
        later = scan(torch.cat((alpha[:, 1:], one), 1), inputs, reverse=True, pairs=True)
        whole = complex_times(alpha[:, 0], later[:, 0])
        own = torch.stack([(k * later[..., i].transpose(1, 2).unsqueeze(-1)).mT @ v for i in (0, 1)], -1)
        return combine(tuple(state), (own, whole))
