"""The model that a model is to first order in its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import tree
from ._vectors import floating


def linearize(fn: Callable, params: Any) -> Callable:
    """f_lin(new, *args) = fn(params, *args) + J (new - params), with J = d fn / d params at params.

    A tangent per call: about two forward passes. Linear in `new`, so its Hessian is its Gauss-Newton matrix and its tangent
    kernel is constant. Composes with every transform; differentiate it with respect to `new` (a tree like params).

    Args:
        fn: fn(params, *args) -> a tensor.
    Source: Lee et al. 2019, arXiv 1902.06720.
    """
    base, rebuild = floating(params)

    def linear(new: Any, *args: Any, **options: Any) -> Any:
        moved = [x for x, p in zip(tree.leaves(new), tree.leaves(params)) if tree.is_differentiable(p)]
        step = tuple(x - p for x, p in zip(moved, base))
        value, change = torch.func.jvp(lambda *x: fn(rebuild(x), *args, **options), base, step)
        return value + change

    return linear
