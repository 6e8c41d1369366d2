"""What models of pictures and of whole texts refuse: other kinds, shapes, precisions, and token numbers that are none."""

from __future__ import annotations

import pytest
import torch

from fnattn import random
from fnattn.models import clip, discrete_vae, linformer_lm, vit

KEY = random.key(7)
VIT = vit.init(KEY, vit.Config(image_size=12, patch_size=3, num_classes=5, dim=8, depth=1, heads=2, dim_head=4, channels=2))
VAE = discrete_vae.init(KEY, discrete_vae.Config(image_size=8, num_tokens=11, codebook_dim=5, num_layers=2, hidden_dim=3))
CLIP = clip.init(KEY, clip.Config(dim_text=8, dim_image=8, dim_latent=5, num_text_tokens=13, text_enc_depth=1, text_seq_len=5, text_heads=2,
                                  visual_enc_depth=1, visual_heads=2, visual_image_size=6, visual_patch_size=3))
TEXTS = linformer_lm.init(KEY, linformer_lm.Config(dim=6, num_tokens=11, seq_len=7, depth=1, k=3, heads=2))
WORDS, FIVE = torch.tensor([[1, 2, 3]]), torch.zeros(1, 4, dtype=torch.int64)


def pictures(params):
    cfg = params.cfg
    size = getattr(cfg, "image_size", None) or cfg.visual_image_size
    return torch.rand(1, cfg.channels, size, size)


MODELS = {
    "vit.apply": (VIT, lambda images: vit.apply(VIT, images)),
    "discrete_vae.encode": (VAE, lambda images: discrete_vae.encode(VAE, images)),
    "clip": (CLIP, lambda images: clip.apply(CLIP, WORDS, images)),
}


@pytest.mark.parametrize("who", MODELS)
def test_images_of_another_kind_shape_or_precision_are_refused(who):
    params, run = MODELS[who]
    images = pictures(params)
    assert torch.as_tensor(run(images)).isfinite().all()
    for wrong, error, text in ((images.tolist(), TypeError, "must be a tensor; got list"),
                               (None, TypeError, "must be a tensor; got NoneType"),
                               (images[0], ValueError, "images must be .batch"), (images[..., 1:], ValueError, "images must be .batch"),
                               ((images * 255).byte(), TypeError, "must be floating point; got torch.uint8"),
                               (images.double(), TypeError, "must be torch.float32, as the params are; got torch.float64")):
        with pytest.raises(error, match=f"^{who}: (images )?{text}"):
            run(wrong)


IDS = {
    "clip": ("text", 13, lambda ids, **more: clip.apply(CLIP, ids, pictures(CLIP), **more)),
    "discrete_vae.decode": ("tokens", 11, lambda ids: discrete_vae.decode(VAE, ids)),
    "linformer_lm.apply": ("ids", 11, lambda ids, **more: linformer_lm.apply(TEXTS, ids, **more)),
}


@pytest.mark.parametrize("who", IDS)
def test_token_numbers_that_are_none_are_refused(who):
    name, count, run = IDS[who]
    ids = FIVE if who == "discrete_vae.decode" else WORDS
    run(ids), run(ids + count - 1 - ids)
    for wrong, error, text in ((ids.tolist(), TypeError, "must be an int64 tensor of token numbers; got list"),
                               (ids.bool(), TypeError, "must be an int64 tensor of token numbers; got torch.bool"),
                               (ids - 4, ValueError, f"must lie in .0, {count}.; got -"),
                               (ids + count, ValueError, f"must lie in .0, {count}.; got {int(ids.max()) + count}")):
        with pytest.raises(error, match=f"^{who}: {name} {text}"):
            run(wrong)


@pytest.mark.parametrize("who, mask", [("clip", "text_mask"), ("linformer_lm.apply", "mask")])
def test_masks_of_another_kind_or_shape_are_refused(who, mask):
    run = IDS[who][2]
    for wrong, error in (([[True] * 3], TypeError), (torch.ones(1, 3), TypeError), (torch.ones(1, 2, dtype=torch.bool), ValueError)):
        with pytest.raises(error, match=f"^{who}: mask must be"):
            run(WORDS, **{mask: wrong})
