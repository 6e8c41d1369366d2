"""What models refuse: states of other models, token numbers that are none, params and sizes that are none."""

from __future__ import annotations

import pytest
import torch
from conftest import refused

from fnattn import EMPTY, random
from fnattn.attentions import full, simple_gate_loop, taylor
from fnattn.models import dalle, dalle_transformer, lm

KEY, TOKENS = random.key(7), 19
ATTENTIONS = (taylor.Config(dim=6, heads=2, dim_head=3, causal=True), full.Config(dim=6, seq_len=13, heads=2, dim_head=3),
              simple_gate_loop.Config(dim=6))
DALLE = dict(dim=7, depth=2, num_image_tokens=11, image_fmap_size=3, num_text_tokens=13, text_seq_len=5, heads=2, dim_head=6)
lengths = pytest.mark.parametrize("n", [1, 3], ids=["step", "pass"])


def model(attention=ATTENTIONS[0], depth=2, **options):
    return lm.init(KEY, lm.Config(attention=attention, depth=depth, num_tokens=TOKENS, **options))


def tokens(n, batch=1):
    return torch.arange(3, 3 + batch * n).reshape(batch, n)


# ------------------------------------------------------------------------------------------------ the language model


@lengths
@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_the_state_of_a_deeper_or_shallower_model_is_refused(attention, n):
    two, three = model(attention), model(attention, 3)
    for params, other in ((two, three), (three, two)):
        for _ in range(3):  # until instructions are kept
            lm.apply(params, tokens(n), lm.init_state(params, 1, capacity=5))
        with refused("lm.apply", ValueError, f"{params.cfg.depth} parts; got {other.cfg.depth} in blocks"):
            lm.apply(params, tokens(n), lm.init_state(other, 1, capacity=5))


@lengths
@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_a_state_with_a_wrong_part_is_refused(attention, n):
    params = model(attention)
    state = lm.init_state(params, 1, capacity=5)
    first, second = state.blocks
    for _ in range(3):
        lm.apply(params, tokens(n), state)
    with refused("lm.apply", ValueError, "got nothing in blocks.0"):
        lm.apply(params, tokens(n), state._replace(blocks=(EMPTY, second)))
    for wrong in (None, [first, second], {}):
        with refused("lm.apply", TypeError, "in blocks"):
            lm.apply(params, tokens(n), state._replace(blocks=wrong))
    for wrong in (0, None, torch.tensor(0.0), torch.tensor(True), torch.tensor([0])):
        with refused("lm.apply", (TypeError, ValueError), "in pos"):
            lm.apply(params, tokens(n), state._replace(pos=wrong))
    name = type(attention).__module__.rpartition(".")[2]
    with refused(f"{name}.apply", TypeError, "got NoneType"):
        lm.apply(params, tokens(n), state._replace(blocks=(None, second)))
    with refused(f"{name}.apply", ValueError, "the state must have "):
        lm.apply(params, tokens(n), lm.init_state(params, 2, capacity=5))


@lengths
def test_another_kind_of_state_is_a_type_error(n):
    for params in (model(), model(seq_len=7)):
        state = lm.init_state(params, 1, capacity=5)
        for wrong in (None, tokens(n), state.blocks[0], tuple(state), [state], (tokens(n),), {}):
            with refused("lm.apply", TypeError, "state must come from lm.init_state", type(wrong).__name__):
                lm.apply(params, tokens(n), wrong)


@lengths
@pytest.mark.parametrize("wrong", [-1, TOKENS, 10**6])
def test_a_token_that_is_not_in_the_table_is_named(wrong, n):
    params = model()
    ids = tokens(n, 2)
    ids[1, -1] = wrong
    for state in (EMPTY, lm.init_state(params, 2, capacity=5)):
        with refused("lm.apply", ValueError, f"ids must lie in [0, {TOKENS}); got {wrong}"):
            lm.apply(params, ids, state)
    with refused("lm.nll", ValueError, f"got {wrong}"):
        lm.nll(params, torch.cat((tokens(2, 2), ids), 1))  # the last one is predicted only
    assert lm.apply(params, torch.tensor([[0, TOKENS - 1]]))[0].shape == (1, 2, TOKENS)
    assert lm.apply(params, torch.zeros(0, n, dtype=torch.int64))[0].shape == (0, n, TOKENS)


def test_token_numbers_masks_params_and_sizes_that_are_none():
    params = model()
    for call in (lambda p: lm.apply(p, tokens(3)), lambda p: lm.nll(p, tokens(3)), lambda p: lm.loss(p, tokens(3)),
                 lambda p: lm.init_state(p, 1, capacity=5)):
        for wrong in (params.cfg, params.blocks[0].attn, None):
            with refused("lm." + call.__code__.co_names[1], TypeError, "params must come from lm.init"):
                call(wrong)
    for wrong in ([[1, 2]], tokens(2).float(), tokens(2).bool(), None):
        with refused("lm.apply", TypeError, "ids must be an int64 tensor"):
            lm.apply(params, wrong)
    with refused("lm.apply", TypeError, "mask must be a bool tensor", "list"):
        lm.apply(params, tokens(2), mask=[[True, True]])
    with refused("lm.init", TypeError, "dtype must be floating point"):
        lm.init(KEY, params.cfg, dtype=torch.int32)
    with refused("lm.init", TypeError, "cfg must be lm.Config", "taylor.Config"):
        lm.init(KEY, params.cfg.attention)
    for batch, capacity, error in ((-1, 5, ValueError), (1.0, 5, TypeError), (1, True, TypeError), (1, 5.0, TypeError)):
        with refused("lm.init_state", error):
            lm.init_state(params, batch, capacity=capacity)
    for wrong, error in ((dict(depth=2.0), TypeError), (dict(depth=True), TypeError), (dict(depth=1, num_tokens=5.0), TypeError),
                         (dict(depth=1, dim=6.0), TypeError), (dict(depth=1, seq_len=-1), ValueError)):
        with refused("lm.Config", error):
            lm.Config(attention=ATTENTIONS[0], **wrong)


# ------------------------------------------------------------------------------------------------ DALLE


def picture(**options):
    params = dalle.init(KEY, dalle.Config(**{**DALLE, **options}))
    text = torch.arange(1, 11).reshape(2, 5)
    image = torch.arange(18).reshape(2, 9) % 11
    return params, text, image, dalle.tokens(params.cfg, text, image)[:, :-1]


@lengths
def test_the_state_of_another_dalle_is_refused(n):
    params, _, _, ids = picture()
    ids, state = ids[:, :n], dalle.init_state(params, 2)
    with refused("dalle.apply", ValueError, "2 parts; got 3 in attns"):
        dalle.apply(params, ids, dalle.init_state(picture(depth=3)[0], 2))
    with refused("dalle.apply", ValueError, "2 parts; got 0 in attn_last"):
        dalle.apply(params, ids, dalle.init_state(picture(shift_tokens=False)[0], 2))
    with refused("dalle.apply", ValueError, "[2, 3, 7]; got [3, 3, 7] in attn_last.0"):
        dalle.apply(params, ids, dalle.init_state(params, 3))
    with refused("dalle.apply", ValueError, "got nothing in attns.1"):
        dalle.apply(params, ids, state._replace(attns=(state.attns[0], EMPTY)))
    with refused("full.apply", TypeError, "full.init_state", "_picture.State"):
        dalle.apply(params, ids, state._replace(attns=dalle.init_state(picture(attn_types="axial_row")[0], 2).attns))
    for wrong in (None, ids, state.attns[0], tuple(state), []):
        with refused("dalle.apply", TypeError, "state must come from dalle.init_state", type(wrong).__name__):
            dalle.apply(params, ids, wrong)


@pytest.mark.parametrize("share", [False, True])
def test_token_numbers_that_dalle_does_not_have_are_named(share):
    """A text token that is too large would be one of the padding or of the picture, a negative image token one of the text."""
    params, text, image, ids = picture(share_input_output_emb=share)
    for wrong in (-1, 13, 500):
        with refused("dalle.tokens", ValueError, f"text must lie in [0, 13); got {wrong}"):
            dalle.tokens(params.cfg, text.masked_fill(text == 4, wrong))
    for wrong in (-1, 11, 500):
        with refused("dalle.tokens", ValueError, f"image must lie in [0, 11); got {wrong}"):
            dalle.tokens(params.cfg, text, image.masked_fill(image == 4, wrong))
        with refused("dalle.tokens", ValueError, f"image must lie in [0, 11); got {wrong}"):
            dalle.loss(params, text, image.masked_fill(image == 4, wrong))
    for wrong in (-1, 13 + 5 + 11, 500):
        with refused("dalle.apply", ValueError, f"ids must lie in [0, 29); got {wrong}"):
            dalle.apply(params, ids.masked_fill(ids == 4, wrong))
    for wrong in (ids.float(), ids.bool(), ids.tolist(), None):
        with refused("dalle.apply", TypeError, "ids must be an int64 tensor"):
            dalle.apply(params, wrong)


def test_texts_pictures_params_and_sizes_that_are_none():
    params, text, image, ids = picture()
    for wrong in (image.float(), image.tolist(), None):
        with refused("dalle.loss", TypeError, "image must be an int64 tensor"):
            dalle.loss(params, text, wrong)
    for wrong in (text.float(), text.tolist(), None):
        with refused("dalle.loss", TypeError, "text must be an int64 tensor"):
            dalle.loss(params, wrong, image)
        with refused("dalle.generate_images", TypeError, "text must be an int64 tensor"):
            dalle.generate_images(params, wrong, KEY)
    with refused("dalle.apply", TypeError, "mask must be a bool tensor"):
        dalle.apply(params, ids, mask=[[True]])
    for call in (lambda p: dalle.apply(p, ids), lambda p: dalle.loss(p, text, image), lambda p: dalle.init_state(p, 2)):
        with refused("dalle." + call.__code__.co_names[1], TypeError, "params must come from dalle.init", "dalle.Config"):
            call(params.cfg)
    for wrong, error in ((dict(dim=7.0), TypeError), (dict(depth=True), TypeError), (dict(heads=0), ValueError),
                         (dict(dim_head=-1), ValueError), (dict(image_fmap_size=3.0), TypeError)):
        with refused("dalle.Config", error, next(iter(wrong))):
            dalle.Config(**{**DALLE, **wrong})
    for batch, error in ((-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with refused("dalle.init_state", error, "batch must "):
            dalle.init_state(params, batch)
    with refused("dalle.init", TypeError, "dtype must be floating point"):
        dalle.init(KEY, params.cfg, dtype=torch.int32)
    x = torch.ones(1, 2, 7)
    with refused("dalle_transformer.apply", TypeError, "x must be torch.float32", "torch.float64"):
        dalle_transformer.apply(params.transformer, x.double())
    with refused("dalle_transformer.apply", TypeError, "state must come from dalle_transformer.init_state"):
        dalle_transformer.apply(params.transformer, x, None)
