"""conv_attention and axial_attention against dense masks, and what they do not allocate."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import assert_close

from fnattn import ops, random, tree
from fnattn.ops import _picture
from fnattn.ops.conv_attention import KERNELS
from fnattn.testing import brute
from fnattn.testing.memory import peak_bytes

SIZES = [(4, 3), (5, 5), (1, 2), (0, 3), (3, 1)]  # text_len, image_size
PATTERNS = [("conv_attention", dict(kernel_size=k, dilation=d)) for k, d in ((1, 1), (3, 1), (3, 2), (5, 1))]
PATTERNS += [("axial_attention", dict(axis=axis)) for axis in (0, 1)]


def made(n, b=2, h=4, g=2, d=3, e=5, dtype=torch.float64):
    shapes = ((b, h, n, d), (b, g, n, d), (b, g, n, e))
    return tuple(random.normal(key, shape, dtype) for key, shape in zip(random.split(random.key(1), 3), shapes))


# Those that take such tensors here: Triton does under its interpreter only, which has tests of its own.
IMPLS = ["reference", *(kernel.name for kernel in KERNELS if kernel.why_not(*made(13)) is None)]


def lengths(text_len, image_size):
    full = text_len + image_size ** 2
    return sorted({0, 1, text_len, text_len + 1, text_len + image_size, full - 2, full} & set(range(full + 1)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "options"), PATTERNS, ids=str)
@pytest.mark.parametrize(("text_len", "image_size"), SIZES)
def test_it_equals_dense_attention_under_its_mask_at_every_length(name, options, text_len, image_size, impl):
    ours, dense = getattr(ops, name), getattr(brute, name)
    for n in lengths(text_len, image_size):
        q, k, v = made(n)
        mask = random.bernoulli(random.key(2), 0.6, (2, n))
        for given in (dict(), dict(mask=mask), dict(mask=mask, text_sees_all=True), dict(scale=0.7)):
            every = dict(options, text_len=text_len, image_size=image_size, **given)
            out = ours(q, k, v, **every, impl=impl)
            assert out.shape == (2, 4, n, 5)
            assert_close(out, dense(q, k, v, **every) if n else out)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "options"), PATTERNS, ids=str)
def test_gradients_equal_those_of_dense_attention_also_from_expanded_and_transposed_ones(name, options, impl):
    q, k, v = made(4 + 9 - 1)
    mask = random.bernoulli(random.key(2), 0.6, (2, 12))
    every = dict(options, text_len=4, image_size=3, mask=mask)
    for loss in (lambda out: out.sum(), lambda out: out.mT.contiguous().mT.square().sum(), lambda out: out[:, :, -1].sin().sum()):
        found = []
        for run in (functools.partial(getattr(ops, name), impl=impl), getattr(brute, name)):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            found.append(torch.autograd.grad(loss(run(*leaves, **every)), leaves))
        for a, b in zip(*found):
            assert_close(a, b)
        assert found[1][2].abs().max() > 0


@pytest.mark.parametrize(("name", "options"), PATTERNS, ids=str)
def test_working_through_few_lines_at_a_time_changes_nothing(name, options, monkeypatch):
    every = dict(options, text_len=4, image_size=5)
    q, k, v = made(4 + 23)
    whole = getattr(brute, name)(q, k, v, **every)
    for table, band in ((1, 1), (500, 7), (2000, 12), (10**6, 10**6)):
        monkeypatch.setattr(_picture, "TABLE", table)
        monkeypatch.setattr(_picture, "BAND", band)
        for impl in IMPLS:
            assert_close(getattr(ops, name)(q, k, v, **every, impl=impl), whole)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "options"), PATTERNS, ids=str)
def test_it_is_causal_to_the_bit(name, options, impl):
    every = dict(options, text_len=4, image_size=3, impl=impl)
    q, k, v = made(13)
    before = getattr(ops, name)(q, k, v, **every)
    for at in (0, 3, 4, 8, 12):
        changed = [torch.cat((x[:, :, :at], x[:, :, at:] + 1), 2) for x in (q, k, v)]
        after = getattr(ops, name)(*changed, **every)
        assert torch.equal(after[:, :, :at], before[:, :, :at])
        assert not torch.equal(after[:, :, at], before[:, :, at])


def test_neither_copies_of_keys_per_pixel_nor_a_dense_table_are_held():
    text_len, side, d = 16, 32, 64
    q, k, v = made(text_len + side ** 2, b=1, h=2, g=2, d=d, e=d, dtype=torch.float32)
    own = k.nbytes
    conv = peak_bytes(lambda *x: ops.conv_attention(*x, text_len=text_len, image_size=side, impl="reference"), q, k, v)
    assert conv < 20 * own  # upstream unfolds keys and values into 2 * 25
    table = q.shape[1] * q.shape[2] ** 2 * 4
    for axis in (0, 1):
        axial = peak_bytes(lambda *x, axis=axis: ops.axial_attention(*x, text_len=text_len, image_size=side, axis=axis,
                                                                     impl="reference"), q, k, v)
        assert axial < table / 2
    fused = peak_bytes(lambda *x: ops.conv_attention(*x, text_len=text_len, image_size=side, impl="bands"), q, k, v)
    assert fused < 12 * own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    for name, options in (PATTERNS[1], PATTERNS[-1]):
        every = dict(options, text_len=4, image_size=3)
        q, k, v = (x.to(dtype) for x in made(13))
        out = getattr(ops, name)(q, k, v, **every)
        assert out.dtype == dtype
        assert_close(out, getattr(ops, name)(q.double(), k.double(), v.double(), **every), dtype)


def test_large_scores_overflow_nothing():
    q, k, v = (x * 1e3 for x in made(13, dtype=torch.float32))
    for name, options in (PATTERNS[1], PATTERNS[-1]):
        every = dict(options, text_len=4, image_size=3)
        grads = tree.grad(lambda x, every=every, name=name: getattr(ops, name)(*x, **every).sum())((q, k, v))
        assert all(x.isfinite().all() for x in grads)


ERRORS = [
    (dict(), dict(text_len=3), ValueError, r"expected at most 12 positions = text_len 3 \+ image_size\^2 9; got 13"),
    (dict(), dict(text_len=-1), ValueError, "text_len must be at least 0; got -1"),
    (dict(), dict(image_size=0), ValueError, "image_size must be at least 1; got 0"),
    (dict(), dict(image_size=2.5), TypeError, "image_size must be an int; got 2.5"),
    (dict(), dict(text_len=float("nan")), TypeError, "text_len must be an int; got nan"),
    (dict(), dict(mask=torch.ones(2, 12, dtype=torch.bool)), ValueError, r"mask must be \[batch, seq\] = \[2, 13\]; got \[2, 12\]"),
    (dict(), dict(mask=torch.ones(2, 13)), TypeError, "mask must be a bool tensor"),
    (dict(h=3), dict(), ValueError, "h a multiple of g"),
    (dict(), dict(impl="cuda"), ValueError, "impl must be one of 'auto', 'reference'"),
]


@pytest.mark.parametrize("name", ["conv_attention", "axial_attention"])
@pytest.mark.parametrize(("shapes", "options", "kind", "text"), ERRORS, ids=lambda v: None)
def test_mistakes_are_named(name, shapes, options, kind, text):
    with pytest.raises(kind, match=f"{name}: .*{text}.*\n  "):
        getattr(ops, name)(*made(13, **shapes), **{"text_len": 4, "image_size": 3, **options})


def test_wrong_windows_and_axes_are_named():
    with pytest.raises(ValueError, match="kernel_size must be at least 1; got 0"):
        ops.conv_attention(*made(13), text_len=4, image_size=3, kernel_size=0)
    with pytest.raises(TypeError, match=r"dilation must be an int; got 1.5"):
        ops.conv_attention(*made(13), text_len=4, image_size=3, dilation=1.5)
    with pytest.raises(ValueError, match=r"axis must be 0 \(along a row\) or 1 \(along a column\); got 2"):
        ops.axial_attention(*made(13), text_len=4, image_size=3, axis=2)


def test_a_window_wider_than_the_picture_costs_no_more_than_the_picture():
    q = made(13)
    for far in (dict(dilation=10 ** 9), dict(kernel_size=10 ** 9)):
        near = {name: 3 for name in far}
        for impl in ("auto", "reference"):
            options = dict(text_len=4, image_size=3, kernel_size=3, impl=impl)
            out = ops.conv_attention(*q, **{**options, **far})
            assert_close(out, ops.conv_attention(*q, **{**options, **near, "impl": "reference"}))
