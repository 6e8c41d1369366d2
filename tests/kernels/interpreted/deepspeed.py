"""masked_softmax by DeepSpeed's Triton kernel, interpreted."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels import deepspeed
from fnattn_kernels.contracts import KernelUnavailable
from interpreted_checks import ROUNDED, case

from fnattn.ops import masked_softmax
from fnattn.testing import brute, check_operator

REASON = deepspeed.missing("cpu")
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning"),
]


def wrapped(scores, mask):
    """In float32 by the package; in and out float64, as the checks want it."""
    return masked_softmax(scores.float(), mask, impl="deepspeed").double()


# The terms of this gradient cancel: in float32 plain torch errs by 1e-2 of it on these numbers, DeepSpeed by 5e-3.
CANCELS = "grad(vmap(grad(f)))"


def test_every_check_but_numeric_differences_is_right():
    args, names = case("masked_softmax").args(), [name for name in ROUNDED if name != CANCELS]
    report = check_operator(wrapped, args, reference=brute.masked_softmax, rtol=1e-4, compile=False, only=names).require()
    assert {row.check for row in report.rows if row.status != "ok"} == {"grad(checkpoint(f))"}  # torch itself cannot do this


def test_compiled_derivatives_are_right():
    scores, mask = case("masked_softmax").args(torch.float32)

    def loss(impl):
        return lambda s: masked_softmax(s, mask, impl=impl).sin().sum()

    got = torch.compile(torch.func.grad(loss("deepspeed")), fullgraph=True, backend="aot_eager")(scores)
    assert_close(got, torch.func.grad(loss("reference"))(scores))
    assert got.abs().max() > 0


def test_a_masked_score_far_above_the_others_does_no_harm():
    scores = torch.tensor([[0.0, 1.0, 500.0], [-300.0, -301.0, 4e37]], requires_grad=True)
    mask = torch.tensor([True, True, False])
    y = masked_softmax(scores, mask, impl="deepspeed")
    assert_close(y, masked_softmax(scores, mask, impl="reference"))
    (grad,) = torch.autograd.grad((y * torch.tensor([1.0, 2.0, 3.0])).sum(), scores)
    assert grad.isfinite().all() and grad[:, :2].all() and not grad[:, 2].any()


def test_rows_without_entries_are_0_with_gradients_of_0(poisoned_empty):
    scores = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.ones(2, 3, 1, dtype=torch.bool)
    mask[1, 2] = False
    y = masked_softmax(scores, mask, impl="deepspeed")
    (grad,) = torch.autograd.grad(y.sin().sum(), scores)
    assert not y[1, 2].any() and not grad[1, 2].any()
    assert_close(y.sum(-1)[0], torch.ones(3))
    assert grad.isfinite().all() and grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    scores = torch.randn(3, 17, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = masked_softmax(scores.mT.contiguous().mT, impl="deepspeed")
    assert got.dtype == dtype
    assert torch.equal(got, scores.float().softmax(-1).to(dtype))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1), (5,), (2, 0, 3)])
def test_empty_shapes(shape):
    scores = torch.zeros(shape)
    assert_close(masked_softmax(scores, impl="deepspeed"), masked_softmax(scores, impl="reference"))


def test_float64_is_refused_and_not_rounded():
    with pytest.raises(KernelUnavailable, match="float32 only"):
        masked_softmax(torch.zeros(2, 3, dtype=torch.float64), impl="deepspeed")
