"""Polynomial Taylor attention against upstream and against the dense formula."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from upstream import upstream

from fnattn import convert, random, tree
from fnattn.attentions import taylor_poly

OPTIONS = [dict(), dict(include_pass1_mass=False), dict(prenorm=True, attn_gate=True), dict(multiply_root_value=True),
           dict(multiply_root_value=True, use_root_value_as_attn_gate=False, attn_gate=True), dict(use_rotary_embed=False)]


def inputs(n=11, seed=3, dtype=torch.float64):
    return random.normal(random.key(seed), (2, n, 7), dtype)


MASK = torch.arange(11) < torch.tensor([[11], [6]])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_equals_upstream_with_and_without_a_mask(options):
    cfg = taylor_poly.Config(dim=7, heads=3, dim_head=4, **options)
    module = upstream("taylor_series_linear_attention.poly_attention").TaylorSeriesPolyAttention(7, heads=3, dim_head=4, **options)
    # Upstream's rotary table and its mask are float32.
    params, x = convert.load(cfg, module.state_dict()), inputs(dtype=torch.float32)
    for mask in (None, MASK):
        with torch.no_grad():
            theirs = module(x, mask=mask)
        assert_close(taylor_poly.apply(params, x, mask=mask)[0], theirs)
    module.load_state_dict(convert.dump(params), strict=True)


@pytest.mark.parametrize("mass", [True, False])
def test_it_equals_the_dense_formula(mass):
    g = torch.Generator().manual_seed(0)
    q1, q2, q3, v = (torch.randn(2, 3, 11, 4, generator=g, dtype=torch.float64) for _ in range(4))
    p = lambda s: 1 + s + s ** 2 / 2  # noqa: E731
    keep = MASK[:, None, None, :].double()
    a, b = p(q1 @ q2.mT) * keep, p(q2 @ q3.mT) * keep
    if not mass:
        b = b / b.sum(-1, keepdim=True)
    expected = (a @ b @ v) / ((a @ b).sum(-1, keepdim=True) + 1e-6) * keep.mT
    assert_close(taylor_poly.poly_attention(q1, q2, q3, v, MASK, mass), expected)


def test_every_parameter_gets_a_gradient():
    cfg = taylor_poly.Config(dim=7, heads=3, dim_head=4, prenorm=True, attn_gate=True, multiply_root_value=True)
    params = taylor_poly.init(random.key(0), cfg, dtype=torch.float64)
    grads = tree.grad(lambda p: taylor_poly.apply(p, inputs(), mask=MASK)[0].pow(2).sum())(params)
    assert all(g.abs().max() > 0 for g in tree.leaves(grads))


@pytest.mark.parametrize("wrong, text", [
    (lambda p: taylor_poly.Config(dim=7, causal=True), r"causal must be False"),
    (lambda p: taylor_poly.Config(dim=7, dim_head=3), r"needs an even dim_head; got 3"),
    (lambda p: taylor_poly.init_state(p, 2), r"taylor_poly\.init_state: cannot stream"),
    (lambda p: taylor_poly.apply(p, inputs(), torch.zeros(1)), r"cannot take state"),
    (lambda p: taylor_poly.apply(p, inputs(), context=inputs()), r"cannot take context"),
    (lambda p: taylor_poly.apply(p, inputs(), impl="nativ"), r"impl must be one of .*; got 'nativ'"),
])
def test_bad_input_is_named(wrong, text):
    with pytest.raises(ValueError, match=text):
        wrong(taylor_poly.init(random.key(0), taylor_poly.Config(dim=7, heads=3, dim_head=4), dtype=torch.float64))
