"""Arguments of operators, of `random` and of `convert` that are of no use: named, before torch stumbles over them."""

from __future__ import annotations

import pytest
import torch

import fnattn
from fnattn import convert, ops, random
from fnattn.attentions import gate_loop

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
