"""torch's fused attention for the CPU, which its scaled_dot_product_attention runs, as a kernel that can be asked for by name.

With all that torch's own autograd lacks there: forward mode and second order in blocks of queries, grouped heads, causal
offsets, values of another width, empty inputs. `native` calls the same functions where they are faster than its own. The gradient
is not torch's, which loses digits: see softmax_aten.attend_backward.
"""

from __future__ import annotations

from torch import Tensor

from . import softmax_aten as aten
from .call import merged
from .softmax import operators


def _backward(g, q, k, v, mask, out, lse, start, scale):
    return aten.attend_backward(g, q, k, v, mask, start, scale)


attend, attend_backward, attend_tangent, attend_second = operators(
    "softmax_sdpa", merged, cpu=(aten.attend, _backward, aten.tangent, aten.second))


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None if these tensors can be served, else the reason."""
    return None if q.device.type in ("cpu", "meta") else f"needs CPU tensors, got {q.device.type}"
