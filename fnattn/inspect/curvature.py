"""Products of a curvature matrix with a vector, without the matrix: Hessian, Gauss-Newton, Fisher.

Vectors are trees like params; what nothing differentiates has None. Each product costs a few gradients, whatever the size of
the matrix. Partially applied they are what `spectrum`, `traces` and `influence` take:

    product = lambda v: hvp(loss, params, v, batch)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..core import check
from ._vectors import floating, on_vectors, only, ravel, samples, tangent
from .per_sample import _alone

# P parameters, b samples, K outputs of the model in all


def _gradient_tree(params: Any, rebuild: Callable, leaves: tuple) -> Any:
    return tree.map(lambda p, v: v if tree.is_differentiable(p) else None, params, rebuild(leaves))


def hvp(loss: Callable, params: Any, vector: Any, *args: Any, mode: str = "forward over reverse") -> Any:
    """The Hessian of a loss times a vector: H v.

    About four forward passes of time and the memory of one gradient.

    Args:
        loss: loss(params, *args) -> 0-d.
        vector: a tree like params or like a gradient.
        mode: "forward over reverse" (the tangent of the gradient), or "reverse over reverse" (the gradient of g . v), which needs
            no forward mode and twice the memory.
    Source: Pearlmutter 1994.
    """
    check(mode in ("forward over reverse", "reverse over reverse"), "inspect.hvp: unknown mode {!r}.", mode,
          remedy="Use 'forward over reverse' or 'reverse over reverse'.")
    leaves, rebuild = floating(params)
    v = tangent("hvp", params, vector)

    def gradient(*new: Tensor) -> tuple[Tensor, ...]:
        value, pull = torch.func.vjp(lambda *x: loss(rebuild(x), *args), *new)
        return pull(torch.ones_like(value))

    if mode == "forward over reverse":
        return _gradient_tree(params, rebuild, torch.func.jvp(gradient, leaves, v)[1])
    _, pull = torch.func.vjp(lambda *x: sum((g * d).sum() for g, d in zip(gradient(*x), v)), *leaves)
    return _gradient_tree(params, rebuild, pull(torch.ones((), dtype=leaves[0].dtype, device=leaves[0].device)))


def ggn_vp(model: Callable, outer: Callable, params: Any, vector: Any, *args: Any) -> Any:
    """The generalised Gauss-Newton matrix of outer(model(params)) times a vector: J^T (d^2 outer / d out^2) J v.

    The Hessian without the curvature of the model: positive semi-definite where `outer` is convex. A tangent, a product with
    the Hessian of `outer`, and a pull-back: about five forward passes.

    Args:
        model: model(params, *args) -> a tensor of outputs. outer: outer(outputs) -> 0-d.
    Source: Schraudolph 2002.
    """
    leaves, rebuild = floating(params)
    v = tangent("ggn_vp", params, vector)
    outputs, pull = torch.func.vjp(lambda *x: model(rebuild(x), *args), *leaves)
    _, moved = torch.func.jvp(lambda *x: model(rebuild(x), *args), leaves, v)
    _, curved = torch.func.jvp(torch.func.grad(outer), (outputs,), (moved,))
    return _gradient_tree(params, rebuild, pull(curved))


def fisher_vp(logits: Callable, params: Any, vector: Any, *args: Any) -> Any:
    """The Fisher matrix of a categorical model times a vector, averaged over all of its predictions.

        F v = 1/N sum_n J_n^T (diag p_n - p_n p_n^T) J_n v        N predictions

    Uses no labels: it is the expectation over the model's own. Equal to the Gauss-Newton matrix of the mean cross-entropy.

    Args:
        logits: logits(params, *args) -> [..., classes].
    Source: Amari 1998; Martens 2020, arXiv 1412.1193, section 9.
    """
    leaves, rebuild = floating(params)
    v = tangent("fisher_vp", params, vector)
    scores, pull = torch.func.vjp(lambda *x: logits(rebuild(x), *args), *leaves)
    _, moved = torch.func.jvp(lambda *x: logits(rebuild(x), *args), leaves, v)
    p = scores.softmax(-1)
    curved = p * (moved - (p * moved).sum(-1, keepdim=True))
    return _gradient_tree(params, rebuild, pull(curved / (scores.numel() // scores.shape[-1])))


def empirical_fisher_vp(loss: Callable, params: Any, vector: Any, batch: Any) -> Any:
    """The mean of g_i g_i^T over the samples of a batch, times a vector: 1/b sum_i g_i (g_i . v).

    The second moment of per-sample gradients, with the labels as they are; not the Fisher matrix, see Kunstner et al. 2019,
    arXiv 1905.12558. One tangent and one pull-back of the b losses; no gradient of a single sample is made.

    Args:
        loss: loss(params, batch) -> 0-d; called with one sample at a time. batch: samples first.
    """
    count = samples("empirical_fisher_vp", batch)
    leaves, rebuild = floating(params)
    v = tangent("empirical_fisher_vp", params, vector)

    def losses(*x: Tensor) -> Tensor:
        return tree.vmap(_alone(loss), (None, 0))(rebuild(x), batch)

    _, pull = torch.func.vjp(losses, *leaves)
    _, slopes = torch.func.jvp(losses, leaves, v)
    return _gradient_tree(params, rebuild, pull(slopes / count))


def dense(product: Callable, like: Any) -> Tensor:
    """The matrix [P, P] of a product, column by column: for small models, and for tests."""
    flat = ravel(only(like))
    return torch.stack([on_vectors(product, like)(e) for e in torch.eye(flat.numel(), dtype=flat.dtype, device=flat.device)], 1)
