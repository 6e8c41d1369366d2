"""Attention over a cache whose rows are read where they lie: of any width, of bfloat16, and with rows that nobody may read."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.native import build
from fnattn_kernels.native import decode as native

from fnattn import ops

BF16, NAN = torch.bfloat16, float("nan")
WIDTHS = ((1, 3), (5, 7), (13, 8), (16, 19), (31, 33), (64, 130), (67, 15))  # of keys and values: below, at and above a vector
pytestmark = pytest.mark.skipif(bool(build.why_not("decode")), reason="no C kernel here")


def cache(d, e, first=37, late=5, n=2, dtype=torch.float32):
    """q, and the two parts of a cache of two key heads; rows behind those in use are NaN. length: first + late."""
    source = torch.Generator().manual_seed(d + 100 * e)
    q, k, v, k_late, v_late = (torch.randn(2, heads, rows, width, generator=source).to(dtype) for heads, rows, width in (
        (4, n, d), (2, first + 3, d), (2, first + 3, e), (2, late + 2, d), (2, late + 2, e)))
    for part, used in ((k, first), (v, first), (k_late, late), (v_late, late)):
        part[:, :, used:] = NAN
    return (q, k, v, k_late, v_late), {"first": first, "length": first + late}


def copies(tensors):
    """The same numbers where nothing lies behind the last one that a kernel may read: memory of their own, up to a page's NaN."""
    out = []
    for t in tensors:
        memory = torch.full((t.numel() + 64,), NAN, dtype=t.dtype)
        memory[:t.numel()] = t.flatten()
        out.append(memory[:t.numel()].view(t.shape))
    return out


@pytest.mark.parametrize("d, e", WIDTHS)
def test_rows_of_any_width_give_the_numbers_of_the_reference(instructions, d, e):
    parts, where = cache(d, e)
    exact = ops.cached_attention(*(t.double() for t in parts), **where, impl="reference")
    for given in (parts, copies(parts)):
        assert exact.any() and exact.isfinite().all()
        assert_close(ops.cached_attention(*given, **where, impl="native"), exact.float())


@pytest.mark.parametrize("d, e", WIDTHS)
def test_gradients_in_rows_of_any_width_are_those_of_the_reference(instructions, d, e):
    parts, where = cache(d, e)
    found = []
    for impl, given in (("native", copies(t.nan_to_num() for t in parts)), ("reference", [t.nan_to_num().double() for t in parts])):
        given = [t.requires_grad_() for t in given]
        out = ops.cached_attention(*given, **where, impl=impl)
        found.append(torch.autograd.grad(out, given, torch.ones_like(out).cumsum(-1)))
    for ours, exact in zip(*found):
        assert exact.any()
        assert_close(ours, exact.float())
    for grad, used in zip(found[0][1:], (where["first"],) * 2 + (where["length"] - where["first"],) * 2):
        assert not grad[:, :, used:].any()


@pytest.mark.parametrize("d, e", WIDTHS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_cache_of_bfloat16_gives_what_its_numbers_give_in_float32_rounded_once(instructions, d, e, masked):
    parts, where = cache(d, e, dtype=BF16)
    mask = torch.rand(2, 1, 2, where["length"], generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    out = ops.cached_attention(*copies(parts), **where, mask=mask, impl="native")
    assert out.dtype == BF16 and out.any()
    assert torch.equal(out, ops.cached_attention(*(t.float() for t in parts), **where, mask=mask, impl="native").to(BF16))


def test_a_cache_of_bfloat16_is_not_widened(monkeypatch):
    seen = []
    monkeypatch.setattr(native, "attend", lambda *args: seen.append([t.dtype for t in args[:5]]) or args[0])
    parts, where = cache(16, 16, dtype=BF16)
    ops.cached_attention(*parts, **where, impl="native")
    ops.cached_attention(*(t.requires_grad_() for t in parts), **where, impl="native")
    assert seen == [[torch.float32] + [BF16] * 4, [torch.float32] * 5]


@pytest.mark.parametrize("d, e", [(5, 7), (64, 33)])
def test_derivatives_of_a_cache_of_bfloat16_are_those_of_float64(d, e):
    parts, where = cache(d, e, n=1, dtype=BF16)
    moves = [t.nan_to_num().cos() for t in parts]
    run = lambda *x: ops.cached_attention(*x, **where, impl="native")  # noqa: E731
    found = []
    for dtype in (BF16, torch.float64):
        given = [t.nan_to_num().to(dtype).requires_grad_() for t in parts]
        grads = torch.autograd.grad(run(*given).square().sum(), given)
        found.append([*grads, *torch.func.jvp(run, tuple(t.detach() for t in given), tuple(t.to(dtype) for t in moves))])
    for ours, exact in zip(*found):
        assert ours.dtype == BF16 and exact.any()
        assert (ours.double() - exact).abs().max() <= 4 * torch.finfo(BF16).eps * exact.abs().max()


def test_vmap_over_caches_of_bfloat16_is_a_loop():
    parts, where = cache(16, 24, dtype=BF16)
    stacked = [torch.stack([t, -t, t / 2]) for t in parts]
    run = lambda *x: ops.cached_attention(*x, **where, impl="native")  # noqa: E731
    for i, out in enumerate(torch.func.vmap(run)(*stacked)):
        assert torch.equal(out, run(*(t[i] for t in stacked)))
