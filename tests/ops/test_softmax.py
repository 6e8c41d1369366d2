"""softmax_attention against an average taken row by row, in value and every derivative, for both implementations."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.native import softmax as native
from softmax_cases import CASES, F32, F64, attending, brute, directions, make
from torch.autograd import gradcheck, gradgradcheck

from fnattn.ops import softmax
from fnattn.ops.softmax import softmax_attention

IMPLS = ["reference", "native", "sdpa"]


def all_of(fn, tensors):
    """The value, the gradient of a random weighting, and the tangents in one direction each and in all at once."""
    out, pull = torch.func.vjp(fn, *tensors)
    found = [out, *pull(directions([out], 7)[0])]
    moves = directions(tensors)
    for only in (0, 1, 2, None):
        tangent = tuple(t if only in (i, None) else torch.zeros_like(t) for i, t in enumerate(moves))
        found.append(torch.func.jvp(fn, tensors, tangent)[1])
    return found


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_tangents_equal_those_of_the_average_row_by_row(case, impl, dtype):
    tensors, options = make(case, dtype)
    wide = tuple(t.double() for t in tensors)
    expected = all_of(lambda *a: brute(*a, **options), wide) if case != "several tiles" else \
        all_of(attending("reference", options), wide)
    for ours, theirs in zip(all_of(attending(impl, options), tensors), expected):
        assert ours.dtype == dtype and theirs.abs().max() > 0
        assert_close(ours, theirs)


@pytest.mark.parametrize("case", ["all keys", "queries before the first key", "grouped heads, narrow values",
                                  "mask of pairs, causal"])
def test_native_derivatives_equal_finite_differences_in_both_modes_and_second_order(case):
    tensors, options = make(case)

    fn = attending("native", options)
    tensors = tuple(t.requires_grad_() for t in tensors)
    assert gradcheck(fn, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, fast_mode=True)
    assert gradgradcheck(fn, tensors, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_hessian_vector_products_agree_between_modes_and_are_not_zero(impl):
    tensors, options = make("mask of pairs, causal")
    moves = directions(tensors)

    def loss(*a):
        return softmax_attention(*a, **options, impl=impl).square().sum()

    def slope(*a):
        return torch.func.grad(loss, (0, 1, 2))(*a)

    forward = torch.func.jvp(slope, tensors, moves)[1]
    reverse = torch.func.vjp(slope, *tensors)[1](moves)
    crossed = torch.func.grad(lambda *a: torch.func.jvp(loss, a, moves)[1], (0, 1, 2))(*tensors)
    for f, r, c in zip(forward, reverse, crossed):
        assert f.abs().max() > 0
        assert_close(f, r)
        assert_close(f, c)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_that_sees_nothing_is_zero_with_finite_derivatives(impl, causal):
    (q, k, v), _ = make("causal", F32)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[0] = False
    mask[1, 0, 3] = False
    found = all_of(lambda *a: softmax_attention(*a, mask=mask, causal=causal, impl=impl), (q, 3 * k, v))
    assert all(t.isfinite().all() for t in found)
    for t in (found[0], found[1], *found[4:]):  # the value, the gradient in q, the tangents
        assert (t[0] == 0).all() and (t[1, :, 3] == 0).all() and (t[1, :, 4] != 0).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shapes", [((2, 3, 5, 7), (2, 3, 0, 7), (2, 3, 0, 5)), ((2, 3, 0, 7), (2, 3, 5, 7), (2, 3, 5, 5)),
                                    ((0, 3, 5, 7), (0, 1, 5, 7), (0, 1, 5, 5)),
                                    ((2, 3, 5, 7), (2, 3, 5, 7), (2, 3, 5, 0))], ids=str)
def test_axes_may_have_length_zero(impl, shapes):
    tensors = tuple(torch.randn(s, dtype=F64) for s in shapes)
    for found in all_of(lambda *a: softmax_attention(*a, causal=True, offset=1, impl=impl), tensors):
        assert (found == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_without_channels_all_visible_keys_count_alike(impl):
    v = torch.randn(2, 3, 5, 5, dtype=F64)
    out = softmax_attention(v[..., :0], v[..., :0], v, causal=True, impl=impl)
    assert_close(out, v.cumsum(2) / torch.arange(1, 6, dtype=F64)[:, None])


@pytest.mark.parametrize("case", CASES)
def test_memory_that_was_never_written_is_never_read(case, poisoned_empty):
    tensors, options = make(case)
    found = all_of(attending("native", options), tensors)
    expected = all_of(attending("reference", options), tensors)
    for ours, theirs in zip(found, expected):
        assert_close(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_of_inputs_and_gradients_do_not_matter(impl):
    (q, k, v), _ = make("causal")
    whole = torch.func.grad(lambda *a: softmax_attention(*a, causal=True, impl=impl).sum(), (0, 1, 2))(q, k, v)
    for layout in ((0, 2, 1, 3), (3, 2, 1, 0), (2, 3, 0, 1)):
        back = [layout.index(i) for i in range(4)]
        views = [t.permute(layout).contiguous().permute(back) for t in (q, k, v)]
        parts = torch.func.grad(lambda *a: softmax_attention(*a, causal=True, impl=impl).sum(), (0, 1, 2))(*views)
        for ours, theirs in zip(parts, whole):  # .sum(): the gradient that comes in has strides of zero
            assert_close(ours, theirs)
    shared = [t[:1, :1, :1, :1].expand(t.shape) for t in (q, k, v)]
    found, expected = (torch.func.vjp(f, *shared)[1](shared[2]) for f in (
        lambda *a: softmax_attention(*a, causal=True, impl=impl), lambda *a: brute(*a, causal=True)))
    for ours, theirs in zip(found, expected):
        assert_close(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_heads_that_lie_side_by_side_are_not_taken_for_channels_of_a_picture(impl):
    """A few queries whose values are wider: torch pads such queries, and keeps the order of their memory."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, *shape, dtype=F64) for shape in ((3, 24, 6), (3, 100, 24), (3, 100, 33)))
    q = q.movedim(-1, 1)
    assert q.is_contiguous(memory_format=torch.channels_last)
    expected = softmax_attention(q.contiguous(), k, v, impl="reference")
    assert_close(softmax_attention(q, k, v, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_offset_may_be_a_number_a_tensor_or_differ_along_a_mapped_axis(impl):
    (q, k, v), _ = make("causal, aligned to the end")
    offsets = torch.tensor([-2, 0, 3, 6, 20])
    expected = torch.stack([brute(q, k, v, causal=True, offset=int(o)) for o in offsets])
    for given in ([int(o) for o in offsets], list(offsets)):
        assert_close(torch.stack([softmax_attention(q, k, v, causal=True, offset=o, impl=impl) for o in given]), expected)
    mapped = torch.vmap(lambda o: softmax_attention(q, k, v, causal=True, offset=o, impl=impl))
    assert_close(mapped(offsets), expected)
    slopes = torch.vmap(torch.func.grad(lambda k, o: softmax_attention(q, k, v, causal=True, offset=o, impl=impl).sin().sum()),
                        (None, 0))(k, offsets)
    one = torch.func.grad(lambda k: brute(q, k, v, causal=True, offset=3).sin().sum())(k)
    assert_close(slopes[2], one)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (2, 1, 1, 7), (2, 3, 5, 7)])
def test_mapping_over_inputs_or_masks_equals_a_loop(impl, shape):
    stack = [torch.stack(t) for t in zip(*(make("all keys", seed=s)[0] for s in range(3)))]
    masks = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) > 0.3

    def fn(q, k, v, mask):
        return torch.func.grad(lambda q: softmax_attention(q, k, v, mask=mask, impl=impl).square().sum())(q)

    for dims in ((0, 0, 0, None), (0, None, 0, 0), (None, None, None, 0)):
        args = [t if d == 0 else t[0] for t, d in zip((*stack, masks), dims)]
        loop = torch.stack([fn(*(a[i] if d == 0 else a for a, d in zip(args, dims))) for i in range(3)])
        assert_close(torch.vmap(fn, dims)(*args), loop)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_twice_plain_torch(impl, dtype):
    (q, k, v), _ = make("several tiles", dtype)
    exact = all_of(lambda *a: softmax_attention(*a, causal=True, impl="reference"), tuple(t.double() for t in (q, k, v)))

    def plain(q, k, v):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    ours = all_of(lambda *a: softmax_attention(*a, causal=True, impl=impl), (q, k, v))
    theirs = all_of(plain, (q, k, v))
    for a, b, e in zip(ours, theirs, exact):
        assert a.dtype == dtype
        assert (a.double() - e).norm() <= 2 * (b.double() - e).norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_beyond_the_range_of_exp_are_safe(impl):
    (q, k, v), _ = make("causal", F32)
    q = q * 1e4
    found = all_of(lambda *a: softmax_attention(*a, causal=True, impl=impl), (q, k, v))
    assert all(t.isfinite().all() for t in found)
    best = (q.double() @ k.double().transpose(-1, -2)).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    assert_close(found[0], v.gather(2, best.argmax(-1, keepdim=True).expand_as(v)))


def test_the_reference_in_blocks_of_queries_equals_one_table(monkeypatch):
    for case in ("causal, aligned to the end", "mask of keys", "mask of everything, causal"):
        tensors, options = make(case)
        whole = all_of(attending("reference", options), tensors)
        with monkeypatch.context() as patch:
            patch.setattr(softmax, "TABLE", 2 * tensors[0].shape[0] * tensors[0].shape[1] * tensors[1].shape[2])
            for ours, theirs in zip(all_of(attending("reference", options), tensors), whole):
                assert_close(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_without_a_compiler_the_result_is_the_same(case, monkeypatch, poisoned_empty):
    tensors, options = make(case)
    expected = all_of(attending("reference", options), tensors)
    monkeypatch.setattr(native, "why_not", lambda source: "no compiler")
    monkeypatch.setattr(native.aten, "BLOCK", 1 << 9)
    for ours, theirs in zip(all_of(attending("native", options), tensors), expected):
        assert_close(ours, theirs)


def test_results_are_the_same_to_the_bit_for_any_number_of_threads():
    tensors, options = make("several tiles", F32)
    tensors = tuple(t.repeat(3, 1, 1, 4) for t in tensors)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(all_of(attending("native", options), tensors))
    finally:
        torch.set_num_threads(1)
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0]))


def test_autocast_does_not_lower_the_precision():
    (q, k, v), _ = make("causal", F32)
    exact = softmax_attention(q.double(), k.double(), v.double(), causal=True)
    for impl in IMPLS:
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(softmax_attention(q, k, v, causal=True, impl=impl), exact, F32)


def test_dtypes_may_differ_and_the_result_has_that_of_the_values():
    (q, k, v), _ = make("causal")
    out = softmax_attention(q.float(), k, v.bfloat16(), causal=True)
    assert out.dtype == torch.bfloat16
    assert_close(out, brute(q, k, v, causal=True), torch.bfloat16)


def test_the_weights_helper_alone_is_a_safe_softmax():
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=F64, requires_grad=True)
    allowed = torch.tensor([[True, False, True], [False, False, False]])
    p = softmax.weights(scores, allowed)
    assert_close(p[0], torch.tensor([1 / (1 + torch.e ** 2), 0, 1 / (1 + torch.e ** -2)], dtype=F64))
    assert (p[1] == 0).all()
    assert gradcheck(lambda s: softmax.weights(s, allowed), scores, check_forward_ad=True)
    assert gradgradcheck(lambda s: softmax.weights(s, allowed), scores)


# ------------------------------------------------------------------------------------------------ errors, and their remedies


def qkv():
    return make("all keys")[0]


ERRORS = [
    (dict(mask=torch.ones(5, 7)), TypeError, "mask must be a bool tensor, True = may be attended; got torch.float32",
     dict(mask=torch.ones(5, 7).bool())),
    (dict(mask=torch.ones(2, 7, dtype=torch.bool)), ValueError,
     r"mask must be broadcastable to \[b, h, n, m\] = \[2, 3, 5, 7\]; got \[2, 7\]",
     dict(mask=torch.ones(2, 7, dtype=torch.bool)[:, None, None, :])),
    (dict(offset=3), ValueError, "got offset with causal=False", dict(offset=3, causal=True)),
    (dict(offset=3.0, causal=True), TypeError, "offset must be an int or a 0-d integer tensor; got float",
     dict(offset=3, causal=True)),
    (dict(offset=torch.tensor([3]), causal=True), TypeError, r"got torch.int64 of shape \[1\]",
     dict(offset=torch.tensor(3), causal=True)),
    (dict(impl="fused"), ValueError, "impl must be one of 'auto', 'reference', 'native', 'sdpa', 'triton'; got 'fused'", dict(impl="auto")),
]


@pytest.mark.parametrize("options, error, text, remedy", ERRORS, ids=[e[2][:30] for e in ERRORS])
def test_a_mistake_is_named_and_its_remedy_works(options, error, text, remedy):
    with pytest.raises(error, match=text):
        softmax_attention(*qkv(), **options)
    softmax_attention(*qkv(), **remedy)


def test_a_named_kernel_that_cannot_serve_is_refused_with_the_reason():
    q, k, v = qkv()
    with pytest.raises(KernelUnavailable, match="needs CUDA tensors, got cpu"):
        softmax_attention(q, k, v, impl="triton")
    assert softmax_attention(q, k, v).shape == (2, 3, 5, 3)


@pytest.mark.parametrize("impl", ["auto", "sdpa"])
@pytest.mark.parametrize("scale", [0.0, -1.0])
@pytest.mark.parametrize("n, offset", [(4, 0), (64, 0), (4, 60)])
def test_scales_that_are_not_positive(n, offset, scale, impl):
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, count, 4, dtype=torch.float64, generator=source) for count in (n, 64, 64))
    found, truth = [], []
    for which, results in ((impl, found), ("reference", truth)):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = softmax_attention(*leaves, causal=True, offset=offset, scale=scale, impl=which)
        results += [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]
    torch.testing.assert_close(found, truth)
