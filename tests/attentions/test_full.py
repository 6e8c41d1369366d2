"""Softmax attention against DALLE's, against recorded numbers, in pieces through its cache, and its documented errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import assert_close
from torch.autograd import gradcheck, gradgradcheck
from upstream import upstream

import fnattn
from fnattn import convert, random, tree
from fnattn.attentions import full

F64 = torch.float64
CAUSAL, GROUPED, MASKED, TWO_WAY = full.FAMILY.examples
STREAMING = [CAUSAL, GROUPED, MASKED]
IMPLS = ["reference", "native"]


def inputs(cfg, n=11, batch=2, dtype=F64, seed=3):
    return random.normal(random.key(seed), (batch, n, cfg.dim), dtype)


def holes(n=11, batch=2, seed=4):
    """A mask of keys; the first sequence starts with two that are not there."""
    keep = random.uniform(random.key(seed), (batch, n)) > 0.3
    keep[0, :2] = False
    keep[1, 0] = True
    return keep


def params_of(cfg, dtype=F64):
    return full.init(random.key(0), cfg, dtype=dtype)


def dense(params, x, mask=None, angles=None):
    """The formula with a table of weights, a query head and a row at a time."""
    cfg, (b, n, _) = params.cfg, x.shape
    h, g, d = cfg.heads, cfg.key_heads, cfg.dim_head
    q, k, v = (t.unflatten(-1, (-1, d)) for t in (x @ params.to_qkv.T).split([h * d, g * d, g * d], -1))
    rows = []
    for bi, i in itertools.product(range(b), range(n)):
        keys = [j for j in range(n) if (j <= i or not cfg.causal) and (mask is None or mask[bi, j])
                and (cfg.static_mask is None or cfg.static_mask[i][j] == "1")]
        heads = [(k[bi, keys, a * g // h] @ q[bi, i, a] * d ** -0.5).softmax(0) @ v[bi, keys, a * g // h] for a in range(h)]
        rows.append(params.to_out @ torch.cat(heads) + params.to_out_bias if keys else x.new_zeros(cfg.dim))
    return torch.stack(rows).view(b, n, -1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cfg", [CAUSAL, MASKED, TWO_WAY, full.Config(dim=7, seq_len=13, heads=6, dim_head=3, kv_heads=2)], ids=str)
def test_it_equals_the_formula_row_by_row_in_value_gradient_and_tangent(cfg, impl):
    params, x = params_of(cfg), inputs(cfg)
    move, weight = tree.map(torch.cos, params), inputs(cfg, seed=8)
    for mask in (None, holes()):
        def derivatives(fn):
            out, pull = torch.func.vjp(fn, params)
            return [out, *tree.leaves(pull(weight)[0]), torch.func.jvp(fn, (params,), (move,))[1]]

        ours = derivatives(lambda p: full.apply(p, x, mask=mask, impl=impl)[0])  # noqa: B023
        theirs = derivatives(lambda p: dense(p, x, mask))  # noqa: B023
        for a, b in zip(ours, theirs):
            assert b.abs().max() > 0
            assert_close(a, b)


# ------------------------------------------------------------------------------------------------ upstream

SPARSE = torch.tensor([[(3 * i + j) % 4 != 1 or i == j for j in range(13)] for i in range(13)])
GRID = [dict(causal=c, stable=s, static_mask=m, heads=h) for c in (True, False) for s in (True, False) for m in (None, SPARSE)
        for h in (1, 3)]


def table(n=13, f=2):
    """Rotary angles [n, f]."""
    return torch.arange(n, dtype=F64)[:, None] * torch.tensor([1.0, 0.1], dtype=F64)[:f]


@pytest.mark.parametrize("rotary", [False, True], ids=["", "rotary table"])
@pytest.mark.parametrize("options", GRID, ids=lambda o: " ".join(f"{k}={'some' if torch.is_tensor(o[k]) else o[k]}" for k in o))
def test_it_equals_upstream_in_value_and_gradient(options, rotary):
    module = upstream("dalle_pytorch.attention").Attention(7, 13, dim_head=5, **options).double()
    cfg = full.Config(dim=7, seq_len=13, dim_head=5, **options)
    params, x, n = convert.load(cfg, module.state_dict()), inputs(cfg, 13), 13
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[1, [4, 7]] = False  # no row is left without a key: there upstream averages over everything, the future too
    angles = table() if rotary else None
    theirs_table = angles.repeat_interleave(2, -1)[None] if rotary else None
    for mask in (None, keep):
        theirs = module(x, mask=mask, rotary_pos_emb=theirs_table)
        assert_close(full.attend(params, x, mask=mask, angles=angles)[0], theirs)
    weight = inputs(cfg, 13, seed=9)
    (theirs * weight).sum().backward()
    grads = convert.dump(tree.grad(lambda p: (full.attend(p, x, mask=keep, angles=angles)[0] * weight).sum())(params))
    for name, p in module.named_parameters():
        assert_close(grads[name], p.grad)


def wave(*shape):
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=F64).mul(0.7).sin().view(shape)


# Rows 1 and 6 of dalle-pytorch 1.6.6's Attention(5, 7, heads=2, dim_head=4, **options) in float64, with to_qkv = wave(24, 5),
# to_out = wave(5, 8), its bias = wave(5), x = 2 wave(1, 7, 5).
KEYS = torch.tensor([[True, True, False, True, True, False, True]])
GOLDEN = [
    (dict(), None, False, [0.599629512522, -0.778020039703, -1.827576420949, -2.075305366635, -1.398680257727,
                           0.490134176375, -1.035527106231, -2.117508473351, -2.267521113966, -1.40690015521]),
    (dict(causal=False), KEYS, False, [0.806939234273, -0.28722995681, -1.273606059094, -1.706814428807, -1.381072623742,
                                       0.731790274542, -0.178646010913, -1.03002909258, -1.437578406665, -1.207029046178]),
    (dict(stable=True, static_mask=[[(i * 3 + j) % 4 != 1 or i == j for j in range(7)] for i in range(7)]), KEYS, False,
     [0.599629512522, -0.778020039703, -1.827576420949, -2.075305366635, -1.398680257727,
      0.731531885687, 1.778739338977, 2.006391873216, 1.314925231173, 0.026045791992]),
    # with the table of angles that `table` gives, in float32 as it was recorded
    (dict(), None, True, [0.599635041089, -0.778019249512, -1.827580723827, -2.075312831157, -1.398687533305,
                          -3.966572172712, 1.766652622089, 6.685747841212, 8.585309592424, 6.624013892477]),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options, mask, rotary, expected", GOLDEN, ids=["causal", "key mask", "static mask", "rotary table"])
def test_recorded_numbers_of_upstream_come_out(options, mask, rotary, expected, impl):
    params = full.Params(full.Config(dim=5, seq_len=7, heads=2, dim_head=4, **options), wave(24, 5), wave(5, 8), wave(5))
    angles = torch.arange(7.0)[:, None] * torch.tensor([1.0, 0.1]) if rotary else None
    out, _ = full.attend(params, 2 * wave(1, 7, 5), mask=mask, angles=angles, impl=impl)
    assert (out[0, [1, 6]].flatten() - torch.tensor(expected, dtype=F64)).abs().max() < 1e-11


# ------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cfg", STREAMING, ids=str)
@pytest.mark.parametrize("cuts", [(), (1,), (4,), (3, 3, 5), tuple(range(1, 11)), (10,)], ids=str)
def test_a_sequence_may_be_cut_anywhere(cfg, cuts, impl):
    params, x, keep = params_of(cfg), inputs(cfg), holes()
    whole, end = full.apply(params, x, full.init_state(params, 2, capacity=13), mask=keep, impl=impl)
    assert_close(whole, full.apply(params, x, mask=keep, impl=impl)[0])
    state, parts = full.init_state(params, 2, capacity=13), []
    for first, last in zip((0, *cuts), (*cuts, 11)):
        out, state = full.apply(params, x[:, first:last], state, mask=keep[:, first:last], impl=impl)
        parts.append(out)
    assert_close(torch.cat(parts, 1), whole)
    for a, b in zip(tree.leaves(state), tree.leaves(end)):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert_close(a.double(), b.double())
    assert state.pos == 11


@pytest.mark.parametrize("cfg", STREAMING, ids=str)
def test_gradients_and_tangents_flow_through_the_cache(cfg):
    params, x = params_of(cfg), inputs(cfg, 5)

    def in_pieces(params, x):
        state, outs = full.init_state(params, 2, capacity=7), []
        for piece in x.split(2, 1):
            out, state = full.apply(params, piece, state)
            outs.append(out)
        return torch.cat(outs, 1).sin().sum()

    def at_once(params, x):
        return full.apply(params, x)[0].sin().sum()

    for a, b in zip(*(tree.leaves(torch.func.grad(f, (0, 1))(params, x)) for f in (in_pieces, at_once))):
        assert b.abs().max() > 0
        assert_close(a, b)
    a, b = (torch.func.jvp(f, (params, x), (params, x))[1] for f in (in_pieces, at_once))
    assert b.abs() > 0
    assert_close(a, b)


@pytest.mark.parametrize("cfg", STREAMING, ids=str)
def test_sequences_at_different_positions_run_under_one_vmap(cfg):
    params, x = params_of(cfg), inputs(cfg)
    states = [full.apply(params, x[:, :n], full.init_state(params, 2, capacity=11), mask=holes()[:, :n])[1] for n in (2, 5, 8)]
    out, new = tree.vmap(lambda s: full.apply(params, x[:, 8:], s))(tree.stack(states))
    loop = [full.apply(params, x[:, 8:], s) for s in states]
    assert_close(out, torch.stack([o for o, _ in loop]))
    assert new.pos.tolist() == [5, 8, 11]
    for a, b in zip(tree.leaves(new), tree.leaves(tree.stack([s for _, s in loop]))):
        assert_close(a.double(), b.double())


def test_the_cache_remembers_what_was_masked():
    params, x = params_of(CAUSAL), inputs(CAUSAL)
    keep = torch.ones(2, 4, dtype=torch.bool)
    keep[:, 1] = False
    _, state = full.apply(params, x[:, :4], full.init_state(params, 2, capacity=11), mask=keep)
    later, _ = full.apply(params, x[:, 4:], state)
    without, _ = full.apply(params, torch.cat((x[:, :1], x[:, 2:]), 1))
    assert_close(later, without[:, 3:])


def test_a_state_is_not_written_to_and_holds_the_dtype_of_the_params():
    for dtype in (torch.float32, torch.bfloat16):
        params = params_of(CAUSAL, dtype)
        state = full.init_state(params, 2, capacity=5)
        out, new = full.apply(params, inputs(CAUSAL, 3, dtype=dtype), state)
        assert not any(rows.any() for rows in (*state.k, *state.v)) and state.pos == 0 and new.pos == 3
        assert out.dtype == dtype and new.k.main.dtype == new.k.late.dtype == dtype and state.visible.all() and new.visible.all()


# ------------------------------------------------------------------------------------------------ what masks mean


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cfg", full.FAMILY.examples, ids=str)
def test_a_row_that_sees_nothing_is_zero_with_finite_gradients(cfg, impl):
    params, x = params_of(cfg), inputs(cfg)
    keep = holes()
    keep[0] &= cfg.causal  # else every row sees the later keys
    keep[1] = True
    out, _ = full.apply(params, x, mask=keep, impl=impl)
    assert (out[0, :2] == 0).all() and out[1].abs().sum(-1).min() > 0
    grads = tree.leaves(torch.func.grad(lambda p, x: full.apply(p, x, mask=keep, impl=impl)[0].sum(), (0, 1))(params, x))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cfg", STREAMING, ids=str)
def test_the_future_does_not_leak_into_the_past(cfg, impl):
    params, x, keep = params_of(cfg), inputs(cfg), holes()
    before, _ = full.apply(params, x, mask=keep, impl=impl)
    changed = torch.cat((x[:, :6], x[:, 6:] + 1), 1)
    after, _ = full.apply(params, changed, mask=keep, impl=impl)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])


def test_shared_key_heads_equal_repeated_ones():
    params = params_of(GROUPED)
    q, k, v = params.to_qkv.split([24, 8, 8])
    k, v = (t.view(2, 4, 7).repeat_interleave(3, 0).reshape(24, 7) for t in (k, v))
    wide = full.Params(full.Config(**{**vars(GROUPED), "kv_heads": None}), torch.cat((q, k, v)), *params[2:])
    x = inputs(GROUPED)
    assert_close(full.apply(params, x)[0], full.apply(wide, x)[0])


def test_a_context_is_attended_to_with_its_own_mask():
    params, x, context = params_of(TWO_WAY), inputs(TWO_WAY, 3), inputs(TWO_WAY, 7, seed=5)
    keep = torch.tensor([[True] * 5 + [False] * 2, [False] * 3 + [True] * 4])
    out, _ = full.apply(params, x, context=context, mask=keep)
    for b in range(2):
        one, _ = full.apply(params, x[b:b + 1], context=context[b:b + 1, keep[b]])
        assert_close(out[b:b + 1], one)
    assert_close(full.apply(params, x, context=x)[0], full.apply(params, x)[0])


def test_rotary_makes_scores_depend_on_distance():
    params, x = params_of(GROUPED), inputs(GROUPED, 7)
    pad = torch.zeros(2, 6, dtype=torch.bool)
    late, _ = full.apply(params, torch.cat((x[:, :1].expand(2, 6, 7), x), 1), mask=torch.cat((pad, torch.ones(2, 7).bool()), 1))
    assert (late[:, 6:] - full.apply(params, x)[0]).abs().max() < 1e-6  # angles are float32
    plain = params._replace(cfg=full.Config(**{**vars(GROUPED), "rotary_emb": False}))
    assert (full.apply(plain, x)[0] - full.apply(params, x)[0]).abs().max() > 1e-3


def test_dropout_happens_exactly_with_a_key():
    params, x = params_of(GROUPED), inputs(GROUPED, 101)
    dry, _ = full.apply(params, x)
    wet, _ = full.apply(params, x, dropout_key=random.key(1))
    again, _ = full.apply(params, x, dropout_key=random.key(1))
    kept = wet != 0
    assert torch.equal(wet, again) and 0.7 < kept.double().mean() < 0.8
    assert_close(wet[kept], dry[kept] / 0.75)
    sure = params_of(CAUSAL)
    assert torch.equal(full.apply(sure, x, dropout_key=random.key(1))[0], full.apply(sure, x)[0])


@pytest.mark.parametrize("cfg", [CAUSAL, MASKED], ids=str)
def test_derivatives_equal_finite_differences(cfg):
    params, keep = params_of(cfg), holes(5)
    x = inputs(cfg, 5).requires_grad_()

    def fn(x, to_qkv):
        return full.apply(params._replace(to_qkv=to_qkv), x, mask=keep)[0]

    args = (x, params.to_qkv.clone().requires_grad_())
    assert gradcheck(fn, args, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(fn, args, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_twice_plain_torch(dtype, impl):
    params, x = params_of(CAUSAL, dtype), inputs(CAUSAL, dtype=dtype)
    exact = dense(tree.map(lambda t: t.double(), params), x.double())
    ours, theirs = full.apply(params, x, impl=impl)[0], dense(params, x)
    assert ours.dtype == dtype
    assert (ours.double() - exact).norm() <= 2 * (theirs.double() - exact).norm()


# ------------------------------------------------------------------------------------------------ configs, parameters, errors


def test_a_static_mask_may_be_a_tensor_or_bools_or_strings():
    given = SPARSE[:3, :3]
    forms = [given, given.tolist(), tuple("".join("01"[v] for v in row) for row in given.tolist())]
    made = [full.Config(dim=5, seq_len=3, static_mask=form) for form in forms]
    assert made[0] == made[1] == made[2] and len({hash(cfg) for cfg in made}) == 1
    assert made[0].static_mask == forms[2]


def test_parameters_are_drawn_by_name_within_the_bounds_of_linear_layers():
    params = full.init(random.key(7), full.Config(dim=5, seq_len=3, heads=6, dim_head=3, kv_heads=2))
    assert [tuple(t.shape) for t in params[1:]] == [(30, 5), (5, 18), (5,)]
    for leaf, fan_in in zip(params[1:], (5, 18, 18)):
        assert 0.7 * fan_in ** -0.5 < leaf.abs().max() <= fan_in ** -0.5
    named = random.uniform(random.fold_in(random.key(7), "to_out_bias"), (5,), torch.float32, -(18 ** -0.5), 18 ** -0.5)
    assert torch.equal(params.to_out_bias, named)
    assert fnattn.init(random.key(7), params.cfg, device="meta").to_qkv.shape == (30, 5)


P, X = params_of(CAUSAL), inputs(CAUSAL, 3)


def state_after(n, capacity):
    return full.apply(P, inputs(CAUSAL, n), full.init_state(P, 2, capacity=capacity))[1]


ERRORS = {
    "one sequence": (lambda: full.apply(P, X[0]), ValueError,
                     r"full.apply: x must be \[batch, seq, 7\] \(cfg.dim=7\); got \[3, 7\]", lambda: full.apply(P, X[0][None])),
    "wrong width": (lambda: full.apply(P, X[..., :5]), ValueError, r"got \[2, 3, 5\]", lambda: full.apply(P, X)),
    "float mask": (lambda: full.apply(P, X, mask=torch.ones(2, 3)), TypeError, "mask must be bool",
                   lambda: full.apply(P, X, mask=torch.ones(2, 3).bool())),
    "long mask": (lambda: full.apply(P, X, mask=torch.ones(2, 4).bool()), ValueError, r"= \[2, 3\], describing x; got \[2, 4\]",
                  lambda: full.apply(P, X, mask=torch.ones(2, 3).bool())),
    "causal context": (lambda: full.apply(P, X, context=X), ValueError, "full.apply: cannot take context. With causal=True",
                       lambda: full.apply(P._replace(cfg=full.Config(**{**vars(CAUSAL), "causal": False})), X, context=X)),
    "state of a two-way config": (lambda: full.apply(params_of(TWO_WAY), inputs(TWO_WAY), state_after(0, 3)), ValueError,
                                  "full.apply: cannot take state. A non-causal query sees later keys",
                                  lambda: full.apply(params_of(TWO_WAY), inputs(TWO_WAY))),
    "no state of a two-way config": (lambda: full.init_state(params_of(TWO_WAY), 2, capacity=3), ValueError,
                                     "full.init_state: cannot stream", lambda: full.init_state(P, 2, capacity=3)),
    "full cache, one more": (lambda: full.apply(P, X[:, :1], state_after(5, 5)), ValueError,
                             r"the state holds 5 of 5 positions and 1 more was given.\n.*capacity=6 or more",
                             lambda: full.apply(P, X[:, :1], state_after(5, 6))),
    "full cache, three more": (lambda: full.apply(P, X, state_after(5, 7)), ValueError,
                               r"the state holds 5 of 7 positions and 3 more were given.\n.*capacity=8 or more",
                               lambda: full.apply(P, X, state_after(5, 8))),
    "other batch": (lambda: full.apply(P, X[:1], state_after(1, 5)), ValueError,
                    r"\[1, 3, capacity, 5\]; got \[2, 3, 5, 5\]",
                    lambda: full.apply(P, X[:1], full.init_state(P, 1, capacity=3))),
    "not a state": (lambda: full.apply(P, X, {"pos": 0}), TypeError, "state must come from full.init_state; got dict",
                    lambda: full.apply(P, X, full.init_state(P, 2, capacity=3))),
    "no room": (lambda: full.init_state(P, 2, capacity=0), ValueError, "capacity must be at least 1; got 0",
                lambda: full.init_state(P, 2, capacity=1)),
    "longer than the mask": (lambda: full.apply(params_of(MASKED), inputs(MASKED, 14)), ValueError,
                             "x has 14 positions, but cfg.static_mask has 13",
                             lambda: full.apply(params_of(MASKED), inputs(MASKED, 13))),
    "cache longer than the mask": (lambda: full.init_state(params_of(MASKED), 2, capacity=14), ValueError,
                                   "capacity must be at most 13, the side of cfg.static_mask; got 14",
                                   lambda: full.init_state(params_of(MASKED), 2, capacity=13)),
    "context of a masked config": (lambda: full.apply(params_of(full.Config(**{**vars(MASKED), "causal": False})), inputs(MASKED),
                                                      context=inputs(MASKED)), ValueError,
                                   "cannot take context. The rows and columns of static_mask are positions of x",
                                   lambda: full.apply(params_of(full.Config(dim=5, seq_len=13, causal=False)), inputs(MASKED),
                                                      context=inputs(MASKED))),
    "context with rotary": (lambda: full.apply(params_of(full.Config(dim=7, seq_len=3, causal=False, rotary_emb=True)), X,
                                               context=X), ValueError, "cannot take context. Rotary positions",
                            lambda: full.apply(params_of(full.Config(dim=7, seq_len=3, causal=False)), X, context=X)),
    "mask of another size": (lambda: full.Config(dim=5, seq_len=3, static_mask=SPARSE), ValueError,
                             r"static_mask must be bools \[3, 3\] \(cfg.seq_len\); got 13 rows of \[13\]",
                             lambda: full.Config(dim=5, seq_len=13, static_mask=SPARSE)),
    "mask of one row": (lambda: full.Config(dim=5, seq_len=3, static_mask=[True] * 3), ValueError, "static_mask must be bools",
                        lambda: full.Config(dim=5, seq_len=3, static_mask=[[True] * 3] * 3)),
    "no heads": (lambda: full.Config(dim=5, seq_len=3, heads=0), ValueError, "heads must be at least 1; got 0",
                 lambda: full.Config(dim=5, seq_len=3, heads=1)),
    "odd rotary": (lambda: full.Config(dim=5, seq_len=3, dim_head=3, rotary_emb=True), ValueError, "even dim_head; got 3",
                   lambda: full.Config(dim=5, seq_len=3, dim_head=4, rotary_emb=True)),
    "key heads": (lambda: full.Config(dim=5, seq_len=3, heads=6, kv_heads=4), ValueError, "kv_heads must divide heads=6; got 4",
                  lambda: full.Config(dim=5, seq_len=3, heads=6, kv_heads=3)),
    "dropout": (lambda: full.Config(dim=5, seq_len=3, dropout=1.5), ValueError, r"dropout must lie in \[0, 1\]; got 1.5",
                lambda: full.Config(dim=5, seq_len=3, dropout=0.5)),
    "unknown field": (lambda: full.Config(dim=5, seq_len=3, head=2), TypeError, "unexpected keyword argument 'head'",
                      lambda: full.Config(dim=5, seq_len=3, heads=2)),
    "unknown implementation": (lambda: full.apply(P, X, impl="flash"), ValueError, "impl must be one of",
                               lambda: full.apply(P, X, impl="auto")),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_is_named_and_its_remedy_works(name):
    wrong, error, text, right = ERRORS[name]
    with pytest.raises(error, match=text):
        wrong()
    right()
