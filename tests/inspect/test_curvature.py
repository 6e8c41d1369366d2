"""Products with curvature matrices, and what is read from them, against the matrices themselves."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from torch.nn import functional as F

from fnattn import inspect, random, tree
from fnattn.inspect import ravel, unravel


def vector(small, name="v"):
    return random.normal(random.fold_in(random.key(11), name), tuple(small.flat.shape), torch.float64)


def product(small):
    return lambda v: inspect.hvp(small.loss, small.params, v, small.batch)


@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
def test_hessian_vector_products(small, mode):
    v = vector(small)
    found = inspect.hvp(small.loss, small.params, unravel(v, small.params), small.batch, mode=mode)
    assert_close(ravel(found), small.hessian() @ v)


def test_the_dense_matrix_is_the_hessian(small):
    assert_close(inspect.dense(product(small), small.params), small.hessian())


def jacobian(small):
    def outputs(flat):
        return small.model(unravel(flat, small.params), small.batch["x"])

    return torch.func.jacrev(outputs)(small.flat)  # [b, n, dim, P]


def test_gauss_newton_products(small):
    v, j = vector(small), jacobian(small).flatten(0, 2)

    def outer(out):
        return (out - small.batch["y"]).square().sum((1, 2)).mean()

    found = inspect.ggn_vp(small.model, outer, small.params, unravel(v, small.params), small.batch["x"])
    assert_close(ravel(found), 2 / 5 * j.T @ (j @ v))


def test_fisher_products_are_those_of_the_expectation_over_labels(small):
    v, j = vector(small), jacobian(small).flatten(0, 1)  # 20 predictions of 3 classes
    p = small.model(small.params, small.batch["x"]).softmax(-1).flatten(0, 1)
    score = torch.einsum("nck,ncp->nkp", torch.eye(3).double() - p[..., None], j)  # gradient of log p(k)
    fisher = torch.einsum("nk,nkp,nkq->pq", p, score, score) / 20
    found = inspect.fisher_vp(small.model, small.params, unravel(v, small.params), small.batch["x"])
    assert_close(ravel(found), fisher @ v)
    labels = torch.arange(20) % 3
    ggn = inspect.ggn_vp(small.model, lambda out: F.cross_entropy(out.flatten(0, 1), labels), small.params, unravel(v, small.params),
                         small.batch["x"])
    assert_close(ravel(found), ravel(ggn))


def test_empirical_fisher_products(small):
    v, rows = vector(small), small.grads()
    found = inspect.empirical_fisher_vp(small.loss, small.params, unravel(v, small.params), small.batch)
    assert_close(ravel(found), rows.T @ (rows @ v) / 5)


def test_traces_and_diagonals_come_close_and_say_how_close(small, key):
    h = small.hessian()
    found = inspect.hutchinson_trace(product(small), small.params, key, probes=64, chunk_size=16)
    assert (found.value - h.trace()).abs() < 4 * found.error
    parts = inspect.hutchinson_diagonal(product(small), small.params, key, probes=64, chunk_size=16)
    gap = (ravel(parts.value) - h.diag()).abs()
    assert (gap <= 5 * ravel(parts.error) + 1e-12).all() and gap.max() > 0
    one = inspect.hutchinson_trace(product(small), small.params, key, probes=64)
    assert_close(one.value, found.value)


def test_traces_of_a_diagonal_matrix_are_exact(small, key):
    d = unravel(torch.arange(small.flat.numel()).double(), small.params)

    def scaled(v):
        return tree.map(lambda a, b: a * b, d, v)

    assert_close(inspect.hutchinson_trace(scaled, small.params, key, probes=1).value, ravel(d).sum())
    assert_close(ravel(inspect.hutchinson_diagonal(scaled, small.params, key, probes=1).value), ravel(d))


def test_lanczos_to_the_end_finds_the_whole_spectrum(small, key):
    h = small.hessian()
    found = inspect.lanczos(product(small), small.params, key, steps=small.flat.numel())
    values = torch.linalg.eigvalsh(h)
    # Eigenvalues at 0 come once: Lanczos sees distinct values.
    assert_close(found.values[-8:], values[-8:])
    assert_close(found.values[:3], values[:3])
    t = torch.diag(found.diagonal) + torch.diag(found.off, 1) + torch.diag(found.off, -1)
    torch.testing.assert_close(found.basis.T @ h @ found.basis, t, rtol=1e-8, atol=1e-9)
    assert_close(found.weights.sum(), torch.tensor(1.0).double())


def test_the_top_eigenpairs_are_those_of_the_matrix(small, key):
    h = small.hessian()
    found = inspect.eigenpairs(product(small), small.params, key, k=3, steps=30)
    values = torch.linalg.eigvalsh(h)
    assert_close(found.values.abs(), values.abs().sort(descending=True).values[:3])
    for value, v, residual in zip(*found):
        assert (h @ ravel(v) - value * ravel(v)).norm() <= residual + 1e-9
        assert_close(ravel(v).norm(), torch.tensor(1.0).double())


def test_sharpness_is_the_largest_eigenvalue(small):
    found = inspect.sharpness(small.loss, small.params, small.batch, steps=30)
    assert_close(found, torch.linalg.eigvalsh(small.hessian())[-1])


def test_the_density_is_that_of_the_eigenvalues(small, key):
    h = small.hessian()
    runs = inspect.spectrum(lambda v: unravel(h @ ravel(v), small.params), small.params, key, runs=12, steps=small.flat.numel())
    width = 1.0
    found = inspect.density(runs, width=width, points=2000)
    values = torch.linalg.eigvalsh(h)
    assert abs(torch.trapezoid(found.density, found.grid) - 1) < 1e-3
    exact = torch.exp(-0.5 * ((found.grid[:, None] - values) / width).square()).mean(1) / (width * (2 * torch.pi) ** 0.5)
    assert torch.trapezoid((found.density - exact).abs(), found.grid) < 0.25  # twelve random starts


def test_what_they_refuse_they_refuse_with_the_reason(small, key):
    with pytest.raises(ValueError, match="inspect.hvp: vector must have the structure of params"):
        inspect.hvp(small.loss, small.params, {"v": torch.zeros(3)}, small.batch)
    with pytest.raises(ValueError, match="inspect.hvp: vector must have the shapes of params"):
        inspect.hvp(small.loss, small.params, tree.map(lambda p: p[:1], small.params), small.batch)
    with pytest.raises(ValueError, match="unknown mode 'sideways'"):
        inspect.hvp(small.loss, small.params, small.params, small.batch, mode="sideways")
    with pytest.raises(ValueError, match="expected \\[\\d+\\] numbers for this tree; got \\[3\\]"):
        unravel(torch.zeros(3), small.params)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        inspect.lanczos(product(small), small.params, key, steps=0)
