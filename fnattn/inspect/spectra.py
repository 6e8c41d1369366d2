"""The spectrum of a symmetric matrix that is only known by its products: Lanczos, density, top eigenpairs, sharpness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import random
from ..core import check
from ._vectors import Product, normal_like, on_vectors, only, unravel
from .curvature import hvp

# P parameters, s steps


class Lanczos(NamedTuple):
    """What s steps from one start vector found. A = basis T basis^T on the space that the steps span."""

    diagonal: Tensor   # [s]: of the tridiagonal T
    off: Tensor        # [s - 1]
    basis: Tensor      # [P, s], orthonormal columns; the first is the start
    last: Tensor       # 0-d: length of what is left after the last step; 0 if the space is invariant
    values: Tensor     # [s]: eigenvalues of T, ascending
    vectors: Tensor    # [s, s]: eigenvectors of T in columns
    weights: Tensor    # [s]: share of the start vector in each: quadrature weights, summing to 1


def lanczos(product: Product, like: Any, key: Tensor, *, steps: int = 20) -> Lanczos:
    """Lanczos with full reorthogonalisation, from a random normal start.

    Costs `steps` products and memory of steps vectors. The outermost values come first; spectra of at most `steps` distinct
    values are exact. Stops earlier where the space is invariant.

    Args:
        product: v -> A v on trees like params, A symmetric. like: params or a gradient.
    Source: Golub and Van Loan, Matrix Computations, 10.1.
    """
    check(steps >= 1, "inspect.lanczos: steps must be at least 1; got {}.", steps, remedy="20 finds the largest values.")
    run = on_vectors(product, like)
    q = normal_like(key, only(like))
    basis, diagonal, off = [q / q.norm()], [], []
    last = q.new_zeros(())
    for step in range(min(steps, q.numel())):
        w = run(basis[-1])
        a = basis[-1] @ w
        diagonal.append(a)
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            for b in basis:
                w = w - (b @ w) * b
        last = w.norm()
        size = max(abs(float(d)) for d in diagonal)
        if float(last) <= 1e-12 * max(size, 1e-30) * q.numel() ** 0.5 or step + 1 == min(steps, q.numel()):
            break
        off.append(last)
        basis.append(w / last)
    t = torch.diag(torch.stack(diagonal))
    if off:
        beside = torch.stack(off)
        t = t + torch.diag(beside, 1) + torch.diag(beside, -1)
    values, vectors = torch.linalg.eigh(t)
    return Lanczos(torch.stack(diagonal), torch.stack(off) if off else t.new_zeros(0), torch.stack(basis, 1), last, values, vectors,
                   vectors[0].square())


class EigenPairs(NamedTuple):
    """Largest in size first."""

    values: Tensor      # [k]
    vectors: list       # k trees like a gradient, of norm 1
    residuals: Tensor   # [k]: |A v - value v|, bounds the error of each value


def eigenpairs(product: Product, like: Any, key: Tensor, *, k: int = 1, steps: int | None = None) -> EigenPairs:
    """The k eigenvalues of largest size and their vectors, from one Lanczos run of max(20, 4 k) steps.

    residuals tell how far they are from convergence: an eigenvalue lies within that distance of each value.
    """
    found = lanczos(product, like, key, steps=steps or max(20, 4 * k))
    order = found.values.abs().argsort(descending=True)[:k]
    vectors = found.basis @ found.vectors[:, order]
    residuals = found.last * found.vectors[-1, order].abs()
    return EigenPairs(found.values[order], [unravel(v, only(like)) for v in vectors.T], residuals)


def sharpness(loss: Callable, params: Any, *args: Any, key: Tensor | None = None, steps: int = 20) -> Tensor:
    """The largest eigenvalue of the Hessian of loss(params, *args): 0-d. Costs `steps` Hessian-vector products.

    Along a training it rises to about 2 / (learning rate) and stays there (Cohen et al. 2021, arXiv 2103.00065).
    """
    key = random.key(0) if key is None else key
    return lanczos(lambda v: hvp(loss, params, v, *args), params, key, steps=steps).values[-1]


class Density(NamedTuple):
    """A smooth histogram of eigenvalues; its integral is 1."""

    grid: Tensor      # [points]
    density: Tensor   # [points], per unit of eigenvalue


def density(runs: Sequence[Lanczos], *, points: int = 512, width: float | None = None) -> Density:
    """The spectral density of a matrix by stochastic Lanczos quadrature: Gaussians around the values of some runs.

        density(x) = mean over runs of sum_i weight_i N(x; value_i, width^2)

    Args:
        runs: from `lanczos` with different keys; more runs, less noise.
        width: of the Gaussians; default a hundredth of the range of values.
    Source: Ghorbani et al. 2019, arXiv 1901.10159.
    """
    check(len(runs) >= 1, "inspect.density: expected at least one Lanczos run; got none.", remedy="Use lanczos(product, like, key).")
    low, high = min(r.values.min() for r in runs), max(r.values.max() for r in runs)
    span = float(high - low) or max(1.0, abs(float(high)))
    width = span / 100 if width is None else width
    beside = 5 * width  # the Gaussians around the outermost values are in it as good as whole
    grid = torch.linspace(float(low) - beside, float(high) + beside, points, dtype=runs[0].values.dtype)
    total = torch.zeros_like(grid)
    for r in runs:
        bumps = torch.exp(-0.5 * ((grid[:, None] - r.values.to(grid.device)) / width).square()) / (width * (2 * torch.pi) ** 0.5)
        total = total + bumps @ r.weights
    return Density(grid, total / len(runs))


def spectrum(product: Product, like: Any, key: Tensor, *, runs: int = 4, steps: int = 20) -> list[Lanczos]:
    """Some Lanczos runs from independent starts: what `density` takes."""
    return [lanczos(product, like, k, steps=steps) for k in random.split(key, runs)]
