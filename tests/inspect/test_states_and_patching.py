"""Gradients through states, interventions, gradients of tapped values, the bridge to other tools."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close

from fnattn import attentions, inspect, optim, random, taps, tree
from fnattn.attentions import block_sparse, full, gate_loop, gate_loop_full, simple_gate_loop, sparse_conv, taylor
from fnattn.models import lm
from fnattn.testing.world import make_params, make_x

STREAMS = [taylor.FAMILY.examples[0], gate_loop.FAMILY.examples[1], gate_loop_full.FAMILY.examples[1],
           simple_gate_loop.FAMILY.examples[0], full.FAMILY.examples[0], sparse_conv.FAMILY.examples[0]]
NAMES = [attentions.find(cfg).name for cfg in STREAMS]


def begun(cfg, key, seen=4, capacity=9):
    family = attentions.find(cfg)
    params, x = make_params(family, cfg, key), make_x(cfg, key, 2, capacity)
    state = family.apply(params, x[:, :seen], family.init_state(params, 2, capacity=capacity))[1]
    return params, x[:, seen:seen + 3], state


@pytest.mark.parametrize("cfg", STREAMS, ids=NAMES)
def test_the_influence_of_a_state_is_the_norm_of_its_jacobian(cfg, key):
    params, x, state = begun(cfg, key)
    jacobian = inspect.state_jacobian(params, x, state, chunk_size=4)
    square = sum(j.flatten(3).square().sum((2, 3)) for j in tree.leaves(jacobian) if j is not None)
    found = inspect.state_influence(params, x, state)
    assert_close(found, square.sqrt())
    assert (found > 0).all()


def test_the_jacobian_of_a_state_is_a_finite_difference(key):
    params, x, state = begun(gate_loop.FAMILY.examples[1], key)
    jacobian = inspect.state_jacobian(params, x, state)
    step = torch.zeros_like(state.h)
    step[1, 0, 2, 1, 0] = 1e-6
    up, down = (gate_loop.apply(params, x, state._replace(h=state.h + sign * step))[0] for sign in (1, -1))
    torch.testing.assert_close(jacobian.h[..., 1, 0, 2, 1, 0], (up - down) / 2e-6, rtol=1e-6, atol=1e-8)
    assert not jacobian.h[0, :, :, 1].any()  # sequences do not touch one another


@pytest.mark.parametrize("cfg", STREAMS, ids=NAMES)
def test_memory_is_the_jacobian_of_the_whole_sequence_wherever_it_is_cut(cfg, key):
    family = attentions.find(cfg)
    params, x = make_params(family, cfg, key), make_x(cfg, key, 2, 6)
    whole = torch.func.jacrev(lambda x: family.apply(params, x)[0][:, -1].sum(0))(x)  # [e, b, m, dim]: sequences do not touch
    for cut in (None, 2):
        found = inspect.memory(params, x, cut=cut)
        torch.testing.assert_close(found.norm, whole.square().sum((0, 3)).sqrt(), rtol=1e-9, atol=1e-11)
    assert found.distance.tolist() == [5, 4, 3, 2, 1, 0] and (found.reach <= 5).all()


def test_a_gate_loop_that_forgets_remembers_less_far(key):
    cfg = gate_loop.Config(dim=6, heads=2, add_swish_gating=False, frac_gradient_state_transition=1.0)
    params, x = make_params(gate_loop.FAMILY, cfg, key), make_x(cfg, key, 1, 12)
    slow = params._replace(to_a_bias=torch.full_like(params.to_a_bias, 6.0))
    fast = params._replace(to_a=params.to_a * 1e-3, to_a_bias=torch.zeros_like(params.to_a_bias))  # alpha near 1/2
    assert inspect.memory(fast, x).reach < inspect.memory(slow, x).reach


# ------------------------------------------------------------------------------------------------ taps


MODEL = lm.Config(attention=gate_loop.Config(dim=6, heads=2, frac_gradient_state_transition=1.0), depth=2, num_tokens=13)
ATTN, FF = ["blocks.0.attn_out", "blocks.1.attn_out"], ["blocks.0.ff_out", "blocks.1.ff_out"]


def model(key):
    params = lm.init(key, MODEL, dtype=torch.float64)
    clean = random.randint(key, (1, 5), 0, 13)
    corrupted = clean.clone()
    corrupted[0, 1] = (clean[0, 1] + 5) % 13
    return params, clean, corrupted


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_sweep_of_patches_is_a_loop_over_taps_and_positions(key, chunk_size):
    params, clean, corrupted = model(key)

    def metric(ids):
        return lm.apply(params, ids)[0][0, -1, 3]

    found = inspect.patch(metric, clean, corrupted, ATTN + FF, chunk_size=chunk_size)
    _, values = taps.harvest(metric)(clean)
    for t, name in enumerate(ATTN + FF):
        for position in range(5):
            def put(old, name=name, position=position):
                return torch.cat((old[:, :position], values[name][:, position:position + 1], old[:, position + 1:]), 1)

            assert_close(found.metric[t, position], taps.plant(metric, {name: put})(corrupted))
    assert_close(found.restored, (found.metric - metric(corrupted)) / (metric(clean) - metric(corrupted)))
    assert found.restored[:, 0].abs().max() < 1e-12  # before the change nothing differs, but for rounding under vmap
    assert found.restored.abs().max() > 0.01


def test_patches_of_heads(key):
    params, clean, corrupted = model(key)

    def metric(ids):
        return lm.apply(params, ids)[0][0, -1, 3]

    names = ["blocks.0.attn.heads", "blocks.1.attn.heads"]
    found = inspect.patch(metric, clean, corrupted, names, axis=1)
    _, values = taps.harvest(metric)(clean)
    planted = {names[1]: lambda old: torch.cat((old[:, :1], values[names[1]][:, 1:]), 1)}
    assert found.metric.shape == (2, 2)
    assert_close(found.metric[1, 1], taps.plant(metric, planted)(corrupted))


def test_causal_tracing_restores_what_noise_destroyed(key):
    params, clean, _ = model(key)
    noise = random.normal(key, (1, 5, 6), torch.float64)

    def metric(ids):
        return lm.apply(params, ids)[0][0, -1].log_softmax(-1)[3]

    corruption = {"blocks.0.attn_out": lambda old: old + noise}
    found = inspect.causal_trace(metric, clean, corruption, ["blocks.0.ff_out", "blocks.1.attn_out", "blocks.1.ff_out"])
    assert_close(found.corrupted, taps.plant(metric, corruption)(clean))
    _, values = taps.harvest(metric)(clean)
    both = {**corruption, "blocks.1.ff_out": lambda old: torch.cat((old[:, :4], values["blocks.1.ff_out"][:, 4:]), 1)}
    assert_close(found.metric[2, 4], taps.plant(metric, both)(clean))
    with pytest.raises(ValueError, match="cannot be both corrupted and restored; got \\['blocks.0.attn_out'\\]"):
        inspect.causal_trace(metric, clean, corruption, ["blocks.0.attn_out"])


def test_gradients_of_tapped_values_are_those_of_planted_ones(key):
    params, ids, _ = model(key)
    values, grads = inspect.tap_grads(lm.loss, params, ids)
    assert values.keys() == grads.keys() >= {*ATTN, *FF, "blocks.0.attn.q"}
    name = "blocks.1.attn_out"
    expected = torch.func.grad(lambda v: taps.plant(lm.loss, {name: v})(params, ids))(values[name])
    assert_close(grads[name], expected)
    assert expected.any()


def test_norms_per_leaf_layer_and_head(key):
    params, ids, _ = model(key)
    grads = tree.grad(lm.loss)(params, ids)
    layers = inspect.layer_norms(grads)
    assert list(layers) == ["embed", "blocks.0", "blocks.1", "norm", "to_logits"]
    assert_close(layers["blocks.1"], optim.global_norm(grads.blocks[1]))
    assert_close(torch.stack(list(layers.values())).norm(), optim.global_norm(grads))
    assert_close(inspect.leaf_norms(grads)["embed"], grads.embed.norm())
    heads = inspect.head_norms(lm.loss, params, ids)
    assert list(heads) == ["blocks.0.attn", "blocks.1.attn"]
    assert_close(heads["blocks.1.attn"][1], inspect.tap_grads(lm.loss, params, ids)[1]["blocks.1.attn.heads"][:, 1].norm())
    attn = inspect.head_weight_norms(params.blocks[0].attn, grads.blocks[0].attn)
    assert_close(attn["to_qkv"][1], grads.blocks[0].attn.to_qkv[3:6].norm())
    assert_close(attn["to_out"][0], grads.blocks[0].attn.to_out[:, :3].norm())
    with pytest.raises(ValueError, match="expected taps named 'heads'"):
        inspect.head_norms(lambda x: taps.tap("x", x).sum(), ids.double())


# ------------------------------------------------------------------------------------------------ other tools


def test_the_flat_function_is_the_function(key):
    cfg = block_sparse.FAMILY.examples[0]
    params, x = make_params(block_sparse.FAMILY, cfg, key), make_x(cfg, key)
    f, flat = inspect.flat_fn(block_sparse.apply, params), inspect.flat_params(params)
    assert list(flat) == ["to_qkv", "to_out", "to_out_bias"]  # the layout is not trained
    assert_close(f(flat, x), block_sparse.apply(params, x)[0])
    grads = torch.func.grad(lambda p: f(p, x).square().sum())(flat)
    assert_close(grads["to_out"], tree.grad(lambda p: block_sparse.apply(p, x)[0].square().sum())(params).to_out)
    with pytest.raises(ValueError, match="got missing \\['to_out'\\], unknown \\['out'\\]"):
        f({"to_qkv": flat["to_qkv"], "to_out_bias": flat["to_out_bias"], "out": x}, x)


def test_curvlinops_multiplies_with_our_hessian(small):
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    module = inspect.as_module(small.model, small.params)
    weights = list(module.parameters())
    operator = curvlinops.HessianLinearOperator(module, torch.nn.MSELoss(), weights, [(small.batch["x"], small.batch["y"])])
    v = random.normal(random.key(1), tuple(small.flat.shape), torch.float64)
    ours = inspect.hvp(lambda p, x, y: (small.model(p, x) - y).square().mean(), small.params, inspect.unravel(v, small.params),
                       small.batch["x"], small.batch["y"])
    assert_close(operator @ v, inspect.ravel(ours))


def test_torchopt_trains_the_flat_function(small):
    torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed")
    f, flat = inspect.flat_fn(small.model, small.params), inspect.flat_params(small.params)
    optimizer = torchopt.adam(1e-2)
    state = optimizer.init(flat)
    losses = []
    for _ in range(20):
        grads, value = torch.func.grad_and_value(lambda p: (f(p, small.batch["x"]) - small.batch["y"]).square().mean())(flat)
        updates, state = optimizer.update(grads, state, inplace=False)
        flat = torchopt.apply_updates(flat, updates, inplace=False)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.01
