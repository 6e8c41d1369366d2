"""Taylor attention on images and video, whose channels come first: upstream's class, and the sequence form that it stands for."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from upstream import upstream

from fnattn import convert, random, tree
from fnattn.attentions import taylor

CFG = taylor.Config(dim=7, heads=2, dim_head=3, dropout=0.25)
PARAMS = taylor.init(random.key(0), CFG, dtype=torch.float64)


def points(*spatial, dim=7):
    return random.normal(random.key(1), (2, dim, *spatial), torch.float64)


@pytest.mark.parametrize("spatial", [(11,), (5, 7), (3, 5, 2)], ids=["sound", "image", "video"])
@pytest.mark.parametrize("options", [{}, {"one_headed_kv": True, "gate_value_heads": True, "prenorm": True}, {"combine_heads": False}],
                         ids=str)
def test_it_equals_upstream_in_value_and_gradient(spatial, options):
    shape = dict(dim=7, heads=2, dim_head=3, **options)
    module = upstream("taylor_series_linear_attention").ChannelFirstTaylorSeriesLinearAttn(**shape).double()
    params = convert.load(taylor.Config(**shape), module.attn.state_dict())
    x = points(*spatial).requires_grad_()
    out, theirs = taylor.channel_first(params, x), module(x)
    assert_close(out, theirs)
    (ours,), (expected,) = (torch.autograd.grad(t.sin().sum(), x) for t in (out, theirs))
    assert_close(ours, expected)
    assert expected.any()


@pytest.mark.parametrize("spatial", [(11,), (5, 7), (3, 5, 2)], ids=len)
def test_it_is_apply_on_the_points_as_a_sequence(spatial):
    x, mask = points(*spatial), random.bernoulli(random.key(2), 0.6, (2, *spatial))
    given = {"dropout_key": random.key(3), "impl": "reference"}
    sequence, _ = taylor.apply(PARAMS, x.flatten(2).transpose(1, 2), mask=mask.flatten(1), **given)
    out = taylor.channel_first(PARAMS, x, mask=mask, **given)
    assert out.shape == x.shape and not torch.equal(out, taylor.channel_first(PARAMS, x, **given))
    assert_close(out.flatten(2).mT, sequence)


def test_a_causal_config_sees_the_points_before_in_raster_order():
    params = taylor.init(random.key(0), taylor.Config(dim=7, heads=2, dim_head=3, causal=True), dtype=torch.float64)
    x = points(3, 5)
    moved = x.clone()
    moved[:, :, 1, 2] += 1
    changed = (taylor.channel_first(params, moved) - taylor.channel_first(params, x)).abs().amax((0, 1)) > 0
    assert changed.flatten().tolist() == [i >= 7 for i in range(15)]


def test_it_maps_over_pictures_and_params():
    x = points(5, 3)
    each = torch.vmap(lambda x: taylor.channel_first(PARAMS, x[None])[0])(x)
    assert_close(each, taylor.channel_first(PARAMS, x))
    grads = tree.grad(lambda p: taylor.channel_first(p, x).sin().sum())(PARAMS)
    assert all(g.any() for g in tree.leaves(grads))


@pytest.mark.parametrize("wrong, error, text", [
    (lambda: taylor.channel_first(PARAMS, points(5)[:, :, 0]), ValueError, r"x must be \[batch, 7, \*spatial\].*got \[2, 7\]"),
    (lambda: taylor.channel_first(PARAMS, points(7, 5).movedim(1, -1)[:, :5]), ValueError, r"got \[2, 5, 5, 7\].\n  Channels come"),
    (lambda: taylor.channel_first(PARAMS, [0.0]), TypeError, "x must be a tensor; got list"),
    (lambda: taylor.channel_first(PARAMS, points(5, 3), mask=[[True]]), TypeError, "mask must be a tensor; got list"),
    (lambda: taylor.channel_first(PARAMS.cfg, points(5, 3)), TypeError, "params must come from taylor.init; got taylor.Config"),
    (lambda: taylor.channel_first(PARAMS, points(5, 3), mask=torch.ones(2, 15, dtype=torch.bool)), ValueError,
     r"mask must be \[batch, \*spatial\] = \[2, 5, 3\]; got \[2, 15\]"),
    (lambda: taylor.channel_first(PARAMS, points(5, 3), impl="no_such_kernel"), ValueError, "impl must be one of"),
], ids=["no spatial axis", "channels last", "no tensor", "list as mask", "config as params", "flat mask", "impl"])
def test_bad_input_is_named(wrong, error, text):
    with pytest.raises(error, match=text):
        wrong()
