"""Taylor attention: plain torch, the C kernel and a dense table of weights agree, in values and in every derivative."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.native import build
from fnattn_kernels.native import taylor as native
from taylor_dense import dense, earlier, inputs, weights_of, with_gradients

from fnattn.ops.taylor import reference, taylor
from fnattn.ops.taylor.reference import features, gradients
from fnattn.testing import brute

REASON = build.why_not("taylor")
IMPLS = ["reference", "auto", pytest.param("native", marks=pytest.mark.skipif(REASON is not None, reason=str(REASON)))]
# b, h, g, n, d, e: prime sizes, one position, one chunk more or less, grouped heads, widths beside and on whole vectors
SIZES = [(2, 3, 1, 1, 5, 7), (1, 2, 2, 63, 16, 16), (1, 4, 2, 64, 3, 17), (2, 2, 1, 65, 17, 16), (1, 2, 2, 131, 16, 64),
         (1, 1, 1, 97, 32, 33), (1, 2, 2, 37, 1, 1), (1, 3, 3, 29, 2, 3), (1, 1, 1, 43, 65, 5)]


def swapped(fn, args, at, x):
    """fn of args with x in place `at`."""
    return fn(*args[:at], x, *args[at + 1:])


def slope(outs):
    return sum((o + 0.3).sin().sum() for o in outs)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients_are_those_of_the_dense_table(impl, size, causal):
    b, _, g, n, d, e = size
    for kind, past in ((None, False), (None, True), ("mask", False), ("weights", True)):
        args = (*inputs(*size), weights_of(kind, b, n), earlier(b, g, d, e) if past else None)
        actual = with_gradients(lambda q, k, v, c, s: taylor(q, k, v, keep=c, sums=s, causal=causal, impl=impl), args)
        expected = with_gradients(lambda q, k, v, c, s: dense(q, k, v, c, s, causal), args)
        for a, x in zip(actual, expected):
            assert_close(a, x)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_float32_is_near_the_dense_table_in_float64(impl, size):
    exact = inputs(*size)
    actual = with_gradients(lambda q, k, v: taylor(q, k, v, impl=impl), [t.float() for t in exact])
    expected = with_gradients(dense, exact)
    for a, x in zip(actual, expected):
        assert a.dtype == torch.float32
        assert (a - x).abs().max() <= 1e-5 * max(x.abs().max().item(), 1.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_other_keys_than_queries_need_no_equal_length(impl):
    args = inputs(2, 4, 2, 41, 7, 5, m=73)
    actual = with_gradients(lambda q, k, v: taylor(q, k, v, causal=False, scale=0.7, impl=impl), args)
    for a, x in zip(actual, with_gradients(lambda q, k, v: dense(q, k, v, causal=False, scale=0.7), args)):
        assert_close(a, x)


@pytest.mark.parametrize("impl", IMPLS)
def test_split_anywhere_with_carried_sums_equals_one_pass(impl):
    q, k, v = inputs(2, 4, 2, 101, 7, 5)
    whole, total = taylor(q, k, v, impl=impl)
    for cuts in ([1] * 3 + [98], [64, 37], [33, 1, 67], [0, 101], [32, 32, 37]):
        outs, sums = [], None
        for q_c, k_c, v_c in zip(*(t.split(cuts, 2) for t in (q, k, v))):
            out, sums = taylor(q_c, k_c, v_c, sums=sums, impl=impl)
            outs.append(out)
        assert_close(torch.cat(outs, 2), whole)
        assert_close(sums, total)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_flow_through_carried_sums(impl):
    args = inputs(1, 2, 1, 71, 5, 3)

    def pieces(q, k, v):
        sums, outs = None, []
        for q_c, k_c, v_c in zip(*(t.split([1, 33, 36, 1], 2) for t in (q, k, v))):
            out, sums = taylor(q_c, k_c, v_c, sums=sums, impl=impl)
            outs.append(out)
        return torch.cat(outs, 2), sums

    for a, x in zip(with_gradients(pieces, args), with_gradients(dense, args)):
        assert_close(a, x)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_is_the_removal_of_keys_whatever_they_hold(impl, causal):
    q, k, v = inputs(1, 2, 1, 67, 5, 3)
    keep = weights_of("mask", 1, 67)
    keep[:, :3] = False
    where = keep[0].nonzero().squeeze(1)
    dirty = [torch.where(keep[:, None, :, None], t, float("nan")) for t in (k, v)]
    actual = with_gradients(lambda *a: taylor(*a, keep=keep, causal=causal, impl=impl), (q, *dirty))
    if causal:
        out, sums = taylor(q[:, :, where], k[:, :, where], v[:, :, where], impl=impl)
        assert_close(actual[0][:, :, where], out)
        assert actual[0][:, :, :3].eq(0).all()
    else:
        out, sums = taylor(q, k[:, :, where], v[:, :, where], causal=False, impl=impl)
        assert_close(actual[0], out)
    assert_close(actual[1], sums)
    assert all(t.isfinite().all() for t in actual)
    assert actual[3][:, :, ~keep[0]].eq(0).all() and actual[4][:, :, ~keep[0]].eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sequence_without_a_visible_key_gives_zeros_and_finite_gradients(impl):
    q, k, v = inputs(2, 2, 2, 37, 5, 3)
    keep = torch.zeros(2, 37, dtype=torch.bool)
    for causal in (True, False):
        call = functools.partial(taylor, keep=keep, causal=causal, impl=impl)
        out, sums, *grads = with_gradients(call, (q, k, v))
        assert out.eq(0).all() and sums.eq(0).all()
        assert all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(2, 2, 1, 0, 3, 4), (0, 2, 2, 5, 3, 4), (2, 0, 0, 5, 3, 4), (2, 0, 2, 5, 3, 4), (1, 2, 1, 5, 3, 0)],
                         ids=str)
def test_empty_sizes_give_empty_results(impl, shape):
    b, h, g, n, d, e = shape
    for causal in (True, False):
        out, sums, *grads = with_gradients(functools.partial(taylor, causal=causal, impl=impl), inputs(*shape))
        assert out.shape == (b, h, n, e) and sums.shape == (b, g, 10, e + 1)
        assert all(t.isfinite().all() for t in (out, sums, *grads))
        truths = brute.taylor(*inputs(*shape), causal=causal)
        for found, truth in zip((out, sums), truths, strict=True):
            assert_close(found, truth)


@pytest.mark.parametrize("impl", IMPLS)
def test_later_positions_do_not_touch_earlier_outputs(impl):
    q, k, v = inputs(1, 2, 2, 79, 16, 16, torch.float32)
    before, _ = taylor(q, k, v, impl=impl)
    for t in (0, 31, 32, 65, 78):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t] += 1
        after, _ = taylor(*changed, impl=impl)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t:], before[:, :, t:])


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl, poisoned_empty):
    q, k, v = inputs(2, 2, 2, 35, 5, 7)
    plain = with_gradients(lambda *a: taylor(*a, impl=impl), (q, k, v))
    turned = with_gradients(lambda *a: taylor(*(t.transpose(1, 2) for t in a), impl=impl),
                            [t.transpose(1, 2).contiguous() for t in (q, k, v)])
    for a, x in zip(turned[:2], plain[:2]):
        assert_close(a, x)
    for a, x in zip(turned[2:], plain[2:]):
        assert_close(a.transpose(1, 2), x)
    # the gradient of a sum is expanded from one number, and one head's values expanded to all have stride 0
    sums = [torch.autograd.grad(taylor(*leaves, impl=impl)[0].sum(), leaves)
            for leaves in [[t.clone().requires_grad_() for t in (q, k, v)]]][0]
    ones = [torch.autograd.grad(dense(*leaves)[0].sum(), leaves)
            for leaves in [[t.clone().requires_grad_() for t in (q, k, v)]]][0]
    for a, x in zip(sums, ones):
        assert_close(a, x)
    wide = v[:, :1].expand(-1, 2, -1, -1)
    assert_close(taylor(q, k, wide, impl=impl)[0], dense(q, k, wide)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_several_threads_give_the_same_bits(impl):
    args = inputs(2, 3, 3, 131, 16, 16, torch.float32)
    run = lambda: with_gradients(lambda *a: taylor(*a, impl=impl), args)  # noqa: E731
    single = run()
    torch.set_num_threads(2)
    try:
        double = run()
    finally:
        torch.set_num_threads(1)
    if impl != "reference":
        assert all(torch.equal(a, b) for a, b in zip(single, double))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_low_precision_inputs_are_summed_in_float32(impl, dtype):
    args = inputs(1, 2, 1, 83, 16, 16, dtype)
    out, sums, *grads = with_gradients(lambda *a: taylor(*a, impl=impl), args)
    exact = with_gradients(dense, [a.double() for a in args])
    assert out.dtype == dtype and sums.dtype == torch.float32 and all(g.dtype == dtype for g in grads)
    for a, x in zip((out, *grads), (exact[0], *exact[2:])):  # one rounding of each result
        assert (a - x).abs().max() <= 2 * torch.finfo(dtype).eps * x.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_first_and_second_derivatives_pass_numerical_checks(impl):
    q, k, v = (t.requires_grad_() for t in inputs(1, 2, 1, 3, 2, 2))
    sums = earlier(1, 1, 2, 2).requires_grad_()
    keep = torch.tensor([[0.3, 1.7, 0.9]], dtype=torch.float64, requires_grad=True)
    run = lambda q, k, v, s, c: taylor(q, k, v, sums=s, keep=c, impl=impl)  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, k, v, sums, keep), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (q, k, v, sums, keep), check_fwd_over_rev=True)


def hessian_products(fn, args, along):
    """Hessian times `along`, forward over reverse and reverse over reverse."""
    gradient = torch.func.grad(lambda *a: slope(fn(*a)), tuple(range(len(args))))
    return torch.func.jvp(gradient, args, along)[1] + torch.func.vjp(gradient, *args)[1](along)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("kind", [None, "mask", "weights", "sums", "mask and sums"])
@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives_are_right_across_chunks(impl, kind, causal):
    keep = None if kind in (None, "sums") else weights_of(kind.split()[0], 1, 71)
    args, last = inputs(1, 4, 2, 71, 17, 3), ()
    if kind == "weights":
        last = (keep,)
    elif kind is not None and "sums" in kind:
        last = (earlier(1, 2, 17, 3),)

    def call(fn, **options):
        def of(q, k, v, x=None):
            weights, sums = (x, None) if kind == "weights" else (keep, x)
            return fn(q, k, v, keep=weights, sums=sums, causal=causal, **options)
        return of

    args += last
    along = tuple(a.cos() for a in args)
    for a, x in zip(hessian_products(call(taylor, impl=impl), args, along), hessian_products(call(dense), args, along)):
        assert a.abs().max() > 1e-6
        assert_close(a, x)


@pytest.mark.parametrize("impl", IMPLS)
def test_tangents_are_finite_differences_and_not_zero(impl):
    args, direction, step = inputs(1, 2, 2, 67, 5, 3), inputs(1, 2, 2, 67, 5, 3, seed=15), 1e-6
    fn = lambda *a: taylor(*a, impl=impl)  # noqa: E731
    _, tangents = torch.func.jvp(fn, args, direction)
    up, down = (fn(*(a + s * t for a, t in zip(args, direction))) for s in (step, -step))
    for tangent, u, w in zip(tangents, up, down):
        assert tangent.abs().max() > 0.1
        torch.testing.assert_close(tangent, (u - w) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 5, 64, 97])
def test_the_length_of_a_chunk_does_not_matter(chunk):
    q, k, v = inputs(1, 4, 2, 31, 5, 3)
    keep, sums = weights_of("weights", 1, 31), earlier(1, 2, 5, 3)
    given = inputs(1, 4, 2, 31, 5, 3, seed=17)[0].new_ones(1, 4, 31, 3).cumsum(2)
    options = dict(scale=0.6, chunk=chunk)
    for causal in (True, False):
        out, den, total = reference(q, k, v, keep, sums, causal=causal, **options)
        want, want_total = dense(q, k, v, keep, sums, causal, 0.6)
        assert_close(out, want)
        assert_close(total, want_total)
        leaves = [t.clone().requires_grad_() for t in (q, k, v, keep, sums)]
        loss = (dense(*leaves, causal, 0.6)[0] * given).sum()
        grads = gradients(q, k, v, keep, sums, out, den, given, None, causal=causal, **options)
        for a, x in zip(grads, torch.autograd.grad(loss, leaves)):
            assert_close(a, x)


def test_features_multiply_to_the_polynomial():
    x, y = torch.randn(2, 7, 5, dtype=torch.float64)
    s = (x * y).sum(-1)
    assert_close((features(x, False) * features(y, True)).sum(-1), 1 + s + s**2 / 2)


@pytest.mark.parametrize("arguments, words", [
    (dict(k=torch.ones(1, 2, 4, 3)), "as many keys as queries"),
    (dict(keep=torch.ones(1, 5, dtype=torch.bool)), r"keep must be \[batch, keys\]"),
    (dict(sums=torch.ones(1, 2, 9, 3)), "sums must be"),
    (dict(q=torch.ones(1, 2, 3)), "q must be"),
    (dict(impl="fast"), "impl must be"),
])
def test_wrong_shapes_are_named(arguments, words):
    given = dict(q=torch.ones(1, 2, 3, 3), k=torch.ones(1, 2, 3, 3), v=torch.ones(1, 2, 3, 2)) | arguments
    if "k" in arguments:
        given["v"] = torch.ones(1, 2, 4, 2)
    with pytest.raises(ValueError, match=words):
        taylor(**given)


def test_wrong_types_are_named():
    q, k, v = inputs(1, 1, 1, 3, 2, 2)
    with pytest.raises(TypeError, match="keep must be a bool"):
        taylor(q, k, v, keep=torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="sums must be a float32 or float64"):
        taylor(q, k, v, sums=torch.ones(1, 1, 6, 3, dtype=torch.bfloat16))


def test_a_named_kernel_refuses_what_it_cannot_serve():
    q = torch.ones(1, 1, 3, 2)
    with pytest.raises(KernelUnavailable, match="needs CUDA tensors, got cpu"):
        taylor(q, q, q, impl="triton")
    assert taylor(q, q, q)[0].shape == (1, 1, 3, 2)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("kind", [None, "mask", "weights"])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_tangent_of_each_argument_alone_is_right(impl, kind, causal):
    b, h, g, n, d, e = 1, 4, 2, 71, 17, 5
    keep, past = weights_of(kind, b, n), earlier(b, g, d, e)
    args = [*inputs(b, h, g, n, d, e), past] + ([keep] if kind == "weights" else [])
    fixed = keep if kind == "mask" else None

    def call(fn, **options):
        return lambda q, k, v, s, c=fixed: fn(q, k, v, keep=c, sums=s, causal=causal, **options)

    for moved in range(len(args)):
        def along(fn, at=moved):
            part = functools.partial(swapped, fn, args, at)
            return torch.func.jvp(part, (args[at],), (args[at].cos(),))[1]

        for a, x in zip(along(call(taylor, impl=impl)), along(call(dense))):
            assert_close(a, x)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("past", [True, False], ids=["sums", "no sums"])
def test_what_is_made_in_one_pass_is_what_two_passes_make(past, masked, causal):
    b, h, g, n, d, e = 1, 4, 2, 71, 17, 5
    q, k, v = inputs(b, h, g, n, d, e)
    keep, sums = weights_of("mask", b, n).to(q.dtype) if masked else None, earlier(b, g, d, e) if past else None
    options = masked, causal, 0.4, 1e-5
    everything = [None if t is None else t.cos() for t in (q, k, v, sums)]
    for some in range(5):  # all move, then each alone
        tq, tk, tv, ts = (t if some in (0, i) else None for i, t in enumerate(everything, 1))
        if some == 4 and not past:
            continue
        outs = native.forward(q, k, v, keep, sums, *options)
        moved = native.tangent(q, k, v, keep, sums, *outs[:2], tq, tk, tv, None, ts, *options)
        for a, x in zip(native.both(q, k, v, keep, sums, tq, tk, tv, None, ts, *options), (*outs, *moved)):
            assert_close(a, x)
        args = q, k, v, keep, sums, *outs[:2], outs[0].sin(), outs[2].sin()
        moves = *moved[:2], tq, tk, tv, ts, outs[0].cos(), None
        first, second = native.backward(*args, *options), native.second(*args, *moves, *options)
        for a, x in zip(native.backward_both(*args, *moves, *options), (*first[:3], first[4], *second)):
            assert_close(a, x)
