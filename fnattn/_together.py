"""Many small tensors in one call: torch._foreach_* for optimisers, where nothing maps, traces or differentiates them.

These have no rule for vmap and write in place, so `plain` says where they may be used. On a CPU they give the numbers of a
loop over the tensors up to rounding, without a Python call for each.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from .core import peek

_PLAIN = (Tensor, torch.nn.Parameter)


def plain(lists: tuple[list, ...], *numbers: Any) -> bool:
    """Whether nobody maps, traces or differentiates these, and the lists hold CPU tensors of one float dtype, some at all."""
    if not lists[0] or torch._C._functorch.get_dynamic_layer_stack_depth() or fwad._current_level >= 0:
        return False
    grad, dtype = torch.is_grad_enabled(), lists[0][0].dtype
    if peek(lists[0][0]) is None or dtype not in (torch.float32, torch.float64):
        return False
    for part in lists:
        for x in part:
            if type(x) not in _PLAIN or x.dtype is not dtype or not x.is_cpu:
                return False
        if grad and torch._C._any_requires_grad(*part):
            return False
    return all(type(x) in _PLAIN and x.is_cpu and not (grad and x.requires_grad) for x in numbers if isinstance(x, Tensor))


def add(a: list, b: list) -> list:
    """a + b"""
    return torch._foreach_add(a, b)


def scale(a: list, factor: float) -> list:
    """a times a number, which goes in as a tensor: from a Python number torch makes one for each tensor of the list."""
    return torch._foreach_mul(a, torch.full((), factor, dtype=a[0].dtype))


def norm(a: list) -> Tensor:
    """The Euclidean norm of all entries of all tensors."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(a)))


def adamw(g: list, p: list, mu: list, nu: list, t: Tensor, b1: float, b2: float, eps: float, weight_decay: float,
          rate: float) -> tuple[list, list, list]:
    """Updates and new means of `optim.adamw` at the t-th update. Writes to what it makes only."""
    change = list(scale(p, -rate * weight_decay))
    mu, nu = list(scale(mu, 1.0)), list(scale(nu, 1.0))  # copies; _foreach_clone came after torch 2.11
    g = [x if x.is_contiguous() else x.contiguous() for x in g]
    if all(x.is_contiguous() for part in (change, mu, nu) for x in part):  # the fused one reads memory from end to end
        torch._fused_adamw_(change, g, mu, nu, [], [t] * len(g), lr=rate, beta1=b1, beta2=b2, weight_decay=0.0, eps=eps,
                            amsgrad=False, maximize=False)
        return change, mu, nu
    torch._foreach_lerp_(mu, g, 1 - b1)
    torch._foreach_mul_(nu, b2)
    torch._foreach_addcmul_(nu, g, g, 1 - b2)
    below = torch._foreach_sqrt(nu)
    torch._foreach_div_(below, math.sqrt(1 - b2 ** float(t)))
    torch._foreach_add_(below, eps)
    torch._foreach_addcdiv_(change, mu, below, -rate / (1 - b1 ** float(t)))
    return change, mu, nu
