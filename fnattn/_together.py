"""Many small tensors in one call: torch._foreach_* for optimisers, where nothing maps, traces or differentiates them.

These have no rule for vmap and write in place, so `plain` says where they may be used. On a CPU they give the numbers of a
loop over the tensors, without a Python call for each.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from .core import peek


def plain(lists: tuple[list, ...], *numbers: Any) -> bool:
    """Whether nobody maps, traces or differentiates these, and the lists hold CPU tensors of one float dtype, some at all."""
    if not lists[0] or torch._C._functorch.get_dynamic_layer_stack_depth() or fwad._current_level >= 0:
        return False
    tensors = [*itertools.chain(*lists), *(x for x in numbers if isinstance(x, Tensor))]
    grad, dtype = torch.is_grad_enabled(), lists[0][0].dtype
    if peek(tensors[0]) is None or dtype not in (torch.float32, torch.float64):
        return False
    if not all(x.dtype == dtype for part in lists for x in part):
        return False
    return all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and not (grad and x.requires_grad) for x in tensors)


def add(a: list, b: list) -> list:
    """a + b"""
    return torch._foreach_add(a, b)


def scale(a: list, factor: float) -> list:
    """a times a number"""
    return torch._foreach_mul(a, factor)


def norm(a: list) -> Tensor:
    """The Euclidean norm of all entries of all tensors."""
    return torch.stack(torch._foreach_norm(a)).square().sum().sqrt()


def adamw(g: list, p: list, mu: list, nu: list, b1: float, b2: float, eps: float, weight_decay: float, rate: float, size: float,
          root: float) -> tuple[list, list, list]:
    """Updates and new means of `optim.adamw`; size is rate / (1 - b1^t), root is sqrt(1 - b2^t). Writes to what it makes only."""
    mu, nu = list(torch._foreach_mul(mu, b1)), list(torch._foreach_mul(nu, b2))
    torch._foreach_add_(mu, g, alpha=1 - b1)
    torch._foreach_addcmul_(nu, g, g, 1 - b2)
    below = torch._foreach_sqrt(nu)
    torch._foreach_div_(below, root)
    torch._foreach_add_(below, eps)
    change = list(torch._foreach_mul(p, -rate * weight_decay))
    torch._foreach_addcdiv_(change, mu, below, -size)
    return change, mu, nu
