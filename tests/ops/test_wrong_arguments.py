"""Arguments of operators, of `random` and of `convert` that are of no use: named, before torch stumbles over them."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close

import fnattn
from fnattn import convert, ops, random, tree
from fnattn.attentions import gate_loop, taylor

X = torch.ones(2, 3, 5)
Q, ROWS = torch.ones(1, 2, 1, 3), torch.ones(1, 2, 5, 3)


@pytest.mark.parametrize("which", ["q", "kv", "a", "h0"])
@pytest.mark.parametrize("wrong", [None, X.tolist(), X.long()], ids=["none", "list", "int64"])
def test_simple_gate_loop_takes_tensors(which, wrong):
    if which == "h0" and wrong is None:
        return
    with pytest.raises(TypeError, match=rf"^simple_gate_loop: {which} must be a real floating tensor; got (NoneType|list|torch.int64)."):
        ops.simple_gate_loop(**{"q": X, "kv": X, "a": X, which: wrong})


@pytest.mark.parametrize("wrong, error, text", [
    (dict(k_late=None), TypeError, "k_late must be a floating tensor; got NoneType"),
    (dict(v_late=None), TypeError, "v_late must be a floating tensor; got NoneType"),
    (dict(k_late=ROWS.long()), TypeError, "k_late must be a floating tensor; got torch.int64"),
    (dict(k_late=ROWS[0, 0]), ValueError, r"k_late must be .batch, heads, positions, width.; got \[5, 3\]"),
    (dict(v_late=ROWS[0]), ValueError, r"v_late must be .batch, heads, positions, width.; got \[2, 5, 3\]"),
    (dict(scale=[1.0]), TypeError, "scale must be a number or None; got list"),
    (dict(scale="1"), TypeError, "scale must be a number or None; got str"),
    (dict(scale=torch.ones(2)), TypeError, "scale must be a number or None; got Tensor"),
    (dict(scale=torch.tensor(1.0)), TypeError, "scale must be a number or None; got Tensor"),
    (dict(length=[3]), TypeError, "length must be an int; got .3. of type list"),
    (dict(length=3.0), TypeError, "length must be an int; got 3.0 of type float"),
    (dict(first=None), TypeError, "first must be an int; got None of type NoneType"),
    (dict(first=True), TypeError, "first must be an int; got True of type bool"),
])
def test_cached_attention_says_what_is_wrong(wrong, error, text):
    right = dict(k_late=ROWS, v_late=ROWS, first=2, length=3)
    assert ops.cached_attention(Q, ROWS, ROWS, **right).shape == Q.shape
    with pytest.raises(error, match=rf"^cached_attention: {text}.*\n  "):
        ops.cached_attention(Q, ROWS, ROWS, **{**right, **wrong})


SCALED = {
    "softmax_attention": {}, "taylor": {}, "cached_attention": dict(first=5, length=5),
    "conv_attention": dict(text_len=1, image_size=2), "axial_attention": dict(text_len=1, image_size=2),
    "block_sparse_attention": dict(layout=torch.ones(1, 1, 1, dtype=torch.bool), block=5), "coor_descent_attention": dict(sparsity_k=2.0)}


@pytest.mark.parametrize("name", SCALED)
def test_a_scale_that_wants_a_derivative_is_refused_and_a_scaled_query_has_it(name):
    rows, options = random.normal(random.key(3), (1, 2, 5, 3), torch.float64), dict(SCALED[name])
    if name == "cached_attention":
        options.update(k_late=rows[:, :, :0], v_late=rows[:, :, :0])

    def run(scale, q=rows):
        out = getattr(ops, name)(q, rows, rows, scale=scale, **options)
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    for wrong in (torch.tensor(0.5), "1", True):
        with pytest.raises(TypeError, match=rf"^{name}: scale must be a number or None; got {type(wrong).__name__}\.\n  .*q \* scale"):
            run(wrong)
    with pytest.raises(TypeError, match=rf"^{name}: scale must be a number or None; got Tensor"):
        torch.func.grad(run)(torch.tensor(0.5))
    slope = torch.func.grad(lambda scale: run(1.0, rows * scale))(torch.tensor(0.5, dtype=rows.dtype))
    step = 1e-5
    assert abs(slope) > 1e-2 and abs(slope - (run(0.5 + step) - run(0.5 - step)) / (2 * step)) < 1e-6 * abs(slope)


def test_whole_numbers_are_asked_for():
    q = X[:, None].expand(-1, 2, -1, -1)
    layout = torch.ones(1, 5, 5, dtype=torch.bool)
    for call, text in (
            (lambda: ops.coor_descent_attention(q, q, q, 2.0, offset=2.5), "coor_descent_attention: offset must be an int; got 2.5"),
            (lambda: ops.coor_descent_attention(q, q, q, 2.0, nulls="x"), "coor_descent_attention: nulls must be an int; got 'x'"),
            (lambda: ops.block_sparse_attention(q, q, q, layout, block=None), "block_sparse_attention: block must be an int; got None")):
        with pytest.raises(TypeError, match=f"^{text}"):
            call()
    with pytest.raises(ValueError, match="^block_sparse_attention: block must be at least 1; got -1"):
        ops.block_sparse_attention(q, q, q, layout, block=-1)


def test_categorical_takes_a_tensor():
    for wrong in ([0.5, 0.5], None, 1.0):
        with pytest.raises(TypeError, match=rf"^random.categorical: logits must be a floating tensor; got {type(wrong).__name__}\.\n  "):
            random.categorical(random.key(0), wrong)


def test_load_takes_tensors_by_name():
    cfg = gate_loop.Config(dim=3)
    given = convert.dump(fnattn.init(random.key(0), cfg))
    for wrong in (given["to_qkv.weight"].numpy(), given["to_qkv.weight"].tolist(), None):
        with pytest.raises(TypeError, match=rf"^convert.load: to_qkv.weight must be a tensor; got {type(wrong).__name__}\.\n  "):
            convert.load(cfg, {**given, "to_qkv.weight": wrong})
    for wrong in (None, list(given.items())):
        with pytest.raises(TypeError, match=rf"^convert.load: state_dict must be a mapping of tensors; got {type(wrong).__name__}\.\n  "):
            convert.load(cfg, wrong)


FOUR = torch.ones(1, 2, 4, 3)


@pytest.mark.parametrize("call, error, text", [
    (lambda: ops.gate_loop(FOUR, FOUR, FOUR, FOUR[..., :2], state=3), TypeError, r"gate_loop: state must be \(H, A\); got int"),
    (lambda: ops.coor_descent(FOUR, None), TypeError, "coor_descent: k must be a number or a tensor; got NoneType"),
    (lambda: ops.coor_descent(FOUR, float("nan")), ValueError, "coor_descent: k must be a number; got nan"),
    (lambda: ops.coor_descent_attention(FOUR, FOUR, FOUR, "x"), TypeError, "coor_descent_attention: k must be a number or a tensor"),
    (lambda: ops.linear(FOUR, torch.ones(5, 3), 3), TypeError, "linear: bias must be a floating point tensor; got int"),
    (lambda: ops.linear(FOUR, torch.ones(5, 3).double()), TypeError, "linear: x, weight and bias must have one dtype; got torch.float32"),
    (lambda: ops.linear(FOUR, torch.ones(5, 3), torch.ones(5).half()), TypeError, "linear: .* and torch.float16"),
    (lambda: ops.layouts.make(ops.layouts.Fixed(num_heads=2), "x"), TypeError, "layouts.make: seq_len must be an int; got 'x'"),
    (lambda: ops.lang_freqs(-1), ValueError, "lang_freqs: dim must be at least 0; got -1"),
    (lambda: ops.rotary(FOUR, torch.arange(4), torch.tensor([1j])), TypeError, "rotary: freqs must be floating point; got torch.complex64"),
    (lambda: ops.rotary(FOUR, torch.arange(4) * 1j, torch.ones(1)), TypeError, "rotary: positions must be an integer tensor"),
])
def test_what_is_of_no_use_is_named(call, error, text):
    with pytest.raises(error, match=rf"^{text}.*\n  "):
        call()


@pytest.mark.parametrize("call", [
    lambda t: ops.rms_norm(FOUR, t(3)), lambda t: ops.linear(FOUR, t(5, 3)), lambda t: ops.linear(FOUR, torch.ones(5, 3), t(5)),
    lambda t: ops.softmax_attention(FOUR, FOUR, FOUR, mask=t(4, 4) > 0), lambda t: ops.taylor(FOUR, FOUR, FOUR, keep=t(1, 4) > 0),
    lambda t: ops.conv_attention(FOUR, FOUR, FOUR, text_len=3, image_size=1, mask=t(1, 4) > 0), lambda t: ops.rotate(FOUR, t(4, 1)),
    lambda t: ops.coor_descent(FOUR, t(1, 2, 4)), lambda t: ops.cached_attention(FOUR, t(1, 2, 4, 3), t(1, 2, 4, 3), t(1, 2, 1, 3),
                                                                               t(1, 2, 1, 3), first=4, length=4)])
def test_tensors_without_numbers_beside_others_are_refused(call):
    assert call(torch.ones) is not None
    with pytest.raises((ValueError, RuntimeError), match="on one device; got|expected device meta"):  # the latter is torch's own
        call(lambda *shape: torch.ones(*shape, device="meta"))


def test_params_without_numbers_and_stacked_ones_are_named():
    cfg, x = gate_loop.Config(dim=3), torch.ones(1, 4, 3)
    params = fnattn.init(random.key(0), cfg)
    with pytest.raises(ValueError, match="^gate_loop.apply: x and the params must be on one device; got cpu and meta.\n  The meta device"):
        fnattn.apply(fnattn.init(random.key(0), cfg, device="meta"), x)
    stacked = tree.map(lambda t: torch.stack((t, t)), params)
    with pytest.raises(ValueError, match="^gate_loop.apply: the params must be those of one model; got 2 stacked ones.\n  Map over them"):
        fnattn.apply(stacked, x)
    assert_close(tree.vmap(lambda p: fnattn.apply(p, x)[0])(stacked)[1], fnattn.apply(params, x)[0])


@pytest.mark.parametrize("field, value, text", [
    ("dropout", None, "must be a number; got None"), ("dropout", "x", "must be a number; got 'x'"),
    ("dropout", True, "must be a number; got True"), ("causal", "no", "must be a bool; got 'no'"), ("causal", 1, "must be a bool; got 1")])
def test_fields_of_configs_are_of_their_kind(field, value, text):
    with pytest.raises(TypeError, match=rf"^taylor.Config: {field} {text} of type .*\n  "):
        taylor.Config(dim=8, **{field: value})


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_what_is_not_a_number_stays_so(impl):
    nan = float("nan")
    q, rows, late = torch.tensor([[[[nan, 1.0]]]]), torch.ones(1, 1, 3, 2), torch.ones(1, 1, 0, 2)
    for visible, expected in (([False, True, True], True), ([True, True, True], True), ([False, False, False], False)):
        mask = torch.tensor([[[visible]]])
        out = ops.cached_attention(q, rows, rows, late, late, first=3, length=3, mask=mask, impl=impl)
        assert out.isnan().all() == expected and (expected or not out.any())
    for n in (1, 3, 300):
        x = torch.ones(1, 1, n, 2)
        sums = ops.taylor(x, x, x)[1].clone()
        sums[0, 0, 0, 2] = nan  # of the normaliser
        assert ops.taylor(x, x, x, sums=sums, impl=impl)[0].isnan().all()
