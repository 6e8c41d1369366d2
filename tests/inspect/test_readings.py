"""What is read from attention maps, against loops over queries and keys."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_close

from fnattn import inspect, random, taps
from fnattn.attentions import full, gate_loop, gate_loop_full, simple_gate_loop, taylor
from fnattn.models import lm
from fnattn.testing.world import make_params, make_x


def some_map(key, causal=True):
    scores = random.normal(key, (2, 3, 5, 5), torch.float64)
    return scores.tril() if causal else scores


def test_shares_are_sizes_over_their_sum_and_empty_rows_stay_empty(key):
    found = inspect.shares(some_map(key))
    assert_close(found.sum(-1), torch.ones(2, 3, 5).double())
    assert not inspect.shares(torch.zeros(2, 3)).any()


def test_rollout_multiplies_layers(key):
    a, b = some_map(key), some_map(random.fold_in(key, 1))
    expected = []
    for sequence in range(2):
        layers = []
        for m in (a, b):
            mean = sum(m[sequence, h].abs() / m[sequence, h].abs().sum(-1, keepdim=True) for h in range(3)) / 3
            layers.append(0.5 * torch.eye(5).double() + 0.5 * mean)
        expected.append(layers[1] @ layers[0])
    found = inspect.rollout([a, b])
    assert_close(found, torch.stack(expected))
    assert_close(found.sum(-1), torch.ones(2, 5).double())


def test_gradient_times_attention_is_the_slope_along_each_entry(key):
    cfg = taylor.Config(dim=5, heads=2, dim_head=3, causal=True, one_headed_kv=True)
    params, x = make_params(taylor.FAMILY, cfg, key), make_x(cfg, key, 1, 4)

    def loss(params, x):
        return taylor.apply(params, x)[0].sin().sum()

    found = inspect.gradient_times_attention(loss, params, x)[""]
    one = inspect.attended(params, x)
    step = torch.zeros_like(one.map)
    step[0, 1, 3, 2] = 1e-6

    def with_map(m):
        return taps.plant(loss, {"heads": m @ one.values})(params, x)

    slope = (with_map(one.map + step) - with_map(one.map - step)) / 2e-6
    torch.testing.assert_close(found.gradient[0, 1, 3, 2], slope, rtol=1e-6, atol=1e-8)
    assert_close(found.relevance, one.map * found.gradient)


def test_gradient_times_attention_of_every_layer_of_a_model(key):
    params = lm.init(key, lm.Config(attention=gate_loop.Config(dim=6, heads=2), depth=2, num_tokens=13), dtype=torch.float64)
    ids = random.randint(key, (1, 6), 0, 13)
    found = inspect.gradient_times_attention(lm.loss, params, ids)
    assert list(found) == ["blocks.0.attn", "blocks.1.attn"]
    assert all(one.relevance.shape == (1, 2, 5, 5) and one.relevance.any() for one in found.values())


def test_effective_context_is_the_mean_distance_and_the_reach_of_most_weight(key):
    attention = some_map(key)
    found = inspect.effective_context(attention, share=0.8)
    for h in range(3):
        for i in range(5):
            row = attention[1, h, i].abs() / attention[1, h, i].abs().sum()
            assert_close(found.mean[1, h, i], sum(row[j] * (i - j) for j in range(i + 1)))
            near = [sum(row[j] for j in range(max(0, i - r), i + 1)) for r in range(5)]
            assert found.reach[1, h, i] == next(r for r in range(5) if near[r] >= 0.8 - 1e-12)


def test_the_context_of_queries_that_begin_later_counts_from_the_end(key):
    attention = some_map(key)
    assert torch.equal(inspect.effective_context(attention[..., 3:, :]).reach, inspect.effective_context(attention).reach[..., 3:])
    assert inspect.effective_context(torch.zeros(1, 4)).reach == 0


def test_entropy_is_nothing_for_one_key_and_most_for_all_alike():
    assert_close(inspect.entropy(torch.ones(7).double()), torch.tensor(math.log(7), dtype=torch.float64))
    assert inspect.entropy(torch.eye(3).double()).abs().max() == 0
    assert inspect.entropy(torch.zeros(3)) == 0


@pytest.mark.parametrize(("family", "cfg"), [
    (gate_loop.FAMILY, gate_loop.Config(dim=6, heads=2)),
    (gate_loop_full.FAMILY, gate_loop_full.FAMILY.examples[1]),
    (simple_gate_loop.FAMILY, simple_gate_loop.Config(dim=5))], ids=["gate_loop", "gate_loop_full", "simple_gate_loop"])
def test_the_decay_spectrum_is_that_of_the_gates(family, cfg, key):
    params, x = make_params(family, cfg, key), make_x(cfg, key, 2, 5)
    found = inspect.decay_spectrum(params, x)
    a = taps.harvest(family.apply)(params, x)[1]["a"]
    if family.name == "simple_gate_loop":
        assert_close(found.size, a.sigmoid().mT)
        assert not found.phase.any()
    else:
        size = a.norm(dim=-1)
        alpha = torch.polar(found.size, found.phase)
        assert_close(torch.view_as_real(alpha), (size.sigmoid() / size)[..., None] * a)
    assert_close(found.size ** found.half_life, torch.full_like(found.size, 0.5))


@pytest.mark.parametrize("example", [0, 2])
def test_the_error_of_taylors_series_against_the_exponential(example, key):
    cfg = taylor.FAMILY.examples[example]
    params, x = make_params(taylor.FAMILY, cfg, key), 3 * make_x(cfg, key, 1, 5)
    found = inspect.taylor_error(params, x)
    seen = taps.harvest(taylor.apply)(params, x)[1]
    for i in range(5):
        s = seen["q"][0, 1, i] @ seen["k"][0, 1].T * cfg.dim_head ** -0.5
        s = s[:i + 1] if cfg.causal else s
        series = 1 + s + s * s / 2
        assert_close(found.variation[0, 1, i], (series / series.sum() - s.softmax(0)).abs().sum() / 2)
        assert_close(found.largest[0, 1, i], s.abs().max())
        assert_close(found.relative[0, 1, i], ((series - s.exp()) / s.exp()).abs().max())
    assert found.variation.max() > 1e-3


def test_rows_without_keys_have_no_error(key):
    cfg = taylor.FAMILY.examples[0]
    params, x = make_params(taylor.FAMILY, cfg, key), make_x(cfg, key, 1, 5)
    mask = torch.tensor([[False, True, True, False, True]])
    found = inspect.taylor_error(params, x, mask=mask)
    assert all(not t[..., 0].any() and t.isfinite().all() for t in found)


def test_what_they_refuse_they_refuse_with_the_reason(key):
    cfg = full.FAMILY.examples[0]
    params, x = full.init(key, cfg), torch.zeros(1, 3, cfg.dim)
    with pytest.raises(ValueError, match="expected a family with gates; got fnattn.attentions.full"):
        inspect.decay_spectrum(params, x)
    with pytest.raises(ValueError, match="expected params of the family taylor; got fnattn.attentions.full"):
        inspect.taylor_error(params, x)
    with pytest.raises(ValueError, match="expected at least one map"):
        inspect.rollout([])
