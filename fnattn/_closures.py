"""What functions that are recomputed in the backward pass must not capture.

They are differentiated with respect to their arguments. A tensor that one of them reads otherwise would get no gradient, without a
word. Leaves of autograd show themselves where the function first runs; tensors of a transform's level do not, since that runs below
all levels. Those are looked for in all that the function holds.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from ._trees import is_differentiable, leaves

_DERIVATIVES = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
_MOST = 1000  # objects to look into
_CLOSED = (str, int, float, complex, bool, bytes, type, types.ModuleType, torch.dtype, torch.device, type(None))


def differentiated(tensors: Sequence[Any]) -> bool:
    """Whether a derivative may be asked for of what is computed from these."""
    if fwad._current_level >= 0:
        return True
    functorch = torch._C._functorch
    if functorch.get_dynamic_layer_stack_depth() and any(level.key() in _DERIVATIVES for level in functorch.get_interpreter_stack()):
        return True
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def check(who: str, fn: Callable, remedy: str) -> None:
    """Raises ValueError if fn holds a tensor of a transform's level, in a closure, a default, an argument of partial or an attribute."""
    for name, t in _held(fn):
        raise _refusal(who, name, f" of shape {list(t.shape)}", remedy)


def run(who: str, fn: Callable, args: Sequence[Tensor], remedy: str) -> tuple[Tensor, ...]:
    """fn(*args) below all levels, without a graph. Raises ValueError if a leaf of autograd takes part that is none of the arguments."""
    with torch.enable_grad():
        outs = fn(*(t.detach() for t in args))
    if any(out.requires_grad for out in outs):
        raise _refusal(who, "the function", "", remedy)
    return tuple(outs)


def _refusal(who: str, name: str, shape: str, remedy: str) -> ValueError:
    return ValueError(f"{who}: {name} captures a tensor{shape} that takes part in differentiation, and would get no gradient for it.\n"
                      f"  {remedy}")


def _held(fn: Callable) -> Iterator[tuple[str, Tensor]]:
    """(the holder's name, tensor) for tensors of a transform's level."""
    seen: set[int] = set()
    todo = [fn]
    while todo and len(seen) < _MOST:
        holder = todo.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        for item in leaves(_parts(holder)):
            if isinstance(item, Tensor):
                if is_differentiable(item) and _moves(item):
                    yield getattr(holder, "__name__", type(holder).__name__), item
            elif not isinstance(item, _CLOSED):  # such as a function, or an object
                todo.append(item)


def _parts(holder: Any) -> list[Any]:
    if isinstance(holder, functools.partial):
        return [holder.func, holder.args, holder.keywords]
    parts = [cell.cell_contents for cell in getattr(holder, "__closure__", None) or () if _filled(cell)]
    parts += [getattr(holder, name, None) for name in ("__defaults__", "__kwdefaults__", "__self__", "__wrapped__")]
    parts += [getattr(holder, name, None) for name in getattr(type(holder), "__slots__", ()) if isinstance(name, str)]
    return [*parts, *getattr(holder, "__dict__", {}).values()]


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises while the variable has no value
    except ValueError:
        return False
    return True


def _moves(t: Tensor) -> bool:
    """Whether t is mapped, has a tangent, or takes part in a gradient. torch.func.grad also wraps arguments that it leaves alone."""
    functorch = torch._C._functorch
    gradients = {level.level() for level in functorch.get_interpreter_stack() or () if level.key() == functorch.TransformType.Grad}
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.maybe_get_level(t) not in gradients or t.requires_grad:
            return True
        t = functorch.get_unwrapped(t)
    return fwad._current_level >= 0 and torch._VF._unpack_dual(t, level=0)[1] is not None
