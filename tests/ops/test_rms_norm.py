"""Root-mean-square normalisation: values and gradients of the C kernel, rows of zeros, many rows, threads, errors."""

from __future__ import annotations

import pytest
import torch
from fnattn_kernels.native import build

from fnattn.ops import rms_norm
from fnattn.testing import brute

WHY_NOT = build.why_not("rms_norm")
needs_kernel = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
IMPLS = ["reference", pytest.param("native", marks=needs_kernel)]


def numbers(*shape, dtype=torch.float64, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cotangent(out):
    """The same numbers in every precision."""
    return numbers(*out.shape, seed=7).float().to(out.dtype)


def with_gradients(x, gamma, impl):
    x, gamma = x.clone().requires_grad_(), gamma.clone().requires_grad_()
    out = rms_norm(x, gamma, impl=impl)
    return out, *torch.autograd.grad(out, (x, gamma), cotangent(out))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(5,), (3, 1), (2, 7, 16), (3, 17, 5), (0, 17, 5), (2, 3, 2, 67), (1025, 33), (2100, 8)])
def test_values_and_gradients_are_those_of_brute_force(shape, impl):
    x, gamma = numbers(*shape) * 3, numbers(shape[-1], seed=5)
    found, (a, b) = with_gradients(x, gamma, impl), (x.clone().requires_grad_(), gamma.clone().requires_grad_())
    out = brute.rms_norm(a, b)
    for ours, true in zip(found, (out, *torch.autograd.grad(out, (a, b), cotangent(out))), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-10)
    # A single channel is its sign: its gradient is 0.
    assert not out.numel() or found[1].abs().max() > 0 or shape[-1] == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_entries_of_many_rows_are_right_under_transforms(impl):
    x, gamma, along = numbers(2, 17, 5), numbers(5, seed=5), numbers(3, 2, 17, 5, seed=9)

    def loss(fn, x, gamma):
        return fn(x, gamma).sin().sum()

    for which in (0, 1):
        for transform in (lambda f, w=which: torch.func.grad(f, argnums=w), lambda f, w=which: torch.func.hessian(f, argnums=w),
                          lambda f, w=which: lambda x, g: torch.vmap(torch.func.grad(f, argnums=w), (0, None))(x + along, g)):
            ours, true = (transform(lambda x, g, fn=fn: loss(fn, x, g))(x, gamma)
                          for fn in (lambda x, g: rms_norm(x, g, impl=impl), brute.rms_norm))
            torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-10)  # float64, sums over rows in another order


@pytest.mark.parametrize("impl", IMPLS)
def test_zeros_stay_zeros_and_very_small_rows_are_scaled_by_a_constant(impl):
    x = torch.zeros(3, 4, dtype=torch.float64)
    x[1] = 1e-14
    out, dx, dgamma = with_gradients(x, torch.ones(4, dtype=torch.float64), impl)
    assert not out[0].any() and torch.allclose(out[1], torch.full((4,), 1e-14 * 2e12, dtype=torch.float64))
    torch.testing.assert_close(dx, 2e12 * cotangent(out))
    assert dgamma.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_with_nan_is_nan_and_no_other(impl):
    x = numbers(3, 5)
    x[1, 2] = torch.nan
    out = rms_norm(x, torch.ones(5, dtype=torch.float64), impl=impl)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5)])
def test_nothing_gives_nothing(shape, impl, poisoned_empty):
    out, dx, dgamma = with_gradients(torch.zeros(shape, dtype=torch.float64), torch.ones(shape[-1], dtype=torch.float64), impl)
    assert out.shape == dx.shape == shape and not dgamma.any()


@needs_kernel
def test_sums_over_many_rows_are_as_precise_as_plain_torchs_and_no_bit_depends_on_threads():
    x, gamma = numbers(9000, 64, dtype=torch.float32) + 2, numbers(64, dtype=torch.float32, seed=5)
    ours, plain = with_gradients(x, gamma, "native"), with_gradients(x, gamma, "reference")
    for a, b, true in zip(ours, plain, with_gradients(x.double(), gamma.double(), "reference"), strict=True):
        far, theirs = ((t - true).abs().max() / true.abs().max() for t in (a, b))
        assert far <= 2 * theirs + torch.finfo(torch.float32).eps
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(ours, with_gradients(x, gamma, "native"), strict=True))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_are_normed_in_float32(dtype):
    x, gamma = numbers(3, 64).to(dtype), numbers(64, seed=5).to(dtype)
    out = rms_norm(x, gamma)
    assert out.dtype == dtype
    assert torch.equal(out, rms_norm(x.float(), gamma.float()).to(dtype)) or WHY_NOT is not None
    torch.testing.assert_close(out, rms_norm(x, gamma, impl="reference"))


@pytest.mark.parametrize("call, error, text", [
    (lambda: rms_norm(torch.ones(3, dtype=torch.int64), torch.ones(3)), TypeError, "rms_norm: x must be a floating point tensor"),
    (lambda: rms_norm(torch.ones(2, 3), None), TypeError, "rms_norm: gamma must be a floating point tensor"),
    (lambda: rms_norm(torch.ones(2, 3), torch.ones(2)), ValueError, r"rms_norm: expected x \[..., d\] and gamma \[d\]"),
])
def test_errors_say_who_what_and_what_to_do(call, error, text):
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n  " in str(caught.value)
