"""Routing: what is chosen, the gradient that a hard choice passes, several routes and blocks, upstream, documented errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import assert_close
from torch.func import grad, hessian, jacfwd, jvp, vmap
from upstream import upstream

from fnattn import random
from fnattn.ops.coor_descent import coor_descent
from fnattn.ops.routing import route, route_back, topk

OPTIONS = [dict(), dict(eps=0.3, n_iters=7), dict(eps_init=4.0, eps_decay=0.7), dict(coor_descent_k_ratio=1.0)]


def normal(shape, seed=3):
    return random.normal(random.key(seed), shape, torch.float64)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_topk_equals_upstream_in_value_and_gradient(options):
    theirs = upstream("colt5_attention.topk").topk
    for shape, k in (((3, 11), 3), ((2, 3, 7), 1), ((5,), 5)):
        x = normal(shape).requires_grad_()
        mine, other = topk(x, k, **options), theirs(x, k, **options)
        assert torch.equal(mine.indices, other.indices)
        for a, b in zip(mine, other):
            assert_close(a, b)
        for a, b in ((mine.values, other.values), (mine.gates, other.gates)):
            weight = normal(tuple(a.shape), seed=5)
            slope, expected = (torch.autograd.grad((t * weight).sum(), x, retain_graph=True)[0] for t in (a, b))
            assert_close(slope, expected)
            # Sharp choices are at the cap, where y has no slope.
            assert k == shape[-1] or "eps" not in options or slope.abs().max() > 0


def test_topk_picks_masked_entries_last_with_value_and_gradient_zero():
    x = normal((2, 7)).requires_grad_()
    mask = torch.tensor([[True, False, True, True, True, False, True], [False, False, True, False, False, True, False]])
    chosen = topk(x, 3, mask=mask)
    there = mask.gather(1, chosen.indices)
    assert there[0].all() and there[1].tolist() == [True, True, False]
    assert_close(chosen.values, torch.where(there, x.gather(1, chosen.indices), 0.0))
    (slope,) = torch.autograd.grad((chosen.values * normal((2, 3), 5)).sum(), x)
    assert (slope[~mask] == 0).all() and (slope[0][mask[0]] != 0).sum() >= 3


def test_topk_without_derivatives_is_the_plain_one():
    x = normal((2, 7)).requires_grad_()
    plain, chosen = torch.topk(x, 3), topk(x, 3, non_differentiable=True)
    assert torch.equal(chosen.values, plain.values) and torch.equal(chosen.indices, plain.indices)
    assert not chosen.gates.requires_grad and (chosen.coor_descent_values == 1).all()


def test_the_straight_through_gradient_is_the_same_in_every_mode():
    x, weight = normal((7,)), normal((3,), 5)
    options = dict(eps=0.5, n_iters=6)

    def f(x):
        return (topk(x, 3, **options).gates * weight).sum()

    def soft(x):  # what the estimate differentiates
        y = coor_descent(x, 27 / 8, **options)
        return (y.gather(-1, topk(x, 3, **options).indices) * weight).sum()

    slope = grad(soft)(x)
    assert (slope.abs() > 1e-3).sum() >= 5
    tangent = normal((7,), 9)
    assert_close(grad(f)(x), slope)
    assert_close(jacfwd(f)(x), slope)
    assert_close(jvp(f, (x,), (tangent,))[1], slope @ tangent)
    assert_close(hessian(f)(x), hessian(soft)(x))
    assert_close(jacfwd(jacfwd(f))(x), hessian(soft)(x))
    assert hessian(f)(x).abs().max() > 1e-6
    many = normal((4, 7), 8)
    assert_close(vmap(grad(f))(many), torch.stack([grad(soft)(row) for row in many]))
    assert_close(torch.compile(grad(f), backend="aot_eager", fullgraph=True)(x), slope)


# ------------------------------------------------------------------------------------------------ routes


def plain_route(x, tokens, num_tokens, ratio=9 / 8, mask=None, cosine=False, **options):
    """One sequence and one routing token at a time: indices, scores."""
    found = []
    for b, r in itertools.product(range(x.shape[0]), range(tokens.shape[1])):
        left, right = x[b], tokens[b, r]
        if cosine:
            left, right = left / left.norm(dim=-1, keepdim=True), 8 * right / right.norm()
        s = left @ right
        keep = None if mask is None else mask[b]
        y = coor_descent(s, min(num_tokens * ratio, len(s)), mask=keep, eps=0.03, eps_init=4.0, eps_decay=0.7, **options)
        order = (s if keep is None else s.masked_fill(~keep, -torch.inf)).argsort(descending=True)[:num_tokens]
        found.append((order, y[order]))
    return (torch.stack(t).view(x.shape[0], tokens.shape[1], num_tokens) for t in zip(*found))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("routes", [1, 3])
def test_each_route_takes_its_tokens_from_its_own_sequence(routes, cosine):
    x, tokens = normal((2, 11, 5)), normal((routes, 5), 5)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, ::2] = False
    for keep, own in itertools.product((None, mask), (False, True)):
        given = normal((2, routes, 5), 6) if own else tokens
        found = route(x, given, num_tokens=3, mask=keep, cosine_sim_routing=cosine, straight_through=False, keep_one_route_dim=True)
        indices, scores = plain_route(x, given.expand(2, routes, 5), 3, mask=keep, cosine=cosine)
        assert torch.equal(found.indices, indices)
        assert_close(found.scores, scores)
        for b, r, t in itertools.product(range(2), range(routes), range(3)):
            assert torch.equal(found.routed_tokens[b, r, t], x[b, indices[b, r, t]])
        assert found.routed_mask.all()
        if routes == 1:
            alone = route(x, given, num_tokens=3, mask=keep, cosine_sim_routing=cosine, straight_through=False)
            assert all(torch.equal(a, b[:, 0]) for a, b in zip(alone, found))


@pytest.mark.parametrize("options", [dict(), dict(cosine_sim_routing=True), dict(straight_through=False), dict(n_iters=9, eps=0.5)],
                         ids=str)
def test_one_route_equals_upstream(options):
    cls = upstream("colt5_attention.transformer_block").CoordinateDescentRouter
    # With the ratio at 1 no more entries reach the cap than are chosen, so upstream's choice among equals is the same set.
    module = cls(5, fetch_k_ratio=1.0, **options).double()
    x = normal((2, 11, 5))
    mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(1)) > 0.3
    for keep in (None, mask):
        theirs = module(x, num_tokens=3, mask=keep)
        ours = route(x, module.routing_token, num_tokens=3, fetch_k_ratio=1.0, mask=keep, **options)
        for b in range(2):
            a, o = ours.indices[b].argsort(), theirs.indices[b].argsort()
            assert torch.equal(ours.indices[b][a], theirs.indices[b][o])
            assert_close(ours.scores[b][a], theirs.routing_scores[b][o] if hasattr(theirs, "routing_scores") else theirs[1][b][o])
            assert torch.equal(ours.routed_tokens[b][a], theirs.routed_tokens[b][o])


def test_scores_are_one_and_pass_the_gradient_of_the_soft_choice():
    x, token, weight = normal((2, 7, 3)), normal((1, 3), 5), normal((2, 3), 7)
    options = dict(num_tokens=3, eps=0.5, eps_init=None, eps_decay=1.0, n_iters=6)

    def f(token, straight):
        return (route(x, token, straight_through=straight, **options).scores * weight).sum()

    assert_close(route(x, token, **options).scores, torch.ones(2, 3).double())
    slope = grad(lambda t: f(t, False))(token)
    assert slope.abs().max() > 1e-3
    assert_close(grad(lambda t: f(t, True))(token), slope)
    assert_close(jacfwd(lambda t: f(t, True))(token), slope)
    assert_close(vmap(grad(lambda t: f(t, True)))(torch.stack([token, token]))[1], slope)


def test_blocks_are_chosen_from_evenly():
    x, tokens = normal((2, 11, 5)), normal((3, 5), 5)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 4:7] = False
    found = route(x, tokens, num_tokens=5, route_block_size=4, mask=mask)
    assert found.indices.shape == (2, 3, 6)  # ceil(5 / 2) from each of two blocks; the last three positions are left out
    for block in range(2):
        part = slice(4 * block, 4 * block + 4)
        alone = route(x[:, part], tokens, num_tokens=3, mask=mask[:, part])
        assert torch.equal(found.indices[..., 3 * block:3 * block + 3], alone.indices + 4 * block)
        assert_close(found.scores[..., 3 * block:3 * block + 3], alone.scores)
    assert torch.equal(found.routed_tokens[1, 2], x[1, found.indices[1, 2]])
    # The second block of sequence 1 has one visible position: two masked ones are picked for want of others, with score 0.
    assert found.routed_mask[1, :, 3:].sum(-1).tolist() == [1, 1, 1]
    assert torch.equal(found.scores[1, 0, 3:] > 0, found.routed_mask[1, 0, 3:])


def test_nothing_to_choose_takes_everything():
    x, tokens = normal((2, 3, 5)), normal((2, 5), 5)
    found = route(x, tokens, num_tokens=3)
    assert torch.equal(found.indices, torch.arange(3).expand(2, 2, 3)) and (found.scores == 1).all()
    assert torch.equal(found.routed_tokens, x[:, None].expand(2, 2, 3, 5))


def test_a_random_route_depends_on_the_key_alone_and_respects_the_mask():
    x, tokens = normal((2, 11, 5)), normal((1, 5), 5)
    mask = torch.arange(11) < 4
    a, b, c = (route(x, tokens, num_tokens=3, mask=mask.expand(2, 11), random_route_key=random.key(s)).indices for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.max() < 4


def test_tokens_go_back_where_they_came_from_and_nothing_is_written_to():
    x, tokens = normal((2, 11, 5)), normal((3, 5), 5)
    found = route(x, tokens, num_tokens=4)
    src = x[:, None].expand(2, 3, 11, 5)
    before = x.clone()
    back = route_back(src, found.routed_tokens * 2, found.indices)
    assert torch.equal(x, before)
    for b, r in itertools.product(range(2), range(3)):
        chosen = torch.zeros(11, dtype=torch.bool).index_fill(0, found.indices[b, r], True)
        assert torch.equal(back[b, r][chosen], 2 * x[b][chosen]) and torch.equal(back[b, r][~chosen], x[b][~chosen])
    one = route(x, tokens[:1], num_tokens=4)
    ensemble = vmap(lambda scale: route_back(x, one.routed_tokens * scale, one.indices))(torch.tensor([1.0, 2.0]).double())
    assert torch.equal(ensemble[0], x) and (ensemble[1] - x).abs().max() > 0
    slopes = grad(lambda t: route_back(x, t, one.indices).square().sum())(one.routed_tokens)
    assert_close(slopes, 2 * one.routed_tokens)


X, TOKENS = torch.zeros(2, 7, 3), torch.zeros(1, 3)


@pytest.mark.parametrize("call, text", [
    (lambda: topk(X, 4), "topk: k must be an int from 1 to 3, the size of the last axis; got 4."),
    (lambda: topk(X, 2, coor_descent_k_ratio=0.5), "topk: coor_descent_k_ratio must be at least 1; got 0.5."),
    (lambda: route(X[0], TOKENS, num_tokens=2), "route: x must be [batch, n, d]; got [7, 3]."),
    (lambda: route(X, torch.zeros(2, 4), num_tokens=2), "route: routing_tokens must be [r, 3] or [2, r, 3]; got [2, 4]."),
    (lambda: route(X, TOKENS, num_tokens=0), "route: num_tokens must be at least 1; got 0."),
    (lambda: route(X, TOKENS, num_tokens=2, fetch_k_ratio=0.5), "route: fetch_k_ratio must be at least 1; got 0.5."),
    (lambda: route(X, TOKENS, num_tokens=2, route_block_size=8), "route_block_size must lie in [1, 7], the length of x; got 8."),
    (lambda: route(X, TOKENS, num_tokens=2, mask=torch.ones(2, 6).bool()), "mask must be bool [2, 7], True = may be chosen;"),
    (lambda: route_back(X, torch.zeros(2, 3, 2, 3), torch.zeros(2, 3, 2).long()), "route_back: expected src [..., n, d]"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_errors_say_who_what_and_what_to_do(call, text):
    with pytest.raises(ValueError) as caught:
        call()
    assert text in str(caught.value) and "\n  " in str(caught.value)
