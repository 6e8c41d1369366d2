"""Trace and diagonal of a matrix that is only known by its products, from random probes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import random, tree
from ._vectors import Product, on_vectors, only, signs_like, unravel


class Estimate(NamedTuple):
    """A mean over probes and its standard error."""

    value: Any
    error: Any


def hutchinson_trace(product: Product, like: Any, key: Tensor, *, probes: int = 16, chunk_size: int | None = 1) -> Estimate:
    """Hutchinson's estimate of a trace: the mean of z^T A z over random signs z.

    Without bias; for symmetric A the variance of one probe is 2 (|A|_F^2 - sum_i A_ii^2), so that a diagonal matrix is exact.
    Costs `probes` products. Returns 0-d tensors; the error is NaN for one probe.

    Args:
        product: v -> A v on trees like params. like: params or a gradient.
        chunk_size: so many probes in one vmap; 1 calls the product once per probe.
    Source: Hutchinson 1990.
    """
    run = on_vectors(product, like)

    def one(k: Tensor) -> Tensor:
        z = signs_like(k, like)
        return z @ run(z)

    values = _each(one, random.split(key, probes), chunk_size)
    return Estimate(values.mean(), values.std() / probes ** 0.5 if probes > 1 else values.new_full((), torch.nan))


def hutchinson_diagonal(product: Product, like: Any, key: Tensor, *, probes: int = 16, chunk_size: int | None = 1) -> Estimate:
    """The diagonal of a matrix from random signs: the mean of z * (A z). Trees like a gradient; costs `probes` products.

    Without bias; the variance of entry i is the sum of A_ij^2 over j != i, over the number of probes.
    Source: Bekas et al. 2007.
    """
    run = on_vectors(product, like)

    def one(k: Tensor) -> Tensor:
        z = signs_like(k, like)
        return z * run(z)

    values = _each(one, random.split(key, probes), chunk_size)
    error = values.std(0) / probes ** 0.5 if probes > 1 else torch.full_like(values[0], torch.nan)
    return Estimate(unravel(values.mean(0), only(like)), unravel(error, only(like)))


def _each(one: Any, keys: Tensor, chunk_size: int | None) -> Tensor:
    if chunk_size == 1:
        return torch.stack([one(k) for k in keys])
    return tree.vmap(one, chunk_size=chunk_size)(keys)
