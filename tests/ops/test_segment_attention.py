"""The native kernel over lists of keys, behind three operators, against dense attention in value and every derivative."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.native.segment_attention import KEYS
from torch.autograd import gradcheck, gradgradcheck

from fnattn import ops, random
from fnattn.ops import _segments
from fnattn.testing import brute
from fnattn.testing.memory import peak_bytes

F64, F32 = torch.float64, torch.float32


def layout(heads, blocks, seed=3):
    """Random blocks; one row of them is empty."""
    made = random.bernoulli(random.fold_in(random.key(seed), "layout"), 0.5, (heads, blocks, blocks))
    made[:, blocks // 2] = False
    return made


PICTURE = dict(text_len=37, image_size=11)  # 37 + 121: several blocks of text, tiles with ragged edges
# name -> operator, (b, h, g, n, d, e), options; mask "some" is a random one
CASES = {
    "window": ("conv_attention", (2, 4, 2, 158, 5, 3), dict(PICTURE, kernel_size=5)),
    "window, the picture's last row begun": ("conv_attention", (1, 2, 1, 151, 3, 5), dict(PICTURE, kernel_size=3, mask="some")),
    "dilated window": ("conv_attention", (1, 2, 2, 158, 3, 2),
                       dict(PICTURE, kernel_size=3, dilation=2, mask="some", text_sees_all=True)),
    "window beyond the picture": ("conv_attention", (1, 2, 2, 28, 3, 2), dict(text_len=3, image_size=5, kernel_size=7, dilation=3)),
    "pixel alone": ("conv_attention", (1, 1, 1, 26, 2, 3), dict(text_len=1, image_size=5, kernel_size=1)),
    "no text": ("conv_attention", (1, 2, 2, 121, 3, 3), dict(text_len=0, image_size=11, kernel_size=5, mask="some")),
    "text alone": ("conv_attention", (2, 2, 1, 29, 3, 3), dict(PICTURE, mask="some")),
    "rows": ("axial_attention", (2, 4, 2, 158, 5, 3), dict(PICTURE, axis=0)),
    "rows, one begun": ("axial_attention", (1, 2, 1, 43, 3, 5), dict(PICTURE, axis=0, mask="some", text_sees_all=True)),
    "columns": ("axial_attention", (2, 4, 2, 158, 5, 3), dict(PICTURE, axis=1, mask="some")),
    "columns, the last row begun": ("axial_attention", (1, 2, 1, 151, 3, 5), dict(PICTURE, axis=1)),
    "lines longer than a block": ("axial_attention", (1, 1, 1, 1371, 2, 2), dict(text_len=2, image_size=37, axis=1, mask="some")),
    "layout": ("block_sparse_attention", (2, 4, 4, 158, 5, 3), dict(layout=layout(1, 10), block=16, causal=True)),
    "layout per head, both directions": ("block_sparse_attention", (2, 3, 3, 61, 3, 5),
                                         dict(layout=layout(3, 13), block=5, keep="some")),
    "layout per head, causal": ("block_sparse_attention", (1, 3, 3, 61, 3, 2),
                                dict(layout=layout(3, 9), block=7, causal=True, keep="some")),
    "layout longer than the sequence": ("block_sparse_attention", (1, 2, 2, 35, 2, 2), dict(layout=layout(2, 7), block=11)),
    "layout of single positions": ("block_sparse_attention", (1, 2, 2, 37, 2, 2), dict(layout=layout(2, 37), block=1, causal=True)),
    "wide heads": ("axial_attention", (1, 1, 1, 43, 67, 129), dict(PICTURE, axis=0, scale=0.3)),
    "widths of whole vectors": ("conv_attention", (1, 2, 1, 158, 64, 32), dict(PICTURE, kernel_size=3)),
}
SMALL = ["window beyond the picture", "rows, one begun", "layout longer than the sequence"]


def make(case, dtype=F64, seed=0):
    """q, k, v, and the operator as a function of them and of impl."""
    name, (b, h, g, n, d, e), options = CASES[case]
    keys = random.split(random.key(seed), 4)
    tensors = tuple(random.normal(key, shape, dtype) for key, shape in zip(keys, ((b, h, n, d), (b, g, n, d), (b, g, n, e))))
    options = dict(options)
    for kind in ("mask", "keep"):
        if kind in options:
            options[kind] = random.bernoulli(keys[3], 0.6, (b, n))
            options[kind][:, 0] = False  # the first position sees nothing, or only itself
    return tensors, name, options


def attending(name, options, impl="native"):
    return lambda *a: getattr(ops, name)(*a, **options, impl=impl)


def dense(name, options):
    """The same with a table of all pairs, by what the operator means."""
    options = dict(options)
    if options.get("image_size") == 37:  # brute force goes through all pairs in Python
        return attending(name, options, "reference")
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
@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_tangents_equal_those_of_dense_attention(case, dtype):
    tensors, name, options = make(case, dtype)
    expected = all_of(dense(name, options), tuple(t.double() for t in tensors))
    for ours, theirs in zip(all_of(attending(name, options), tensors), expected):
        assert ours.dtype == dtype and theirs.abs().max() > 0
        assert_close(ours, theirs)


@pytest.mark.parametrize("n", [0, 1, 2, 16, 17, 31, 32, 33, 36, 37, 38, 48, 49, 70, 157])
@pytest.mark.parametrize("case", ["dilated window", "rows", "columns", "layout"])
def test_every_length_is_served(case, n):
    tensors, name, options = make(case)
    options = {key: value for key, value in options.items() if key != "mask"}
    tensors = tuple(t[:, :, :n].contiguous() for t in tensors)
    for ours, theirs in zip(all_of(attending(name, options), tensors), all_of(attending(name, options, "reference"), tensors)):
        assert_close(ours, theirs)


@pytest.mark.parametrize("case", SMALL)
def test_derivatives_equal_finite_differences_in_both_modes_and_second_order(case):
    tensors, name, options = make(case)
    tensors = tuple(t.requires_grad_() for t in tensors)
    fn = attending(name, options)
    assert gradcheck(fn, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, fast_mode=True)
    assert gradgradcheck(fn, tensors, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("case", ["dilated window", "columns", "layout per head, causal"])
def test_hessian_vector_products_agree_between_modes_and_with_the_reference(case):
    tensors, name, options = make(case)
    moves = directions(tensors)

    def products(impl):
        def loss(*a):
            return attending(name, options, impl)(*a).square().sum()

        slope = torch.func.grad(loss, (0, 1, 2))
        return (torch.func.jvp(slope, tensors, moves)[1], torch.func.vjp(slope, *tensors)[1](moves),
                torch.func.grad(lambda *a: torch.func.jvp(loss, a, moves)[1], (0, 1, 2))(*tensors))

    expected = products("reference")[0]
    for found in products("native"):
        for ours, theirs in zip(found, expected):
            assert theirs.abs().max() > 0
            assert_close(ours, theirs)


@pytest.mark.parametrize("case", SMALL)
def test_third_derivatives_equal_those_of_the_reference(case):
    tensors, name, options = make(case)
    moves, others = directions(tensors), directions(tensors, 11)

    def products(impl):
        def loss(*a):
            return attending(name, options, impl)(*a).pow(3).sum()

        def along(*a):
            return torch.func.jvp(loss, a, moves)[1]

        slope = torch.func.grad(loss, (0, 1, 2))
        hessian = lambda *a: torch.func.jvp(slope, a, moves)[1]  # noqa: E731
        return (*torch.func.jvp(hessian, tensors, others)[1], *torch.func.vjp(hessian, *tensors)[1](others),
                *torch.func.jvp(torch.func.grad(along, (0, 1, 2)), tensors, others)[1])

    for ours, theirs in zip(products("native"), products("reference")):
        assert theirs.abs().max() > 0
        assert_close(ours, theirs)


@pytest.mark.parametrize("case", ["window, the picture's last row begun", "columns", "layout per head, both directions", "layout"])
def test_mapping_equals_a_loop_in_values_and_gradients(case):
    stack = [torch.stack(t) for t in zip(*(make(case, seed=seed)[0] for seed in range(3)))]
    _, name, options = make(case)
    kind = "keep" if name == "block_sparse_attention" else "mask"
    n = stack[0].shape[3]
    masks = random.bernoulli(random.key(1), 0.6, (3, stack[0].shape[1], n))

    def slopes(q, k, v, mask):
        every = {**options, kind: mask}
        return torch.func.grad(lambda *a: attending(name, every)(*a).sin().sum(), (0, 1, 2))(q, k, v)

    for dims in ((0, 0, 0, None), (0, None, 0, 0), (None, None, None, 0)):
        args = [t if d == 0 else t[0] for t, d in zip((*stack, masks), dims)]
        loop = zip(*(slopes(*(a[i] if d == 0 else a for a, d in zip(args, dims))) for i in range(3)))
        for ours, theirs in zip(torch.vmap(slopes, dims)(*args), loop):
            assert_close(ours, torch.stack(theirs))
    outer = torch.func.grad(lambda q: torch.vmap(attending(name, options))(q, *stack[1:]).square().sum())(stack[0])
    inner = [torch.func.grad(lambda q, i=i: attending(name, options)(q, stack[1][i], stack[2][i]).square().sum())(stack[0][i])
             for i in range(3)]
    assert_close(outer, torch.stack(inner))


@pytest.mark.parametrize("heads", [1, 3])
def test_layouts_may_be_mapped_over_like_the_weights_they_travel_with(heads):
    (q, k, v), name, options = make("layout per head, both directions")
    layouts = torch.stack([layout(heads, 13, seed) for seed in range(4)])

    def slope(q, layout):
        return torch.func.grad(lambda q: attending(name, {**options, "layout": layout})(q, k, v).sin().sum())(q)

    found = torch.vmap(slope, (None, 0))(q, layouts)
    assert_close(found, torch.stack([slope(q, one) for one in layouts]))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("case", ["window", "rows", "columns", "layout"])
def test_a_row_that_sees_nothing_is_zero_with_finite_derivatives(case):
    (q, k, v), name, options = make(case, F32)
    mask = torch.ones(2, q.shape[2], dtype=torch.bool)
    mask[0] = False
    mask[1, 0] = False
    options["keep" if name == "block_sparse_attention" else "mask"] = mask
    found = all_of(attending(name, options), (q, 3 * k, v))
    assert all(t.isfinite().all() for t in found)
    for t in (found[0], found[1], *found[4:]):  # the value, the gradient in q, the tangents
        assert (t[0] == 0).all() and (t[1, :, 0] == 0).all() and (t[1, :, -1] != 0).any()


@pytest.mark.parametrize("case", CASES)
def test_memory_that_was_never_written_is_never_read(case, poisoned_empty):
    tensors, name, options = make(case)
    for ours, theirs in zip(all_of(attending(name, options), tensors), all_of(attending(name, options, "reference"), tensors)):
        assert_close(ours, theirs)


@pytest.mark.parametrize("case", ["window", "columns", "layout per head, causal"])
def test_results_are_the_same_to_the_bit_for_any_number_of_threads(case):
    tensors, name, options = make(case, F32)
    tensors = tuple(t.repeat(2, 1, 1, 7) for t in tensors)
    for kind in {"mask", "keep"} & set(options):
        options[kind] = options[kind].repeat(2, 1)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(all_of(attending(name, options), tensors))
    finally:
        torch.set_num_threads(1)
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0]))


@pytest.mark.parametrize("case", ["window", "layout"])
def test_strides_of_inputs_and_gradients_do_not_matter(case):
    (q, k, v), name, options = make(case)
    fn = attending(name, options)
    whole = torch.func.grad(lambda *a: fn(*a).sum(), (0, 1, 2))(q, k, v)  # .sum(): the gradient comes in with strides of zero
    for order in ((0, 2, 1, 3), (3, 2, 1, 0)):
        back = [order.index(i) for i in range(4)]
        views = [t.permute(order).contiguous().permute(back) for t in (q, k, v)]
        for ours, theirs in zip(torch.func.grad(lambda *a: fn(*a).sum(), (0, 1, 2))(*views), whole):
            assert_close(ours, theirs)


@pytest.mark.parametrize("d, e", [(0, 3), (3, 0)])
@pytest.mark.parametrize("case", ["window", "rows", "layout"])
def test_widths_may_be_zero(case, d, e):
    _, name, options = make(case)
    options["scale"] = 0.7
    n = CASES[case][1][3]
    tensors = tuple(torch.ones(1, 2, n, width, dtype=F64) for width in (d, d, e))
    out = attending(name, options)(*tensors)
    seen = attending(name, options)(*tensors[:2], torch.ones(1, 2, n, 1, dtype=F64))  # 0 where a row of the layout is empty
    assert_close(out, seen.expand(out.shape))
    for grad in all_of(attending(name, options), tensors):
        assert grad.isfinite().all()


@pytest.mark.parametrize("case", ["window", "columns", "layout"])
def test_scores_beyond_the_range_of_exp_are_safe(case):
    (q, k, v), name, options = make(case, F32)
    found = all_of(attending(name, options), (q * 1e4, k, v))
    assert all(t.isfinite().all() for t in found)
    assert found[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["window", "rows", "layout"])
def test_low_precision_is_computed_in_float32(case, dtype):
    tensors, name, options = make(case, dtype)
    exact = all_of(attending(name, options), tuple(t.double() for t in tensors))
    for ours, theirs in zip(all_of(attending(name, options), tensors), exact):
        assert ours.dtype == dtype
        assert_close(ours, theirs, dtype)


def test_no_table_is_held_for_value_gradient_tangent_or_hessian_vector_product():
    n = 16 + 24 ** 2
    tensors = tuple(random.normal(key, (1, 2, n, 8)) for key in random.split(random.key(0), 3))
    blocks = torch.ones(1, -(-n // 16), -(-n // 16), dtype=torch.bool).tril()
    for name, options in (("conv_attention", dict(text_len=16, image_size=24)),
                          ("block_sparse_attention", dict(layout=blocks, block=16, causal=True))):
        def loss(*a, name=name, options=options):
            return attending(name, options)(*a).square().sum()

        def product(*a, loss=loss):
            return torch.func.jvp(torch.func.grad(loss, (0, 1, 2)), a, tensors)[1]

        product(*tensors)
        for fn, copies in ((attending(name, options), 2), (torch.func.grad(loss, (0, 1, 2)), 8), (product, 20)):
            assert peak_bytes(fn, *tensors) < copies * tensors[0].nbytes
        assert 20 * tensors[0].nbytes < 2 * n * n * 4 / 2  # half of one table


# ------------------------------------------------------------------------------------------------ lists

PATTERNS = [(_segments.conv(37, 11, 5, 1, False), None), (_segments.conv(3, 7, 3, 2, True), None),
            (_segments.axial(37, 11, 0, False), None), (_segments.axial(5, 37, 1, False), None),
            (_segments.blocks(7, True), layout(2, 23)), (_segments.blocks(16, False), layout(1, 10))]


@pytest.mark.parametrize("pattern, layout", PATTERNS, ids=lambda x: str(x) if isinstance(x, list) else "")
def test_lists_name_every_visible_pair_once_and_no_other(pattern, layout):
    n = min(158, pattern[1] + pattern[2] ** 2) if layout is None else 150
    made = _segments.lists(1, 2, n, None if layout is None else layout[None], tuple(pattern))
    expected = _segments.table(tuple(pattern), layout, None, n, torch.device("cpu")).view(-1, n, n)
    data, tiles = made.data.tolist(), made.tiles.tolist()
    for group in range(len(expected)):
        count = torch.zeros(n, n, dtype=torch.int64)
        rows_seen = []
        for rows, at, first, end, _ in made.blocks[group].tolist():
            positions = data[at:at + rows]
            rows_seen += positions
            for start, stride, size, half, index, mask in tiles[first:end]:
                assert 1 <= size <= KEYS
                lanes = range(rows)[{0: slice(0, 32), 1: slice(0, 16), 2: slice(16, 32)}[half]]
                for j in range(size):
                    key = start + j * stride if index < 0 else data[index + j]
                    word = ~0 if mask < 0 else data[mask + j]
                    for lane in lanes:
                        count[positions[lane], key] += word >> lane & 1
        assert sorted(rows_seen) == list(range(n))
        assert torch.equal(count, expected[group].long())


def test_lists_are_made_once_for_a_pattern():
    pattern = tuple(_segments.conv(37, 11, 5, 1, False))
    assert _segments.lists(1, 2, 158, None, pattern) is _segments.lists(3, 5, 158, None, pattern)
    same = layout(1, 10)[None]
    first, second = (_segments.lists(1, 2, 150, x, tuple(_segments.blocks(16, True))) for x in (same, same.clone()))
    assert first is second
    assert _segments.lists(1, 2, 150, ~same, tuple(_segments.blocks(16, True))) is not first


def test_heads_with_equal_layouts_share_their_lists():
    one = layout(2, 10)
    made = _segments.lists(2, 3, 150, torch.cat((one, one[:1]))[None], tuple(_segments.blocks(16, True)))
    assert made.group.tolist() == [[0, 1, 0]] * 2 and len(made.blocks) == 2


def test_the_kernel_is_chosen_where_it_can_serve():
    for case in ("window", "rows", "layout"):
        tensors, name, options = make(case, F32)
        assert torch.equal(attending(name, options, "auto")(*tensors), attending(name, options)(*tensors))
        meta = tuple(t.to("meta") for t in tensors)
        rest = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        assert attending(name, rest, "auto")(*meta).shape == attending(name, options)(*tensors).shape


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_mask_of_another_kind_or_shape_is_refused(impl):
    q, layout = torch.randn(2, 1, 6, 3), torch.ones(1, 3, 3, dtype=torch.bool)
    keep = torch.ones(2, 6, dtype=torch.bool)
    for wrong in (keep.float(), keep.long(), [True]):
        with pytest.raises(TypeError, match="block_sparse_attention: keep"):
            ops.block_sparse_attention(q, q, q, layout, block=2, keep=wrong, impl=impl)
    for wrong in (keep[:, :4], keep[:1], keep[0], torch.ones(2, 9, dtype=torch.bool)):
        with pytest.raises(ValueError, match="block_sparse_attention: keep"):
            ops.block_sparse_attention(q, q, q, layout, block=2, keep=wrong, impl=impl)
