"""taylor by Triton, interpreted."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.triton import taylor_launch as launch
from interpreted_checks import check

from fnattn.ops import taylor
from fnattn.testing import brute


@pytest.fixture
def small(monkeypatch):
    """Segments of 8 positions and tiles that short sequences and narrow heads fill several of."""
    monkeypatch.setattr(launch, "SEGMENT", {16: 8, 32: 8, 64: 8})
    monkeypatch.setattr(launch, "TILE", (8, 4, 8, 4))
    monkeypatch.setattr(launch, "TILE_DOUBLE", (8, 4, 8, 4))


def test_transforms_are_right():
    check("taylor, one key head, weights, earlier sums", "triton")


def draw(h, g, n, d, e, m=None, keep=None, sums=False, dtype=torch.float64):
    """Floating arguments by name, and the option keep="mask"."""
    source = torch.Generator().manual_seed(n)

    def some(*shape):
        return torch.randn(shape, generator=source, dtype=torch.float64)

    m, options = n if m is None else m, {}
    given = dict(q=some(1, h, n, d), k=some(1, g, m, d), v=some(1, g, m, e))
    if sums:  # of seven earlier keys
        given["sums"] = taylor(some(1, g, 7, d), some(1, g, 7, d), some(1, g, 7, e), impl="reference")[1]
    if keep == "weights":
        given["keep"] = some(1, m).abs() + 0.1
        given["keep"][:, 0] = 1e-9  # so little that the least normaliser acts
    if keep == "mask":
        options["keep"] = some(1, m) > -0.5
        options["keep"][:, 0] = False
    return {name: t.to(dtype).requires_grad_() for name, t in given.items()}, options


def everything(f, given, options, order=2):
    """Value, sums, their tangents, gradients and the gradients of gradients."""
    names, args = list(given), tuple(given.values())

    def run(*args):
        return f(**dict(zip(names, args)), **options)

    values, changes = torch.func.jvp(run, args, tuple(a.detach().cos() for a in args))
    found = [*values, *changes]
    grads = torch.autograd.grad(sum(x.sin().sum() for x in values), args, create_graph=order == 2)
    found += grads
    if order == 2:
        found += torch.autograd.grad(sum(g.sin().sum() for g in grads), args)
    return found


def compare(given, options, order=2):
    ours = everything(lambda **kw: taylor(impl="triton", **kw), given, options, order)
    true = everything(brute.taylor, given, options, order)
    assert len(ours) == len(true)
    for a, b in zip(ours, true):
        assert_close(a, b)
        assert a.abs().max() > 0


@pytest.mark.parametrize("h, g, n, d, e, options, order", [
    (1, 1, 1, 1, 1, {"sums": True}, 2), (1, 1, 7, 3, 2, {}, 1), (2, 1, 8, 2, 5, {"sums": True}, 1), (1, 1, 11, 5, 3, {}, 1),
    (3, 1, 9, 2, 3, {"keep": "mask", "sums": True}, 2), (1, 1, 17, 2, 2, {"keep": "weights"}, 1),
])
def test_several_segments_and_tiles(small, h, g, n, d, e, options, order):
    compare(*draw(h, g, n, d, e, **options), order)


@pytest.mark.parametrize("options, order", [({}, 1), ({"keep": "mask", "sums": True}, 2), ({"keep": "weights"}, 1)])
def test_not_causal(small, options, order):
    given, options = draw(2, 1, 5, 3, 2, m=11, **options)
    compare(given, dict(options, causal=False), order)


def test_the_sizes_of_a_gpu():
    given, _ = draw(1, 1, 131, 2, 17, dtype=torch.float32)
    results = []
    for f, args in ((taylor, given.values()), (brute.taylor, [t.detach().double().requires_grad_() for t in given.values()])):
        out, _ = f(*args, impl="triton") if f is taylor else f(*args)
        results.append((out, *torch.autograd.grad(out.sin().sum(), tuple(args))))
    for ours, true in zip(*results):
        assert_close(ours.double(), true, torch.float32)


def test_a_sequence_in_pieces(small):
    given, _ = draw(2, 1, 13, 3, 2)
    q, k, v = given.values()
    whole, total = taylor(q, k, v, impl="triton")
    first, sums = taylor(q[:, :, :9], k[:, :, :9], v[:, :, :9], impl="triton")
    second, sums = taylor(q[:, :, 9:], k[:, :, 9:], v[:, :, 9:], sums=sums, impl="triton")
    assert_close(torch.cat((first, second), 2), whole)
    assert_close(sums, total)
    grads = [torch.autograd.grad(out.sin().sum() + s.sin().sum(), (q, k, v))
             for out, s in ((torch.cat((first, second), 2), sums), (whole, total))]
    for ours, true in zip(*grads):
        assert_close(ours, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(small, dtype):
    given, _ = draw(1, 1, 19, 5, 3, dtype=dtype)
    out, sums = taylor(*given.values(), impl="triton")
    assert out.dtype == dtype and sums.dtype == torch.float32
    expected, total = brute.taylor(*(t.detach().double() for t in given.values()))
    assert_close(out.double(), expected, dtype)
    assert_close(sums.double(), total, torch.float32)


def test_strided_and_expanded(small):
    source = torch.Generator().manual_seed(1)
    qkv = torch.randn(1, 9, 2, 9, generator=source, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(1, 1, generator=source, dtype=torch.float64).add(0.5).expand(1, 9)

    def parts(qkv):
        q, k, v = qkv.transpose(1, 2).split(3, -1)
        return q, k[:, :1].expand(1, 2, 9, 3), v

    results = []
    for f in (lambda *args: taylor(*args, keep=keep, impl="triton"), lambda *args: brute.taylor(*args, keep=keep)):
        out, _ = f(*parts(qkv))
        results.append((out, *torch.autograd.grad(out.sum(), qkv)))  # the gradient of a sum has strides of 0
    for ours, true in zip(*results):
        assert_close(ours, true)
        assert ours.abs().max() > 0


def test_keys_that_are_not_there_may_hold_anything(small):
    given, options = draw(1, 1, 11, 3, 2, keep="mask")
    gone = ~options["keep"][:, None, :, None]
    spoiled = {name: t if name == "q" else t.detach().masked_fill(gone, torch.nan).requires_grad_() for name, t in given.items()}
    found = [everything(lambda **kw: taylor(impl="triton", **kw), args, options, 1) for args in (given, spoiled)]
    for clean, ours in zip(*found):
        if clean.shape[2:] != (11, 3) and clean.shape[2:] != (11, 2):
            assert_close(ours, clean)
        assert ours.isfinite().all()


def test_empty_and_poisoned_memory(small, poisoned_empty):
    for h, g, n, d, e in ((1, 1, 0, 3, 2), (1, 1, 3, 2, 0), (2, 1, 11, 3, 2)):
        for sums in (False, True):
            given, _ = draw(h, g, n, d, e, sums=sums)
            results = []
            for impl in ("triton", "reference"):
                out, total = taylor(**given, impl=impl)
                grads = torch.autograd.grad(out.sin().sum() + total.sin().sum(), tuple(given.values()))
                results.append((out, total, *grads))
            for ours, other in zip(*results):
                assert_close(ours, other)


def test_sums_without_queries(small, poisoned_empty):
    given, _ = draw(1, 1, 11, 3, 2)
    q, k, v = given.values()
    (out, total), (_, expected) = taylor(q[:, :0], k, v, impl="triton"), taylor(q, k, v, impl="reference")
    assert out.shape == (1, 0, 11, 2)
    assert_close(total, expected)
    for ours, plain in zip(torch.autograd.grad(total.sin().sum(), (k, v)), torch.autograd.grad(expected.sin().sum(), (k, v))):
        assert_close(ours, plain)


def test_wide_heads_are_refused():
    for d, e in ((65, 2), (2, 129)):
        given, _ = draw(1, 1, 2, d, e)
        with pytest.raises(KernelUnavailable, match=f"at most 64 and values of at most 128 channels, got {d} and {e}"):
            taylor(**given, impl="triton")
