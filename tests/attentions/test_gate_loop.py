"""The three GateLoop attentions against upstream, against a loop over complex numbers, and their documented errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import assert_close
from upstream import upstream

import fnattn
from fnattn import convert, random, tree
from fnattn.attentions import gate_loop, gate_loop_full, simple_gate_loop


def inputs(dim, n=11, batch=2, dtype=torch.float64, seed=3):
    return random.normal(random.key(seed), (batch, n, dim), dtype)


def complex_loop(params, x):
    """The recurrence with one complex matrix per head, step by step."""
    cfg = params.cfg
    heads = cfg.head_count
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (x @ params.to_qkv.T).chunk(3, -1))
    a = torch.view_as_complex((x @ params.to_a.T + params.to_a_bias).unflatten(-1, (heads, 2)))
    if cfg.ablate_complex:
        a = a.real + 0j
    alpha = torch.ones_like(a) if cfg.ablate_state_transition else torch.polar(a.abs().sigmoid(), a.angle())
    h = torch.zeros(*q[:, 0].shape, q.shape[-1], dtype=a.dtype)
    outs = []
    for t in range(x.shape[1]):
        h = alpha[:, t, :, None, None] * h + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append((q[:, t, :, :, None] * h.real).sum(-2))
    out = torch.stack(outs, 1).flatten(2)
    if cfg.sub_ln:
        out = torch.nn.functional.layer_norm(out, out.shape[-1:], params.sub_ln, params.sub_ln_bias)
    if cfg.add_swish_gating:
        out = torch.nn.functional.silu(x @ params.to_gates.T) * out
    return out @ params.to_out.T if cfg.projects_out else out


SHAPES = [dict(), dict(heads=2), dict(heads=1), dict(heads=3, dim_inner=9)]
OPTIONS = [dict(), dict(sub_ln=True), dict(add_swish_gating=False), dict(ablate_complex=True), dict(ablate_state_transition=True)]
GRID = [{**a, **b} for a, b in itertools.product(SHAPES, OPTIONS)]


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("options", GRID, ids=str)
def test_it_equals_the_loop_over_complex_numbers(options, impl):
    cfg = gate_loop.Config(dim=6, **options)
    params, x = gate_loop.init(random.key(0), cfg, dtype=torch.float64), inputs(6, n=67)
    assert_close(gate_loop.apply(params, x, impl=impl)[0], complex_loop(params, x))


@pytest.mark.parametrize("options", GRID, ids=str)
def test_it_equals_upstream_in_value_and_gradient(options):
    cls = upstream("gateloop_transformer.gateloop_transformer").GateLoopedAttention
    cfg = gate_loop.Config(dim=6, **options)
    fields = {n: getattr(cfg, n) for n in ("heads", "dim_inner", "add_swish_gating", "sub_ln", "frac_gradient_state_transition")}
    module = cls(6, checkpoint_gate_looped_attn=False, **fields).double()
    params, x = convert.load(cfg, module.state_dict()), inputs(6)
    theirs = module(x, ablate_complex=cfg.ablate_complex, ablate_state_transition=cfg.ablate_state_transition)
    ours, _ = gate_loop.apply(params, x)
    assert_close(ours, theirs)
    weight = random.normal(random.key(7), tuple(x.shape), torch.float64)
    (theirs * weight).sum().backward()
    grads = convert.dump(tree.grad(lambda p: (gate_loop.apply(p, x)[0] * weight).sum())(params))
    for name, p in module.named_parameters():
        if p.grad is not None:  # the gate of an ablated transition gets none
            assert_close(grads[name], p.grad)
            assert cfg.ablate_state_transition or p.grad.abs().max() > 0


def test_the_gradient_of_the_gate_is_scaled_and_the_library_says_so():
    cfg = gate_loop.Config(dim=6)
    exact = gate_loop.Config(dim=6, frac_gradient_state_transition=1.0)
    assert not fnattn.gradient_is_exact(cfg) and fnattn.gradient_is_exact(exact)
    params, x = gate_loop.init(random.key(0), cfg, dtype=torch.float64), inputs(6)
    scaled, full = (tree.grad(lambda p: gate_loop.apply(p, x)[0].pow(2).sum())(params._replace(cfg=c)) for c in (cfg, exact))
    assert_close(scaled.to_a, 0.9 * full.to_a)
    assert full.to_a.abs().max() > 0


def test_bfloat16_runs_where_upstream_cannot():
    cfg = gate_loop.Config(dim=6, heads=2)
    params, x = gate_loop.init(random.key(0), cfg, dtype=torch.float64), inputs(6)
    low = tree.map(lambda t: t.bfloat16(), params)
    out, _ = gate_loop.apply(low, x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert_close(out, gate_loop.apply(params, x)[0].bfloat16())


def test_a_zero_gate_halves_the_state_and_has_finite_gradients():
    cfg = gate_loop.Config(dim=6, heads=2, frac_gradient_state_transition=1.0)
    params = gate_loop.init(random.key(0), cfg, dtype=torch.float64)
    params, x = params._replace(to_a=params.to_a * 0, to_a_bias=params.to_a_bias * 0), inputs(6)
    assert_close(gate_loop.apply(params, x)[0], complex_loop(params, x))
    grads = tree.grad(lambda p: gate_loop.apply(p, x)[0].pow(2).sum())(params)
    assert all(g.isfinite().all() for g in tree.leaves(grads))


@pytest.mark.parametrize("options", [dict(), dict(prenorm=False), dict(post_ln=True), dict(reverse=True),
                                     dict(reverse=True, post_ln=True), dict(use_heinsen=True)], ids=str)
def test_the_simple_layer_equals_upstream(options):
    cls = upstream("gateloop_transformer").SimpleGateLoopLayer
    cfg = simple_gate_loop.Config(dim=7, **options)
    module = cls(7, **options).double()
    params, x = convert.load(cfg, module.state_dict()), inputs(7)
    # Upstream's logarithmic form always computes in complex64.
    dtype = torch.float32 if cfg.use_heinsen else torch.float64
    with torch.no_grad():
        theirs = module(x)
        assert_close(simple_gate_loop.apply(params, x)[0], theirs, dtype)
        if cfg.reverse:
            return
        _, cache = module(x[:, :4], return_cache=True)
        step, _ = module(x[:, 4:], cache=cache, return_cache=True)
    _, state = simple_gate_loop.apply(params, x[:, :4], simple_gate_loop.init_state(params, 2))
    assert_close(simple_gate_loop.apply(params, x[:, 4:], state)[0], step, dtype)
    assert_close(state.h.flatten(), cache[1].flatten(), dtype)


def test_the_logarithmic_form_equals_the_scan():
    params = simple_gate_loop.init(random.key(0), simple_gate_loop.Config(dim=7), dtype=torch.float64)
    other, x = params._replace(cfg=simple_gate_loop.Config(dim=7, use_heinsen=True)), inputs(7, n=65)
    a, b = (simple_gate_loop.apply(p, x)[0] for p in (params, other))
    torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-9)  # cancellation in the sums of logarithms, measured 2e-11


FULL = [dict(), dict(rotary_emb=True), dict(add_swish_gating=True), dict(softmax_normalize=False),
        dict(data_dependent_rel_pos=True, compat=True), dict(data_dependent_rel_pos=True, compat=True, softmax_normalize=True),
        dict(data_dependent_rel_pos=True, compat=True, ablate_complex=True),
        dict(data_dependent_rel_pos=True, ablate_state_transition=True)]


@pytest.mark.parametrize("options", FULL, ids=str)
def test_the_attention_form_equals_upstream(options):
    cls = upstream("gateloop_transformer.gateloop_transformer").CausalFullAttention
    cfg = gate_loop_full.Config(dim=7, dim_head=4, heads=3, **options)
    fields = {n: getattr(cfg, n) for n in ("dim_head", "heads", "rotary_emb", "add_swish_gating", "data_dependent_rel_pos",
                                           "softmax_normalize")}
    module = cls(7, **fields).double()
    params, x = convert.load(cfg, module.state_dict()), inputs(7)
    theirs = module(x, ablate_complex=cfg.ablate_complex, ablate_state_transition=cfg.ablate_state_transition)
    ours, _ = gate_loop_full.apply(params, x)
    # Upstream's rotary table is float32. Its clamped inverse reaches 1e10: compare relative to the largest output.
    dtype = torch.float32 if cfg.rotary_emb else torch.float64
    assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), dtype)


def test_relative_positions_are_products_over_time():
    cfg = gate_loop_full.Config(dim=7, dim_head=4, heads=3, data_dependent_rel_pos=True)
    params, x = gate_loop_full.init(random.key(0), cfg, dtype=torch.float64), inputs(7, n=131)
    q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in (x @ params.to_qkv.T).chunk(3, -1))
    a = torch.view_as_complex((x @ params.to_a.T).unflatten(-1, (3, 2, 2))).transpose(1, 2)
    log_alpha = torch.polar(a.abs().sigmoid(), a.angle()).log().cumsum(2)  # [b, h, n, p]
    decay = (log_alpha[:, :, :, None] - log_alpha[:, :, None]).exp().real
    scores = ((q.unflatten(-1, (2, 2))[:, :, :, None] * k.unflatten(-1, (2, 2))[:, :, None]).sum(-1) * decay).sum(-1) / 2
    expected = (scores.tril() @ v).transpose(1, 2).flatten(2) @ params.to_out.T + params.to_out_bias
    assert_close(gate_loop_full.apply(params, x)[0], expected)
    state = gate_loop_full.init_state(params, 2, capacity=140)
    outs = []
    for chunk in x.split((1, 70, 3, 57), 1):
        out, state = gate_loop_full.apply(params, chunk, state)
        outs.append(out)
    assert_close(torch.cat(outs, 1), expected)


def test_long_sequences_stay_finite_where_upstream_explodes():
    cfg = gate_loop_full.Config(dim=7, dim_head=4, heads=3, data_dependent_rel_pos=True)
    params, x = gate_loop_full.init(random.key(0), cfg), inputs(7, n=1024, dtype=torch.float32)
    value, grads = tree.value_and_grad(lambda p: gate_loop_full.apply(p, x)[0].pow(2).mean())(params)
    assert value < 10 and all(g.isfinite().all() for g in tree.leaves(grads)) and grads.to_a.abs().max() > 0


ERRORS = [
    (lambda: gate_loop.Config(dim=6, heads=4), r"gate_loop\.Config: heads must divide dim_inner=6; got 4\."),
    (lambda: simple_gate_loop.Config(dim=6, use_jax_associative_scan=True), r"use_jax_associative_scan must be False; got True"),
    (lambda: gate_loop_full.Config(dim=6, dim_head=3, rotary_emb=True), r"need an even dim_head; got 3"),
    (lambda: gate_loop.apply(P, X, mask=torch.ones(2, 11).bool()), r"gate_loop\.apply: cannot take mask\. The recurrence reads"),
    (lambda: gate_loop.apply(P, X, context=X), r"gate_loop\.apply: cannot take context\."),
    (lambda: gate_loop.apply(P, X[..., :3]), r"gate_loop\.apply: x must be \[batch, seq, 6\] \(cfg\.dim=6\); got \[2, 11, 3\]"),
    (lambda: simple_gate_loop.init_state(simple_gate_loop.init(random.key(0), REVERSED), 2), r"init_state: cannot stream\. A reversed"),
    (lambda: simple_gate_loop.apply(simple_gate_loop.init(random.key(0), REVERSED), X, simple_gate_loop.State(X[:, 0])),
     r"cannot take state\. A reversed layer"),
    (lambda: gate_loop_full.apply(F, X, gate_loop_full.init_state(F, 2, capacity=5)),
     r"gate_loop_full\.apply: the state holds 0 of 5 positions and 11 more were given\.\n  Make it larger: init_state"),
    (lambda: gate_loop_full.init_state(F, 2, capacity=0), r"capacity must be at least 1; got 0"),
]
P, X = gate_loop.init(random.key(0), gate_loop.Config(dim=6)), inputs(6, dtype=torch.float32)
F = gate_loop_full.init(random.key(0), gate_loop_full.Config(dim=6, dim_head=4, heads=2))
REVERSED = simple_gate_loop.Config(dim=6, reverse=True)


@pytest.mark.parametrize("wrong, text", ERRORS)
def test_bad_input_is_named(wrong, text):
    with pytest.raises(ValueError, match=text):
        wrong()
