"""Ensembles: stacked trees, each member the same as alone."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_close

from fnattn import attentions, ensemble, optim, random, tree
from fnattn.attentions import block_sparse, taylor
from fnattn.models import lm

CFG = taylor.Config(dim=5, heads=2, dim_head=3, causal=True)
MODEL = lm.Config(attention=CFG, depth=2, num_tokens=11)


def loss(params, x):
    return taylor.apply(params, x)[0].square().mean()


def inputs(key, *shape):
    return random.normal(random.fold_in(key, "x"), shape, torch.float64)


def same(a, b):
    assert tree.structure(a) == tree.structure(b)
    for x, y in zip(tree.leaves(a), tree.leaves(b)):
        assert_close(x, y)


def test_keys_are_those_of_the_seeds_one_by_one():
    assert torch.equal(ensemble.keys(7, 3)[2], random.key(9))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(("cfg", "init"), [(CFG, taylor.init), (MODEL, lm.init)], ids=["family", "model"])
def test_each_member_is_drawn_as_alone(cfg, init, chunk_size):
    keys = ensemble.keys(0, 3)
    stacked = ensemble.init(keys, cfg, chunk_size=chunk_size)
    assert stacked.cfg == cfg and ensemble.size(stacked) == 3
    for i, key in enumerate(keys):
        tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), ensemble.member(stacked, i), init(key, cfg))


def test_a_function_of_the_key_draws_anything_else():
    stacked = ensemble.init(ensemble.keys(0, 2), lambda key: {"w": random.normal(key, (3,))})
    assert torch.equal(stacked["w"][1], random.normal(random.key(1), (3,)))


def test_stack_is_the_inverse_of_unstack():
    stacked = ensemble.init(ensemble.keys(0, 3), CFG)
    same(ensemble.stack(ensemble.unstack(stacked)), stacked)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("each", [False, True])
def test_values_and_gradients_are_those_of_a_loop(key, each, chunk_size):
    params = ensemble.init(ensemble.keys(0, 3), CFG, dtype=torch.float64)
    x = inputs(key, 3, 2, 7, 5) if each else inputs(key, 2, 7, 5)
    out, _ = ensemble.apply(params, x, each=each, chunk_size=chunk_size)
    values, grads = ensemble.value_and_grad(loss, each=each, chunk_size=chunk_size)(params, x)
    for i, one in enumerate(ensemble.unstack(params)):
        value, grad = tree.value_and_grad(loss)(one, x[i] if each else x)
        assert_close(out[i], taylor.apply(one, x[i] if each else x)[0])
        assert_close(values[i], value)
        same(ensemble.member(grads, i), grad)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_members_train_with_their_own_rates_and_decays_as_alone(key, chunk_size):
    def optimizer(rate, decay):
        return optim.adamw(rate, weight_decay=decay)

    hyper = {"rate": torch.tensor([1e-3, 1e-2, 3e-2]).double(), "decay": torch.tensor([0.0, 0.1, 0.3]).double()}
    params, x = ensemble.init(ensemble.keys(0, 3), CFG, dtype=torch.float64), inputs(key, 2, 7, 5)
    state, step = ensemble.opt_init(optimizer, params, hyper), ensemble.train_step(loss, optimizer, chunk_size=chunk_size)
    trained = params
    for _ in range(3):
        trained, state, losses = step(trained, state, x, hyper=hyper)
    for i, one in enumerate(ensemble.unstack(params)):
        alone = optimizer(hyper["rate"][i], hyper["decay"][i])
        own = alone.init(one)
        for _ in range(3):
            value, grads = tree.value_and_grad(loss)(one, x)
            updates, own = alone.update(grads, own, one)
            one = optim.apply_updates(one, updates)
        assert_close(losses[i], value)
        same(ensemble.member(trained, i), one)
    assert not torch.allclose(trained.to_q[0] - params.to_q[0], trained.to_q[1] - params.to_q[1])


def test_members_train_on_their_own_data_with_one_optimiser(key):
    params, x = ensemble.init(ensemble.keys(0, 2), CFG, dtype=torch.float64), inputs(key, 2, 3, 7, 5)
    optimizer = optim.sgd(0.1)
    new, _, losses = ensemble.train_step(loss, optimizer, each=True)(params, ensemble.opt_init(optimizer, params), x)
    for i in range(2):
        value, grads = tree.value_and_grad(loss)(ensemble.member(params, i), x[i])
        assert_close(losses[i], value)
        assert_close(new.to_q[i], params.to_q[i] - 0.1 * grads.to_q)


def test_the_average_of_members_keeps_what_is_not_trained():
    cfg = block_sparse.FAMILY.examples[0]
    stacked = ensemble.init(ensemble.keys(0, 3), cfg)
    mean = ensemble.average(stacked)
    assert_close(mean.to_qkv, stacked.to_qkv.mean(0))
    assert torch.equal(mean.layout, stacked.layout[0])
    assert attentions.apply(mean, torch.zeros(1, 3, cfg.dim))[0].shape == (1, 3, cfg.dim)
    weighted = ensemble.average(stacked, torch.tensor([0.0, 2.0, 0.0]))
    assert_close(weighted.to_qkv, stacked.to_qkv[1])


def test_disagreement_is_nothing_among_equals_and_everything_among_opposites():
    equal = ensemble.disagreement(torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert_close(equal.total, torch.tensor(math.log(2), dtype=torch.float64))
    assert equal.mutual_information == 0
    sure = ensemble.disagreement(torch.tensor([[900.0, 0.0], [0.0, 900.0]], dtype=torch.float64))
    assert_close(sure.mutual_information, torch.tensor(math.log(2), dtype=torch.float64))
    assert sure.expected == 0


def test_disagreement_splits_the_entropy_of_the_mean(key):
    logits = inputs(key, 3, 5, 7)
    p = logits.softmax(-1)
    found = ensemble.disagreement(logits)
    mean = p.mean(0)
    assert_close(found.total, -(mean * mean.log()).sum(-1))
    assert_close(found.mutual_information, (p * (p / mean).log()).sum(-1).mean(0))
    assert (found.mutual_information > 0).all()


def test_the_speed_of_one_vmap_against_a_loop_is_measured():
    found = ensemble.speed(loss, ensemble.init(ensemble.keys(0, 3), CFG), torch.ones(1, 3, 5), repeats=1)
    assert found.mapped_s > 0 and found.loop_s > 0 and found.gain == found.loop_s / found.mapped_s


def test_what_it_refuses_it_refuses_with_the_reason(key):
    with pytest.raises(ValueError, match="ensemble.keys: members must be at least 1; got 0."):
        ensemble.keys(0, 0)
    with pytest.raises(ValueError, match=r"ensemble.init: member_keys must be \[members, 2\]; got \[2\]."):
        ensemble.init(key, CFG)
    with pytest.raises(TypeError, match=r"expected init\(member_keys, cfg\)"):
        ensemble.init(lambda k: k, ensemble.keys(0, 2))
    with pytest.raises(ValueError, match=r"ensemble.size: expected one leading size for all leaves; got \[2, 3\]."):
        ensemble.size((torch.zeros(2), torch.zeros(3)))
    params = ensemble.init(ensemble.keys(0, 2), CFG)
    with pytest.raises(ValueError, match=r"ensemble.average: weights must be \[members\] = \[2\]; got \[3\]."):
        ensemble.average(params, torch.ones(3))
    with pytest.raises(ValueError, match="takes no hyper-parameters; got \\['rate'\\]"):
        ensemble.opt_init(optim.sgd(0.1), params, {"rate": torch.ones(2)})
    with pytest.raises(ValueError, match="each must be a bool, or one per argument"):
        ensemble.value_and_grad(loss, each=(True, False))(params, torch.ones(2, 1, 3, 5))
