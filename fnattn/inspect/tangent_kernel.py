"""The empirical neural tangent kernel: inner products of the model's Jacobians, full, in parts, or as a product.

    K[i, a, j, b] = sum over parameters of  d f_a(x_i) / d p  *  d f_b(x_j) / d p
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..core import check
from ._vectors import floating

# n, m samples, o outputs of one sample, P parameters


def _jacobian(fn: Callable, params: Any, x: Tensor, chunk_size: int | None) -> tuple[Tensor, ...]:
    """[n, o, ...] for each differentiable leaf, a sample at a time with a batch axis of 1."""
    leaves, rebuild = floating(params)

    def one(*args: Tensor) -> Tensor:
        return fn(rebuild(args[:-1]), args[-1][None]).reshape(-1)

    jacobian = torch.func.jacrev(one, argnums=tuple(range(len(leaves))))
    axes = (*(None for _ in leaves), 0)
    return torch.vmap(jacobian, in_dims=axes, chunk_size=chunk_size)(*leaves, x)


def ntk(fn: Callable, params: Any, x: Tensor, other: Tensor | None = None, *, chunk_size: int | None = None) -> Tensor:
    """The full kernel between samples x [n, ...] and other [m, ...] (default x): [n, o, m, o].

    Time of n o gradients and a product of n o m o P numbers; memory of n o P for the Jacobians.

    Args:
        fn: fn(params, x) -> a tensor with the samples first; o is the number of outputs of one sample, flattened.
        chunk_size: Jacobians of so many samples at a time.
    Source: Jacot et al. 2018, arXiv 1806.07572; Novak et al. 2022, arXiv 2206.08720 (Jacobian contraction).
    """
    return sum(ntk_blocks(fn, params, x, other, chunk_size=chunk_size).values())


def ntk_blocks(fn: Callable, params: Any, x: Tensor, other: Tensor | None = None, *, chunk_size: int | None = None) -> dict[str, Tensor]:
    """The part of the kernel that each parameter leaf gives, by name: [n, o, m, o] each; their sum is `ntk`."""
    left = _jacobian(fn, params, x, chunk_size)
    right = left if other is None else _jacobian(fn, params, other, chunk_size)
    names = [name for name, leaf in tree.to_flat(params).items() if tree.is_differentiable(leaf)]
    return {name: torch.einsum("nop,mqp->nomq", a.flatten(2), b.flatten(2)) for name, a, b in zip(names, left, right)}


def ntk_diagonal(fn: Callable, params: Any, x: Tensor, *, chunk_size: int | None = 1) -> Tensor:
    """K[i, a, i, b] of every sample with itself: [n, o, o]. Memory of chunk_size o P."""
    def one(sample: Tensor) -> Tensor:
        parts = _jacobian(fn, params, sample[None], None)
        return sum(torch.einsum("op,qp->oq", j[0].flatten(1), j[0].flatten(1)) for j in parts)

    return torch.vmap(one, chunk_size=chunk_size)(x)


def ntk_vp(fn: Callable, params: Any, x: Tensor, vector: Tensor) -> Tensor:
    """The kernel times a vector without the kernel: J (J^T v), shaped like fn(params, x). One pull-back and one tangent."""
    leaves, rebuild = floating(params)

    def run(*new: Tensor) -> Tensor:
        return fn(rebuild(new), x)

    _, pull = torch.func.vjp(run, *leaves)
    return torch.func.jvp(run, leaves, pull(vector))[1]


class KernelSpectrum(NamedTuple):
    """Of a kernel as a matrix [n o, n o]."""

    values: Tensor      # [n o], descending
    vectors: Tensor     # [n o, n o], columns in that order
    trace: Tensor       # 0-d
    effective_rank: Tensor  # 0-d: exp of the entropy of values / trace; n o if all are equal


def ntk_spectrum(kernel: Tensor) -> KernelSpectrum:
    """Eigenvalues and vectors of a kernel [n, o, n, o]. Time (n o)^3.

    effective_rank after Roy and Vetterli 2007.
    """
    k = _square(kernel)
    values, vectors = torch.linalg.eigh((k + k.T) / 2)
    p = values.clamp(min=0) / values.clamp(min=0).sum()
    rank = torch.exp(-torch.where(p > 0, p * p.log(), 0.0).sum())
    return KernelSpectrum(values.flip(0), vectors.flip(1), values.sum(), rank)


def ntk_alignment(kernel: Tensor, targets: Tensor) -> Tensor:
    """How well a kernel [n, o, n, o] fits targets [n, o]: y^T K y / (|K|_F |y|^2), between 0 and 1; 0-d.

    Source: Cristianini et al. 2001 (kernel-target alignment).
    """
    k, y = _square(kernel), targets.reshape(-1).to(kernel.dtype)
    check(k.shape[0] == y.shape[0], "inspect.ntk_alignment: targets must have {} numbers, one per row of the kernel; got {}.",
          k.shape[0], y.shape[0], remedy="Give [n, o] targets of the same samples.")
    return (y @ k @ y) / (k.norm() * (y @ y))


def _square(kernel: Tensor) -> Tensor:
    check(kernel.ndim == 4 and kernel.shape[:2] == kernel.shape[2:], "inspect.ntk_spectrum: kernel must be [n, o, n, o]; got {}.",
          list(kernel.shape), remedy="Use ntk(fn, params, x).")
    return kernel.flatten(2).flatten(0, 1)
