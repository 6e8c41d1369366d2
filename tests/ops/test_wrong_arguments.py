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
