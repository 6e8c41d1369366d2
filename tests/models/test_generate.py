"""Generation through the state equals generation by full recomputation; drawing keeps to its options."""

from __future__ import annotations

import pytest
import torch

from fnattn import random, tree
from fnattn.attentions import full, gate_loop, taylor
from fnattn.models import lm
from fnattn.models.generate import generate, prefill, sample, stream

CONFIGS = {
    "taylor": lm.Config(attention=taylor.Config(dim=6, heads=2, dim_head=4, causal=True, rotary_emb=True, shift_tokens=True),
                        depth=2, num_tokens=11),
    "gate_loop": lm.Config(attention=gate_loop.Config(dim=6), depth=2, num_tokens=11),
    "full": lm.Config(attention=full.Config(dim=6, seq_len=13, heads=2, dim_head=4), depth=2, num_tokens=11),
}


@pytest.fixture(params=CONFIGS)
def params(request, key):
    return lm.init(key, CONFIGS[request.param], dtype=torch.float64)


@pytest.fixture
def prompt(key):
    return random.randint(random.fold_in(key, "prompt"), (3, 5), 0, 11)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.6}])
def test_tokens_through_the_state_are_those_of_full_recomputation(params, prompt, options, key):
    found = generate(params, prompt, 7, key=key, **options)
    ids = prompt
    for i in range(7):
        token = sample(random.fold_in(key, i), lm.apply(params, ids)[0][:, -1], **options)
        ids = torch.cat((ids, token[:, None]), 1)
    assert torch.equal(found, ids[:, 5:])


def test_tokens_come_one_at_a_time_and_fewer_are_a_prefix(params, prompt, key):
    tokens = stream(params, prompt, 7, key=key)
    first = next(tokens)
    assert first.shape == (3,) and first.dtype == torch.int64
    whole = torch.stack([first, *tokens], 1)
    assert torch.equal(whole, generate(params, prompt, 7, key=key))
    assert torch.equal(whole[:, :3], generate(params, prompt, 3, key=key))
    assert generate(params, prompt, 0, key=key).shape == (3, 0)


def test_an_ensemble_generates_under_vmap(prompt, key):
    keys = random.split(key, 3)
    for cfg in CONFIGS.values():
        stacked = tree.vmap(lambda k, cfg=cfg: lm.init(k, cfg, dtype=torch.float64))(keys)
        found = tree.vmap(lambda p, k: generate(p, prompt, 5, key=k, top_k=5))(stacked, keys)
        for i, one in enumerate(tree.unstack(stacked)):
            assert torch.equal(found[i], generate(one, prompt, 5, key=keys[i], top_k=5))


def test_gradients_are_on_again_between_two_tokens(params, prompt, key):
    for _ in stream(params, prompt, 2, key=key):
        assert torch.is_grad_enabled()


def test_temperature_zero_takes_the_largest(key):
    logits = random.normal(key, (5, 11))
    assert torch.equal(sample(key, logits, temperature=0), logits.argmax(-1))


def draws(key, logits, **options):
    return torch.vmap(lambda k: sample(k, logits, **options))(random.split(key, 500))


def test_top_k_draws_only_among_the_k_largest(key):
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
    assert set(draws(key, logits, top_k=2, temperature=9.0).tolist()) == {1, 3}
    assert set(draws(key, logits, top_k=99, temperature=9.0).tolist()) == {0, 1, 2, 3, 4}


def test_top_p_draws_only_among_those_that_reach_p_together(key):
    logits = torch.tensor([0.05, 0.5, 0.3, 0.15]).log()
    assert set(draws(key, logits, top_p=0.7).tolist()) == {1, 2}
    assert set(draws(key, logits, top_p=0.4).tolist()) == {1}
    assert set(draws(key, logits, top_p=torch.tensor(0.0)).tolist()) == {1}
    assert set(draws(key, logits, top_p=1.0).tolist()) == {0, 1, 2, 3}


def test_draws_follow_the_distribution(key):
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    found = torch.bincount(torch.vmap(lambda k: sample(k, logits))(random.split(key, 4000)), minlength=3) / 4000
    assert (found - torch.tensor([0.2, 0.5, 0.3])).abs().max() < 0.04


def test_temperature_and_top_p_map(key):
    logits, temperatures = random.normal(key, (4, 11)), torch.tensor([0.5, 2.0])
    mapped = torch.vmap(lambda t: sample(key, logits, temperature=t, top_p=t / 3))(temperatures)
    assert torch.equal(mapped[1], sample(key, logits, temperature=2.0, top_p=2 / 3))


def test_what_it_refuses_it_refuses_with_the_reason(key, prompt):
    params = lm.init(key, CONFIGS["full"], dtype=torch.float64)

    def refused(message, call):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(message) and "\n  " in str(caught.value), str(caught.value)

    refused("generate.stream: temperature must be at least 0; got -1.", lambda: stream(params, prompt, 2, key=key, temperature=-1))
    refused("generate.stream: top_k must be at least 0; got -1.", lambda: stream(params, prompt, 2, key=key, top_k=-1))
    refused("generate.stream: top_p must lie in (0, 1]; got 0.", lambda: stream(params, prompt, 2, key=key, top_p=0))
    refused("generate.sample: top_p must lie in (0, 1]; got 1.5.", lambda: sample(key, torch.zeros(3), top_p=1.5))
    refused("generate.stream: steps must be at least 0; got -2.", lambda: stream(params, prompt, -2, key=key))
    refused("generate.stream: the state must have room for 11 tokens, 5 of the prompt and 6 new ones; got capacity=10.",
            lambda: stream(params, prompt, 7, key=key, capacity=10))
    refused("generate.prefill: prompt must be [batch, at least 1]; got [3, 0].",
            lambda: generate(params, prompt[:, :0], 2, key=key))
    refused("generate.prefill: the state must have room for the prompt of 5 tokens; got capacity=4.",
            lambda: prefill(params, prompt, capacity=4))
    _, state = prefill(params, prompt, capacity=5)
    refused("full.apply: the state holds 5 of 5 positions and 1 more was given.", lambda: lm.apply(params, prompt[:, :1], state))
