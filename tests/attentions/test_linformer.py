"""Linformer attention against upstream, against its formula, with padding, and its documented errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import assert_close
from torch.func import grad, hessian, jvp, vmap
from upstream import upstream

import fnattn
from fnattn import convert, random, tree
from fnattn.attentions import linformer

FLAGS = [dict(zip(("one_kv_head", "share_kv"), bits)) for bits in itertools.product((False, True), repeat=2)]
SHAPES = [dict(k=4, heads=2), dict(k=3, heads=3, dim_head=5), dict(k=17, heads=1)]
GRID = [{**a, **b} for a, b in itertools.product(FLAGS, SHAPES)]
DIM, LONGEST = 6, 13


def drawn(seed, *shape, dtype=torch.float64):
    return random.normal(random.key(seed), shape, dtype)


def made(**options):
    cfg = linformer.Config(dim=DIM, seq_len=LONGEST, **options)
    return linformer.init(random.key(0), cfg, dtype=torch.float64)


def formula(params, x, mask=None, context=None):
    """The definition, one head at a time."""
    cfg = params.cfg
    c = x if context is None else context
    if mask is not None:
        c = c * mask[..., None]
    e, f = (p[:c.shape[1]] for p in (params.proj_k, params.proj_k if cfg.share_kv else params.proj_v))
    q = (x @ params.to_q.T).unflatten(-1, (cfg.heads, -1))
    k = e.T @ (c @ params.to_k.T)
    v = f.T @ (c @ (params.to_k if cfg.share_kv else params.to_v).T)
    k, v = (t.unflatten(-1, (cfg.kv_heads, -1)).expand(-1, -1, cfg.heads, -1) for t in (k, v))
    outs = [torch.softmax(q[:, :, h] @ k[:, :, h].mT * cfg.head_width ** -0.5, -1) @ v[:, :, h]
            for h in range(cfg.heads)]
    return torch.cat(outs, -1) @ params.to_out.T + params.to_out_bias


@pytest.mark.parametrize("options", GRID, ids=str)
def test_it_equals_its_formula_and_upstream_in_value_and_gradient(options):
    params = made(**options)
    fields = {name: getattr(params.cfg, name) for name in params.cfg.__dataclass_fields__}
    module = None
    for n, keys in ((LONGEST, None), (7, None), (1, None), (5, 11), (17, LONGEST)):
        x = drawn(1, 2, n, DIM)
        context = None if keys is None else drawn(2, 2, keys, DIM)
        out, state = linformer.apply(params, x, context=context)
        assert state == fnattn.EMPTY
        assert_close(out, formula(params, x, context=context))
        if module is None:
            module = upstream("linformer").LinformerSelfAttention(fields.pop("dim"), **fields).double()
            module.load_state_dict(convert.dump(params))
        module.zero_grad()
        theirs = module(x, context)
        assert_close(out, theirs.detach())
        theirs.square().sum().backward()
        ours = tree.grad(lambda p, x, c: linformer.apply(p, x, context=c)[0].square().sum())(params, x, context)
        for name, leaf in convert.dump(ours).items():
            assert_close(leaf, module.get_parameter(name).grad)


@pytest.mark.parametrize("options", FLAGS, ids=str)
def test_a_state_dict_survives_the_round_trip(options):
    params = made(k=4, heads=2, **options)
    again = convert.load(params.cfg, convert.dump(params))
    assert again.cfg == params.cfg and all(torch.equal(a, b) for a, b in zip(tree.leaves(again), tree.leaves(params)))


@pytest.mark.parametrize("options", GRID, ids=str)
def test_masked_rows_enter_the_mixture_as_zeros(options):
    params, x = made(**options), drawn(1, 3, 7, DIM)
    mask = random.bernoulli(random.key(3), 0.6, (3, 7))
    assert_close(linformer.apply(params, x, mask=mask)[0], formula(params, x, mask=mask))
    context, mask = drawn(2, 3, 11, DIM), random.bernoulli(random.key(4), 0.6, (3, 11))
    out, _ = linformer.apply(params, x, context=context, mask=mask)
    assert_close(out, formula(params, x, mask=mask, context=context))


def test_masking_the_end_equals_cutting_it_off_even_if_it_holds_nan():
    params, x = made(k=4, heads=2), drawn(1, 2, 11, DIM)
    padded = torch.cat((x[:, :7], torch.full((2, 4, DIM), float("nan"), dtype=torch.float64)), 1)
    mask = torch.arange(11).expand(2, 11) < 7
    queries = drawn(2, 2, 5, DIM)
    out, _ = linformer.apply(params, queries, context=padded, mask=mask)
    assert_close(out, linformer.apply(params, queries, context=x[:, :7])[0])


def test_a_query_that_sees_no_key_gives_zero_and_finite_gradients():
    params, x = made(k=4, heads=2), drawn(1, 2, 5, DIM)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    assert_close(linformer.apply(params, x, mask=mask)[0], torch.zeros(2, 5, DIM, dtype=torch.float64))
    grads = tree.grad(lambda p, x: linformer.apply(p, x, mask=mask)[0].square().sum(), (0, 1))(params, x)
    assert all(torch.isfinite(g).all() for g in tree.leaves(grads))


def test_the_cheaper_order_of_the_products_is_taken_and_both_are_right():
    assert linformer.mixes_first(m=4096, dim=512, kv=512, k=256)
    assert not linformer.mixes_first(m=4096, dim=512, kv=64, k=256)
    params = made(k=2, heads=2, one_kv_head=True)
    for n in (2, LONGEST):
        x = drawn(1, 2, n, DIM)
        assert_close(linformer.apply(params, x)[0], formula(params, x))
    both = {linformer.mixes_first(m, DIM, params.to_k.shape[0], k) for m in (1, LONGEST) for k in (1, 2, 17)}
    assert both == {False, True}


def test_golden_numbers():
    params = made(k=4, heads=2, dim_head=3)
    ones = tree.map(lambda t: torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape), params)
    out, _ = linformer.apply(ones, torch.linspace(0, 1, 5 * DIM, dtype=torch.float64).view(1, 5, DIM))
    assert_close(out[0, ::2, 1], torch.tensor(GOLDEN, dtype=torch.float64))


GOLDEN = [-2.8088540927133008, -2.660358629421262, -2.5944253321426483]  # from linformer 0.2.3


def test_derivatives_in_every_mode_agree_and_are_not_zero():
    params, x = made(k=4, heads=2, one_kv_head=True), drawn(1, 2, 5, DIM)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    f = lambda x: linformer.apply(params, x, mask=mask)[0].sin().sum()  # noqa: E731
    g = lambda x: formula(params, x, mask=mask).sin().sum()  # noqa: E731
    t = drawn(5, *x.shape)
    for take in (lambda f: grad(f)(x), lambda f: jvp(f, (x,), (t,))[1], lambda f: hessian(f)(x),
                 lambda f: jvp(grad(f), (x,), (t,))[1], lambda f: grad(lambda x: (grad(f)(x) * t).sum())(x)):
        ours, theirs = take(f), take(g)
        assert_close(ours, theirs)
        assert theirs.abs().max() > 1e-3
    one = lambda x, m: linformer.apply(params, x[None], mask=m[None])[0].sin().sum()  # noqa: E731
    assert_close(vmap(grad(one))(x, mask), grad(f)(x))


def test_an_ensemble_under_vmap_equals_a_loop():
    cfg = linformer.Config(dim=DIM, seq_len=LONGEST, k=4, heads=2)
    members = [linformer.init(random.key(i), cfg, dtype=torch.float64) for i in range(3)]
    x = drawn(1, 2, 5, DIM)
    out = tree.vmap(lambda p: linformer.apply(p, x)[0])(tree.stack(members))
    for got, member in zip(out, members):
        assert_close(got, linformer.apply(member, x)[0])


def test_dropout_acts_on_the_attention_matrix_exactly_when_a_key_is_given():
    params, x = made(k=16, heads=2, dropout=0.5), drawn(1, 2, 7, DIM)
    plain = linformer.apply(params, x)[0]
    keys = random.split(random.key(1), 3000)
    outs = vmap(lambda key: linformer.apply(params, x, dropout_key=key)[0])(keys)
    assert_close(outs[5], linformer.apply(params, x, dropout_key=keys[5])[0])
    assert not torch.equal(outs[0], outs[1])
    error = (outs.mean(0) - plain).abs().max() / (outs.std(0).max() / 3000 ** 0.5)
    assert error < 5  # standard errors
    assert_close(linformer.apply(params._replace(cfg=made(k=16, heads=2).cfg), x, dropout_key=keys[0])[0], plain)


def test_bfloat16_stays_near_float64():
    params, x = made(k=4, heads=2), drawn(1, 2, 7, DIM)
    low = tree.map(lambda t: t.bfloat16(), params)
    out, _ = linformer.apply(low, x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert_close(out.double(), linformer.apply(params, x)[0], torch.bfloat16)


# ------------------------------------------------------------------------------------------------ errors


def test_it_refuses_to_stream_and_says_why():
    params, x = made(k=4, heads=2), drawn(1, 2, 5, DIM)
    text = ("cannot stream. Its projection mixes all positions, so no prefix has a final answer.\n"
            "  Call apply.params, x. on the whole sequence, or choose a streaming family: full, gate_loop, taylor.")
    with pytest.raises(ValueError, match="linformer.init_state: " + text):
        fnattn.attentions.init_state(params, 2, capacity=5)
    with pytest.raises(ValueError, match="linformer.apply: " + text):
        fnattn.attentions.apply(params, x, (x,))


@pytest.mark.parametrize(("build", "text"), [
    (lambda p, x: linformer.apply(p, x[0]), r"x must be \[batch, seq, 6\]"),
    (lambda p, x: linformer.apply(p, torch.cat((x, x), 1)), "x must have at most cfg.seq_len=13 positions; got 14"),
    (lambda p, x: linformer.apply(p, x, context=torch.cat((x, x), 1)),
     "context must have at most cfg.seq_len=13 positions; got 14"),
    (lambda p, x: linformer.apply(p, x, mask=torch.ones(2, 3, dtype=torch.bool)),
     r"mask must be \[batch, keys\] = \[2, 7\]"),
    (lambda p, x: linformer.Config(dim=7, seq_len=3, heads=2), "heads must divide dim=7"),
    (lambda p, x: linformer.Config(dim=6, seq_len=3, heads=2, k=0), "k must be at least 1; got 0"),
    (lambda p, x: linformer.Config(dim=6, seq_len=3, heads=2, dropout=1.5), r"dropout must lie in \[0, 1\]; got 1.5"),
])
def test_mistakes_are_named(build, text):
    with pytest.raises(ValueError, match=text):
        build(made(k=4, heads=2), drawn(1, 2, 7, DIM))
