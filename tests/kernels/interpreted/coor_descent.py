"""coor_descent by Triton, interpreted."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.triton import coor_descent as kernel
from interpreted_checks import SOME, check

from fnattn.ops import coor_descent


@pytest.mark.parametrize("name, only", [("coor_descent", SOME), ("coor_descent, exact, mask", SOME)])
def test_every_transform_is_right(name, only):
    check(name, "triton", only)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_iters", [1, 2, 7])
def test_masks_and_schedules(n_iters, dtype):
    source = torch.Generator().manual_seed(n_iters)
    s = torch.randn(3, 2, 17, generator=source).to(dtype).requires_grad_()
    k = torch.rand(3, 1, generator=source).add(1.5).to(dtype).requires_grad_()  # shared by the two rows
    mask = torch.rand(3, 1, 17, generator=source) > 0.3
    mask[1] = False
    for options in (dict(eps=0.1), dict(eps=0.3, eps_init=2.0, eps_decay=0.7)):
        results = []
        for impl in ("triton", "reference"):
            choose = functools.partial(coor_descent, mask=mask, n_iters=n_iters, impl=impl, **options)
            y, t = torch.func.jvp(lambda s, k, choose=choose: choose(s, k), (s, k), (s.detach().cos(), k.detach().sin()))
            results.append((y, t, *torch.autograd.grad(y.sin().sum(), (s, k), retain_graph=True)))
        for ours, plain in zip(*results):
            assert_close(ours, plain)
            assert ours.abs().max() > 0
        assert not results[0][0][1].any() and not results[0][2][1].any()  # rows without entries: 0, and no NaN behind them


def test_one_bad_score_spoils_its_row_only():
    s = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    s[0, 2] = torch.nan
    y = coor_descent(s, 2.0, impl="triton")
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_empty_rows_and_poisoned_memory(poisoned_empty):
    for shape in ((0, 3), (2, 0), (1, 1), (3,), (2, 17)):
        s = torch.linspace(-1, 1, int(torch.tensor(shape).prod())).reshape(shape).requires_grad_()
        y = coor_descent(s, 1.0, impl="triton")
        assert_close(y, coor_descent(s, 1.0, impl="reference"))
        assert torch.autograd.grad(y.sum(), s)[0].isfinite().all()


def test_what_it_does_not_have_is_refused():
    with pytest.raises(KernelUnavailable, match=f"at most {kernel.COLUMNS}"):
        coor_descent(torch.zeros(1, kernel.COLUMNS + 1), 2.0, impl="triton")
