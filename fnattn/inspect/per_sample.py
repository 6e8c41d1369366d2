"""Gradients of single samples, their norms, and the mean and variance over a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import optim, tree
from ._vectors import only, samples

# b samples


def _alone(loss: Callable) -> Callable:
    """loss on one sample, which keeps a batch axis of 1."""
    return lambda params, sample: loss(params, tree.map(lambda x: x[None] if isinstance(x, Tensor) else x, sample))


def per_sample_grads(loss: Callable, params: Any, batch: Any, *, chunk_size: int | None = None) -> Any:
    """The gradient of the loss of each sample alone.

    Time of one batched gradient, roughly; memory b times the parameters, or chunk_size times those while it runs.

    Args:
        loss: loss(params, batch) -> 0-d. It is called with batches of one sample.
        batch: a tensor or a tree of tensors, samples first: [b, ...].
        chunk_size: map so many samples at a time.
    Returns:
        A tree like params whose leaves have a leading axis of b; None where nothing is differentiated.
    """
    samples("per_sample_grads", batch)
    return tree.vmap(tree.grad(_alone(loss)), (None, 0), chunk_size=chunk_size)(params, batch)


class PerSample(NamedTuple):
    """One number per sample."""

    loss: Tensor  # [b]
    norm: Tensor  # [b], of the gradient with respect to all parameters, float32 or wider


def per_sample_norms(loss: Callable, params: Any, batch: Any, *, chunk_size: int | None = 16) -> PerSample:
    """The loss and the norm of the gradient of each sample alone; memory of chunk_size gradients at a time."""
    samples("per_sample_norms", batch)

    def one(p, sample):
        value, grads = tree.value_and_grad(_alone(loss))(p, sample)
        return PerSample(value, optim.global_norm(grads))

    return tree.vmap(one, (None, 0), chunk_size=chunk_size)(params, batch)


class Moments(NamedTuple):
    """Mean and variance of the gradients of single samples: trees like params, None where nothing is differentiated."""

    mean: Any
    variance: Any    # unbiased (divided by b - 1), per entry
    mean_square: Tensor  # 0-d: mean over samples of the squared norm
    count: int


def moments(loss: Callable, params: Any, batch: Any, *, chunk_size: int = 16) -> Moments:
    """Mean and variance of per-sample gradients, from chunk_size gradients at a time: memory does not grow with the batch.

    Chunks are joined as Chan et al. 1983 do, so that the variance is exact also where it is small beside the mean.
    """
    total = samples("moments", batch)
    mean = square = None
    seen, norms = 0, 0.0
    for start in range(0, total, chunk_size):
        part = tree.map(lambda x: x[start:start + chunk_size] if isinstance(x, Tensor) else x, batch)  # noqa: B023 - used at once
        grads = tree.map(_wide, per_sample_grads(loss, params, part))
        count = min(chunk_size, total - start)
        here = tree.map(lambda g: None if g is None else g.mean(0), grads)
        spread = tree.map(lambda g, m: None if g is None else (g - m).square().sum(0), grads, here)
        norms = norms + sum(g.square().sum() for g in tree.leaves(grads) if g is not None)
        if mean is None:
            mean, square = here, spread
        else:
            gap = tree.map(lambda a, b: None if a is None else b - a, mean, here)
            part_of = count / (seen + count)
            square = tree.map(lambda s, t, d: None if s is None else s + t + d.square() * (seen * part_of), square, spread, gap)  # noqa: B023
            mean = tree.map(lambda m, d: None if m is None else m + d * part_of, mean, gap)  # noqa: B023
        seen += count
    variance = tree.map(lambda s: None if s is None else s / max(total - 1, 1), square)
    return Moments(mean, variance, torch.as_tensor(norms) / total, total)


def _wide(g: Tensor | None) -> Tensor | None:
    return None if g is None else g.to(torch.promote_types(g.dtype, torch.float32))


def signal_to_noise(found: Moments) -> Any:
    """|mean| / standard deviation of the per-sample gradient of every parameter: a tree like params, 0 where both are 0.

    Below 1 / sqrt(batch) a step follows noise there. Source: Schaul et al. 2013, arXiv 1206.1106 (their g^2 / v, square root).
    """
    def ratio(mean: Tensor | None, variance: Tensor | None) -> Tensor | None:
        if mean is None or variance is None:
            return None
        return torch.where(mean == 0, 0.0, mean.abs() / variance.sqrt())

    return tree.map(ratio, only(found.mean), only(found.variance))
