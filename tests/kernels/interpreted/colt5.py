"""coor_descent by the kernels of colt5-attention, interpreted; all transforms of it are in all_checks.py."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels import colt5
from fnattn_kernels.contracts import KernelUnavailable
from interpreted_checks import case

from fnattn.ops import coor_descent

REASON = colt5.missing("cpu")
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    # The package multiplies -infinity by 0 to make zeros; numpy, which interprets it, warns.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning"),
]
OPTIONS = dict(eps=0.3, eps_init=2.0, eps_decay=0.7)


def test_compiled_derivatives_are_right():
    s, k = (t.float() for t in case("coor_descent").args())

    def loss(impl):
        return lambda s: coor_descent(s, k, n_iters=5, impl=impl, **OPTIONS).sin().sum()

    got = torch.compile(torch.func.grad(loss("colt5")), fullgraph=True, backend="aot_eager")(s)
    assert_close(got, torch.func.grad(loss("reference"))(s))
    assert got.abs().max() > 0


@pytest.mark.parametrize("n_iters", [1, 2, 11])
def test_segments_and_masks(n_iters):
    source = torch.Generator().manual_seed(n_iters)
    s = torch.randn(3, 2, 13, generator=source).requires_grad_()
    k = torch.rand(3, 1, generator=source).add(1.5).requires_grad_()  # shared by the two rows
    mask = torch.rand(3, 1, 13, generator=source) > 0.3
    mask[1] = False
    for options in (dict(eps=0.1), OPTIONS):
        results = []
        for impl in ("colt5", "reference"):
            y = coor_descent(s, k, mask=mask, n_iters=n_iters, impl=impl, **options)
            results.append((y, *torch.autograd.grad(y.sin().sum(), (s, k))))
        for ours, plain in zip(*results):
            assert_close(ours, plain)
        assert not results[0][0][1].any() and not results[0][1][1].any()  # rows without entries: 0, and no NaN behind them
        assert results[0][2].abs().max() > 0


def test_one_bad_score_spoils_its_row_only():
    s = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    s[0, 2] = torch.nan
    y = coor_descent(s, 2.0, impl="colt5")
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_empty_rows_and_poisoned_memory(poisoned_empty):
    for shape in ((0, 3), (2, 0), (1, 1), (3,)):
        s = torch.linspace(-1, 1, int(torch.tensor(shape).prod())).reshape(shape).requires_grad_()
        y = coor_descent(s, 1.0, impl="colt5")
        assert_close(y, coor_descent(s, 1.0, impl="reference"))
        assert torch.autograd.grad(y.sum(), s)[0].isfinite().all()


def test_what_it_does_not_have_is_refused():
    s = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    with pytest.raises(KernelUnavailable, match="float32 only"):
        coor_descent(s.double(), 2.0, impl="colt5")
    with pytest.raises(KernelUnavailable, match='solver="iterate" only'):
        coor_descent(s, 2.0, solver="exact", impl="colt5")


def test_more_numbers_than_the_kernels_can_count_are_refused(monkeypatch):
    monkeypatch.setattr(colt5, "KEPT", 2 * 2 * 6)
    s = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    with pytest.raises(KernelUnavailable, match="fewer than 2\\^31 kept numbers, got 5 for each of 2 x 5"):
        coor_descent(s, 2.0, n_iters=20, impl="colt5")
