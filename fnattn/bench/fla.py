"""flash-linear-attention's kernels as other sides, where they compute what an operator of ours does. Optional: pip install fla-core.

| ours                                  | theirs                                | to make them equal                                      |
|---|---|---|
| taylor, causal                        | parallel_based, fused_chunk_based     | they add 1e-6 to the denominator, ours is 1e-5 at least |
| gate_loop with real positive gates    | chunk_simple_gla                      | gates as logarithms; no scale                           |
| scan, real, gates above 0             | chunk_hgrn, fused_recurrent_hgrn      | gates as logarithms                                     |
| simple_gate_loop                      | the same, times q                     | gates as logarithms of sigmoids                         |

Each function here takes theirs as its first argument, so that its plain-torch oracle may stand in for a kernel.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from .upstream import Missing

# b batch, h heads, n positions, d width of a head, e width of a value, c channels


def taylor(theirs: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[b, h, n, d], [b, h, n, e] -> [b, h, n, e]; they have positions before heads."""
    return theirs(*(t.transpose(1, 2).contiguous() for t in (q, k, v))).transpose(1, 2)


def gate_loop(theirs: Callable, q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    """a [b, h, n, 2] must be positive numbers and zeros: gates are then sigmoid(a[..., 0])."""
    q, k, v, g = (t.transpose(1, 2).contiguous() for t in (q, k, v, F.logsigmoid(a[..., 0].float())))
    return theirs(q, k, v, g, scale=1.0)[0].transpose(1, 2)


def scan(theirs: Callable, a: Tensor, x: Tensor) -> Tensor:
    """[b, n, c], gates a above 0."""
    return theirs(x.contiguous(), a.log().contiguous())[0].to(x.dtype)


def simple_gate_loop(theirs: Callable, q: Tensor, kv: Tensor, a: Tensor) -> Tensor:
    """[b, n, c]."""
    return q * theirs(kv.contiguous(), F.logsigmoid(a).contiguous())[0].to(q.dtype)


# operator -> name of the other side -> adapter, module, function
PEERS = {
    "taylor": {"fla parallel_based": (taylor, "based", "parallel_based"), "fla fused_chunk_based": (taylor, "based", "fused_chunk_based")},
    "gate_loop": {"fla chunk_simple_gla": (gate_loop, "simple_gla", "chunk_simple_gla")},
    "scan": {"fla chunk_hgrn": (scan, "hgrn", "chunk_hgrn"), "fla fused_recurrent_hgrn": (scan, "hgrn", "fused_recurrent_hgrn")},
    "simple_gate_loop": {"fla chunk_hgrn": (simple_gate_loop, "hgrn", "chunk_hgrn"),
                         "fla fused_recurrent_hgrn": (simple_gate_loop, "hgrn", "fused_recurrent_hgrn")},
}


def peer(operator: str, name: str) -> Callable:
    """The other side as a function of our operator's tensors.

    Raises:
        Missing: fla-core is not installed, or cannot be imported here.
    """
    adapter, module, function = PEERS[operator][name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what else it would like to have; that is not ours to fix
            return partial(adapter, getattr(importlib.import_module(f"fla.ops.{module}"), function))
    except Exception as error:  # whatever an optional package raises, the table goes on without it
        raise Missing(f"fla-core: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
