"""Clipped, noisy gradients: the step of differentially private SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import optim, random, tree
from ..core import check
from ._vectors import samples
from .per_sample import _alone

# b samples


def clip(grads: Any, bound: float | Tensor) -> Any:
    """The gradient of one sample, scaled down to a norm of at most `bound`: g min(1, bound / |g|). None stays None."""
    size = optim.global_norm(grads)
    factor = torch.where(size > bound, bound / size, torch.ones_like(size))
    return tree.map(lambda g: None if g is None else g * factor.to(g.dtype), grads)


def private_grad(key: Tensor, loss: Callable, params: Any, batch: Any, *, bound: float, noise: float,
                 chunk_size: int = 16) -> Any:
    """The gradient of DP-SGD: per-sample gradients clipped, summed, made noisy, divided by the number of samples.

        g = (sum_i g_i min(1, bound / |g_i|) + noise * bound * N(0, 1)) / b

    Time of b gradients, memory of chunk_size. This is the mechanism only: the privacy that it gives depends on how batches
    are drawn (Poisson sampling) and on the number of steps; account for it elsewhere.

    Args:
        key: of the noise, a fresh one for every step; each leaf draws by its name.
        bound: largest norm of one sample's gradient. noise: noise multiplier; 0 clips only.
    Returns:
        A tree like params, None where nothing is differentiated: what optim takes.
    Source: Abadi et al. 2016, arXiv 1607.00133, algorithm 1 (their C is our bound, sigma our noise, L our b).
    """
    check(bound > 0 and noise >= 0, "inspect.private_grad: bound must be above 0 and noise at least 0; got {} and {}.", bound, noise,
          remedy="bound=1.0 and noise=1.0 are usual.")
    count = samples("private_grad", batch)

    def one(p, sample):
        return clip(tree.grad(_alone(loss))(p, sample), bound)

    total = None
    for start in range(0, count, chunk_size):
        part = tree.map(lambda x: x[start:start + chunk_size] if isinstance(x, Tensor) else x, batch)  # noqa: B023 - used at once
        here = tree.map(lambda g: None if g is None else g.sum(0), tree.vmap(one, (None, 0))(params, part))
        total = here if total is None else tree.map(lambda a, b: None if a is None else a + b, total, here)

    flat = tree.to_flat(_filled(total))
    noisy = {}
    for name, g in flat.items():
        wide = torch.promote_types(g.dtype, torch.float32)
        drawn = random.normal(random.fold_in(key, name), tuple(g.shape), wide).to(g.device)
        noisy[name] = ((g.to(wide) + noise * bound * drawn) / count).to(g.dtype)
    made = tree.from_flat(noisy, _filled(total))
    return tree.map(lambda old, new: None if old is None else new, total, made)


def _filled(total: Any) -> Any:
    """The tree with an empty tensor for None, so that every leaf has a name."""
    return tree.map(lambda g: torch.zeros(0) if g is None else g, total)
