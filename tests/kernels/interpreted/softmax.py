"""softmax_attention by Triton, interpreted."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.triton import softmax as triton
from interpreted_checks import check

from fnattn.ops import softmax_attention
from fnattn.testing import brute


def test_transforms_are_right():
    check("softmax_attention, mask, offset", "triton")


def draw(h, g, n, m, d, e, dtype=torch.float64):
    source = torch.Generator().manual_seed(n)
    return [torch.randn(2, heads, length, w, generator=source, dtype=torch.float64).to(dtype).requires_grad_()
            for heads, length, w in ((h, n, d), (g, m, d), (g, m, e))]


@pytest.mark.parametrize("masked, options", [(False, {}), (True, {}), (False, {"causal": True}), (True, {"causal": True, "offset": -3}),
                                             (False, {"causal": True, "offset": 40})])
def test_several_tiles(masked, options):
    args = draw(2, 1, 37, 35, 3, 19)
    if masked:
        options = dict(options, mask=torch.rand(2, 1, 37, 35, generator=torch.Generator().manual_seed(1)) > 0.4)
        options["mask"][1, :, 5] = False
    results = []
    for impl in ({"impl": "triton"}, None):
        def f(*args, impl=impl):
            return softmax_attention(*args, **options, **impl) if impl else brute.softmax_attention(*args, **options)
        out, tangent = torch.func.jvp(f, tuple(args), tuple(a.detach().cos() for a in args))
        results.append((out, tangent, *torch.autograd.grad(out.sin().sum(), args)))
    for ours, true in zip(*results):
        assert_close(ours, true)
        assert ours.abs().max() > 0


@pytest.mark.parametrize("options", [{}, {"causal": True, "offset": -3}])
def test_second_derivatives_over_several_tiles(options, monkeypatch):
    if not options:
        monkeypatch.setattr(triton, "TOGETHER", 16)  # as for the widest heads
    args = tuple(a.detach() for a in draw(2, 1, 19, 35, 3, 17))
    mask = torch.rand(2, 1, 19, 35, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[1, :, 5] = False
    g = torch.randn(2, 2, 19, 17, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for moving_g in (False, True):
        def slope(*args, impl, moving_g=moving_g):
            def loss(*args):
                out = softmax_attention(*args, **options, mask=mask, impl=impl)
                return ((out + out.square() if moving_g else out) * g).sum()
            return torch.func.grad(loss, (0, 1, 2))(*args)
        moves = tuple(a.cos() for a in args)
        ours, plain = (torch.func.jvp(lambda *a, impl=impl: slope(*a, impl=impl), args, moves)[1] for impl in ("triton", "reference"))
        back = torch.func.vjp(lambda *a: slope(*a, impl="triton"), *args)[1](moves) if moving_g else ours
        for a, b, true in zip(ours, back, plain):
            assert_close(a, true)
            assert_close(b, true)
            assert true.abs().max() > 0


def test_tangents_of_one_argument_alone():
    args = draw(1, 1, 5, 7, 3, 2)
    for i in range(3):
        def part(x, impl, i=i):
            return softmax_attention(*args[:i], x, *args[i + 1:], impl=impl)
        ours, plain = (torch.func.jvp(lambda x, impl=impl: part(x, impl), (args[i],), (args[i].detach().cos(),))[1]
                       for impl in ("triton", "reference"))
        assert_close(ours, plain)
        assert ours.abs().max() > 0


def test_large_scores_do_not_overflow():
    q, k, v = draw(1, 1, 5, 35, 3, 2, torch.float32)
    assert_close(softmax_attention(100 * q, 100 * k, v, impl="triton"), softmax_attention(100 * q, 100 * k, v, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype):
    args = draw(1, 1, 17, 33, 33, 5, dtype)
    got = softmax_attention(*args, impl="triton")
    assert got.dtype == dtype
    assert_close(got.double(), brute.softmax_attention(*(a.double() for a in args)), dtype)


def test_empty_and_poisoned_memory(poisoned_empty):
    for shape in ((1, 1, 0, 3, 3, 2), (1, 1, 3, 0, 3, 2), (2, 1, 17, 3, 3, 2)):
        args = draw(*shape)
        out = softmax_attention(*args, impl="triton")
        assert_close(out, softmax_attention(*args, impl="reference"))
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), args))


def test_wide_heads_are_refused():
    with pytest.raises(KernelUnavailable, match="widths of at most 128, got 129"):
        softmax_attention(*draw(1, 1, 2, 2, 129, 2), impl="triton")
