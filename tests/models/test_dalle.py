"""DALLE's transformer, model, autoencoder and CLIP against upstream, and their states against one pass."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
from conftest import assert_close
from upstream import upstream

import fnattn
from fnattn import convert, optim, random, tree
from fnattn.models import clip, dalle, discrete_vae
from fnattn.models import dalle_transformer as stack

SIDE, TEXT = 3, 5
SEQ = TEXT + SIDE * SIDE
ALL = ("full", "axial_row", "axial_col", "conv_like")
GRID = [
    dict(), dict(attn_types=("axial_row",)), dict(attn_types=("axial_col",)), dict(attn_types=("conv_like",)),
    dict(attn_types=ALL, shift_tokens=True), dict(attn_types=ALL, sandwich_norm=True, rotary_emb=False),
    dict(attn_types=ALL, reversible=True), dict(attn_types=ALL, reversible=True, shift_tokens=True, sandwich_norm=True),
    dict(shared_attn_ids=(0, 1), shared_ff_ids=(0,), attn_types=("full", "conv_like"), shift_tokens=True),
    dict(stable=True), dict(causal=False, rotary_emb=False), dict(attn_types=ALL, optimize_for_inference=True),
]


def config(**options) -> stack.Config:
    return stack.Config(**{**dict(dim=8, depth=4, seq_len=SEQ, heads=2, dim_head=12, image_fmap_size=SIDE), **options})


def inputs(n=SEQ, dim=8, seed=3, dtype=torch.float64):
    return random.normal(random.key(seed), (2, n, dim), dtype)


def upstream_stack(cfg: stack.Config):
    fields = {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}
    module = upstream("dalle_pytorch.transformer").Transformer(**fields).double()
    with torch.no_grad():  # the initial scales are so small that layers would hardly show
        for name, p in module.named_parameters():
            if name.endswith("scale"):
                p.uniform_(0.5, 1.5)
    return module


@pytest.mark.parametrize("options", GRID, ids=str)
def test_the_stack_equals_upstream_in_value_and_gradient(options):
    cfg = config(**options)
    module = upstream_stack(cfg)
    params, x = convert.load(cfg, module.state_dict()), inputs().requires_grad_()
    module.train()
    theirs = module(x)
    # Upstream's table of rotary angles is float32.
    dtype = torch.float32 if cfg.rotary_emb else torch.float64
    ours, _ = stack.apply(params, x.detach())
    assert_close(ours, theirs, dtype)
    weight = inputs(seed=9)
    (theirs * weight).sum().backward()
    flat = convert.dump(tree.grad(lambda p: (stack.apply(p, x.detach())[0] * weight).sum())(params))
    for name, p in module.named_parameters():
        assert_close(flat[name], p.grad, dtype)
        assert p.grad.abs().max() > 0


@pytest.mark.parametrize("options", GRID, ids=str)
def test_the_state_dict_goes_both_ways(options):
    cfg = config(**options)
    module = upstream_stack(cfg)
    params = convert.load(cfg, module.state_dict())
    dumped = convert.dump(params)
    theirs = module.state_dict()
    assert set(dumped) == set(theirs)
    assert all(dumped[k].shape == theirs[k].shape for k in theirs)
    assert all(torch.equal(dumped[k], theirs[k]) for k in theirs if not k.endswith("pos_emb"))
    if cfg.rotary_emb:
        assert torch.equal(dumped["pos_emb"].float(), theirs["pos_emb"].float())  # the table bit for bit
    module.load_state_dict(dumped, strict=True)


@pytest.mark.parametrize("cuts", [(1,) * SEQ, (6, 8), (3, 4, 7), (2, 1, 9, 2)], ids=str)
@pytest.mark.parametrize("options", [dict(attn_types=ALL, shift_tokens=True), dict(attn_types=ALL, reversible=True),
                                     dict(attn_types=("sparse", "full"), shift_tokens=True)], ids=str)
def test_any_cuts_give_the_whole(options, cuts):
    cfg = config(**options)
    params, x = stack.init(random.key(0), cfg, dtype=torch.float64), inputs()
    params = params._replace(layers=tuple(layer._replace(attn_scale=layer.attn_scale * 10, ff_scale=layer.ff_scale * 10)
                                          for layer in params.layers))
    whole, _ = stack.apply(params, x)
    state, outs = stack.init_state(params, 2, capacity=SEQ + 1), []
    for chunk in x.split(cuts, 1):
        out, state = stack.apply(params, chunk, state)
        outs.append(out)
    assert_close(torch.cat(outs, 1), whole)


def test_a_later_token_never_changes_an_earlier_result():
    cfg = config(attn_types=ALL, shift_tokens=True)
    params, x = stack.init(random.key(0), cfg, dtype=torch.float64), inputs()
    whole, _ = stack.apply(params, x)
    for t in range(1, SEQ):
        changed, _ = stack.apply(params, torch.cat((x[:, :t], x[:, t:] + 1), 1))
        assert torch.equal(changed[:, :t], whole[:, :t])


def test_dropout_keys_repeat_on_recomputation():
    cfg = config(reversible=True, attn_dropout=0.2, ff_dropout=0.3)
    params, x, key = stack.init(random.key(0), cfg, dtype=torch.float64), inputs(), random.key(4)
    f = lambda p: stack.apply(p, x, dropout_key=key)[0].pow(2).sum()  # noqa: E731
    grads = tree.grad(f)(params)
    step = tree.map(lambda p: random.normal(random.key(8), tuple(p.shape), p.dtype), params)
    moved = [f(tree.map(lambda p, d: p + s * 1e-6 * d, params, step)) for s in (1, -1)]  # noqa: B023
    slope = (moved[0] - moved[1]) / 2e-6
    expected = sum((g * d).sum() for g, d in zip(tree.leaves(grads), tree.leaves(step)))
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ the model


def model_config(**options) -> dalle.Config:
    return dalle.Config(**{**dict(dim=8, depth=2, num_image_tokens=7, image_fmap_size=4, num_text_tokens=11, text_seq_len=TEXT,
                                  heads=2, dim_head=12), **options})


def upstream_package():
    """The sub-module with the model, behind stand-ins for what it imports and never uses here."""
    upstream("dalle_pytorch.transformer")
    pytest.importorskip("axial_positional_embedding")
    for name, content in {"taming": {}, "taming.models": {}, "taming.models.vqgan": {"VQModel": None, "GumbelVQ": None},
                          "omegaconf": {"OmegaConf": None}, "dalle_pytorch.vae": {"OpenAIDiscreteVAE": int, "VQGanVAE": int}}.items():
        if name not in sys.modules:
            module = types.ModuleType(name)
            vars(module).update(content)
            sys.modules[name] = module
    sys.modules["dalle_pytorch"].distributed_utils = types.SimpleNamespace(is_distributed=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return upstream("dalle_pytorch.dalle_pytorch")


def upstream_model(cfg: dalle.Config):
    package = upstream_package()
    vae = package.DiscreteVAE(image_size=8, num_layers=1, num_tokens=cfg.num_image_tokens, codebook_dim=4, hidden_dim=4)
    names = set(cfg.__dataclass_fields__) - {"num_image_tokens", "image_fmap_size"}
    module = package.DALLE(vae=vae, **{name: getattr(cfg, name) for name in names}).double()
    return module, {k: v for k, v in module.state_dict().items() if not k.startswith("vae.")}


def batch(cfg: dalle.Config):
    text = torch.tensor([[3, 1, 4, 0, 0], [2, 7, 1, 8, 0]])
    image = random.bits(random.key(5), (2, cfg.image_seq_len)) % cfg.num_image_tokens
    return text, image


MODELS = [dict(shift_tokens=False), dict(), dict(rotary_emb=False, shift_tokens=False), dict(share_input_output_emb=True),
          dict(stable=True, loss_img_weight=3), dict(attn_types=ALL, depth=4, reversible=True)]


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_the_model_equals_upstream_in_logits_and_loss(options):
    cfg = model_config(**options)
    module, state_dict = upstream_model(cfg)
    params = convert.load(cfg, state_dict)
    text, image = batch(cfg)
    # Upstream's rotary table is float32; without rotary its learned positions are double like the rest.
    dtype = torch.float32 if cfg.rotary_emb else torch.float64
    with torch.no_grad():
        scores, loss = module(text, image), module(text, image, return_loss=True)
    assert_close(dalle.apply(params, dalle.tokens(cfg, text, image)[:, :-1])[0], scores, dtype)
    assert_close(dalle.loss(params, text, image), loss, dtype)
    assert set(convert.dump(params)) == set(state_dict)


def test_prefill_with_image_tokens_then_decode_equals_one_pass():
    cfg = model_config(attn_types=ALL, depth=4)
    params = dalle.init(random.key(0), cfg, dtype=torch.float64)
    text, image = batch(cfg)
    ids = dalle.tokens(cfg, text, image)[:, :-1]
    whole, _ = dalle.apply(params, ids)
    for cut in (1, TEXT, TEXT + 1, TEXT + 7):
        first, state = dalle.apply(params, ids[:, :cut], dalle.init_state(params, 2))
        second, _ = dalle.apply(params, ids[:, cut:], state)
        assert_close(torch.cat((first, second), 1), whole)


def test_generation_equals_recomputing_everything_with_guidance_and_priming():
    cfg = model_config(attn_types=ALL, depth=4)
    params = dalle.init(random.key(0), cfg, dtype=torch.float64)
    text, image = batch(cfg)
    given = text.clone()
    options = dict(filter_thres=0.9, temperature=0.7, cond_scale=3.0)
    out = dalle.generate_images(params, text, random.key(1), image=image[:, :5], **options)
    assert torch.equal(text, given) and torch.equal(out[:, :5], image[:, :5])

    expected, words = image[:, :5], cfg.text_vocabulary
    for i in range(5, cfg.image_seq_len):
        conditional, null = (dalle.apply(params, dalle.tokens(cfg, t, expected))[0][:, -1, words:] for t in (text, text * 0))
        scores = null + (conditional - null) * 3.0
        k = max(int((1 - 0.9) * (words + cfg.num_image_tokens)), 1)
        scores = scores.masked_fill(scores < scores.topk(k, -1).values[:, -1:], -torch.inf)
        token = random.categorical(random.fold_in(random.key(1), i), scores / 0.7)
        expected = torch.cat((expected, token[:, None]), 1)
    assert torch.equal(out, expected)
    assert not torch.equal(out, dalle.generate_images(params, text, random.key(1), image=image[:, :5], filter_thres=0.9,
                                                      temperature=0.7))


def test_text_positions_predict_text_only_and_image_positions_image_only():
    cfg = model_config()
    params = dalle.init(random.key(0), cfg)
    scores, _ = dalle.apply(params, dalle.tokens(cfg, *batch(cfg))[:, :-1])
    lowest = -torch.finfo(scores.dtype).max
    possible = scores > lowest
    assert possible[:, :TEXT, :cfg.text_vocabulary].all() and not possible[:, :TEXT, cfg.text_vocabulary:].any()
    assert possible[:, TEXT:, cfg.text_vocabulary:].all() and not possible[:, TEXT:, :cfg.text_vocabulary].any()


def test_padding_gets_one_token_per_position():
    cfg = model_config()
    ids = dalle.tokens(cfg, torch.zeros(1, TEXT, dtype=torch.int64))
    assert ids.tolist() == [[0] + [11 + i for i in range(TEXT)]]


def test_dropped_conditions_come_from_the_key_and_leave_the_text_alone():
    cfg = model_config()
    params, (text, image) = dalle.init(random.key(0), cfg), batch(cfg)
    given = text.clone()
    always = dalle.loss(params, text, image, null_cond_prob=1.0, dropout_key=random.key(1))
    assert torch.equal(text, given)
    assert_close(always, dalle.loss(params, text * 0, image))
    with pytest.raises(ValueError, match=r"dropout_key must be given, because null_cond_prob=0\.5"):
        dalle.loss(params, text, image, null_cond_prob=0.5)


# ------------------------------------------------------------------------------------------------ autoencoder, CLIP


@pytest.mark.parametrize("options", [dict(), dict(num_resnet_blocks=2), dict(smooth_l1_loss=True, channels=1)], ids=str)
def test_the_autoencoder_equals_upstream(options):
    cfg = discrete_vae.Config(image_size=16, num_tokens=7, codebook_dim=6, num_layers=2, hidden_dim=5, **options)
    module = upstream_package().DiscreteVAE(**{n: getattr(cfg, n) for n in cfg.__dataclass_fields__}).double()
    params = convert.load(cfg, module.state_dict())
    images = random.uniform(random.key(1), (2, cfg.channels, 16, 16), torch.float64)
    with torch.no_grad():
        assert_close(discrete_vae.encode(params, images), module(images, return_logits=True))
        codes = module.get_codebook_indices(images)
        assert torch.equal(discrete_vae.codebook_indices(params, images), codes)
        assert_close(discrete_vae.decode(params, codes), module.decode(codes))
    module.load_state_dict(convert.dump(params), strict=True)


@pytest.mark.parametrize("options", [dict(), dict(straight_through=True), dict(straight_through=True, reinmax=True)], ids=str)
def test_the_autoencoder_learns(options):
    cfg = discrete_vae.Config(image_size=8, num_tokens=8, codebook_dim=8, num_layers=1, hidden_dim=8, channels=1,
                              kl_div_loss_weight=1e-4, **options)
    params = discrete_vae.init(random.key(0), cfg)
    images = random.uniform(random.key(1), (4, 1, 4, 4)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    images, values = (images > 0.5).float(), []
    adam = optim.adamw(1e-2)
    state = adam.init(params)
    for step in range(80):
        value, grads = tree.value_and_grad(discrete_vae.loss)(params, images, random.fold_in(random.key(2), step))
        assert all(g.isfinite().all() for g in tree.leaves(grads))
        updates, state = adam.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        values.append(float(value))
    assert min(values[-5:]) < 0.5 * values[0]


def test_clip_equals_upstream():
    cfg = clip.Config(dim_text=8, dim_image=12, dim_latent=5, num_text_tokens=11, text_enc_depth=2, text_seq_len=6, text_heads=2,
                      visual_enc_depth=1, visual_heads=2, visual_image_size=8, visual_patch_size=4)
    module = upstream_package().CLIP(**{n: getattr(cfg, n) for n in cfg.__dataclass_fields__}).double()
    params = convert.load(cfg, module.state_dict())
    text = random.bits(random.key(0), (3, 6)) % 11
    images = random.uniform(random.key(1), (3, 3, 8, 8), torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [3], [5]])
    for given in (None, mask):
        with torch.no_grad():
            assert_close(clip.apply(params, text, images, text_mask=given), module(text, images, text_mask=given))
            assert_close(clip.loss(params, text, images, text_mask=given), module(text, images, text_mask=given, return_loss=True))
    module.load_state_dict(convert.dump(params), strict=True)


P = dalle.init(random.key(0), model_config())


@pytest.mark.parametrize("wrong, error, text", [
    (lambda: config(attn_types=("ful",)), ValueError, r"attn_types must be among 'full', 'axial_row'.*got \('ful',\)"),
    (lambda: config(image_fmap_size=None), ValueError, r"image_fmap_size must be given for rotary_emb; got None"),
    (lambda: config(shared_attn_ids=(0,), attn_types=ALL), ValueError, r"layers that share attention must have one type"),
    (lambda: config(seq_len=4), ValueError, r"seq_len must hold the 9 image tokens; got 4"),
    (lambda: dalle.tokens(model_config(), torch.zeros(1, 3).long()), ValueError, r"text must be \[batch, 5\].*got \[1, 3\]"),
    (lambda: dalle.tokens(model_config(), torch.zeros(1, TEXT)), TypeError, r"text must be an int64 tensor.*got torch\.float32"),
    (lambda: dalle.loss(P, *[t[:, :5] for t in batch(model_config())]), ValueError, r"image must be \[batch, 16\]"),
    (lambda: dalle.generate_images(P, *batch(model_config())[:1], random.key(0), image=batch(model_config())[1]), ValueError,
     r"image must leave a token to draw; got 16 of 16"),
    (lambda: discrete_vae.Config(image_size=12), ValueError, r"image_size must be a power of 2; got 12"),
])
def test_bad_input_is_named(wrong, error, text):
    with pytest.raises(error, match=text):
        wrong()


def test_a_string_is_one_attention_type():
    assert config(attn_types="full").types == ("full",) * 4
    assert fnattn.gradient_is_exact(config())
