"""Where the gradient is: its norm per parameter, per layer, and per head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import taps, tree
from ..core import check

# b batch, h heads, n positions, d width of a head


def leaf_norms(grads: Any) -> dict[str, Tensor]:
    """The norm of each leaf of a gradient by dotted name: 0-d tensors, float32 or wider. None leaves are left out."""
    flat = tree.to_flat(tree.map(lambda g: torch.zeros(0, dtype=torch.int64) if g is None else g, grads))
    return {name: g.to(torch.promote_types(g.dtype, torch.float32)).norm() for name, g in flat.items() if tree.is_differentiable(g)}


def layer_norms(grads: Any) -> dict[str, Tensor]:
    """The norm of all leaves of a layer together: "embed", "blocks.0", "blocks.1", ...

    A layer is a name up to and with its first number; a name without one stands alone.
    """
    squares: dict[str, Tensor] = {}
    for name, norm in leaf_norms(grads).items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        layer = ".".join(parts[:number + 1]) if number is not None else parts[0]
        squares[layer] = squares.get(layer, 0.0) + norm.square()
    return {layer: total.sqrt() for layer, total in squares.items()}


def tap_grads(loss: Callable, *args: Any, names: list[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of a loss with respect to tapped values: (values, gradients), by name of the tap.

    Args:
        loss: loss(*args) -> 0-d, with taps inside.
        names: which taps; default all whose values are floating tensors.
    Time and memory of one gradient. A value that the loss does not depend on has gradient 0.
    """
    _, values = taps.harvest(loss, only=names)(*args)
    values = {name: v for name, v in values.items() if tree.is_differentiable(v)}
    check(bool(values), "inspect.tap_grads: expected a function with taps; got none.", remedy="See fnattn.taps.")

    def moved(*steps: Tensor) -> Tensor:
        adds = {name: (lambda old, step=step: old + step) for name, step in zip(values, steps)}
        return taps.plant(loss, adds)(*args)

    value, pull = torch.func.vjp(moved, *(torch.zeros_like(v) for v in values.values()))
    return values, dict(zip(values, pull(torch.ones_like(value))))


def head_norms(loss: Callable, *args: Any) -> dict[str, Tensor]:
    """The norm of the gradient with respect to what each head computes: {"blocks.0.attn": [h], ...}.

    For families whose "heads" are tapped, in a model or alone. How much the loss would change if a head's output did: 0 for a
    head that nothing reads.

    Args:
        loss: loss(*args) -> 0-d.
    """
    _, values = taps.harvest(loss)(*args)
    names = [name for name in values if name == "heads" or name.endswith(".heads")]
    check(bool(names), "inspect.head_norms: expected taps named 'heads'; got {}.", sorted(values),
          remedy="simple_gate_loop has channels in place of heads.")
    _, grads = tap_grads(loss, *args, names=names)
    return {name.removesuffix("heads").rstrip("."): g.transpose(0, 1).flatten(1).norm(dim=1) for name, g in grads.items()}


def head_weight_norms(params: Any, grads: Any) -> dict[str, Tensor]:
    """The norm of the parameter gradient that belongs to each query head: {"to_q": [h], "to_out": [h]} of one attention.

    Rows of to_q (or the query rows of to_qkv) and columns of to_out, where the family has them.

    Args:
        params, grads: of one family, not of a model; see `inspect.attentions_of`.
    """
    cfg = params.cfg
    heads = getattr(cfg, "head_count", None) or getattr(cfg, "heads", None)
    check(heads is not None, "inspect.head_weight_norms: expected a family with heads; got {}.", type(cfg).__module__,
          remedy="Use leaf_norms.")
    out_width = params.to_out.shape[1] if isinstance(getattr(params, "to_out", None), Tensor) else None
    inner = out_width or getattr(cfg, "inner", None) or heads * cfg.dim_head
    found = {}
    for name in ("to_q", "to_qkv"):
        g = getattr(grads, name, None)
        if isinstance(g, Tensor):
            found[name] = g[:inner].unflatten(0, (heads, -1)).flatten(1).norm(dim=1)
    if out_width:
        found["to_out"] = grads.to_out.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1).norm(dim=1)
    return found
