"""The language model: one sequence or chunks of it, alone or in an ensemble, give the same; its loss is what it says."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from torch.nn import functional as F

from fnattn import random, taps, tree
from fnattn.attentions import gate_loop, linformer, taylor
from fnattn.models import feedforward_coor_descent, lm

TAYLOR = taylor.Config(dim=6, heads=2, dim_head=4, causal=True, rotary_emb=True, gate_value_heads=True, shift_tokens=True)
CONFIGS = {
    "taylor": lm.Config(attention=TAYLOR, depth=2, num_tokens=11),
    "gate_loop_post": lm.Config(attention=gate_loop.Config(dim=6), depth=2, num_tokens=11, norm="layer", post_norm=True),
    "positions_tied": lm.Config(attention=gate_loop.Config(dim=6), depth=1, num_tokens=11, seq_len=13, tied=True, logits_bias=True,
                                norm="layer", norm_attention=False),
    "coor_descent_ff": lm.Config(attention=gate_loop.Config(dim=6), depth=1, num_tokens=11,
                                 ff=feedforward_coor_descent.CoorDescent(iters=5)),
}


@pytest.fixture(params=CONFIGS)
def cfg(request):
    return CONFIGS[request.param]


@pytest.fixture
def ids(key):
    return random.randint(random.fold_in(key, "ids"), (3, 13), 0, 11)


def make(key, cfg, dtype=torch.float64):
    return lm.init(key, cfg, dtype=dtype)


@pytest.mark.parametrize("cuts", [(13,), (1, 12), (5, 0, 7, 1), (1,) * 13])
def test_any_chunks_through_the_state_equal_one_pass(cfg, cuts, key, ids):
    params = make(key, cfg)
    whole, nothing = lm.apply(params, ids)
    assert whole.shape == (3, 13, 11) and tree.leaves(nothing) == []
    state, parts = lm.init_state(params, 3, capacity=13), []
    for part in ids.split(cuts, 1):
        logits, new = lm.apply(params, part, state)
        assert tree.structure(new) == tree.structure(state)
        state = new
        parts.append(logits)
    assert_close(torch.cat(parts, 1), whole)
    assert int(state.pos) == 13


def test_no_logit_depends_on_later_tokens(cfg, key, ids):
    params = make(key, cfg)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 11
    a, b = lm.apply(params, ids)[0], lm.apply(params, changed)[0]
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.equal(a[:, 7:], b[:, 7:])


def test_the_loss_is_the_cross_entropy_of_the_next_token(cfg, key, ids):
    params = make(key, cfg)
    logits = lm.apply(params, ids[:, :-1])[0]
    assert_close(lm.loss(params, ids), F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_making_logits_in_parts_changes_neither_loss_nor_gradient(cfg, key, ids, monkeypatch):
    params = make(key, cfg)
    whole = tree.value_and_grad(lm.loss)(params, ids)
    monkeypatch.setattr(lm, "LOGITS_AT_ONCE", 3 * 11 * 5)  # 5 positions at a time
    parts = tree.value_and_grad(lm.loss)(params, ids)
    tree.map(assert_close, parts, whole)


def test_recomputing_blocks_changes_neither_loss_nor_gradient(key, ids):
    cfg = CONFIGS["taylor"]
    other = lm.Config(attention=TAYLOR, depth=2, num_tokens=11, remat=True)
    tree.map(assert_close, tree.leaves(tree.value_and_grad(lm.loss)(make(key, other), ids)),
             tree.leaves(tree.value_and_grad(lm.loss)(make(key, cfg), ids)))


def test_every_parameter_has_a_gradient_and_it_is_right(cfg, key, ids):
    params = make(key, cfg)
    grads = tree.grad(lm.loss)(params, ids)
    for name, leaf in tree.to_flat(grads).items():
        assert leaf.abs().max() > 0, name
    direction = tree.map(lambda p: random.normal(random.fold_in(key, "d"), tuple(p.shape), p.dtype), params)
    eps = 1e-6
    ahead, behind = (lm.loss(tree.map(lambda p, d, s=s: p + s * eps * d, params, direction), ids) for s in (1, -1))
    slope = sum((g * d).sum() for g, d in zip(tree.leaves(grads), tree.leaves(direction)))
    # frac_gradient_state_transition scales the gradient of gate_loop on purpose.
    if isinstance(cfg.attention, taylor.Config):
        torch.testing.assert_close((ahead - behind) / (2 * eps), slope, rtol=1e-6, atol=1e-8)


def test_an_ensemble_equals_its_members(cfg, key, ids):
    keys = random.split(key, 3)
    stacked = tree.vmap(lambda k: make(k, cfg))(keys)
    losses, grads = tree.vmap(tree.value_and_grad(lm.loss), in_axes=(0, None))(stacked, ids)
    for i, one in enumerate(make(k, cfg) for k in keys):
        tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), tree.unstack(stacked)[i], one)
        loss, grad = tree.value_and_grad(lm.loss)(one, ids)
        assert_close(losses[i], loss)
        tree.map(assert_close, tree.unstack(grads)[i], grad)


def test_gradients_per_sample_equal_a_loop(key, ids):
    params = make(key, CONFIGS["taylor"])
    mapped = tree.vmap(tree.grad(lambda p, row: lm.loss(p, row[None])), in_axes=(None, 0))(params, ids)
    for i, row in enumerate(ids):
        tree.map(assert_close, tree.unstack(mapped)[i], tree.grad(lm.loss)(params, row[None]))


def test_masked_tokens_are_neither_seen_nor_counted(key, ids):
    params = make(key, CONFIGS["taylor"])
    mask = torch.ones(3, 13, dtype=torch.bool)
    mask[:, 9:] = False
    assert_close(lm.loss(params, ids, mask=mask), lm.loss(params, ids[:, :9]))
    assert float(lm.loss(params, ids, mask=torch.zeros_like(mask))) == 0.0


def test_parameters_are_drawn_by_name(key):
    small, large = (lm.init(key, lm.Config(attention=TAYLOR, depth=depth, num_tokens=11, logits_bias=bias))
                    for depth, bias in ((1, False), (3, True)))
    large = tree.to_flat(large)
    for name, leaf in tree.to_flat(small).items():
        assert torch.equal(leaf, large[name]), name


def test_the_meta_device_gives_the_shapes(cfg, key):
    real, shapes = tree.to_flat(make(key, cfg, torch.float32)), tree.to_flat(lm.init(key, cfg, device="meta"))
    assert {n: p.shape for n, p in real.items()} == {n: p.shape for n, p in shapes.items()}


def test_dropout_happens_exactly_when_a_key_comes(key, ids):
    cfg = lm.Config(attention=TAYLOR, depth=1, num_tokens=11, dropout=0.5)
    params, other = make(key, cfg), make(key, lm.Config(attention=TAYLOR, depth=1, num_tokens=11))
    assert_close(lm.nll(params, ids), lm.nll(other, ids))
    a, b = (lm.loss(params, ids, dropout_key=random.fold_in(key, i)) for i in (1, 2))
    assert a != b and torch.equal(a, lm.loss(params, ids, dropout_key=random.fold_in(key, 1)))


def test_values_inside_have_names(key, ids):
    params = make(key, CONFIGS["taylor"])
    _, seen = taps.harvest(lambda: lm.apply(params, ids))()
    assert {"blocks.0.attn.q", "blocks.1.attn_out", "blocks.1.ff_out"} <= set(seen)
    assert seen["blocks.1.ff_out"].shape == (3, 13, 6)


def test_arguments_are_not_written_to(key, ids):
    params = make(key, CONFIGS["taylor"])
    state = lm.init_state(params, 3, capacity=13)
    before = tree.map(torch.clone, (params, state, ids))
    lm.apply(params, ids, state)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), (params, state, ids), before)


def test_what_it_refuses_it_refuses_with_the_reason(key, ids):
    def refused(message, call, error=ValueError):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith(message) and "\n  " in str(caught.value), str(caught.value)

    params = make(key, CONFIGS["positions_tied"])
    attention = gate_loop.Config(dim=6)
    refused("lm.Config: attention must be causal; got Config(dim=6, ",
            lambda: lm.Config(attention=taylor.Config(dim=6, causal=False), depth=1))
    refused("lm.Config: attention must be causal",
            lambda: lm.Config(attention=linformer.Config(dim=6, seq_len=13, heads=2), depth=1))
    refused("lm.Config: attention must give back dim",
            lambda: lm.Config(attention=taylor.Config(dim=6, causal=True, combine_heads=False), depth=1))
    refused("lm.Config: dim must equal attention.dim=6; got 7.", lambda: lm.Config(attention=attention, depth=1, dim=7))
    refused("lm.Config: depth must be at least 1; got 0.", lambda: lm.Config(attention=attention, depth=0))
    refused("lm.Config: norm must be one of 'rms', 'layer'", lambda: lm.Config(attention=attention, depth=1, norm="batch"))
    refused("lm.Config: dropout must lie in [0, 1]; got 2.", lambda: lm.Config(attention=attention, depth=1, dropout=2.0))
    refused("lm.Config: ff must be the config of an activation; got 'gelu'.",
            lambda: lm.Config(attention=attention, depth=1, ff="gelu"), TypeError)
    refused("fnattn: expected the Config of a family", lambda: lm.Config(attention=7, depth=1), TypeError)
    refused("lm.apply: ids must be [batch, seq]; got [13].", lambda: lm.apply(params, ids[0]))
    refused("lm.apply: ids must be an int64 tensor of token numbers; got torch.float32.", lambda: lm.apply(params, ids.float()),
            TypeError)
    refused("lm.apply: mask must be [batch, seq] = [3, 13], describing ids; got [3, 12].",
            lambda: lm.apply(params, ids, mask=torch.ones(3, 12, dtype=torch.bool)))
    refused("lm.apply: mask must be bool", lambda: lm.apply(params, ids, mask=torch.ones(3, 13)), TypeError)
    refused("lm.nll: ids must be [batch, seq] with at least 2 tokens, one to predict; got [3, 1].",
            lambda: lm.loss(params, ids[:, :1]))
    refused("lm.init_state: capacity must be at most the 13 learned positions (cfg.seq_len); got 14.",
            lambda: lm.init_state(params, 3, capacity=14))
    refused("lm.apply: ids must fit the 13 learned positions (cfg.seq_len); got 14 after 0.",
            lambda: lm.apply(params, torch.cat((ids, ids[:, :1]), 1)))
    dropping = lm.init(key, lm.Config(attention=taylor.Config(dim=6, causal=True, dropout=0.25), depth=1, dropout=0.5,
                                      num_tokens=11))
    assert lm.dropout_chances(dropping.cfg) == {"cfg.dropout": 0.5, "cfg.attention.dropout": 0.25}
    without = lm.loss(dropping, ids)  # no key, no randomness: an evaluation
    assert torch.equal(without, lm.nll(dropping, ids).mean()) and without != lm.loss(dropping, ids, dropout_key=key)


@pytest.mark.parametrize("name", ["taylor", "gate_loop_post"])
def test_forward_mode_and_second_order_agree_with_reverse_mode(name, key, ids):
    params = make(key, CONFIGS[name])
    leaves, form = tree.flatten(params)
    direction = [random.normal(random.fold_in(key, i), tuple(p.shape), p.dtype) for i, p in enumerate(leaves)]

    def loss(*leaves):
        return lm.loss(tree.unflatten(leaves, form), ids)

    def gradient(*leaves):
        return torch.func.grad(loss, tuple(range(len(leaves))))(*leaves)

    _, slope = torch.func.jvp(loss, tuple(leaves), tuple(direction))
    grads = gradient(*leaves)
    assert_close(slope, sum((g * d).sum() for g, d in zip(grads, direction)))
    _, forward = torch.func.jvp(gradient, tuple(leaves), tuple(direction))
    reverse = torch.func.grad(lambda *p: sum((g * d).sum() for g, d in zip(gradient(*p), direction)), tuple(range(len(leaves))))(*leaves)
    if name == "taylor":  # gate_loop scales gradients on the way, so that the second derivative is of no function
        for a, b in zip(forward, reverse):
            assert_close(a, b)
