"""Causal linear attention: blocks of positions, shared heads and threads of the C kernel, against sums over all pairs."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.native import build

from fnattn.ops.causal_dot import causal_dot
from fnattn.random import fold_in, key, normal
from fnattn.testing import brute

REASON = build.why_not("causal_dot")
IMPLS = ["reference", pytest.param("native", marks=pytest.mark.skipif(REASON is not None, reason=str(REASON)))]
HEADS = [(4, 4), (6, 2), (3, 1)]


def inputs(h, g, n, d, e, dtype=torch.float64):
    shapes = ((2, h, n, d), (2, g, n, d), (2, g, n, e))
    return [normal(fold_in(key(3), i), shape, torch.float64).to(dtype) for i, shape in enumerate(shapes)]


def value_and_gradients(fn, args):
    leaves = [a.detach().requires_grad_() for a in args]
    out = fn(*leaves)
    return out.detach(), *torch.autograd.grad((out * torch.arange(out.numel()).cos().reshape(out.shape)).sum(), leaves)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("reverse", [False, True], ids=["past", "future"])
@pytest.mark.parametrize("h, g", HEADS)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_length_width_and_sharing_of_heads_is_the_sum_over_pairs(impl, h, g, reverse, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # The last rows are what the kernel does in chunks of 64: wide heads, and short sequences of heads not so narrow.
        for n, d, e in ((1, 3, 5), (7, 1, 16), (8, 17, 1), (9, 3, 33), (63, 2, 7), (64, 5, 8), (67, 16, 17), (137, 3, 67),
                        (1, 67, 71), (63, 64, 64), (64, 31, 37), (131, 67, 71)):
            args = inputs(h, g, n, d, e)
            found = value_and_gradients(lambda *a: causal_dot(*a, reverse=reverse, impl=impl), args)
            for ours, truth in zip(found, value_and_gradients(lambda *a: brute.causal_dot(*a, reverse=reverse), args), strict=True):
                assert truth.abs().max() > 1e-2
                assert_close(ours, truth)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_wide_heads_err_no_more_than_plain_torch(dtype):
    for h, g, n, d, e in ((2, 2, 1031, 67, 71), (2, 1, 67, 128, 64), (1, 1, 29, 64, 128)):
        low = inputs(h, g, n, d, e, dtype)
        exact = value_and_gradients(brute.causal_dot, [t.double() for t in low])
        for ours, plain, truth in zip(*(value_and_gradients(lambda *a, impl=impl: causal_dot(*a, impl=impl), low)
                                        for impl in ("native", "reference")), exact, strict=True):
            error, usual = ((t.double() - truth).abs().max().item() / truth.abs().max().item() for t in (ours, plain))
            assert error <= 2 * usual + torch.finfo(dtype).eps
