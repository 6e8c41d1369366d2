"""Taylor attention where the C kernel chooses: pairs or states by the length, one thread or several by the number of heads."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.native import build
from taylor_dense import dense, earlier, inputs, weights_of, with_gradients

from fnattn.ops.taylor import taylor


@pytest.mark.parametrize("n", [31, 33, 97, 211, 331])
@pytest.mark.parametrize("kind", [None, "mask", "weights", "sums"])
def test_pairs_and_states_agree_at_every_length(kind, n):
    args = inputs(1, 4, 2, n, 16, 16)
    past = earlier(1, 2, 16, 16) if kind == "sums" else None
    keep = weights_of(kind, 1, n)

    def gradients_of(fn):  # the sums get no cotangent: only then does a gradient need no states
        leaves = [t.clone().requires_grad_() for t in args]
        out = fn(*leaves, keep=keep, sums=past)[0]
        return out, *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)

    for a, x in zip(gradients_of(taylor), gradients_of(dense)):
        assert x.abs().max() > 1e-2
        assert_close(a, x)


@pytest.mark.parametrize("n", [33, 97, 131])
@pytest.mark.parametrize("kind", [None, "mask", "weights", "sums"])
def test_pairs_and_states_agree_in_tangents_too(kind, n):
    args = inputs(1, 4, 2, n, 16, 16)
    past = earlier(1, 2, 16, 16) if kind == "sums" else None
    keep = weights_of(kind, 1, n)
    along = tuple(t.cos() for t in args)

    def tangents_of(fn, moved):
        def part(*some):
            return fn(*[some[moved.index(i)] if i in moved else t for i, t in enumerate(args)], keep=keep, sums=past)

        return torch.func.jvp(part, tuple(args[i] for i in moved), tuple(along[i] for i in moved))

    for moved in ((0, 1, 2), (0,), (1,), (2,)):
        for found, true in zip(tangents_of(taylor, moved), tangents_of(dense, moved)):  # the values, then their tangents
            for a, x in zip(found, true):
                assert_close(a, x)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("kind", [None, "mask", "weights", "sums"])
def test_a_head_that_threads_share_gives_the_same_to_rounding(kind, threads):
    n = 801  # parts of 256 positions or more
    past, keep = earlier(1, 1, 7, 5) if kind == "sums" else None, weights_of(kind, 1, n)
    args = (*inputs(1, 2, 1, n, 7, 5), keep, past)
    run = lambda: with_gradients(lambda q, k, v, c, s: taylor(q, k, v, keep=c, sums=s), args)  # noqa: E731
    single = run()
    torch.set_num_threads(threads)
    try:
        shared = run()
    finally:
        torch.set_num_threads(1)
    for a, x in zip(shared, single):
        assert x.abs().max() > 1e-3
        assert_close(a, x)
    if build.why_not("taylor") is None:
        assert not torch.equal(shared[0], single[0])  # it was shared
