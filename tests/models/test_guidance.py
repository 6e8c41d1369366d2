"""Guidance: tokens drawn through two states are those of both whole sequences' logits, mixed."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close

from fnattn import random, tree
from fnattn.attentions import full, taylor
from fnattn.models import lm
from fnattn.models.generate import generate, guide, sample, stream

CONFIGS = {
    "taylor": lm.Config(attention=taylor.Config(dim=6, heads=2, dim_head=4, causal=True, shift_tokens=True), depth=2, num_tokens=11),
    "full": lm.Config(attention=full.Config(dim=6, seq_len=17, heads=2, dim_head=4, rotary_emb=True), depth=2, num_tokens=11),
}


@pytest.fixture(params=CONFIGS)
def params(request, key):
    # Weights at which a prompt changes the next token.
    return tree.map(lambda t: t * 3, lm.init(key, CONFIGS[request.param], dtype=torch.float64))


@pytest.fixture
def prompts(key):
    """A prompt of 5 tokens, and one of 3 without its condition."""
    return (random.randint(random.fold_in(key, name), (2, n), 0, 11) for name, n in (("prompt", 5), ("null", 3)))


@pytest.mark.parametrize("scale", [0.0, 2.5, torch.tensor(3.0)], ids=str)
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.7, "top_k": 4}], ids=str)
def test_tokens_are_those_of_both_whole_logits_mixed(params, prompts, options, scale, key):
    prompt, null = prompts
    found = generate(params, prompt, 7, key=key, null_prompt=null, cond_scale=scale, **options)
    drawn = prompt[:, :0]
    for i in range(7):
        conditional, without = (lm.apply(params, torch.cat((p, drawn), 1))[0][:, -1] for p in (prompt, null))
        token = sample(random.fold_in(key, i), without + (conditional - without) * scale, **options)
        drawn = torch.cat((drawn, token[:, None]), 1)
    assert torch.equal(found, drawn)


def test_scale_one_is_no_guidance_zero_is_the_null_prompt_and_more_is_neither(params, prompts, key):
    prompt, null = prompts
    alone, without = (generate(params, p, 7, key=key) for p in (prompt, null))
    guided = {scale: generate(params, prompt, 7, key=key, null_prompt=null, cond_scale=scale) for scale in (0.0, 1.0, 4.0)}
    assert torch.equal(guided[1.0], alone) and torch.equal(guided[0.0], without)
    assert not torch.equal(alone, without) and not torch.equal(guided[4.0], alone)


def test_a_prompt_against_itself_is_no_guidance(params, prompts, key):
    prompt, _ = prompts
    assert torch.equal(generate(params, prompt, 5, key=key, null_prompt=prompt.clone(), cond_scale=7.0),
                       generate(params, prompt, 5, key=key))


def test_an_ensemble_is_guided_with_a_scale_for_each_member(prompts, key):
    prompt, null = prompts
    keys, scales = random.split(key, 3), torch.tensor([0.5, 2.0, 5.0])
    stacked = tree.vmap(lambda k: lm.init(k, CONFIGS["taylor"], dtype=torch.float64))(keys)
    found = tree.vmap(lambda p, k, s: generate(p, prompt, 3, key=k, null_prompt=null, cond_scale=s))(stacked, keys, scales)
    for i, one in enumerate(tree.unstack(stacked)):
        assert torch.equal(found[i], generate(one, prompt, 3, key=keys[i], null_prompt=null, cond_scale=scales[i].item()))


def test_the_mixture_is_linear_in_both_and_differentiable():
    conditional, null = random.normal(random.key(0), (2, 3, 7), torch.float64)
    assert_close(guide(conditional, null, 3.0), 3.0 * conditional - 2.0 * null)
    slopes = torch.func.grad(lambda c, n, s: guide(c, n, s).sum(), (0, 1, 2))(conditional, null, torch.tensor(3.0).double())
    assert_close(slopes[0], torch.full_like(null, 3.0))
    assert_close(slopes[1], torch.full_like(null, -2.0))
    assert_close(slopes[2], (conditional - null).sum())


def test_mistakes_are_named(params, prompts, key):
    prompt, null = prompts
    with pytest.raises(ValueError, match=r"null_prompt must be given for cond_scale=2.0; got None.\n  Give the prompt without"):
        stream(params, prompt, 3, key=key, cond_scale=2.0)
    with pytest.raises(ValueError, match=r"null_prompt must be \[2, at least 1\] .*; got \[1, 3\].\n  One row for each prompt"):
        stream(params, prompt, 3, key=key, cond_scale=2.0, null_prompt=null[:1])
    longer = torch.cat((null, prompt, null), 1)
    with pytest.raises(ValueError, match="must have room for 13 tokens, 11 of the prompt and 2 new ones; got capacity=12"):
        stream(params, prompt, 3, key=key, cond_scale=2.0, null_prompt=longer, capacity=12)
    with pytest.raises(ValueError, match=r"conditional and null must have one shape; got \[3\] and \[5\]"):
        guide(torch.zeros(3), torch.zeros(5), 2.0)
