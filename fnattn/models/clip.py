"""CLIP: texts and pictures to unit vectors whose product says how well they belong together.

    sim = exp(temperature) normalise(text latent) . normalise(image latent)

each latent the mean of a non-causal transformer's tokens, projected.

Source: CLIP of dalle-pytorch 1.6.6; Radford et al. 2021, arXiv 2103.00020.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import random
from ..attentions._heads import linear_init, uniform_init
from ..core import check, check_ids, config
from . import dalle_transformer as stack
from ._images import check_images

# b batch, t text tokens, p patches


@config
class Config:
    """Options of CLIP: widths, depths and heads of the two encoders, the shared latent, and the picture's size."""

    dim_text: int = 512
    dim_image: int = 512
    dim_latent: int = 512
    num_text_tokens: int = 10000
    text_enc_depth: int = 6
    text_seq_len: int = 256
    text_heads: int = 8
    num_visual_tokens: int = 512
    visual_enc_depth: int = 6
    visual_heads: int = 8
    visual_image_size: int = 256
    visual_patch_size: int = 32
    channels: int = 3

    def __post_init__(self):
        check(self.visual_image_size % self.visual_patch_size == 0, "clip.Config: visual_patch_size must divide visual_image_size={}; "
              "got {}.", self.visual_image_size, self.visual_patch_size, remedy="Choose a divisor.")

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return (self.visual_image_size // self.visual_patch_size) ** 2

    @property
    def text(self) -> stack.Config:
        """The text encoder."""
        return stack.Config(causal=False, seq_len=self.text_seq_len, dim=self.dim_text, depth=self.text_enc_depth,
                            heads=self.text_heads, rotary_emb=False)

    @property
    def visual(self) -> stack.Config:
        """The picture encoder."""
        return stack.Config(causal=False, seq_len=self.patches, dim=self.dim_image, depth=self.visual_enc_depth,
                            heads=self.visual_heads, rotary_emb=False)


class Params(NamedTuple):
    """Weights are [out, in]."""

    cfg: Config
    text_emb: Tensor             # [num_text_tokens, dim_text]
    text_positions: Tensor       # [t, dim_text]
    text_transformer: stack.Params
    to_text_latent: Tensor       # [dim_latent, dim_text]
    to_visual: Tensor            # [dim_image, patch]
    to_visual_bias: Tensor       # [dim_image]
    visual_positions: Tensor     # [p, dim_image]
    visual_transformer: stack.Params
    to_visual_latent: Tensor     # [dim_latent, dim_image]
    temperature: Tensor          # []: the logarithm of the scale


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key; embeddings normal, the rest as in torch.nn."""
    kind, patch = {"dtype": dtype, "device": device}, cfg.channels * cfg.visual_patch_size ** 2

    def table(name: str, rows: int, width: int) -> Tensor:
        if device is not None and torch.device(device).type == "meta":
            return torch.empty(rows, width, **kind)
        return random.normal(random.fold_in(params_key, name), (rows, width), torch.promote_types(dtype, torch.float32)).to(**kind)

    return Params(
        cfg, table("text_emb", cfg.num_text_tokens, cfg.dim_text), table("text_positions", cfg.text_seq_len, cfg.dim_text),
        stack.init(random.fold_in(params_key, "text_transformer"), cfg.text, **kind),
        linear_init(params_key, "to_text_latent", cfg.dim_latent, cfg.dim_text, **kind),
        linear_init(params_key, "to_visual", cfg.dim_image, patch, **kind),
        uniform_init(params_key, "to_visual_bias", (cfg.dim_image,), patch ** -0.5, **kind),
        table("visual_positions", cfg.patches, cfg.dim_image),
        stack.init(random.fold_in(params_key, "visual_transformer"), cfg.visual, **kind),
        linear_init(params_key, "to_visual_latent", cfg.dim_latent, cfg.dim_image, **kind),
        torch.ones((), **kind))


def latents(params: Params, text: Tensor, images: Tensor, *, text_mask: Tensor | None = None,
            impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Unit vectors [b, dim_latent] of texts int64 [b, t] and pictures [b, c, size, size]; text_mask bool [b, t]."""
    cfg, size = params.cfg, params.cfg.visual_patch_size
    check_images("clip", images, cfg.channels, cfg.visual_image_size, params.to_visual)
    check_ids("clip", text, params.text_emb.shape[0], name="text", mask=text_mask)
    check(text.shape[1] <= cfg.text_seq_len, "clip: text must be [batch, at most {}]; got {}.", cfg.text_seq_len, list(text.shape),
          remedy="Cut the text.")
    words = F.embedding(text, params.text_emb) + params.text_positions[:text.shape[1]]
    words, _ = stack.apply(params.text_transformer, words, mask=text_mask, impl=impl)
    if text_mask is None:
        words = words.mean(1)
    else:
        words = torch.where(text_mask[..., None], words, 0.0).sum(1) / text_mask.sum(1, keepdim=True)
    patches = images.unflatten(2, (-1, size)).unflatten(4, (-1, size)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    seen = F.linear(patches, params.to_visual, params.to_visual_bias) + params.visual_positions
    seen = stack.apply(params.visual_transformer, seen, impl=impl)[0].mean(1)
    return (F.normalize(F.linear(words, params.to_text_latent), dim=-1),
            F.normalize(F.linear(seen, params.to_visual_latent), dim=-1))


def apply(params: Params, text: Tensor, images: Tensor, *, text_mask: Tensor | None = None, impl: str = "auto") -> Tensor:
    """How well each text belongs to its picture: [b]."""
    words, seen = latents(params, text, images, text_mask=text_mask, impl=impl)
    return (words * seen).sum(-1) * params.temperature.exp()


def loss(params: Params, text: Tensor, images: Tensor, *, text_mask: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Cross entropy of finding each text's picture in the batch, and each picture's text; their mean, 0-d."""
    words, seen = latents(params, text, images, text_mask=text_mask, impl=impl)
    scores, labels = words @ seen.mT * params.temperature.exp(), torch.arange(text.shape[0], device=text.device)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.mT, labels)) / 2
