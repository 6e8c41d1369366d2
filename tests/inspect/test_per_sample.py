"""Gradients of single samples, what is made of them, and DP-SGD, each against one sample after the other."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close

from fnattn import inspect, random, tree
from fnattn.attentions import block_sparse
from fnattn.inspect import ravel


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_per_sample_gradients_are_those_of_a_loop(small, chunk_size):
    found = inspect.per_sample_grads(small.loss, small.params, small.batch, chunk_size=chunk_size)
    rows = torch.stack([ravel(tree.map(lambda g: g[i], found)) for i in range(5)])  # noqa: B023
    assert_close(rows, small.grads())
    assert rows.abs().amax() > 0.1


def test_norms_and_losses_of_single_samples(small):
    found = inspect.per_sample_norms(small.loss, small.params, small.batch, chunk_size=2)
    assert_close(found.norm, small.grads().norm(dim=1))
    assert_close(found.loss.mean(), small.loss(small.params, small.batch))


@pytest.mark.parametrize("chunk_size", [1, 2, 16])
def test_moments_do_not_depend_on_the_chunks(small, chunk_size):
    found, rows = inspect.moments(small.loss, small.params, small.batch, chunk_size=chunk_size), small.grads()
    assert_close(ravel(found.mean), rows.mean(0))
    assert_close(ravel(found.variance), rows.var(0))
    assert_close(found.mean_square, rows.square().sum(1).mean())


def test_signal_to_noise_is_the_mean_over_the_deviation(small):
    found, rows = inspect.signal_to_noise(inspect.moments(small.loss, small.params, small.batch)), small.grads()
    assert_close(ravel(found), rows.mean(0).abs() / rows.std(0))


def test_the_noise_scale_is_that_of_its_formula_and_without_bias(small):
    found, rows = inspect.noise_scale(small.loss, small.params, small.batch, chunk_size=2), small.grads()
    trace = rows.var(0).sum()
    assert_close(found.trace, trace)
    assert_close(found.signal, rows.mean(0).square().sum() - trace / 5)
    assert_close(found.scale, found.trace / found.signal)


def test_two_batch_sizes_tell_the_noise_scale_too(small):
    rows = small.grads()
    alone, whole = rows.square().sum(1).mean(), rows.mean(0).square().sum()  # batches of 1 and of 5, from the same samples
    found = inspect.noise_scale_from_norms(alone, 1, whole, 5)
    expected = inspect.noise_scale(small.loss, small.params, small.batch)
    assert_close(found.trace, expected.trace)
    assert_close(found.signal, expected.signal)


def test_a_clipped_gradient_has_the_bound_as_norm_or_is_unchanged(small):
    grads = tree.grad(small.loss)(small.params, small.batch)
    size = ravel(grads).norm()
    assert_close(ravel(inspect.clip(grads, 0.1)), ravel(grads) * 0.1 / size)
    assert torch.equal(ravel(inspect.clip(grads, 2 * size)), ravel(grads))


@pytest.mark.parametrize("chunk_size", [2, 16])
def test_private_gradients_are_clipped_summed_and_noisy(small, key, chunk_size):
    rows = small.grads()
    bound = float(rows.norm(dim=1).median())
    clipped = rows * (bound / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)
    quiet = inspect.private_grad(key, small.loss, small.params, small.batch, bound=bound, noise=0.0, chunk_size=chunk_size)
    assert_close(ravel(quiet), clipped.mean(0))
    loud = inspect.private_grad(key, small.loss, small.params, small.batch, bound=bound, noise=3.0, chunk_size=chunk_size)
    expected = random.normal(random.fold_in(key, "to_q"), tuple(small.params.to_q.shape), torch.float64) * 3.0 * bound / 5
    assert_close(loud.to_q - quiet.to_q, expected)


def test_the_noise_has_the_promised_size(small):
    noise = torch.stack([ravel(inspect.private_grad(k, small.loss, small.params, small.batch, bound=0.5, noise=2.0))
                         for k in random.split(random.key(1), 40)])
    # 40 draws of P numbers: the deviation of the estimate is below two per cent.
    assert abs(float((noise - noise.mean(0)).square().sum(0).mean() / 39) ** 0.5 / (2.0 * 0.5 / 5) - 1) < 0.06


def test_what_is_not_trained_has_no_gradient(key):
    cfg = block_sparse.FAMILY.examples[0]
    params, x = block_sparse.init(key, cfg), random.normal(key, (3, 5, cfg.dim))

    def loss(p, x):
        return block_sparse.apply(p, x)[0].square().mean()

    assert inspect.per_sample_grads(loss, params, x).layout is None
    found = inspect.moments(loss, params, x)
    assert found.mean.layout is None and inspect.signal_to_noise(found).layout is None
    assert inspect.private_grad(key, loss, params, x, bound=1.0, noise=1.0).layout is None


def test_what_they_refuse_they_refuse_with_the_reason(small, key):
    with pytest.raises(ValueError, match=r"same leading size, at least 1; got \[4, 5\]"):
        inspect.per_sample_grads(small.loss, small.params, {"x": small.batch["x"], "y": small.batch["y"][:4]})
    with pytest.raises(ValueError, match="expected at least 2 samples; got 1"):
        inspect.noise_scale(small.loss, small.params, {name: t[:1] for name, t in small.batch.items()})
    with pytest.raises(ValueError, match="bound must be above 0 and noise at least 0; got 0.0 and 1.0"):
        inspect.private_grad(key, small.loss, small.params, small.batch, bound=0.0, noise=1.0)
    with pytest.raises(ValueError, match="expected small_size < big_size; got 4 and 4"):
        inspect.noise_scale_from_norms(1.0, 4, 1.0, 4)
