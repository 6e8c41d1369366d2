"""Trees as vectors: what every product, solver and spectrum here stands on. Leaves that nothing differentiates are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import random, tree
from ..core import check

# P number of differentiable parameters

Product = Callable[[Any], Any]  # tree -> tree: a matrix times a vector, both shaped like the params


def floating(params: Any) -> tuple[tuple[Tensor, ...], Callable[[tuple], Any]]:
    """The differentiable leaves, and the function that puts new ones in their places."""
    items, form = tree.flatten(params)
    places = [i for i, x in enumerate(items) if tree.is_differentiable(x)]

    def rebuild(new: tuple) -> Any:
        full = list(items)
        for i, x in zip(places, new):
            full[i] = x
        return tree.unflatten(full, form)

    return tuple(items[i] for i in places), rebuild


def only(params: Any) -> Any:
    """The same tree with None in place of what nothing differentiates: the shape of a gradient."""
    return tree.map(lambda x: x if tree.is_differentiable(x) else None, params)


def tangent(who: str, params: Any, vector: Any) -> tuple[Tensor, ...]:
    """The leaves of a vector that stand at the differentiable leaves of params."""
    check(tree.structure(vector) == tree.structure(params), "inspect.{}: vector must have the structure of params; got {}.", who,
          tree.structure(vector), remedy="Gradients have it, and what inspect.unravel(flat, params) makes.")
    pairs = [(p, v) for p, v in zip(tree.leaves(params), tree.leaves(vector)) if tree.is_differentiable(p)]
    wrong = [(list(p.shape), getattr(v, "shape", v)) for p, v in pairs if not isinstance(v, Tensor) or v.shape != p.shape]
    check(not wrong, "inspect.{}: vector must have the shapes of params; got {}.", who, wrong[:3],
          remedy="Gradients have them, and what inspect.unravel(flat, params) makes.")
    return tuple(v.to(p.dtype) for p, v in pairs)


def ravel(vector: Any) -> Tensor:
    """All differentiable leaves as one vector [P], float32 or wider."""
    parts = [x.reshape(-1).to(torch.promote_types(x.dtype, torch.float32)) for x in tree.leaves(vector) if tree.is_differentiable(x)]
    check(bool(parts), "inspect.ravel: expected a tree with floating leaves; got none.", remedy="Pass params or a gradient.")
    wide = max((p.dtype for p in parts), key=lambda d: torch.finfo(d).bits)
    return torch.cat([p.to(wide) for p in parts])


def unravel(flat: Tensor, like: Any) -> Any:
    """The tree shaped like params or a gradient that has these numbers [P]; the inverse of `ravel`, None elsewhere."""
    items, form = tree.flatten(like)
    sizes = [x.numel() if tree.is_differentiable(x) else 0 for x in items]
    check(flat.shape == (sum(sizes),), "inspect.unravel: expected [{}] numbers for this tree; got {}.", sum(sizes), list(flat.shape),
          remedy="ravel(params) has the right length.")
    parts = flat.split(sizes)
    return tree.unflatten([p.reshape(x.shape).to(x.dtype) if tree.is_differentiable(x) else None for p, x in zip(parts, items)], form)


def on_vectors(product: Product, like: Any) -> Callable[[Tensor], Tensor]:
    """A product of trees as a product of vectors [P] -> [P]."""
    return lambda flat: ravel(product(unravel(flat, like)))


def dot(a: Any, b: Any) -> Tensor:
    """The inner product of two trees, None counting as nothing; 0-d, float32 or wider."""
    total: Any = 0.0
    for x, y in zip(tree.leaves(a), tree.leaves(b)):
        if tree.is_differentiable(x) and tree.is_differentiable(y):
            wide = torch.promote_types(x.dtype, torch.float32)
            total = total + (x.to(wide) * y.to(wide)).sum()
    return total


def normal_like(key: Tensor, like: Any) -> Tensor:
    """A standard normal vector [P] in ravel's dtype."""
    flat = ravel(like)
    return random.normal(key, tuple(flat.shape), flat.dtype).to(flat.device)


def signs_like(key: Tensor, like: Any) -> Tensor:
    """A vector [P] of independent +1 and -1, each with chance one half, in ravel's dtype."""
    flat = ravel(like)
    return random.bernoulli(key, 0.5, tuple(flat.shape)).to(flat).mul(2.0) - 1.0


def samples(who: str, batch: Any) -> int:
    """The number of samples: the leading size that all tensors of a batch share."""
    sizes = {x.shape[0] if x.ndim else 0 for x in tree.leaves(batch) if isinstance(x, Tensor)}
    check(len(sizes) == 1 and min(sizes) > 0, "inspect.{}: every tensor of a batch must have the same leading size, at least 1; got {}.",
          who, sorted(sizes), remedy="Put the samples first.")
    return sizes.pop()
