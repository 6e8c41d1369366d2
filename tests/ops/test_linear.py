"""Linear maps: the kernel for few rows gives what torch gives, whatever the sizes, and is taken where it is worth it."""

from __future__ import annotations

import sys

import pytest
import torch
from fnattn_kernels import crossovers
from torch.utils._python_dispatch import TorchDispatchMode

from fnattn import ops
from fnattn.core import KernelUnavailable
from fnattn.ops.linear import KERNELS

module = sys.modules["fnattn.ops.linear"]  # fnattn.ops has a function of this name

LIMITS = crossovers.limits("linear", "native")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("rows", [(1,), (2, 1), (3, 1), (2, 2), (5,), (2, 3, 3), (0,), (2, 0), ()])
@pytest.mark.parametrize("m, k", [(1, 1), (7, 5), (13, 37), (6, 128), (3, 0), (0, 3)])
def test_the_kernel_agrees_with_torch(rows, m, k, dtype, tolerance):
    draw = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=draw, dtype=dtype) for shape in ((*rows, k), (m, k), (m,)))
    for b in (None, bias):
        out, expected = ops.linear(x, weight, b, impl="native"), ops.linear(x, weight, b, impl="reference")
        assert out.shape == expected.shape and out.dtype == dtype
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * max(k, 1) ** 0.5)


@pytest.mark.parametrize("rows", [(1,), (2, 1), (5,), (0,)])
@pytest.mark.parametrize("m, k", [(1, 1), (7, 5), (13, 37), (6, 128), (3, 0)])
def test_weights_in_bfloat16_give_what_they_give_in_float32_rounded_once(rows, m, k, instructions):
    draw = torch.Generator().manual_seed(1)
    low = [torch.randn(*shape, generator=draw).bfloat16() for shape in ((*rows, k), (m, k), (m,))]
    for args in (low, low[:2]):
        out = ops.linear(*args, impl="native")
        assert out.dtype == torch.bfloat16 and bool(out.any()) == bool(out.numel() and (k or len(args) == 3))
        assert torch.equal(out, ops.linear(*(t.float() for t in args), impl="native").bfloat16())
    given = [t.requires_grad_() for t in low]
    wide = [t.detach().float().requires_grad_() for t in low]
    for ours, theirs in zip(*(torch.autograd.grad(ops.linear(*args, impl="native").sum(), args) for args in (given, wide))):
        assert ours.any() or not theirs.any()
        assert torch.equal(ours, theirs.bfloat16())


def test_weights_in_bfloat16_are_not_widened(monkeypatch):
    seen = []
    monkeypatch.setattr(module.native, "linear", lambda *args: seen.append([t.dtype for t in args]) or torch.zeros(1, 2, 3))
    args = torch.zeros(2, 5).bfloat16(), torch.zeros(3, 5).bfloat16(), torch.zeros(3).bfloat16()
    ops.linear(*args, impl="native")
    ops.linear(*(t.requires_grad_() for t in args), impl="native")
    assert seen == [[torch.float32, torch.bfloat16, torch.float32], [torch.float32] * 3]


def test_rows_that_lie_apart_are_one_product():
    """torch would make a product per sequence of them, in bfloat16 tens of times as slow."""
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    x, weight = torch.randn(4, 6, 37), torch.randn(11, 37)
    with torch.no_grad(), Recorder():
        out = ops.linear(x[:, 2:3], weight)
    assert torch.ops.aten.bmm.default not in seen and torch.ops.aten.mm.default in seen
    torch.testing.assert_close(out, x[:, 2:3] @ weight.T)


def test_rows_and_weights_may_lie_anywhere():
    x, weight = torch.randn(5, 3, 37, dtype=torch.float64), torch.randn(37, 11, dtype=torch.float64)
    for part in (x[:, 1], x.transpose(0, 1), x[..., ::2], x[:1].expand(4, 3, 37)):
        w = weight[:part.shape[-1]].T
        torch.testing.assert_close(ops.linear(part, w, impl="native"), part @ w.T)


def taken(x, weight):
    return KERNELS[0].worth(x, weight, None)


def test_few_rows_with_large_weights_are_worth_the_kernel():
    large = torch.zeros(LIMITS["weights"] // 64, 64)
    assert taken(torch.zeros(LIMITS["rows"], 1, 64), large)
    assert not taken(torch.zeros(LIMITS["rows"] + 1, 1, 64), large)
    assert not taken(torch.zeros(1, 1, 64), large[1:])
    low = large.bfloat16()
    assert taken(torch.zeros(LIMITS["halves"], 1, 64).bfloat16(), low)
    assert not taken(torch.zeros(LIMITS["halves"] + 1, 1, 64).bfloat16(), low)
    assert not taken(torch.zeros(1, 1, 64).half(), large.half())


def test_what_is_differentiated_or_mapped_is_torch_s():
    large = torch.zeros(LIMITS["weights"] // 64, 64)
    assert not taken(torch.zeros(1, 64, requires_grad=True), large)
    seen = []
    torch.vmap(lambda x: seen.append(taken(x, large)) or x)(torch.zeros(2, 1, 64))
    torch.func.grad(lambda x: seen.append(taken(x, large)) or x.sum())(torch.zeros(1, 64))
    assert seen == [False, False]


def test_what_the_kernel_cannot_serve_it_names():
    x, weight = torch.zeros(1, 3), torch.zeros(2, 3)
    with pytest.raises(TypeError, match="x, weight and bias must have one dtype; got torch.float64, torch.float32 and None"):
        ops.linear(x.double(), weight, impl="native")
    with torch.autocast("cpu"), pytest.raises(KernelUnavailable, match="autocast"):
        ops.linear(x, weight, impl="native")
    with pytest.raises(ValueError, match=r"weight \[m, k\]"):
        ops.linear(x, weight.T)
    with pytest.raises(TypeError, match="weight must be a floating point tensor"):
        ops.linear(x, weight.long())


def test_layers_with_weights_that_do_not_fit_are_errors_not_reads_beyond_the_end():
    from fnattn.attentions._heads import linear, rms_norm
    x = torch.zeros(2, 1, 1024)
    for weight, bias in ((torch.zeros(1024, 1000), None), (torch.zeros(1024, 1024), torch.zeros(1000))):
        with torch.no_grad(), pytest.raises(RuntimeError):
            linear(x, weight, bias)
    with pytest.raises(ValueError, match="rms_norm: expected x"):
        rms_norm(x, torch.zeros(1000))


def test_few_rows_with_large_weights_compile():
    x, weight = torch.ones(1, 1, 1024), torch.full((1024, 1024), 0.5)
    out = torch.compile(lambda x, weight: ops.linear(x, weight), backend="eager", fullgraph=True)(x, weight)
    torch.testing.assert_close(out, torch.full((1, 1, 1024), 512.0))
