"""Tensors that a function reads without being given them.

What recomputes a function in the backward pass differentiates it with respect to its arguments. A tensor that it captures would get
no gradient, without a word: this finds such tensors, so that they can be refused.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from ._trees import is_differentiable, leaves


def moving(fn: Callable) -> tuple[str, Tensor] | None:
    """The first tensor that fn captures and that takes part in a derivative or a transform, with the name of the function that does."""
    return next(_moving(fn, set()), None)


def _moving(fn: Callable, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if id(fn) in seen:
        return
    seen.add(id(fn))
    inner, held = fn, []
    while isinstance(inner, functools.partial):
        held += [inner.args, inner.keywords]
        inner = inner.func
    held += _held(inner)
    for item in leaves(held):
        if isinstance(item, Tensor):
            if is_differentiable(item) and _moves(item):
                yield getattr(inner, "__name__", type(inner).__name__), item
        elif callable(item):
            yield from _moving(item, seen)


def _held(fn: Callable) -> list[Any]:
    """What a function holds: cells of its closure, defaults, its object, parameters, and the tensors among the globals that it reads."""
    if isinstance(fn, torch.nn.Module):
        return [*fn.parameters(), *fn.buffers()]
    held = [cell.cell_contents for cell in getattr(fn, "__closure__", None) or () if _filled(cell)]
    held += [getattr(fn, name, None) for name in ("__defaults__", "__kwdefaults__", "__self__")]
    code, everything = getattr(fn, "__code__", None), getattr(fn, "__globals__", None)
    if isinstance(code, CodeType) and everything is not None:
        held += [everything[name] for name in _globals(code) if isinstance(everything.get(name), (Tensor, torch.nn.Module))]
    return held


@functools.lru_cache(maxsize=1024)
def _globals(code: CodeType) -> frozenset[str]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return frozenset(names).union(*(_globals(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises while the variable has no value
    except ValueError:
        return False
    return True


def _moves(t: Tensor) -> bool:
    if t.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return True
    return fwad._current_level >= 0 and fwad.unpack_dual(t).tangent is not None
