"""One level of forward mode: dual tensors, tangents of plain functions, and what an `Operator` does where there is no other level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from . import watchers

_C = torch._C
_functorch = _C._functorch
_UNPACK = torch._VF._unpack_dual
_OWN_VMAP = _C._dispatch_key_parse("VmapMode")  # of torch.autograd.functional and gradcheck; torch.func has another


# level=0 always: the public forward_ad functions read a Python global that compiled graphs do not set.
def unpack_dual(t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent (or None) of t at the innermost forward-mode level."""
    primal, tangent = torch._VF._unpack_dual(t, level=0)
    return primal, tangent


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """A dual tensor at the innermost forward-mode level."""
    return torch._VF._make_dual(primal, tangent, level=0)


def any_moves(args: Sequence[Any]) -> bool:
    """Whether a tensor has a tangent at the innermost level. On the way of every call: no generator, no lookup by name."""
    for a in args:
        if isinstance(a, Tensor) and _UNPACK(a, level=0)[1] is not None:
            return True
    return False


def apart(args: Sequence[Any]) -> list[tuple[Any, Tensor | None]] | None:
    """Primal and tangent of each argument; None where value and tangent are better computed one after the other.

    That is where vmap maps the tangent alone, as jacfwd does: one value serves all tangents. And inside the vmap that
    torch.autograd.functional and gradcheck have of their own, which cannot make a dual of a mapped value.
    """
    if _C._dispatch_tls_is_dispatch_key_included(_OWN_VMAP):
        return None
    split = [unpack_dual(a) if isinstance(a, Tensor) else (a, None) for a in args]
    for primal, t in split:
        if t is not None and _functorch.is_batchedtensor(t) and not _functorch.is_batchedtensor(primal):
            return None
    return split


def alone(both: Callable, args: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """Duals of the results of both(args, tangents), where a level of forward mode is all there is; None where something else is.

    `both` runs below the level, where operators meet plain tensors and nothing that watches: the ways through functorch's level and
    back cost a small operator more than what it computes. For the same reason this looks at each argument once.
    """
    level = watchers.lone_level()
    if level is None:
        return None
    primals, tangents, met = [], [], []
    for a in args:
        t = None
        if isinstance(a, Tensor):
            a, t = _UNPACK(a, level=0)
            if level:
                a = _functorch._unwrap_for_grad(a, level)
                t = t if t is None else _functorch._unwrap_for_grad(t, level)
            met.append(a)
            if t is not None:
                met.append(t)
        primals.append(a)
        tangents.append(t)
    if not watchers.plain(met):
        return None
    with watchers.Below(level):
        outs, moved = both(primals, tangents)
        moved = [laid_out(t, out.stride()) for out, t in zip(outs, moved, strict=True)]
    return tuple(make_dual(_raised(out, level), _raised(t, level)) for out, t in zip(outs, moved))


def along(both: Callable, split: Sequence[tuple[Any, Tensor | None]]) -> tuple[Tensor, ...]:
    """The same at a level that has forward mode only, with others below it; split: primals and tangents."""
    outs, moved = both([primal for primal, _ in split], [tangent for _, tangent in split])
    return tuple(make_dual(out, laid_out(t, out.stride())) for out, t in zip(outs, moved, strict=True))


def _raised(x: Tensor, level: int) -> Tensor:
    return x if not level else _functorch._wrap_for_grad(x, level)


def laid_out(tangent: Tensor | None, strides: Sequence[int]) -> Tensor | None:
    """The tangent in memory like its value: torch copies one that lies otherwise, and a compiled program cannot."""
    if tangent is None or tangent.stride() == tuple(strides):
        return tangent
    order = sorted(range(tangent.ndim), key=lambda i: -strides[i])
    packed = tangent.permute(order).clone(memory_format=torch.contiguous_format)
    return packed.permute(sorted(range(tangent.ndim), key=order.__getitem__))


def reference_jvp(fn: Callable, args: Sequence[Any], tangents: Sequence[Tensor | None]):
    """Tangents of the plain-torch function fn; unlike torch.func.jvp it may be called inside a jvp rule."""
    with fwad._set_fwd_grad_enabled(True):
        outs = fn(*[make_dual(a, t) if isinstance(a, Tensor) and t is not None else a for a, t in zip(args, tangents)])
        results = []
        for out in outs if isinstance(outs, tuple) else (outs,):
            primal, tangent = unpack_dual(out)
            results.append(torch.zeros_like(primal) if tangent is None else tangent)
    return tuple(results) if isinstance(outs, tuple) else results[0]
