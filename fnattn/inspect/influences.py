"""Which training samples made a prediction what it is: influence functions and TracIn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..core import check
from ._vectors import Product, on_vectors, only, ravel, unravel
from .curvature import hvp
from .per_sample import per_sample_grads

# t test samples, b training samples, P parameters


class Solution(NamedTuple):
    """x with (A + damping) x close to the right-hand side."""

    x: Any
    residual: Tensor  # 0-d: |rhs - (A + damping) x| / |rhs|
    steps: int


def solve_cg(product: Product, rhs: Any, *, damping: float = 0.0, steps: int = 100, tolerance: float = 1e-6) -> Solution:
    """(A + damping)^-1 rhs by conjugate gradients; A + damping positive definite. One product per step.

    Stops at a relative residual of `tolerance`, or where a direction of curvature at or below 0 shows that A + damping is not
    positive definite: the best x so far is returned, and `residual` tells.
    Source: Hestenes and Stiefel 1952.
    """
    run = on_vectors(product, rhs)
    b = ravel(rhs)
    x, r = torch.zeros_like(b), b.clone()
    p, rr, size, done = r, r @ r, b.norm(), 0
    for _ in range(steps):
        if float(rr.sqrt()) <= tolerance * float(size):
            break
        ap = run(p) + damping * p
        curve = p @ ap
        if float(curve) <= 0:
            break
        x, r = x + (rr / curve) * p, r - (rr / curve) * ap
        new = r @ r
        p, rr, done = r + (new / rr) * p, new, done + 1
    return Solution(unravel(x, only(rhs)), rr.sqrt() / size.clamp(min=torch.finfo(b.dtype).tiny), done)


def solve_lissa(product: Product | Sequence[Product], rhs: Any, *, damping: float = 0.0, scale: float = 10.0,
                steps: int = 1000) -> Solution:
    """(A + damping)^-1 rhs by the Neumann series x <- rhs + (1 - (A + damping) / scale) x, divided by scale at the end.

    Converges if the largest eigenvalue of A + damping is below 2 scale and the smallest above 0; the error shrinks by
    1 - smallest / scale per step. Several products, one per batch, are used in turn: then it is stochastic.
    Source: Agarwal et al. 2017, arXiv 1602.03943.
    """
    products = [product] if callable(product) else list(product)
    runs = [on_vectors(one, rhs) for one in products]
    b = ravel(rhs)
    x = b
    for step in range(steps):
        x = b + x - (runs[step % len(runs)](x) + damping * x) / scale
    x = x / scale
    check(bool(x.isfinite().all()), "inspect.solve_lissa: the series diverged with scale={}.", scale,
          remedy="Use a scale above half the largest eigenvalue: see inspect.sharpness.")
    residual = b - sum(run(x) for run in runs) / len(runs) - damping * x
    return Solution(unravel(x, only(rhs)), residual.norm() / b.norm(), steps)


def influence(loss: Callable, params: Any, train: Any, test: Any, *, solver: str = "cg", damping: float = 1e-3,
              product: Product | None = None, chunk_size: int | None = None, **options: Any) -> Tensor:
    """What more weight on a training sample does to the loss of a test sample.

        influence[t, b] = - g_t^T (H + damping)^-1 g_b          H the Hessian of the loss on all of `train`

    Below 0: the training sample helps (raising its weight lowers the test loss). To leave sample b out of b samples changes the
    test loss by about -influence / b. One linear solve per test sample, and the gradients of all samples.

    Args:
        loss: loss(params, batch) -> 0-d, a mean over samples. train, test: batches, samples first.
        solver: "cg" or "lissa"; options go there (steps, tolerance, scale).
        product: a curvature in place of the Hessian, for example the Gauss-Newton matrix, which is never negative.
    Returns:
        [t, b], float32 or wider.
    Source: Koh and Liang 2017, arXiv 1703.04730 (their I_up,loss).
    """
    check(solver in ("cg", "lissa"), "inspect.influence: solver must be 'cg' or 'lissa'; got {!r}.", solver,
          remedy="'cg' is exact sooner.")
    product = product or (lambda v: hvp(loss, params, v, train))
    solve = solve_cg if solver == "cg" else solve_lissa
    at_test = _matrix(per_sample_grads(loss, params, test, chunk_size=chunk_size))
    of_train = _matrix(per_sample_grads(loss, params, train, chunk_size=chunk_size))
    like = only(params)
    return torch.stack([-(of_train @ ravel(solve(product, unravel(g, like), damping=damping, **options).x)) for g in at_test])


def tracin(loss: Callable, checkpoints: Sequence[tuple[Any, float]], train: Any, test: Any, *, chunk_size: int | None = None) -> Tensor:
    """How much the steps on each training sample lowered each test sample's loss, added up over checkpoints.

        tracin[t, b] = sum over checkpoints of rate * g_t . g_b

    Above 0: the training sample helped. Costs the gradients of all samples at each checkpoint; no curvature.

    Args:
        checkpoints: (params, learning rate) pairs along the training.
    Returns:
        [t, b], float32 or wider.
    Source: Pruthi et al. 2020, arXiv 2002.08484 (TracInCP).
    """
    check(len(checkpoints) >= 1, "inspect.tracin: expected at least one checkpoint; got none.", remedy="Give [(params, learning_rate)].")
    total: Any = 0.0
    for params, rate in checkpoints:
        left = _matrix(per_sample_grads(loss, params, test, chunk_size=chunk_size))
        total = total + rate * left @ _matrix(per_sample_grads(loss, params, train, chunk_size=chunk_size)).T
    return total


def _matrix(grads: Any) -> Tensor:
    """[b, P]"""
    parts = [g.flatten(1).to(torch.promote_types(g.dtype, torch.float32)) for g in tree.leaves(grads) if tree.is_differentiable(g)]
    wide = max((p.dtype for p in parts), key=lambda d: torch.finfo(d).bits)
    return torch.cat([p.to(wide) for p in parts], 1)
