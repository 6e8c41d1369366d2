"""Tangent kernels, influence, linearised models: against Jacobians and solved systems."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close

from fnattn import inspect, optim, random, tree
from fnattn.inspect import ravel, unravel


def jacobian(small):
    def outputs(flat):
        return small.model(unravel(flat, small.params), small.batch["x"])

    return torch.func.jacrev(outputs)(small.flat).flatten(1, 2)  # [5, 12, P]


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_kernel_is_the_product_of_jacobians(small, chunk_size):
    j = jacobian(small)
    k = inspect.ntk(small.model, small.params, small.batch["x"], chunk_size=chunk_size)
    assert_close(k, torch.einsum("nop,mqp->nomq", j, j))
    assert_close(inspect.ntk(small.model, small.params, small.batch["x"][:2], small.batch["x"][2:]), k[:2, :, 2:])
    assert_close(inspect.ntk_diagonal(small.model, small.params, small.batch["x"]), torch.einsum("nop,nqp->noq", j, j))


def test_the_blocks_of_the_kernel_add_up_and_belong_to_leaves(small):
    parts = inspect.ntk_blocks(small.model, small.params, small.batch["x"])
    assert list(parts) == list(inspect.flat_params(small.params))
    j = jacobian(small)[..., :small.params.to_q.numel()]
    assert_close(parts["to_q"], torch.einsum("nop,mqp->nomq", j, j))


def test_the_implicit_product_needs_no_kernel(small):
    k = inspect.ntk(small.model, small.params, small.batch["x"])
    v = random.normal(random.key(2), (5, 4, 3), torch.float64)
    assert_close(inspect.ntk_vp(small.model, small.params, small.batch["x"], v).flatten(1), torch.einsum("nomq,mq->no", k, v.flatten(1)))


def test_spectrum_and_alignment_of_the_kernel(small):
    k = inspect.ntk(small.model, small.params, small.batch["x"])
    found = inspect.ntk_spectrum(k)
    square = k.flatten(2).flatten(0, 1)
    assert_close(found.vectors @ torch.diag(found.values) @ found.vectors.T, square)
    assert found.values[0] == found.values.max() and 1 < found.effective_rank < 60
    assert_close(inspect.ntk_spectrum(torch.eye(6).double().reshape(3, 2, 3, 2)).effective_rank, torch.tensor(6.0).double())
    top = found.vectors[:, 0]
    assert_close(inspect.ntk_alignment(k, top.reshape(5, 12)), found.values[0] / square.norm())
    with pytest.raises(ValueError, match="targets must have 60 numbers"):
        inspect.ntk_alignment(k, top[:7])


def test_a_linearised_model_is_the_tangent(small):
    step = random.normal(random.key(3), tuple(small.flat.shape), torch.float64)
    new = unravel(small.flat + step, small.params)
    linear = inspect.linearize(small.model, small.params)
    expected = small.model(small.params, small.batch["x"]) + (jacobian(small) @ step).reshape(5, 4, 3)
    assert_close(linear(new, small.batch["x"]), expected)
    assert_close(inspect.ntk(linear, new, small.batch["x"]), inspect.ntk(small.model, small.params, small.batch["x"]))


def curvature(small, damping):
    return small.hessian() + damping * torch.eye(small.flat.numel()).double()


def exact(small):
    """The product with the Hessian, from the matrix: what the solvers are given where only they are tested."""
    h = small.hessian()
    return lambda v: unravel(h @ ravel(v), small.params)


DAMPING = 7.0  # above the most negative eigenvalue


def test_conjugate_gradients_solve_the_system(small):
    rhs = tree.grad(small.loss)(small.params, small.batch)
    found = inspect.solve_cg(lambda v: inspect.hvp(small.loss, small.params, v, small.batch), rhs, damping=DAMPING, tolerance=1e-12)
    assert_close(ravel(found.x), torch.linalg.solve(curvature(small, DAMPING), ravel(rhs)))
    assert found.residual < 1e-11 and found.steps < small.flat.numel()


def test_lissa_solves_the_system_slowly(small):
    rhs = tree.grad(small.loss)(small.params, small.batch)
    scale = float(torch.linalg.eigvalsh(curvature(small, DAMPING))[-1])
    found = inspect.solve_lissa(exact(small), rhs, damping=DAMPING, scale=scale, steps=500)
    expected = torch.linalg.solve(curvature(small, DAMPING), ravel(rhs))
    assert (ravel(found.x) - expected).norm() < 1e-6 * expected.norm() and found.residual < 1e-6
    in_turn = inspect.solve_lissa([exact(small), exact(small)], rhs, damping=DAMPING, scale=scale, steps=500)
    assert_close(ravel(in_turn.x), ravel(found.x))
    with pytest.raises(ValueError, match="the series diverged with scale=0.001"):
        inspect.solve_lissa(exact(small), rhs, damping=DAMPING, scale=1e-3, steps=200)


@pytest.mark.parametrize("solver", ["cg", "lissa"])
def test_influence_is_that_of_the_inverse_hessian(small, solver):
    test = {name: t[:2] * 0.7 for name, t in small.batch.items()}
    rows = small._replace(batch=test).grads()
    expected = -rows @ torch.linalg.solve(curvature(small, DAMPING), small.grads().T)
    options = {"tolerance": 1e-12} if solver == "cg" else {"steps": 600, "scale": 30.0, "product": exact(small)}
    found = inspect.influence(small.loss, small.params, small.batch, test, damping=DAMPING, solver=solver, **options)
    assert found.shape == (2, 5)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_influence_foretells_what_retraining_with_other_weights_does(small):
    """One Newton step on the damped quadratic model is what influence means; its first order is measured here."""
    weight = 1e-6
    g = small.grads()
    h = curvature(small, DAMPING)
    moved = small.flat - torch.linalg.solve(h, weight * g[3])
    change = (small.of_flat(moved, small.batch) - small.of_flat(small.flat, small.batch)) / weight
    found = inspect.influence(small.loss, small.params, small.batch, small.batch, damping=DAMPING, tolerance=1e-12)
    torch.testing.assert_close(found[:, 3].mean(), change, rtol=1e-4, atol=1e-6)


def test_tracin_adds_up_inner_products_over_checkpoints(small):
    later = optim.apply_updates(small.params, tree.map(lambda g: -0.1 * g, tree.grad(small.loss)(small.params, small.batch)))
    test = {name: t[:2] * 0.5 for name, t in small.batch.items()}
    expected = 0.0
    for params, rate in ((small.params, 0.3), (later, 0.1)):
        here = small._replace(params=params, flat=ravel(params))
        expected = expected + rate * here._replace(batch=test).grads() @ here.grads().T
    assert_close(inspect.tracin(small.loss, [(small.params, 0.3), (later, 0.1)], small.batch, test), expected)
    with pytest.raises(ValueError, match="at least one checkpoint"):
        inspect.tracin(small.loss, [], small.batch, test)
