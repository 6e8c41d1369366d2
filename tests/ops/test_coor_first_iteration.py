"""Iterations whose thresholds lie above all entries leave nothing behind, and the C kernel leaves them out: nothing else changes."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.native import build
from fnattn_kernels.native import coor_descent as native
from torch.func import jvp, vjp, vmap

from fnattn.ops.coor_attention import coor_descent_attention
from fnattn.ops.coor_descent import coor_descent

pytestmark = pytest.mark.skipif(build.why_not("coor_descent") is not None, reason=str(build.why_not("coor_descent")))
SCHEDULES = [dict(n_iters=20, eps_init=4.0, eps_decay=0.7), dict(n_iters=3, eps_init=4.0, eps_decay=0.7), dict(n_iters=9),
             dict(n_iters=14, eps=0.5, eps_init=8.0, eps_decay=0.5), dict(n_iters=40, eps_init=40.0, eps_decay=0.9)]
# With entries in lanes and with rows in lanes, in both precisions; no whole number of blocks of rows.
SHAPES = [(37, 160), (37, 67)]
K = {"one": 1.0, "half": 0.5, "eight": 8.0, "rows": None}


def rows(shape, seed):
    """Rows of every width and height, one of them flat, one with a single entry, one with none."""
    draw = torch.Generator().manual_seed(seed)
    s = torch.randn(*shape, generator=draw, dtype=torch.float64)
    s = s * torch.logspace(-2, 1.5, shape[0], dtype=torch.float64)[:, None]
    s = s + 100 * torch.randn(shape[0], 1, generator=draw, dtype=torch.float64)
    s[3], s[4, 1:], s[5] = 2.5, -torch.inf, -torch.inf
    return torch.where(torch.rand(*shape, generator=draw) < 0.1, -torch.inf, s)


def counts(k, n, dtype=torch.float64):
    return k if k is not None else torch.logspace(-1, 3, n, dtype=dtype)


def first_iterations(s, k, options):
    """How many thresholds of each row are not there, from the front."""
    options = {"eps": 0.1, **options}
    settings = options["eps"], options.get("eps_init", options["eps"]), options.get("eps_decay", 1.0), options["n_iters"]
    log_k = torch.as_tensor(k, dtype=s.dtype).log().expand(s.shape[:1])
    m = native.iterate(s, log_k, *settings)[1]
    assert not torch.isposinf(m[:, -1]).any()
    return torch.isposinf(m).cumprod(1).sum(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_left_out_is_what_lies_above(shape):
    s = rows(shape, 1).clamp(min=-1e3)
    for options in SCHEDULES:
        # k = 1: below the first threshold the row is a softmax, and the last iteration is all that counts.
        assert (first_iterations(s - s.amax(-1, keepdim=True), 1.0, options) == options["n_iters"] - 1).all()
        found = first_iterations(s, 8.0, options)
        # Without the kernel: the first threshold that does not lie above all entries.
        eps, m, above = max(options.get("eps_init", 0.0), options.get("eps", 0.1)), None, torch.ones(shape[0], dtype=torch.bool)
        for t in range(options["n_iters"] - 1):
            m = eps * (torch.full((shape[0],), float(shape[1])).double().log() if m is None else
                       (torch.minimum(s, m[:, None]) / eps).logsumexp(-1)) - eps * torch.tensor(8.0).log()
            above &= m >= s.amax(-1)
            assert (above | (found <= t)).all(), "an iteration that matters was left out"
            eps = max(eps * options.get("eps_decay", 1.0), options.get("eps", 0.1))
    usual = torch.randn(37, 160, generator=torch.Generator().manual_seed(8))
    assert first_iterations(usual, 8.0, SCHEDULES[0]).median() >= 4


@pytest.mark.parametrize("k", K)
@pytest.mark.parametrize("options", SCHEDULES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_derivatives_are_those_of_all_iterations(shape, options, k):
    s, level = rows(shape, 2), counts(K[k], shape[0])
    assert level is not K["rows"] or first_iterations(s, level, options).unique().numel() > 1
    g, t = (torch.randn(*shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (3, 4))
    level = torch.as_tensor(level, dtype=torch.float64).expand(shape[:1]).clone()
    found = {}
    for impl in ("reference", "native"):
        run = partial(coor_descent, impl=impl, **options)
        y, pull = vjp(run, s, level)
        _, ty = jvp(run, (s, level), (t, level))
        # Blocks of rows that the kernel works on together are others here: three batches of 37.
        many = vmap(pull)(torch.stack((g, t, g - t)))
        found[impl] = y, *pull(g), ty, *many, *jvp(lambda s, k, run=run: vjp(run, s, k)[1](g), (s, level), (t, level))[1]
    for mine, true in zip(found["native"], found["reference"]):
        assert_close(mine, true)
    assert all(x.abs().max() > 1e-6 for x in found["reference"])


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_float32_is_as_exact_as_with_all_iterations(offset):
    s = torch.randn(64, 512, generator=torch.Generator().manual_seed(5)) + offset
    options = dict(n_iters=20, eps_init=4.0, eps_decay=0.7)
    for k in (1.0, 8.0, 100.0):
        true = coor_descent(s.double(), k, impl="reference", **options)
        wrong = {impl: (coor_descent(s, k, impl=impl, **options) - true).abs().max().item() for impl in ("native", "reference")}
        assert wrong["native"] <= 2 * wrong["reference"] + 1e-6


@pytest.mark.parametrize("extreme", [torch.inf, torch.nan])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_with_infinity_or_nan_are_those_of_plain_torch_and_spoil_no_other(shape, extreme):
    s = torch.randn(*shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    wrong = s.clone()
    wrong[7, 2] = extreme
    options = dict(n_iters=20, eps_init=4.0, eps_decay=0.7)
    for k in (1.0, 8.0):
        mine, true = coor_descent(wrong, k, impl="native", **options), coor_descent(wrong, k, impl="reference", **options)
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12, equal_nan=True)  # as assert_close, which takes no NaN
        others = torch.arange(shape[0]) != 7
        assert_close(mine[others], coor_descent(s, k, impl="native", **options)[others])


@pytest.mark.parametrize("k", [1.0, 3.0])
def test_attention_too(k):
    q, kk, v, g, t = (torch.randn(1, 2, 45, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(5))
    found = {}
    for impl in ("reference", "native"):
        run = partial(coor_descent_attention, sparsity_k=k, eps=0.1, eps_init=4.0, eps_decay=0.7, n_iters=20, impl=impl)
        out, pull = vjp(run, q, kk, v)
        found[impl] = out, *pull(g), jvp(run, (q, kk, v), (t, g, t))[1], *vmap(pull)(torch.stack((g, t)))
    for mine, true in zip(found["native"], found["reference"]):
        assert_close(mine, true)
        assert true.abs().max() > 1e-3


@pytest.mark.parametrize("spread, offset", [(1, 0), (6, -40), (0.1, 0.3), (30, 7), (1, 300), (3, 30000)])
def test_iterations_of_falling_eps_are_as_exact_as_plain_torch_wherever_the_scores_lie(spread, offset):
    """Their exponents are relative to a whole number of steps, if scores are not so large that it would be rounded."""
    options = {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.8, "n_iters": 13}
    scores = spread * torch.randn(17, 131, generator=torch.Generator().manual_seed(3)) + offset
    exact = coor_descent(scores.double(), 5.0, impl="reference", **options)
    ours, plain = ((coor_descent(scores, 5.0, impl=impl, **options).double() - exact).abs().max() for impl in ("native", "reference"))
    # Beside plain torch's error: scores in double are those in float32, but a threshold among them is rounded, and divided by eps.
    assert 0 < exact.max() and ours <= 2 * plain + torch.finfo(torch.float32).eps * (1 + scores.abs().max() / 0.03)


def test_scores_of_millions_are_no_worse_than_their_own_rounding():
    """From 2^21 steps of eps on, exponents are taken relative to the largest entry first, in the value and in the gradient."""
    options = dict(eps=1.0, eps_init=4.0, eps_decay=0.8, n_iters=7)
    scores = torch.full((16, 512), -1024.0)
    scores[:, 3:93:9] = 0
    scores -= 2.0**22 + torch.arange(16)[:, None]
    g = torch.randn(16, 512, generator=torch.Generator().manual_seed(8))
    (mine, pull), (exact, pull_exact) = (vjp(partial(coor_descent, k=5.0, impl=impl, **options), s) for impl, s in
                                         (("native", scores), ("reference", scores.double())))
    chosen = exact > 0
    # Numbers of that size are 0.5 apart, so a threshold is off by a quarter, and all that has exp(-threshold / eps) by its factor.
    assert (mine[chosen].log() - exact[chosen].log()).abs().max() < 0.251
    assert torch.equal(mine > 0, chosen) and chosen.sum() == 160
    (ours,), (true,) = pull(g), pull_exact(g.double())
    assert torch.allclose(ours[~chosen].double(), true[~chosen], atol=1e-12)
    # ds_j = g_j y_j - w_j sum g y, with w_j = 1/10 here: y may be off by that factor, w by its square.
    part = g * exact
    bound = math.expm1(0.25) * part.abs().max() + math.expm1(0.5) / 10 * part.sum(-1).abs().max()
    assert (ours[chosen] - true[chosen]).abs().max() < bound < 0.5 * true.abs().max()
