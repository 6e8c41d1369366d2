"""Coordinate-descent attention and feed-forward against upstream and a loop, their state, and their documented errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import assert_close
from torch.nn import functional as F
from upstream import upstream

from fnattn import random, tree
from fnattn.attentions import coor_descent as family
from fnattn.models import feedforward_coor_descent as ff
from fnattn.ops.coor_descent import coor_descent

GRID = [dict(zip(("use_coor_descent", "attn_null_kv", "coor_descent_sparsity_k", "coor_descent_iters"), options))
        for options in itertools.product((True, False), (0, 2), (1, 3), (11, 20))]
KEYS = {"norm.weight": "norm", "norm.bias": "norm_bias", "null_kv": "null_kv", "to_qkv.weight": "to_qkv", "to_out.weight": "to_out",
        "to_learned_k.weight": "to_learned_k", "to_learned_k.bias": "to_learned_k_bias"}


def inputs(dim, n=11, batch=2, dtype=torch.float64, seed=3):
    return random.normal(random.key(seed), (batch, n, dim), dtype)


def module_for(cfg, dtype=torch.float64):
    cls = upstream("coordinate_descent_attention").Attention
    fields = {name: getattr(cfg, name) for name in cfg.__dataclass_fields__ if name not in ("dim", "solver", "normalize")}
    torch.manual_seed(5)
    return cls(cfg.dim, **fields).to(dtype)


def params_of(module, cfg):
    return family.Params(cfg, **{KEYS[name]: t.detach().clone() for name, t in module.state_dict().items()})


def loop(params, x, mask=None):
    """One head, one query at a time."""
    cfg = params.cfg
    normed = F.layer_norm(x, (cfg.dim,), params.norm, params.norm_bias)
    q, k, v = (t.unflatten(-1, (cfg.heads, -1)) for t in (normed @ params.to_qkv.T).chunk(3, -1))
    rows = torch.zeros_like(q)
    for b, h, i in itertools.product(range(x.shape[0]), range(cfg.heads), range(x.shape[1])):
        seen = [j for j in range(i + 1) if mask is None or mask[b, j]]
        keys, values = torch.cat((params.null_kv[0, h], k[b, seen, h])), torch.cat((params.null_kv[1, h], v[b, seen, h]))
        if not len(keys):
            continue
        s = keys @ q[b, i, h] * cfg.dim_head ** -0.5
        level = cfg.coor_descent_sparsity_k
        if cfg.learned_sparsity_k:
            level = 1 + (level - 1) * (params.to_learned_k[h] @ normed[b, i] + params.to_learned_k_bias[h]).sigmoid()
        y = coor_descent(
            s, level, eps=cfg.coor_descent_eps, eps_init=cfg.coor_descent_eps_init, eps_decay=cfg.coor_descent_eps_decay,
            n_iters=cfg.coor_descent_iters, solver=cfg.solver, impl="reference") if cfg.use_coor_descent else s.softmax(-1)
        rows[b, i, h] = y @ values / (y.sum() if cfg.normalize else 1)
    return rows.flatten(2) @ params.to_out.T


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("options", GRID, ids=str)
def test_it_equals_upstream_in_value_and_gradient(options, impl):
    cfg = family.Config(dim=6, dim_head=5, heads=3, **options)
    module, x = module_for(cfg), inputs(6)
    params, weight = params_of(module, cfg), inputs(6, seed=7)
    theirs = module(x)
    ours, state = family.apply(params, x, impl=impl)
    assert not state
    assert_close(ours, theirs)
    (theirs * weight).sum().backward()
    grads = tree.grad(lambda p: (family.apply(p, x, impl=impl)[0] * weight).sum())(params)
    for name, p in module.named_parameters():
        if p.numel():
            assert_close(getattr(grads, KEYS[name]), p.grad)
            assert p.grad.abs().max() > 0


def test_float32_equals_upstream():
    for options in GRID:
        cfg = family.Config(dim=6, dim_head=5, heads=3, **options)
        module, x = module_for(cfg, torch.float32), inputs(6, dtype=torch.float32)
        ours, theirs = family.apply(params_of(module, cfg), x)[0], module(x)
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


def test_a_learned_k_equals_upstream_where_upstream_can_run():
    cfg = family.Config(dim=6, dim_head=5, heads=1, use_coor_descent=True, learned_sparsity_k=True, coor_descent_sparsity_k=4)
    module, x = module_for(cfg), inputs(6, batch=1)
    torch.nn.init.normal_(module.to_learned_k.bias)
    assert_close(family.apply(params_of(module, cfg), x)[0], module(x))


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("options", [dict(), dict(learned_sparsity_k=True), dict(solver="exact", learned_sparsity_k=True),
                                     dict(normalize=True, attn_null_kv=2), dict(use_coor_descent=False, attn_null_kv=1),
                                     dict(coor_descent_eps_init=None, coor_descent_eps_decay=1.0)], ids=str)
def test_it_equals_the_loop_for_any_batch_and_heads(options, impl):
    cfg = family.Config(dim=7, dim_head=3, heads=3, **{"use_coor_descent": True, "coor_descent_sparsity_k": 2.5, **options})
    params = family.init(random.key(0), cfg, dtype=torch.float64)
    if cfg.learned_sparsity_k:
        params = params._replace(to_learned_k_bias=params.to_learned_k_bias + 10)
    x, mask = inputs(7), torch.rand(2, 11, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[1, :2] = False
    assert_close(family.apply(params, x, impl=impl)[0], loop(params, x))
    assert_close(family.apply(params, x, mask=mask, impl=impl)[0], loop(params, x, mask))


def test_a_learned_k_receives_a_gradient_for_every_head():
    cfg = family.Config(dim=7, dim_head=3, heads=3, use_coor_descent=True, learned_sparsity_k=True, coor_descent_sparsity_k=4)
    params = family.init(random.key(0), cfg, dtype=torch.float64)
    assert (params.to_learned_k_bias == -10).all()
    params = params._replace(to_learned_k_bias=params.to_learned_k_bias + 10)
    grads = tree.grad(lambda p: family.apply(p, inputs(7))[0].square().sum())(params)
    assert (grads.to_learned_k_bias.abs() > 0).all() and (grads.to_learned_k.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("cfg", family.FAMILY.examples, ids=str)
@pytest.mark.parametrize("cuts", [(0, 1, 11), (4, 5), (10,), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)])
def test_split_anywhere(cfg, cuts):
    params, x = family.init(random.key(0), cfg, dtype=torch.float64), inputs(cfg.dim)
    mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(1)) > 0.3
    for keep in (None, mask):
        whole, end = family.apply(params, x, family.init_state(params, 2, capacity=13), mask=keep)
        assert_close(whole, family.apply(params, x, mask=keep)[0])
        state, outs = family.init_state(params, 2, capacity=13), []
        for a, b in itertools.pairwise((0, *cuts, 11)):
            out, state = family.apply(params, x[:, a:b], state, mask=None if keep is None else keep[:, a:b])
            outs.append(out)
        assert_close(torch.cat(outs, 1), whole)
        assert int(state.pos) == 11
        for s, t in zip(tree.leaves(state), tree.leaves(end)):
            assert_close(s, t)


def test_sequences_at_different_positions_continue_under_vmap():
    cfg = family.FAMILY.examples[1]
    params, x = family.init(random.key(0), cfg, dtype=torch.float64), inputs(7)[:1]
    states = [family.apply(params, x[:, :n], family.init_state(params, 1, capacity=13))[1] for n in (2, 5)]
    step = torch.vmap(lambda s: family.apply(params, x[:, 7:9], s)[0])
    alone = torch.stack([family.apply(params, x[:, 7:9], s)[0] for s in states])
    assert_close(step(tree.stack(states)), alone)


def test_golden_numbers():
    cfg = family.Config(dim=5, dim_head=3, heads=2, use_coor_descent=True, coor_descent_sparsity_k=2, attn_null_kv=1,
                        learned_sparsity_k=True)
    params = family.init(random.key(1), cfg, dtype=torch.float64)
    params = params._replace(to_learned_k_bias=params.to_learned_k_bias + 10)
    out, _ = family.apply(params, inputs(5, n=4, batch=1))
    # From a float64 run of upstream's formula, one (sequence, head) at a time.
    torch.testing.assert_close(out[0, :, 0], torch.tensor(GOLDEN, dtype=torch.float64), rtol=1e-9, atol=1e-11)


GOLDEN = [0.10400964680782082, -0.07961073434755643, 0.2709414157339708, -0.17772766486635722]


@pytest.mark.parametrize("call, text", [
    (lambda p, x: family.apply(p, x, context=x), "coor_descent.apply: cannot take context. A query attends to its own past"),
    (lambda p, x: family.apply(p, x[0]), "coor_descent.apply: x must be [batch, seq, 7] (cfg.dim=7); got [11, 7]."),
    (lambda p, x: family.apply(p, x, family.init_state(p, 2, capacity=9)),
     "the state holds 0 of 9 positions and 11 more were given."),
    (lambda p, x: family.apply(p, x, family.init_state(p, 3, capacity=9)), "the state must have [batch, key heads, capacity, width]"),
    (lambda p, x: family.init_state(p, 2, capacity=0), "capacity must be at least 1; got 0."),
    (lambda p, x: family.Config(dim=7, coor_descent_sparsity_k=0), "coor_descent_sparsity_k must be above 0; got 0."),
    (lambda p, x: family.Config(dim=7, solver="newton"), "solver must be 'iterate' or 'exact'; got 'newton'."),
    (lambda p, x: family.Config(dim=7, attn_null_kv=-1), "attn_null_kv must be at least 0; got -1."),
], ids=lambda x: x if isinstance(x, str) else "")
def test_errors_say_what_came_and_what_to_do(call, text):
    params = family.init(random.key(0), family.FAMILY.examples[0], dtype=torch.float64)
    with pytest.raises(ValueError) as caught:
        call(params, inputs(7))
    assert text in str(caught.value) and "\n  " in str(caught.value)


def test_a_full_state_names_the_capacity_it_needs():
    params = family.init(random.key(0), family.FAMILY.examples[0], dtype=torch.float64)
    _, state = family.apply(params, inputs(7)[:, :3], family.init_state(params, 2, capacity=3))
    with pytest.raises(ValueError, match=r"holds 3 of 3 positions and 1 more was given\.\n.*capacity=4 or more"):
        family.apply(params, inputs(7)[:, :1], state)


# ------------------------------------------------------------------------------------------------ feed-forward


def theirs_ff(module, x, cfg):
    """Upstream's forward with the misspelt name put right."""
    hidden = module.proj_in(x)
    solve = upstream("colt5_attention.coor_descent").coor_descent
    return module.proj_out(solve(hidden, n_iters=cfg.coor_descent_iters, k=module.coor_descent_sparsity_k, eps=cfg.coor_descent_eps,
                                 eps_init=cfg.coor_descent_eps_init, eps_decay=cfg.coor_descent_eps_decay))


@pytest.mark.parametrize("options", [
    dict(), dict(use_coor_descent=True), dict(use_coor_descent=True, coor_descent_sparsity_k=5, mult=3),
    dict(use_coor_descent=True, coor_descent_iters=7, coor_descent_eps=0.4)], ids=str)
def test_the_feed_forward_equals_upstream(options):
    cfg = ff.Config(dim=7, **options)
    cls = upstream("coordinate_descent_attention.coordinate_descent_attention").FeedForward
    module = cls(7, cfg.mult, use_coor_descent=False, coor_descent_sparsity_k=cfg.coor_descent_sparsity_k).double()
    params, x = ff.Params(cfg, *module.parameters()), inputs(7)
    expected = theirs_ff(module, x, cfg) if cfg.use_coor_descent else module(x)
    assert_close(ff.apply(params, x), expected)
    grads = tree.grad(lambda p: ff.apply(p, x).square().sum())(params)
    for mine, theirs in zip(grads[1:], torch.autograd.grad(expected.square().sum(), list(module.parameters()))):
        assert_close(mine, theirs)


def test_the_feed_forward_turns_about_a_tenth_of_its_units_on():
    cfg = ff.Config(dim=13, use_coor_descent=True, solver="exact")
    hidden = inputs(cfg.hidden)
    y = ff.activate(cfg.activation, hidden)
    assert_close(y.sum(-1), torch.full((2, 11), 5.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="sparsity_k must be above 0; got 0 for 8 hidden units"):
        ff.apply(ff.init(random.key(0), ff.Config(dim=2, use_coor_descent=True)), inputs(2, dtype=torch.float32))


@pytest.mark.parametrize("cfg", family.FAMILY.examples[:3], ids=str)
def test_a_compiled_gradient_equals_the_plain_one(cfg):
    params, x = family.init(random.key(0), cfg, dtype=torch.float64), inputs(cfg.dim, n=5)

    def slopes(p, x):
        return tree.grad(lambda p: family.apply(p, x)[0].square().sum())(p)

    compiled = torch.compile(slopes, backend="aot_eager", fullgraph=True)(params, x)
    for mine, plain in zip(tree.leaves(compiled), tree.leaves(slopes(params, x))):
        assert_close(mine, plain)
