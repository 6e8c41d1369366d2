"""Attention maps of every family and model: times the values they give what the family computed, to rounding."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close

from fnattn import attentions, inspect, random, taps
from fnattn.attentions import coor_descent, full, gate_loop, linformer, simple_gate_loop, sparse_axial, sparse_conv, taylor
from fnattn.models import dalle, linformer_lm, lm, vit
from fnattn.testing.world import make_params, make_x, takes

EXAMPLES = [pytest.param(family, cfg, id=f"{name}-{i}") for name, family in sorted(attentions.FAMILIES.items())
            for i, cfg in enumerate(family.examples)]
LENGTH = 11


@pytest.mark.parametrize(("family", "cfg"), EXAMPLES)
def test_the_map_times_the_values_is_what_the_heads_give(family, cfg, key):
    params, x = make_params(family, cfg, key), make_x(cfg, key, 2, LENGTH)
    found = inspect.attended(params, x)
    assert found.map.dtype == torch.float64
    torch.testing.assert_close(found.map @ found.values, found.heads, rtol=1e-10, atol=1e-12)
    assert found.heads.abs().max() > 1e-3
    if family.name != "simple_gate_loop":  # its channels are no tap; the next test compares with its output
        _, seen = taps.harvest(family.apply)(params, x)  # whichever kernel is best
        torch.testing.assert_close(found.map @ found.values, seen["heads"], rtol=1e-9, atol=1e-11)
    assert torch.equal(inspect.attention_map(params, x), found.map)


def test_the_map_of_a_simple_gate_loop_gives_its_output(key):
    for cfg in (simple_gate_loop.Config(dim=5), simple_gate_loop.Config(dim=5, reverse=True)):
        params, x = make_params(simple_gate_loop.FAMILY, cfg, key), make_x(cfg, key, 2, LENGTH)
        found = inspect.attended(params, x)
        assert_close((found.map @ found.values).squeeze(-1).mT, simple_gate_loop.apply(params, x)[0])
        assert found.map.shape == (2, 5, LENGTH, LENGTH)


@pytest.mark.parametrize(("family", "cfg"), [p for p in EXAMPLES if p.values[0].masks])
def test_maps_with_a_mask(family, cfg, key):
    params, x = make_params(family, cfg, key), make_x(cfg, key, 2, LENGTH)
    mask = random.bernoulli(random.fold_in(key, "mask"), 0.6, (2, x.shape[1]))
    mask[0, 0] = False
    found = inspect.attended(params, x, mask=mask)
    torch.testing.assert_close(found.map @ found.values, found.heads, rtol=1e-10, atol=1e-12)
    if family.name != "linformer":  # it zeroes rows in place of leaving keys out
        hidden = found.map[..., found.map.shape[-1] - x.shape[1]:] * ~mask[:, None, None, :]
        assert not hidden.any()


@pytest.mark.parametrize(("family", "cfg"), [p for p in EXAMPLES if p.values[0].contexts])
def test_maps_onto_a_context(family, cfg, key):
    params, x = make_params(family, cfg, key), make_x(cfg, key, 2, 5)
    context = make_x(cfg, key, 2, 7, name="context")
    if not takes(family, params, x, "auto", context=context):
        pytest.skip("this config takes no context")
    found = inspect.attended(params, x, context=context)
    assert found.map.shape[2:] == (5, 7)
    torch.testing.assert_close(found.map @ found.values, found.heads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cfg", [sparse_conv.FAMILY.examples[0], sparse_axial.FAMILY.examples[1]], ids=["conv", "axial"])
def test_maps_with_the_mask_of_upstream(cfg, key):
    cfg = type(cfg)(**{**vars(cfg), "compat_mask": True})
    family = attentions.find(cfg)
    params, x = make_params(family, cfg, key), make_x(cfg, key, 2, 13)
    mask = random.bernoulli(random.fold_in(key, "mask"), 0.5, (2, 13))
    found = inspect.attended(params, x, mask=mask)
    torch.testing.assert_close(found.map @ found.values, found.heads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("family", "cfg"), [p for p in EXAMPLES if p.values[0].name != "simple_gate_loop"])
def test_a_family_without_a_formula_can_be_probed(family, cfg, key):
    params, x = make_params(family, cfg, key), make_x(cfg, key, 2, 5)
    probed, written = inspect.attended(params, x, how="probe"), inspect.attended(params, x)
    torch.testing.assert_close(probed.map @ probed.values, probed.heads, rtol=1e-10, atol=1e-12)
    if family.name not in ("linformer", "coor_descent"):  # their values are others: mixed; without null keys
        torch.testing.assert_close(probed.map, written.map, rtol=1e-9, atol=1e-11)


def test_softmax_maps_are_causal_and_their_rows_sum_to_one(key):
    cfg = full.FAMILY.examples[0]
    params, x = make_params(full.FAMILY, cfg, key), make_x(cfg, key, 2, 7)
    found = inspect.attention_map(params, x)
    assert torch.equal(found, found.tril())
    assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


def test_the_map_of_a_gate_loop_is_the_score_times_the_decay(key):
    cfg = gate_loop.Config(dim=6, heads=2, frac_gradient_state_transition=1.0)
    params, x = make_params(gate_loop.FAMILY, cfg, key), make_x(cfg, key, 1, 5)
    _, seen = taps.harvest(gate_loop.apply)(params, x)
    a = torch.view_as_complex(seen["a"].contiguous())
    alpha = a.abs().sigmoid() * a / a.abs()
    i, j = 4, 1
    expected = (seen["q"][0, 1, i] @ seen["k"][0, 1, j]) * alpha[0, 1, j + 1:i + 1].prod().real
    assert_close(inspect.attention_map(params, x)[0, 1, i, j], expected)


def test_maps_are_differentiable(key):
    cfg = taylor.FAMILY.examples[0]
    params, x = make_params(taylor.FAMILY, cfg, key), make_x(cfg, key, 1, 3)
    assert torch.autograd.gradcheck(lambda x: inspect.attention_map(params, x), (x.requires_grad_(),))


MODELS = {
    "lm": (lm.apply, lm.init, lm.Config(attention=taylor.Config(dim=8, heads=2, dim_head=4, causal=True), depth=2, num_tokens=13), 7, 2),
    "lm, gate loop": (lm.apply, lm.init, lm.Config(attention=gate_loop.Config(dim=6, heads=2), depth=3, num_tokens=13), 7, 3),
    "lm, simple gate loop": (lm.apply, lm.init, lm.Config(attention=simple_gate_loop.Config(dim=6), depth=2, num_tokens=13), 7, 2),
    "lm, nulls": (lm.apply, lm.init, lm.Config(attention=coor_descent.FAMILY.examples[1], depth=2, num_tokens=13, remat=True), 7, 2),
    "linformer_lm": (linformer_lm.apply, linformer_lm.init,
                     linformer_lm.Config(num_tokens=13, dim=6, seq_len=9, depth=2, k=3, heads=2), 7, 2),
    "dalle": (lambda p, ids: dalle.stack.apply(p, torch.nn.functional.one_hot(ids, 13).double()), dalle.stack.init,
              dalle.stack.Config(dim=13, depth=5, seq_len=13, heads=2, dim_head=6, image_fmap_size=3, shift_tokens=True,
                                 attn_types=("full", "axial_row", "axial_col", "conv_like", "sparse"),
                                 shared_attn_ids=(0, 1, 2, 3, 4)), 13, 5),
}


@pytest.mark.parametrize("name", MODELS)
def test_maps_of_whole_models(name, key):
    apply, init, cfg, length, layers = MODELS[name]
    params = init(key, cfg, dtype=torch.float64)
    ids = random.randint(key, (2, length), 0, 13)
    found = inspect.attention_maps(apply, params, ids)
    assert len(found) == layers
    for scope, one in found.items():
        torch.testing.assert_close(one.map @ one.values, one.heads, rtol=1e-10, atol=1e-11)
        assert scope.endswith("attn")


def test_layers_that_share_weights_have_their_own_maps(key):
    cfg = dalle.stack.Config(dim=8, depth=4, seq_len=13, heads=2, dim_head=6, image_fmap_size=3, attn_types=("full", "conv_like"),
                             shared_attn_ids=(7, 3))
    params, x = dalle.stack.init(key, cfg, dtype=torch.float64), random.normal(key, (1, 13, 8), torch.float64)
    found = inspect.attention_maps(dalle.stack.apply, params, x)
    assert list(found) == [f"layers.{i}.attn" for i in range(4)]
    for one in found.values():
        torch.testing.assert_close(one.map @ one.values, one.heads, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found["layers.0.attn"].map, found["layers.2.attn"].map)


def test_maps_of_a_vision_transformer_are_found_under_its_blocks(key):
    cfg = vit.Config(image_size=6, patch_size=2, channels=1, num_classes=3, dim=8, depth=2, heads=2, dim_head=4, ff_mult=1)
    params = vit.init(key, cfg, dtype=torch.float64)
    found = inspect.attention_maps(vit.apply, params, random.normal(key, (1, 1, 6, 6), torch.float64))
    assert list(found) == ["blocks.0", "blocks.1"] and found["blocks.0"].map.shape == (1, 2, 9, 9)


def test_what_they_refuse_they_refuse_with_the_reason(key):
    cfg = linformer.FAMILY.examples[0]
    params, x = linformer.init(key, cfg), torch.zeros(1, 3, cfg.dim)
    with pytest.raises(ValueError, match="how must be 'formula' or 'probe'; got 'guess'"):
        inspect.attention_map(params, x, how="guess")
    one = simple_gate_loop.init(key, simple_gate_loop.Config(dim=3))
    with pytest.raises(ValueError, match="probing needs taps 'v' and 'heads'; got"):
        inspect.attention_map(one, torch.zeros(1, 3, 3), how="probe")
    with pytest.raises(ValueError, match="expected a model whose attentions have taps; got taps"):
        inspect.attention_maps(lambda p, x: x, {"w": x}, x)
