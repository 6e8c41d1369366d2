"""Attention with coordinate descent: the fused kernel, plain torch and a loop over queries agree in every derivative."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.native import build
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from fnattn.ops.coor_attention import coor_descent_attention
from fnattn.ops.coor_descent import coor_descent

WHY_NOT = build.why_not("coor_descent")
NATIVE = pytest.param("native", marks=pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)))
# b, h, g, n, m, d, e: grouped heads, one query, blocks of 32 queries more or less, widths beside and on whole vectors
SIZES = [(2, 3, 1, 5, 5, 3, 2), (1, 2, 2, 37, 41, 17, 5), (2, 4, 2, 1, 7, 16, 16), (1, 2, 2, 13, 3, 4, 4),
         (1, 2, 1, 67, 67, 33, 31)]
EXTRAS = [dict(), dict(nulls=1, offset=2), dict(causal=False)]
SOLVERS = [dict(n_iters=9, eps_init=4.0, eps_decay=0.7, eps=0.3), dict(n_iters=7, eps=0.2), dict(solver="exact"),
           dict(solver="exact", n_iters=2, eps_init=4.0, eps_decay=0.7)]


def inputs(b, h, g, n, m, d, e, dtype=torch.float64, seed=3):
    make = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)
               for shape in ((b, h, n, d), (b, g, m, d), (b, g, m, e)))
    return q, k, v, (torch.rand(b, h, n, generator=make, dtype=torch.float64) * 3 + 0.6).to(dtype)


def hidden(b, m):
    keep = torch.rand(b, m, generator=torch.Generator().manual_seed(7)) > 0.4
    keep[0, 0] = False
    return keep


def loop(q, k, v, level, keep=None, nulls=0, offset=None, causal=True, **options):
    """One query at a time, over the keys that it sees."""
    (b, h, n, d), m = q.shape, k.shape[2]
    start = m - nulls - n if offset is None else int(offset)
    out = torch.zeros(b, h, n, v.shape[3], dtype=v.dtype)
    for x, y, i in itertools.product(range(b), range(h), range(n)):
        seen = [j for j in range(m) if (keep is None or keep[x, j]) and (not causal or j < nulls or j - nulls <= start + i)]
        head = y // (h // k.shape[1])
        if seen:
            s = k[x, head, seen] @ q[x, y, i] * d ** -0.5
            out[x, y, i] = coor_descent(s, level[x, y, i], impl="reference", **options) @ v[x, head, seen]
    return out


@pytest.mark.parametrize("impl", ["reference", "auto", NATIVE])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_it_equals_a_loop_over_queries(solver, impl):
    for size, masked, extra in itertools.product(SIZES[:4], (False, True), EXTRAS):
        args = inputs(*size)
        options = dict(keep=hidden(size[0], size[4]) if masked else None, **extra, **solver)
        assert_close(coor_descent_attention(*args, impl=impl, **options), loop(*args, **options))


def with_gradients(args, **options):
    args = [t.clone().requires_grad_() for t in args]
    out = coor_descent_attention(*args, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    return out, *torch.autograd.grad(out, args, cotangent.to(out.dtype))


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_kernel_has_the_gradients_of_plain_torch(solver, poisoned_empty):
    for size, masked, extra in itertools.product(SIZES, (False, True), EXTRAS):
        args, options = inputs(*size), dict(keep=hidden(size[0], size[4]) if masked else None, **extra, **solver)
        native, reference = (with_gradients(args, impl=impl, **options) for impl in ("native", "reference"))
        for mine, plain in zip(native, reference):
            assert_close(mine, plain)


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_kernel_has_the_tangents_of_plain_torch(solver, poisoned_empty):
    for size, masked, extra in itertools.product(SIZES, (False, True), EXTRAS):
        args, options = inputs(*size), dict(keep=hidden(size[0], size[4]) if masked else None, **extra, **solver)
        native, reference = (jvp(lambda *a: coor_descent_attention(*a, impl=impl, **options), args,  # noqa: B023
                                 inputs(*size, seed=13))[1] for impl in ("native", "reference"))
        assert_close(native, reference)
        assert native.abs().max() > 0


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_float32_kernel_errs_no_more_than_plain_torch_in_float32(solver):
    args = inputs(1, 2, 1, 67, 67, 33, 31)
    exact = with_gradients(args, impl="reference", **solver)
    low = [t.float() for t in args]
    native, reference = (with_gradients(low, impl=impl, **solver) for impl in ("native", "reference"))
    for mine, plain, right in zip(native, reference, exact):
        size = right.abs().max()
        assert (mine - right).abs().max() <= 2 * (plain - right).abs().max() + 2e-6 * size


@pytest.mark.parametrize("impl", ["reference", NATIVE])
@pytest.mark.parametrize("solver", [SOLVERS[0], SOLVERS[2]], ids=str)
def test_gradcheck_and_gradgradcheck(solver, impl):
    args = [t.requires_grad_() for t in inputs(1, 2, 1, 3, 3, 2, 2, seed=5)]

    def f(*args):
        return coor_descent_attention(*args, nulls=1, impl=impl, **solver)

    assert torch.autograd.gradcheck(f, args, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, args, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("impl", ["reference", NATIVE])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_every_transform_agrees_with_plain_torch_and_is_not_zero(solver, impl):
    args = inputs(1, 2, 1, 3, 5, 3, 2)
    keep = torch.tensor([[True, True, False, True, True]])
    many = torch.stack([args[0], args[0].flip(2)])
    starts = torch.tensor([1, 3])

    def loss(impl):
        return lambda q, k, v, level, start=None: (coor_descent_attention(
            q, k, v, level, keep=keep, offset=start, impl=impl, **solver) + 0.3).sin().sum()

    f, plain = loss(impl), loss("reference")
    pairs = [
        (lambda g: grad(g, (0, 1, 2, 3)), args),
        (lambda g: jacfwd(grad(g)), args), (lambda g: jacrev(grad(g)), args), (lambda g: jacfwd(jacfwd(g)), args),
        (lambda g: lambda *a: jvp(g, a, tuple(torch.ones_like(t).cumsum(-1) for t in a))[1], args),
        (lambda g: vmap(grad(g, (0, 3)), (0, None, None, None, 0)), (many, *args[1:], starts)),
    ]
    for transform, given in pairs:
        mine, other = (torch.utils._pytree.tree_leaves(transform(g)(*given)) for g in (f, plain))
        for x, y in zip(mine, other):
            assert_close(x, y)
            assert x.abs().max() > 1e-6


@pytest.mark.parametrize("impl", ["reference", NATIVE])
def test_a_query_that_sees_no_key_gives_zero_with_finite_gradients(impl):
    args, keep = inputs(2, 2, 2, 5, 5, 3, 2), torch.ones(2, 5, dtype=torch.bool)
    keep[1] = False
    for solver in SOLVERS:
        out, *grads = with_gradients(args, keep=keep, impl=impl, **solver)
        assert (out[1] == 0).all() and out[0].abs().max() > 0
        assert all((g[1] == 0).all() and g[0].isfinite().all() and g[0].abs().max() > 0 for g in grads)


@pytest.mark.parametrize("impl", ["reference", NATIVE])
def test_later_keys_change_no_bit_and_large_tables_are_cut(impl, monkeypatch):
    from fnattn.ops import coor_attention as module

    args = inputs(1, 2, 2, 11, 11, 3, 2)
    out = coor_descent_attention(*args, impl=impl)
    q, k, v, level = (t.clone() for t in args)
    for t in (q, k, v, level):
        t[:, :, 7:] += 1
    assert torch.equal(coor_descent_attention(q, k, v, level, impl=impl)[:, :, :7], out[:, :, :7])
    monkeypatch.setattr(module, "TABLE", 50)
    assert_close(coor_descent_attention(*args, impl=impl), out)


def test_threads_change_no_bit():
    args = inputs(1, 3, 3, 67, 67, 17, 16, torch.float32)
    one = with_gradients(args)
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(with_gradients(args), one))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("options, error, text", [
    (dict(nulls=6), ValueError, "nulls must lie in [0, 5], the number of keys; got 6."),
    (dict(offset=torch.tensor(1.0)), TypeError, "offset must be an int or an integer tensor; got torch.float32."),
    (dict(offset=torch.ones(3).long()), ValueError, "offset must be [] or [1]; got [3]."),
    (dict(keep=torch.ones(1, 5)), TypeError, "keep must be a bool tensor, True = is there; got torch.float32."),
    (dict(keep=torch.ones(1, 4).bool()), ValueError, "keep must be [batch, keys] = [1, 5]; got [1, 4]."),
    (dict(sparsity_k=torch.ones(4)), ValueError, "k must broadcast to [1, 2, 5], one number per row; got [4]."),
    (dict(n_iters=0), ValueError, "n_iters must be at least 1; got 0."),
], ids=lambda x: x if isinstance(x, str) else "")
def test_errors_say_who_what_and_what_to_do(options, error, text):
    q, k, v, level = inputs(1, 2, 2, 5, 5, 3, 2)
    with pytest.raises(error) as caught:
        coor_descent_attention(q, k, v, **{"sparsity_k": level, **options})
    assert "coor_descent_attention: " + text in str(caught.value) and "\n  " in str(caught.value)


@pytest.mark.parametrize("solver", ["iterate", "exact"])
@pytest.mark.parametrize("level", [1, 2.5, 0.0])
def test_a_number_of_keys_is_a_tensor_that_holds_it(solver, level):
    q, k, v, _ = inputs(2, 2, 1, 5, 7, 3, 2)
    out = coor_descent_attention(q, k, v, level, solver=solver)
    assert_close(coor_descent_attention(q, k, v, torch.full((5,), float(level), dtype=torch.float64), solver=solver), out)
    for scores in (q[0, 0, 0], q[0, 0], q):
        y = coor_descent(scores, level, solver=solver)
        for same in (torch.tensor(float(level)), torch.full(scores.shape[:-1], float(level), dtype=torch.float64)):
            assert_close(coor_descent(scores, same, solver=solver), y)
