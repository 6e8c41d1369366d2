"""scan by Triton, interpreted."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.triton import scan as kernel
from interpreted_checks import check

from fnattn.ops import scan
from fnattn.testing import brute


def test_transforms_are_right():
    check("scan, pairs, reverse, h0", "triton")


def draw(b, n, c, pairs, dtype=torch.float64):
    source = torch.Generator().manual_seed(n)
    tail = (2,) if pairs else ()
    a, x, h0 = (torch.randn(*shape, *tail, generator=source, dtype=torch.float64) for shape in ((b, n, c), (b, n, c), (b, c)))
    return [(t * s).to(dtype).requires_grad_() for t, s in ((a, 0.6), (x, 1.0), (h0, 1.0))]


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_several_chunks_and_blocks_of_channels(pairs, reverse, start, monkeypatch):
    monkeypatch.setattr(kernel, "TILE", (4, 4))
    args = draw(1, 11, 5, pairs)[:3 if start else 2]
    out = scan(*args, reverse=reverse, pairs=pairs, impl="triton")
    expected = brute.scan(*args, reverse=reverse, pairs=pairs)
    assert_close(out, expected)
    for ours, true in zip(torch.autograd.grad(out.sin().sum(), args), torch.autograd.grad(expected.sin().sum(), args)):
        assert_close(ours, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype):
    args = draw(1, 35, 3, True, dtype)
    got = scan(*args, pairs=True, impl="triton")
    assert got.dtype == dtype
    assert_close(got.double(), brute.scan(*(a.double() for a in args), pairs=True), dtype)


def test_empty_and_poisoned_memory(poisoned_empty):
    for b, n, c in ((1, 0, 3), (0, 3, 2), (1, 1, 1), (1, 5, 0), (2, 7, 3)):
        a, x, h0 = draw(b, n, c, False)
        assert_close(scan(a, x, h0, impl="triton"), brute.scan(a, x, h0) if n else x)


def test_gates_of_zero_forget():
    a, x, _ = draw(1, 7, 2, False)
    a = a.detach().clone()
    a[:, 3] = 0
    assert_close(scan(a, x, impl="triton")[:, 3:], scan(a[:, 3:], x[:, 3:], impl="reference"))
