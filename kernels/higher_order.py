"""torch's own associative scan, a higher-order operator that has no public name yet.

In eager code its generic mode is a tree of ordinary operations, so every transform is right. torch's other ones (scan, while_loop,
cond) refuse torch.func.grad or forward mode, and are not used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def why_not() -> str | None:
    """None if it can be used here, else the reason."""
    if torch.compiler.is_exporting():
        return "an exported program would keep the batch size of its example"
    try:
        from torch._higher_order_ops.associative_scan import associative_scan  # noqa: F401
    except ImportError:
        return "this torch has no associative_scan"
    return None


def associative_scan(combine: Callable[[Any, Any], Any], elems: Any, axis: int) -> Any:
    """All running totals of a tree of tensors along an axis of at least one position; combine(earlier, later) -> total."""
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    return scan(combine, elems, dim=axis, combine_mode="generic")
