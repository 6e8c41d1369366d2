"""Coordinate descent: plain torch, the C kernel, a loop over numbers and upstream agree, in values and in every derivative."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.native import build
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from upstream import upstream

from fnattn.ops.coor_descent import coor_descent

WHY_NOT = build.why_not("coor_descent")
NATIVE = pytest.param("native", marks=pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)))
IMPLS = ["reference", "auto", NATIVE]
SCHEDULES = [dict(n_iters=1), dict(n_iters=2, eps_init=4.0, eps_decay=0.7), dict(n_iters=5, eps=1.0),
             dict(n_iters=20, eps_init=4.0, eps_decay=0.7), dict(n_iters=13, eps=0.5, eps_init=0.2, eps_decay=1.1),
             dict(n_iters=50), dict(n_iters=17, eps=0.03, eps_init=4.0, eps_decay=0.5)]
# Rows on both sides of a register tile, and lengths beside and on whole vectors.
SHAPES = [(1, 1), (2, 3, 5), (17, 16), (3, 67), (33, 7), (131,)]


def scores(shape, dtype=torch.float64, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def levels(shape, seed=5, low=0.3, high=6.0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * (high - low) + low


def some(shape, seed=7):
    """A mask whose first row is empty."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask.view(-1, shape[-1])[0] = False
    return mask


def loop(row, k, *, eps=0.1, eps_init=None, eps_decay=1.0, n_iters=20):
    """Upstream's two steps on a list of numbers; None is masked."""
    there = [x for x in row if x is not None]
    if not there:
        return [0.0] * len(row)
    now, b, a = max(eps if eps_init is None else eps_init, eps), [-x for x in there], 0.0
    for _ in range(n_iters):
        z = [(x + y) / now for x, y in zip(there, b)]
        top = max(z)
        a = now * (math.log(max(k, 1e-20)) - top - math.log(sum(math.exp(x - top) for x in z)))
        b = [-max(x + a, 0.0) for x in there]
        now = max(now * eps_decay, eps)
    ys = iter([math.exp((x + a + y) / now) for x, y in zip(there, b)])
    return [0.0 if x is None else next(ys) for x in row]


def limit(row, k, eps):
    """min(1, exp((s - m) / eps)) with m found by bisection."""
    if len(row) <= k:
        return [1.0] * len(row)

    def y(m):
        return [math.exp(min(x - m, 0.0) / eps) for x in row]

    low, high = min(row) - 50 * eps, max(row) + eps * math.log(len(row) / min(k, 1.0)) + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(y(middle)) > k else (low, middle)
    return y(low)


def with_gradients(fn, s, k, **options):
    """y and the gradients of s and k for an uneven cotangent."""
    s = s.clone().requires_grad_()
    ins = [s]
    if isinstance(k, torch.Tensor):
        k = k.clone().requires_grad_()
        ins.append(k)
    y = fn(s, k, **options)
    return y, *torch.autograd.grad(y, ins, scores(tuple(y.shape), y.dtype, seed=11))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_it_equals_a_loop_over_numbers(schedule, impl):
    for shape in SHAPES:
        s, mask = scores(shape), some(shape)
        k = levels(shape[:-1])
        y = coor_descent(s, k, mask=mask, impl=impl, **schedule)
        rows = zip(s.view(-1, shape[-1]), mask.view(-1, shape[-1]), k.reshape(-1))
        brute = [loop([x if there else None for x, there in zip(row.tolist(), m.tolist())], float(level), **schedule)
                 for row, m, level in rows]
        assert_close(y, torch.tensor(brute, dtype=torch.float64).view(shape))


@pytest.mark.parametrize("impl", ["reference", NATIVE])
@pytest.mark.parametrize("level", [1, 3.5, "tensor"])
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_upstream_in_value_and_gradients(level, masked, impl):
    theirs = upstream("colt5_attention.coor_descent").coor_descent
    for shape, schedule in itertools.product(SHAPES[1:], SCHEDULES):
        s, mask = scores(shape), some(shape) if masked else None
        k = levels(shape[:-1]) if level == "tensor" else level
        ours = with_gradients(coor_descent, s, k, mask=mask, impl=impl, **schedule)
        expected = with_gradients(lambda s, k, **o: theirs(s, k=k, **o), s, k, mask=mask, **schedule)
        for mine, other in zip(ours, expected):
            if masked and other.shape == s.shape[:-1]:  # upstream's gradient of k is NaN where a row is empty
                other = torch.where(mask.any(-1), other, 0.0)
            assert_close(mine, other)


@pytest.mark.parametrize("impl", ["reference", NATIVE])
def test_float32_is_as_close_to_float64_as_upstream_is(impl):
    theirs = upstream("colt5_attention.coor_descent").coor_descent
    for schedule in SCHEDULES:
        s, k = scores((7, 131), torch.float32), levels((7,)).float()
        exact = coor_descent(s.double(), k.double(), impl="reference", **schedule)
        mine, other = coor_descent(s, k, impl=impl, **schedule), theirs(s, k=k, **schedule)
        assert (mine - exact).abs().max() <= 2 * (other - exact).abs().max() + 2e-6


GOLDEN_S = [0.3, -1.2, 2.0, 0.9, 0.7, -0.4, 1.1]
# Upstream's coor_descent in float64: k = 2; 20 iterations from eps_init 4 with decay 0.7, then 5 at constant eps.
GOLDEN = [
    ([0.000287152531939036, 8.78406258581259e-11, 1.0, 0.115845599508549,
            0.0156779970212047, 2.61849215238524e-07, 0.855989633582924],
     dict(eps_init=4.0, eps_decay=0.7)),
    ([0.170528509897502, 5.21650668893644e-08, 1.0, 1.0,
            1.0, 0.000155501872788417, 1.0],
     dict(n_iters=5)),
]


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_numbers(impl):
    for expected, schedule in GOLDEN:
        y = coor_descent(torch.tensor(GOLDEN_S, dtype=torch.float64), 2, impl=impl, **schedule)
        assert_close(y, torch.tensor(expected, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ the fixed point


@pytest.mark.parametrize("impl", IMPLS)
def test_the_exact_solver_equals_bisection_and_sums_to_k(impl):
    for shape, eps in itertools.product(SHAPES, (0.02, 0.1, 1.0)):
        s, k = scores(shape), levels(shape[:-1], high=min(6.0, shape[-1] + 0.5))
        y = coor_descent(s, k, eps=eps, solver="exact", impl=impl)
        brute = [limit(row.tolist(), float(level), eps) for row, level in zip(s.view(-1, shape[-1]), k.reshape(-1))]
        assert_close(y, torch.tensor(brute, dtype=torch.float64).view(shape))
        assert_close(y.sum(-1), k.clamp(max=shape[-1]))


@pytest.mark.parametrize("impl", ["reference", NATIVE])
def test_the_exact_solver_is_where_the_iteration_ends(impl):
    s, k, mask = scores((5, 13)), levels((5,)), some((5, 13))
    exact = with_gradients(coor_descent, s, k, mask=mask, eps=1.0, solver="exact", impl=impl)
    long = with_gradients(coor_descent, s, k, mask=mask, eps=1.0, n_iters=3000, impl=impl)
    for a, b in zip(exact, long):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("impl", ["reference", NATIVE])
def test_the_exact_solver_spans_scores_whose_exponentials_leave_float32(impl):
    s = torch.tensor([[90.0, 40.0, 39.9, 0.0, -50.0, -50.02, -50.05, -80.0]])
    for k in (1.0, 1.5, 2.0, 2.5, 4.0, 5.5, 7.0, 7.9):
        y, ds, dk = with_gradients(coor_descent, s, torch.tensor([k]), eps=0.1, solver="exact", impl=impl)
        wide = with_gradients(coor_descent, s.double(), torch.tensor([k]).double(), eps=0.1, solver="exact", impl=impl)
        assert_close(y, wide[0])
        assert ds.isfinite().all() and dk.isfinite().all()
        if k % 1:
            assert_close(ds, wide[1])
            assert_close(dk, wide[2])


# ------------------------------------------------------------------------------------------------ derivatives


SOLVERS = [dict(n_iters=6, eps=0.4), dict(n_iters=7, eps=0.3, eps_init=1.5, eps_decay=0.7), dict(solver="exact", eps=0.5)]


@pytest.mark.parametrize("impl", ["reference", NATIVE])
@pytest.mark.parametrize("options", SOLVERS, ids=str)
def test_gradcheck_and_gradgradcheck(options, impl):
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 2] = mask[2] = False
    s, k = scores((3, 5), seed=4).requires_grad_(), levels((3,), low=1.3, high=2.7).requires_grad_()

    def f(s, k):
        return coor_descent(s, k, mask=mask, impl=impl, **options)

    assert torch.autograd.gradcheck(f, (s, k), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (s, k), check_fwd_over_rev=True)


@pytest.mark.parametrize("impl", ["reference", NATIVE])
@pytest.mark.parametrize("options", SOLVERS, ids=str)
def test_every_transform_agrees_with_plain_torch_and_is_not_zero(options, impl):
    s, k = scores((5,), seed=4), torch.tensor(2.3, dtype=torch.float64)

    def loss(impl):
        return lambda s, k: (coor_descent(s, k, impl=impl, **options) + 0.3).sin().sum()

    f, plain = loss(impl), loss("reference")
    many = scores((3, 5), seed=8)
    pairs = [
        (grad(f, (0, 1)), grad(plain, (0, 1)), (s, k)),
        (jacrev(grad(f)), jacrev(grad(plain)), (s, k)),
        (hessian(f, (0, 1)), hessian(plain, (0, 1)), (s, k)),
        (jacfwd(jacfwd(f)), jacfwd(jacfwd(plain)), (s, k)),
        (vmap(grad(f, 1), (0, None)), vmap(grad(plain, 1), (0, None)), (many, k)),
        (vmap(vmap(hessian(f), (0, None)), (None, 0)), vmap(vmap(hessian(plain), (0, None)), (None, 0)), (many, levels((2,)))),
        (lambda *a: jvp(f, a, (torch.ones_like(s).cumsum(0), torch.ones_like(k)))[1],
         lambda *a: jvp(plain, a, (torch.ones_like(s).cumsum(0), torch.ones_like(k)))[1], (s, k)),
    ]
    for mine, other, args in pairs:
        a, b = (torch.utils._pytree.tree_leaves(fn(*args)) for fn in (mine, other))
        for x, y in zip(a, b):
            assert_close(x, y)
            assert x.abs().max() > 1e-6


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("options", [*SCHEDULES, dict(n_iters=60, eps=0.05), dict(solver="exact")], ids=str)
def test_the_kernel_has_the_tangents_of_plain_torch(options, poisoned_empty):
    for shape in SHAPES:
        primals, tangents = (scores(shape), levels(shape[:-1])), (scores(shape, seed=13), scores((*shape[:-1], 1), seed=14)[..., 0])
        mask = some(shape)
        mine, plain = (jvp(lambda s, k: coor_descent(s, k, mask=mask, impl=impl, **options), primals, tangents)[1]  # noqa: B023
                       for impl in ("native", "reference"))
        assert_close(mine, plain)
        assert shape != (3, 67) or mine.abs().max() > 0


def test_compiled_functions_equal_plain_ones():
    s, k = scores((3, 7)), levels((3,))
    for options in SOLVERS:
        def f(s, k, options=options):
            return coor_descent(s, k, **options)

        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        assert_close(compiled(s, k), f(s, k))
        slope = torch.compile(grad(lambda s, k: f(s, k).pow(2).sum()), backend="aot_eager", fullgraph=True)
        assert_close(slope(s, k), grad(lambda s, k: f(s, k).pow(2).sum())(s, k))


# ------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("solver", ["iterate", "exact"])
@pytest.mark.parametrize("impl", IMPLS)
def test_masked_rows_are_zero_with_zero_gradients(impl, solver):
    s, mask = scores((2, 3, 7)), torch.ones(2, 3, 7, dtype=torch.bool)
    mask[0, 1] = False
    mask[1, 0, 3:] = False
    y, ds, dk = with_gradients(coor_descent, s, levels((2, 3), high=2.5), mask=mask, solver=solver, impl=impl)
    assert (y[0, 1] == 0).all() and (ds[0, 1] == 0).all() and dk[0, 1] == 0
    assert (y[1, 0, 3:] == 0).all() and (ds[1, 0, 3:] == 0).all()
    assert all(t.isfinite().all() for t in (y, ds, dk)) and ds[1, 0, :3].abs().max() > 0 and dk[1, 0].abs() > 0
    alone = coor_descent(s[1, 0, :3], levels((2, 3), high=2.5)[1, 0], solver=solver, impl=impl)
    assert_close(y[1, 0, :3], alone)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_score_of_minus_infinity_is_not_there(impl):
    s, mask = scores((3, 7)), some((3, 7))
    for solver in ("iterate", "exact"):
        masked = coor_descent(s, 2, mask=mask, solver=solver, impl=impl)
        assert torch.equal(coor_descent(s.masked_fill(~mask, -torch.inf), 2, solver=solver, impl=impl), masked)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_no_more_than_k_entries_take_all(impl):
    for solver in ("iterate", "exact"):
        assert_close(coor_descent(scores((2, 3)) / 9, 7, solver=solver, n_iters=99, impl=impl), torch.ones(2, 3).double())


@pytest.mark.parametrize("impl", IMPLS)
def test_choosing_one_is_a_softmax(impl):
    s = scores((3, 7))
    for options in (dict(n_iters=3), dict(solver="exact")):
        assert_close(coor_descent(s, 1, eps=2.0, impl=impl, **options), (s / 2).softmax(-1))


@pytest.mark.parametrize("n", [7, 512])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_holds_nan_is_nan_and_spoils_no_other(impl, n):
    s = scores((3, n))
    s[1, 2] = torch.nan
    for solver in ("iterate", "exact"):
        y, ds = with_gradients(coor_descent, s, 2, solver=solver, impl=impl)
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all() and ds[[0, 2]].isfinite().all()


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("shape", [(17, 23), (9, 264)], ids=str)
def test_thresholds_that_wander_far_are_followed(shape):
    # A tiny k moves the threshold by 46 eps in every step: the kernel has to take new reference points.
    s = scores(shape) * 30
    for k, n_iters in itertools.product((1e-20, 1e-9, 0.5, shape[1] - 0.5), (3, 20, 200)):
        k = torch.full(shape[:1], k, dtype=torch.float64)
        a, b = ((*with_gradients(coor_descent, s, k, n_iters=n_iters, impl=impl),
                 jvp(lambda s: coor_descent(s, k, n_iters=n_iters, impl=impl), (s,), (s.sin(),))[1])  # noqa: B023
                for impl in ("native", "reference"))
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("n", [128, 512])
@pytest.mark.parametrize("schedule", [dict(n_iters=2), dict(n_iters=50), SCHEDULES[3], {**SCHEDULES[3], "n_iters": 9}], ids=str)
def test_long_rows_are_as_precise_in_float32_as_plain_torch(schedule, n):
    """Long rows are not transposed. A block of rows that is not full, an empty row, masks."""
    s, k, mask = scores((35, n), torch.float32), levels((35,), high=12.0).float(), some((35, n))
    exact = with_gradients(coor_descent, s.double(), k.double(), mask=mask, impl="reference", **schedule)
    plain, mine = (with_gradients(coor_descent, s, k, mask=mask, impl=impl, **schedule) for impl in ("reference", "native"))
    for x, other, right in zip(mine, plain, exact, strict=True):
        assert (x - right).abs().max() <= 2 * (other - right).abs().max() + 2e-6
        assert right.abs().max() > 0


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_results_too_many_for_caches_are_those_of_few_rows():
    s = scores((2500, 512), torch.float32)
    every = with_gradients(coor_descent, s, 3.0, n_iters=12)
    grads = scores((2500, 512), torch.float32, seed=11)
    for rows in (slice(0, 64), slice(2432, 2500)):
        few = s[rows].clone().requires_grad_()
        y = coor_descent(few, 3.0, n_iters=12)
        slope, = torch.autograd.grad(y, few, grads[rows])
        assert torch.equal(y, every[0][rows]) and torch.equal(slope, every[1][rows])


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("schedule", [dict(), dict(eps_init=4.0, eps_decay=0.7)], ids=str)
@pytest.mark.parametrize("n_iters", [15, 50, 131])
@pytest.mark.parametrize("size", [0.02, 0.2, 1.0, 5.0])
@pytest.mark.parametrize("n", [131, 136])
def test_rows_whose_thresholds_settle_at_different_speeds_are_right_in_every_iteration(n, size, n_iters, schedule):
    """Once thresholds settle, the kernel looks at few entries only; rows that share a register settle at different times."""
    s, k = scores((33, n)) * size, levels((33,), low=0.5, high=120.0)
    s[::5, ::3] = -torch.inf
    a, b = (with_gradients(coor_descent, s, k, n_iters=n_iters, impl=impl, **schedule) for impl in ("native", "reference"))
    for x, y in zip(a, b, strict=True):
        assert y.abs().max() > 0
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_layout_and_no_rows_or_entries_at_all(impl, poisoned_empty):
    s = scores((5, 3, 7)).movedim(0, -1)
    y, ds = with_gradients(coor_descent, s, 2, impl=impl)
    assert_close(y, coor_descent(s.contiguous(), 2, impl="reference"))
    flat = scores((3, 7)).requires_grad_()
    coor_descent(flat, 2, n_iters=3, impl=impl).sum().backward()  # an expanded cotangent
    assert flat.grad.isfinite().all()
    for solver in ("iterate", "exact"):
        for shape in ((0, 5), (3, 0), (2, 0, 5), (0,)):
            s = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
            y = coor_descent(s, 2, solver=solver, impl=impl)
            assert y.shape == shape
            y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    s = scores((3, 67)).to(dtype)
    y = coor_descent(s, 3)
    assert y.dtype == dtype
    assert torch.equal(y, coor_descent(s.float(), 3).to(dtype))


def test_threads_change_no_bit():
    s = scores((97, 67), torch.float32)
    one = coor_descent(s, 3)
    torch.set_num_threads(2)
    try:
        assert torch.equal(coor_descent(s, 3), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("call, error, text", [
    (lambda s: coor_descent(s, 2, n_iters=0), ValueError, "coor_descent: n_iters must be at least 1; got 0."),
    (lambda s: coor_descent(s, 2, eps=0.0), ValueError, "coor_descent: eps must be above 0; got 0.0."),
    (lambda s: coor_descent(s, 2, eps=torch.tensor(0.1)), TypeError, "eps must be a Python number; got torch.float32."),
    (lambda s: coor_descent(s, 2, solver="newton"), ValueError, "solver must be one of 'iterate', 'exact'; got 'newton'."),
    (lambda s: coor_descent(s, torch.ones(5)), ValueError, r"k must broadcast to [3], one number per row; got [5]."),
    (lambda s: coor_descent(s, 2, mask=torch.ones(3, 5)), TypeError, "mask must be a bool tensor, True = may be chosen;"),
    (lambda s: coor_descent(s, 2, mask=torch.ones(2, 5).bool()), ValueError, "mask must broadcast to s [3, 5]; got [2, 5]."),
    (lambda s: coor_descent(s.long(), 2), TypeError, "s must be a floating point tensor; got torch.int64."),
    (lambda s: coor_descent(s[0, 0], 2), ValueError, "s must be [..., n]; got []."),
    (lambda s: coor_descent(s, 2, impl="cuda"), ValueError, "impl must be one of 'auto', 'reference', 'native', "),
], ids=lambda x: x if isinstance(x, str) else "")
def test_errors_say_who_what_and_what_to_do(call, error, text):
    with pytest.raises(error) as caught:
        call(scores((3, 5)))
    assert text in str(caught.value) and "\n  " in str(caught.value)
