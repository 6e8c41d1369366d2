"""coor_descent by Triton, interpreted."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.triton import coor_descent as kernel
from interpreted_checks import check

from fnattn.ops import coor_descent


@pytest.mark.parametrize("name", ["coor_descent", "coor_descent, exact, mask"])
def test_transforms_are_right(name):
    check(name, "triton")


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k, eps", [(1.0, 0.5), (4.5, 0.1), (15.4, 0.3), (12.0, 3.0)])
def test_the_exact_solver_with_few_and_many_capped(k, eps, dtype):
    source = torch.Generator().manual_seed(7)
    s = (3 * torch.randn(3, 2, 17, generator=source, dtype=torch.float64)).to(dtype).requires_grad_()
    k = torch.full((3, 1), k, dtype=dtype, requires_grad=True)  # shared by the two rows
    mask = torch.rand(3, 1, 17, generator=source) > 0.1
    mask[1] = False
    mask[2] = True
    results = []
    for impl in ("triton", "reference"):
        choose = functools.partial(coor_descent, mask=mask, eps=eps, solver="exact", impl=impl)
        y, t = torch.func.jvp(lambda s, k, choose=choose: choose(s, k), (s, k), (s.detach().cos(), k.detach().sin()))
        grads = torch.autograd.grad(y.sin().sum(), (s, k), create_graph=True)
        results.append((y, t, *grads, *torch.autograd.grad(sum(g.cos().sum() for g in grads), (s, k))))
    for ours, plain in zip(*results):
        assert_close(ours, plain)
        assert ours.abs().max() > 0
    y = results[0][0]
    assert_close(y[2].sum(-1), k[2].expand(2))
    assert not y[1].any() and not results[0][2][1].any()  # rows without entries: 0, and no NaN behind them


def test_the_exact_solver_caps_all_of_a_short_row():
    s = torch.tensor([[0.5, -1.0, 2.0], [0.5, -torch.inf, 2.0]], requires_grad=True)
    y = coor_descent(s, torch.tensor([3.0, 2.5]), solver="exact", impl="triton")
    assert y.tolist() == [[1, 1, 1], [1, 0, 1]]
    assert not torch.autograd.grad(y.sum(), s)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_exact_solver_in_low_precision_and_on_rows_that_lie_apart(dtype, poisoned_empty):
    source = torch.Generator().manual_seed(3)
    s = torch.randn(19, 3, generator=source).to(dtype).mT.requires_grad_()
    y = coor_descent(s, 4.5, solver="exact", impl="triton")
    assert y.dtype == dtype
    assert_close(y.double(), coor_descent(s.double(), 4.5, solver="exact", impl="reference"), dtype)
    (grad,) = torch.autograd.grad((y * torch.linspace(0, 1, 19)).float().sum(), s)
    assert grad.dtype == dtype and grad.isfinite().all() and grad.abs().max() > 0


@pytest.mark.parametrize("solver", ["iterate", "exact"])
def test_one_bad_score_spoils_its_row_only(solver):
    s = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    s[0, 2] = torch.nan
    y = coor_descent(s, 2.0, solver=solver, impl="triton")
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize("solver", ["iterate", "exact"])
def test_empty_rows_and_poisoned_memory(solver, poisoned_empty):
    for shape in ((0, 3), (2, 0), (1, 1), (3,), (2, 17)):
        s = torch.linspace(-1, 1, int(torch.tensor(shape).prod())).reshape(shape).requires_grad_()
        y = coor_descent(s, 1.0, solver=solver, impl="triton")
        assert_close(y, coor_descent(s, 1.0, solver=solver, impl="reference"))
        assert torch.autograd.grad(y.sum(), s)[0].isfinite().all()


def test_what_it_does_not_have_is_refused():
    with pytest.raises(KernelUnavailable, match=f"at most {kernel.COLUMNS}"):
        coor_descent(torch.zeros(1, kernel.COLUMNS + 1), 2.0, impl="triton")
