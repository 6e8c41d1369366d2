"""causal_dot by Triton, interpreted."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.triton import causal_dot as kernel
from interpreted_checks import check

from fnattn.ops import causal_dot
from fnattn.testing import brute


def test_transforms_are_right():
    check("causal_dot, reverse, one key head", "triton")


def draw(h, g, n, d, e, dtype=torch.float64):
    source = torch.Generator().manual_seed(n)
    return [torch.randn(1, heads, n, w, generator=source, dtype=torch.float64).to(dtype).requires_grad_()
            for heads, w in ((h, d), (g, d), (g, e))]


@pytest.mark.parametrize("programs", [1, 512])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("h, g, n, d, e", [(2, 1, 37, 3, 19)])
def test_several_chunks_in_one_segment_or_many(h, g, n, d, e, reverse, programs, monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    args = draw(h, g, n, d, e)
    out, expected = causal_dot(*args, reverse=reverse, impl="triton"), brute.causal_dot(*args, reverse=reverse)
    assert_close(out, expected)
    for ours, true in zip(torch.autograd.grad(out.sin().sum(), args), torch.autograd.grad(expected.sin().sum(), args)):
        assert_close(ours, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype):
    args = draw(1, 1, 19, 33, 5, dtype)
    got = causal_dot(*args, impl="triton")
    assert got.dtype == dtype
    assert_close(got.double(), brute.causal_dot(*(a.double() for a in args)), dtype)


def test_empty_and_poisoned_memory(poisoned_empty):
    for h, g, n, d, e in ((1, 1, 0, 3, 2), (1, 1, 3, 0, 2), (1, 1, 1, 3, 0), (2, 2, 17, 3, 2)):
        args = draw(h, g, n, d, e)
        assert_close(causal_dot(*args, impl="triton"), brute.causal_dot(*args))


def test_wide_heads_are_refused():
    with pytest.raises(KernelUnavailable, match="widths of at most 128, got 129"):
        causal_dot(*draw(1, 1, 2, 129, 2), impl="triton")


def test_the_plan_covers_every_chunk_once():
    for programs in (1, 7, 512, 5000):
        for chunks in (1, 2, 31, 1000):
            segments, each = kernel.plan(programs, chunks)
            assert (segments - 1) * each < chunks <= segments * each
