"""conv_attention, axial_attention and block_sparse_attention by Triton, interpreted."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import assert_close
from fnattn_kernels import flex
from fnattn_kernels.contracts import KernelUnavailable
from interpreted_checks import check

from fnattn import ops, random
from fnattn.ops import _segment_kernel
from fnattn.ops.axial_attention import KERNELS as AXIAL
from fnattn.ops.block_sparse import KERNELS as BLOCKS
from fnattn.ops.conv_attention import KERNELS as CONV
from fnattn.testing import brute

F64 = torch.float64


@pytest.mark.parametrize("name", ["conv_attention, dilated, one key head, mask", "axial_attention, columns, one key head, mask"])
def test_transforms_are_right(name):
    check(name, "triton", ["f", "vmap(grad(f))"])


def layout(heads, blocks, seed=3):
    """Random blocks; one row of them is empty."""
    made = random.bernoulli(random.key(seed), 0.5, (heads, blocks, blocks))
    made[:, blocks // 2] = False
    return made


# name -> operator, (b, h, g, n, d, e), options; "some" is a random mask
CASES = {
    "window, the last row begun": ("conv_attention", (1, 2, 1, 37, 3, 5), dict(text_len=19, image_size=7, kernel_size=3, mask="some")),
    "dilated window": ("conv_attention", (1, 1, 1, 31, 17, 2), dict(text_len=7, image_size=6, kernel_size=2, dilation=2, mask="some",
                                                                    text_sees_all=True)),
    "window beyond the picture": ("conv_attention", (1, 1, 1, 19, 3, 2), dict(text_len=3, image_size=4, kernel_size=7, dilation=3)),
    "no text": ("conv_attention", (1, 1, 1, 25, 3, 3), dict(text_len=0, image_size=5, kernel_size=3, mask="some")),
    "text alone": ("conv_attention", (1, 2, 1, 19, 3, 3), dict(text_len=37, image_size=5, mask="some")),
    "rows, one begun": ("axial_attention", (1, 1, 1, 43, 3, 5), dict(text_len=5, image_size=19, axis=0, mask="some", text_sees_all=True)),
    "columns, the last row begun": ("axial_attention", (1, 1, 1, 40, 3, 2), dict(text_len=17, image_size=5, axis=1, mask="some")),
    "layout": ("block_sparse_attention", (2, 1, 1, 37, 5, 3), dict(layout=layout(1, 3), block=16, causal=True)),
    "layout per head, both directions": ("block_sparse_attention", (1, 2, 2, 29, 3, 5), dict(layout=layout(2, 8), block=5, keep="some")),
    "blocks longer than tiles": ("block_sparse_attention", (1, 1, 1, 45, 3, 2), dict(layout=layout(1, 3), block=23, causal=True)),
    "layout of single positions": ("block_sparse_attention", (1, 2, 2, 19, 2, 2), dict(layout=layout(2, 23), block=1, causal=True)),
}


def make(case, dtype=F64, seed=0):
    """q, k, v, the operator's name and options."""
    name, (b, h, g, n, d, e), options = CASES[case]
    keys = random.split(random.key(seed), 4)
    tensors = tuple(random.normal(key, shape, dtype) for key, shape in zip(keys, ((b, h, n, d), (b, g, n, d), (b, g, n, e))))
    options = dict(options)
    for kind in {"mask", "keep"} & set(options):
        options[kind] = random.bernoulli(keys[3], 0.6, (b, n))
        options[kind][:, 0] = False  # the first position sees nothing, or only itself
    return tensors, name, options


def attending(name, options, impl="triton"):
    return lambda *a: getattr(ops, name)(*a, **options, impl=impl)


def dense(name, options):
    """The same with a table of all pairs, by what the operator means."""
    if name != "block_sparse_attention":
        return lambda *a: getattr(brute, name)(*a, **options)

    def run(q, k, v):
        at = torch.arange(q.shape[2]) // options["block"]
        mask = options["layout"][:, at][:, :, at][None]
        mask = mask & options["keep"][:, None, None] if "keep" in options else mask
        return brute.softmax_attention(q, k, v, mask=mask, causal=options.get("causal", False))

    return run


def directions(tensors, seed=5):
    keys = random.split(random.key(seed), len(tensors))
    return tuple(random.normal(key, t.shape, F64).to(t.dtype) for key, t in zip(keys, tensors))


def all_of(fn, tensors, second=False):
    """The value, the tangent in one direction, the gradient of a loss, and if asked the gradient's tangent."""
    moves = directions(tensors)
    out, tangent = torch.func.jvp(fn, tensors, moves)
    weight = directions([out], 7)[0]
    slope = torch.func.grad(lambda *a: (fn(*a).square() * weight).sum(), (0, 1, 2))
    slopes = torch.func.jvp(slope, tensors, moves) if second else (slope(*tensors),)
    return out, tangent, *(t for part in slopes for t in part)


@pytest.mark.parametrize("case", CASES)
def test_values_gradients_tangents_and_hessian_vector_products_equal_those_of_dense_attention(case, poisoned_empty):
    tensors, name, options = make(case)
    for ours, theirs in zip(all_of(attending(name, options), tensors, True), all_of(dense(name, options), tensors, True)):
        assert_close(ours, theirs)
        assert theirs.abs().max() > 0


def test_a_hessian_vector_product_is_the_same_in_every_mode():
    tensors, name, options = make("dilated window")
    moves = directions(tensors)

    def products(fn):
        def loss(*a):
            return fn(*a).square().sum()

        slope = torch.func.grad(loss, (0, 1, 2))
        return (*torch.func.vjp(slope, *tensors)[1](moves),
                *torch.func.grad(lambda *a: torch.func.jvp(loss, a, moves)[1], (0, 1, 2))(*tensors))

    for ours, theirs in zip(products(attending(name, options)), products(dense(name, options))):
        assert_close(ours, theirs)
        assert theirs.abs().max() > 0


@pytest.mark.parametrize("case", ["columns, the last row begun", "layout per head, both directions"])
def test_mapping_over_inputs_and_masks_equals_a_loop(case):
    stack = [torch.stack(t) for t in zip(*(make(case, seed=seed)[0] for seed in range(2)))]
    _, name, options = make(case)
    kind = "keep" if name == "block_sparse_attention" else "mask"
    masks = random.bernoulli(random.key(1), 0.6, (2, stack[0].shape[1], stack[0].shape[3]))

    def slopes(q, k, v, mask):
        return torch.func.grad(lambda *a: attending(name, {**options, kind: mask})(*a).sin().sum(), (0, 1, 2))(q, k, v)

    loop = zip(*(slopes(stack[0][i], stack[1][0], stack[2][i], masks[i]) for i in range(2)))
    for ours, theirs in zip(torch.vmap(slopes, (0, None, 0, 0))(stack[0], stack[1][0], stack[2], masks), loop):
        assert_close(ours, torch.stack(theirs))


def test_layouts_may_be_mapped_over():
    (q, k, v), name, options = make("layout per head, both directions")
    layouts = torch.stack([layout(2, 8, seed) for seed in range(2)])

    def slope(q, layout):
        return torch.func.grad(lambda q: attending(name, {**options, "layout": layout})(q, k, v).sin().sum())(q)

    found = torch.vmap(slope, (None, 0))(q, layouts)
    assert_close(found, torch.stack([slope(q, one) for one in layouts]))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["window, the last row begun", "layout"])
def test_low_precision_is_computed_in_float32(case, dtype):
    tensors, name, options = make(case, dtype)
    exact = all_of(dense(name, options), tuple(t.double() for t in tensors))
    for ours, theirs in zip(all_of(attending(name, options), tensors), exact):
        assert ours.dtype == dtype
        if dtype == torch.float32 or theirs.shape == exact[0].shape and theirs is exact[0]:  # the rest is of rounded values
            assert_close(ours, theirs, dtype)


@pytest.mark.parametrize("case", ["rows, one begun", "layout"])
def test_a_row_that_sees_nothing_is_zero_with_finite_derivatives(case):
    (q, k, v), name, options = make(case, torch.float32)
    options["keep" if name == "block_sparse_attention" else "mask"] = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool)
    options.pop("text_sees_all", None)
    for found in all_of(attending(name, options), (1e4 * q, k, v), True):
        assert (found == 0).all()


def test_strides_do_not_matter_and_large_scores_do_not_overflow():
    (q, k, v), name, options = make("window, the last row begun", torch.float32)
    fn = attending(name, options)
    whole = torch.func.grad(lambda *a: fn(*a).sum(), (0, 1, 2))(100 * q, k, v)  # .sum(): the gradient comes in with strides of zero
    views = [t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in (100 * q, k, v)]
    for ours, theirs in zip(torch.func.grad(lambda *a: fn(*a).sum(), (0, 1, 2))(*views), whole):
        assert_close(ours, theirs)
        assert ours.isfinite().all() and ours.abs().max() > 0
    wide = k[:, :1].expand(1, 2, *k.shape[2:]), v[:, :1].expand(1, 2, *v.shape[2:])
    assert_close(fn(q, *wide), fn(q, k, v))


@pytest.mark.parametrize("case", ["no text", "layout"])
def test_nothing_at_all_is_served(case):
    tensors, name, options = make(case)
    options = {key: value for key, value in options.items() if key != "mask"}
    for empty in ((t[:, :, :0] for t in tensors), (t[:0] for t in tensors)):
        empty = tuple(empty)
        out = attending(name, options)(*empty)
        assert out.shape == (*empty[0].shape[:3], tensors[2].shape[3])
        assert [t.shape for t in torch.func.grad(lambda *a: attending(name, options)(*a).sum(), (0, 1, 2))(*empty)] == \
            [t.shape for t in empty]
    options["scale"] = 0.7
    for d, e in ((0, 2), (2, 0)):
        narrow = tuple(torch.ones(*t.shape[:3], width, dtype=F64) for t, width in zip(tensors, (d, d, e)))
        assert_close(attending(name, options)(*narrow), dense(name, {**options, "scale": 0.7})(*narrow) if d else
                     attending(name, options, "reference")(*narrow))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_derivatives_of_flex_attention_are_those_of_these_kernels():
    tensors, name, options = make("layout of single positions")
    fn = functools.partial(_segment_kernel.blocks, flex.attend, layout=options["layout"][:, :19, :19], block=1, causal=True, keep=None,
                           scale=2 ** -0.5)
    for ours, theirs in zip(all_of(fn, tensors, True), all_of(dense(name, options), tensors, True)):
        assert_close(ours, theirs)
        assert theirs.abs().max() > 0


def test_wide_heads_are_refused():
    q = torch.ones(1, 1, 5, 129)
    with pytest.raises(KernelUnavailable, match="widths of at most 128, got 129"):
        ops.conv_attention(q, q, q, text_len=5, image_size=2, impl="triton")


def test_the_native_kernels_are_asked_first():
    assert [[kernel.name for kernel in kernels[:2]] for kernels in (CONV, AXIAL, BLOCKS)] == [["native", "triton"]] * 3
