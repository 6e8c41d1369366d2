"""Optimisers agree with torch.optim, map over ensembles, and leave alone what is not differentiable."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from conftest import assert_close

from fnattn import optim, random, tree


class Params(NamedTuple):
    w: Any
    b: Any


def params_of(key, dtype=torch.float64):
    return Params(random.normal(random.fold_in(key, "w"), (5, 3), dtype), random.normal(random.fold_in(key, "b"), (5,), dtype))


def loss(params, x):
    return (x @ params.w.T + params.b).sin().square().sum()


def train(optimizer, params, x, steps):
    state = optimizer.init(params)
    for _ in range(steps):
        grads = tree.grad(loss)(params, x)
        updates, state = optimizer.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    return params


def torch_train(make, params, x, steps, clip=None):
    leaves = [p.clone().requires_grad_() for p in params]
    made = make(leaves)
    for _ in range(steps):
        made.zero_grad()
        loss(Params(*leaves), x).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(leaves, clip)
        made.step()
    return Params(*(p.detach() for p in leaves))


CASES = {
    "adamw": (optim.adamw(3e-2, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 3e-2, weight_decay=0.1)),
    "adamw_betas": (optim.adamw(1e-2, betas=(0.8, 0.95), eps=1e-3), lambda p: torch.optim.AdamW(p, 1e-2, (0.8, 0.95), 1e-3)),
    "adam": (optim.adam(3e-2), lambda p: torch.optim.Adam(p, 3e-2)),
    "sgd": (optim.sgd(1e-2), lambda p: torch.optim.SGD(p, 1e-2)),
    "momentum": (optim.sgd(1e-2, momentum=0.9), lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9)),
    "nesterov": (optim.sgd(1e-2, momentum=0.9, nesterov=True), lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_equal_those_of_torch_optim(name, key):
    ours, theirs = CASES[name]
    params, x = params_of(key), random.normal(random.fold_in(key, "x"), (7, 3), torch.float64)
    tree.map(assert_close, train(ours, params, x, 20), torch_train(theirs, params, x, 20))


def test_adamw_equals_torch_in_float32_to_a_millionth(key):
    params, x = params_of(key, torch.float32), random.normal(random.fold_in(key, "x"), (7, 3))
    ours = train(optim.adamw(1e-3), params, x, 20)
    theirs = torch_train(lambda p: torch.optim.AdamW(p, 1e-3), params, x, 20)
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 1e-6


def test_clipping_equals_clip_grad_norm(key):
    params, x = params_of(key), random.normal(random.fold_in(key, "x"), (7, 3), torch.float64)
    ours = train(optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(0.1)), params, x, 5)
    tree.map(assert_close, ours, torch_train(lambda p: torch.optim.SGD(p, 0.1), params, x, 5, clip=0.5))


def test_a_small_gradient_is_not_clipped(key):
    grads = params_of(key)
    clipped, _ = optim.clip_by_global_norm(1e3).update(grads, optim.EMPTY, grads)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), clipped, grads)


def test_cosine_falls_from_the_peak_to_the_end_and_stays():
    at = optim.cosine(2.0, 10, 0.5)
    values = [float(at(torch.tensor(i))) for i in (0, 5, 10, 11)]
    assert values == pytest.approx([2.0, 1.25, 0.5, 0.5])


def test_a_cooldown_changes_nothing_before_it_begins_and_ends_at_nought():
    at = optim.cooldown(2.0, 10, 4)
    assert [float(at(torch.tensor(i))) for i in (0, 6, 7, 9, 10, 11)] == pytest.approx([2.0, 2.0, 1.5, 0.5, 0.0, 0.0])


def test_warmup_grows_linearly_into_its_schedule():
    at = optim.warmup(optim.constant(3.0), 3)
    assert [float(at(torch.tensor(i))) for i in range(4)] == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert float(optim.warmup(3.0, 0)(torch.tensor(0))) == 3.0


def test_a_schedule_counts_updates(key):
    params, x = params_of(key), random.normal(random.fold_in(key, "x"), (7, 3), torch.float64)
    ours = train(optim.sgd(optim.cosine(1e-2, 7)), params, x, 7)

    def scheduled(leaves):
        made = torch.optim.SGD(leaves, 1e-2)
        step, count = made.step, iter(range(99))

        def stepped():
            made.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * next(count) / 7))
            step()
        made.step = stepped
        return made

    tree.map(assert_close, ours, torch_train(scheduled, params, x, 7))


def test_an_ensemble_with_its_own_learning_rates_equals_single_trainings(key):
    members = [params_of(k) for k in random.split(key, 3)]
    x = random.normal(random.fold_in(key, "x"), (7, 3), torch.float64)
    rates = torch.tensor([1e-3, 1e-2, 3e-2], dtype=torch.float64)

    def step(params, state, rate):
        optimizer = optim.chain(optim.clip_by_global_norm(0.7), optim.adamw(rate, weight_decay=0.1))
        updates, state = optimizer.update(tree.grad(loss)(params, x), state, params)
        return optim.apply_updates(params, updates), state

    first = optim.chain(optim.clip_by_global_norm(0.7), optim.adamw(0.0))
    params = tree.stack(members)
    state = tree.vmap(first.init)(params)
    for _ in range(4):
        params, state = tree.vmap(step)(params, state, rates)
    for member, start, rate in zip(tree.unstack(params), members, rates.tolist()):
        alone = train(optim.chain(optim.clip_by_global_norm(0.7), optim.adamw(rate, weight_decay=0.1)), start, x, 4)
        tree.map(assert_close, member, alone)


def test_leaves_that_nothing_differentiates_stay_as_they_are(key):
    params = Params(random.normal(key, (3,)), torch.arange(4))
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1))
    grads = tree.grad(lambda p: p.w.square().sum())(params)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    new = optim.apply_updates(params, updates)
    assert torch.equal(new.b, params.b) and not torch.equal(new.w, params.w)
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(state))


def test_half_precision_parameters_keep_wide_moments(key):
    params = Params(*(p.bfloat16() for p in params_of(key)))
    optimizer = optim.adamw(1e-2)
    state = optimizer.init(params)
    updates, state = optimizer.update(tree.map(torch.ones_like, params), state, params)
    assert state.mu.w.dtype == torch.float32
    assert optim.apply_updates(params, updates).w.dtype == torch.bfloat16


def test_nothing_given_is_written_to(key):
    params = params_of(key)
    grads, optimizer = tree.map(torch.ones_like, params), optim.adamw(0.1)
    state = optimizer.init(params)
    before = tree.map(torch.clone, (params, grads, state))
    optimizer.update(grads, state, params)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), (params, grads, state), before)


@pytest.mark.parametrize("name", ["Adagrad", "RMSprop", "AdamW"])
def test_a_torch_optim_class_works_through_the_bridge(name, key):
    cls = getattr(torch.optim, name)
    params, x = params_of(key), random.normal(random.fold_in(key, "x"), (7, 3), torch.float64)
    ours = train(optim.from_torch(cls, lr=1e-2), params, x, 6)
    tree.map(assert_close, ours, torch_train(lambda p: cls(p, lr=1e-2), params, x, 6))


def test_a_torchopt_transformation_works_through_the_bridge(key):
    torchopt = pytest.importorskip("torchopt", reason="torchopt is optional and not installed")
    params, x = params_of(key), random.normal(random.fold_in(key, "x"), (7, 3), torch.float64)
    theirs = optim.from_torchopt(torchopt.adamw(1e-2, weight_decay=0.1))
    ours = train(optim.adamw(1e-2, weight_decay=0.1), params, x, 6)
    # torchopt corrects the bias of its means in float32: 5e-7 measured.
    tree.map(lambda a, b: assert_close(a, b, torch.float32), train(theirs, params, x, 6), ours)


def test_gradients_of_another_structure_are_refused(key):
    params = params_of(key)
    optimizer = optim.adamw(1e-3)
    with pytest.raises(ValueError, match=r"optim.adamw.update: grads must have the structure of params; got "):
        optimizer.update((params.w,), optimizer.init(params), params)


@pytest.mark.parametrize("make, message", [
    (lambda: optim.cosine(1.0, 0), "optim.cosine: steps must be at least 1; got 0."),
    (lambda: optim.cooldown(1.0, 5, 6), "optim.cooldown: last must lie in [1, 5], the number of steps; got 6."),
    (lambda: optim.warmup(1.0, -1), "optim.warmup: steps must be at least 0; got -1."),
])
def test_a_schedule_of_no_length_is_refused(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(message)


def test_all_leaves_in_one_call_give_what_each_leaf_gives(monkeypatch):
    shapes = [(3, 5), (7,), (), (2, 0), (11, 2)]
    params = [random.normal(random.fold_in(random.key(1), i), shape, torch.float64) for i, shape in enumerate(shapes)]
    grads = [None, *(2 * p.cos() for p in params[1:])]
    optimizer = optim.chain(optim.clip_by_global_norm(0.3), optim.adamw(optim.cosine(0.1, 9), weight_decay=0.2))
    results = []
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(optim._together, "plain", lambda *args: False)
        state, at = optimizer.init(params), params
        for _ in range(3):
            updates, state = optimizer.update(grads, state, at)
            at = optim.apply_updates(at, updates)
        results.append((at, state))
        assert at[0] is params[0] and updates[0] is None
    for a, b, p in zip(results[0][0], results[1][0], params):
        assert_close(a, b)
        assert p.numel() == 0 or p is params[0] or (a != p).all()
    for a, b in zip(tree.leaves(results[0][1]), tree.leaves(results[1][1])):
        assert_close(a.double(), b.double())


@pytest.mark.parametrize("who", ["params", "grads", "both"])
def test_leaves_that_lie_across_memory_take_the_same_step(who):
    made = [random.normal(random.key(i), (5, 3), torch.float64) for i in range(2)]
    across = [p.mT.contiguous().mT for p in made]
    grads = [p.sin() + 0.1 for p in made]
    turned = [g.mT.contiguous().mT for g in grads]
    results = []
    for params, given in ((made, grads), (across if who != "grads" else made, turned if who != "params" else grads)):
        optimizer = optim.chain(optim.clip_by_global_norm(9.0), optim.adamw(0.1, weight_decay=0.2))
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(given, state, params)
            params = optim.apply_updates(params, updates)
        results.append((params, state[1].mu, state[1].nu))
    assert not across[0].is_contiguous() and not turned[0].is_contiguous()
    tree.map(assert_close, *results)
    tree.map(lambda a, b: assert_close(a, b), results[0][0], train_by_torch(made, grads))


def train_by_torch(params, grads):
    leaves = [p.clone() for p in params]
    made = torch.optim.AdamW([p.requires_grad_() for p in leaves], 0.1, weight_decay=0.2)
    for _ in range(3):
        for p, g in zip(leaves, grads):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(leaves, 9.0)
        made.step()
    return [p.detach() for p in leaves]


def test_a_gradient_through_an_update_is_not_lost():
    params = [torch.ones(3, dtype=torch.float64)]
    grads = [torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)]
    optimizer = optim.adamw(0.1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert updates[0].requires_grad and optim.apply_updates(params, updates)[0].requires_grad
