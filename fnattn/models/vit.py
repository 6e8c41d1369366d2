"""Vision transformer with Taylor-series linear attention and convolutional feed-forwards.

    x = LayerNorm(Linear(LayerNorm(patches))) + positions;   x = x + attn(norm(x));   x = x + ff(norm(x));   class(mean(x))

Source: ViT of taylor-series-linear-attention 0.2.0; the 2-D table of sines is that of Beyer et al. 2022, arXiv 2205.01580.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import random, taps
from ..attentions import taylor
from ..attentions._heads import dropout, layer_norm, linear_init, uniform_init
from ..core import check, config
from ._images import check_images
from .block import LayerNorm, norm_init

# b batch, c channels, n patches = side^2, p patch_size


@config
class Config:
    """Options of the vision transformer.

    image_size: height and width of an image. patch_size: of a patch, a divisor of image_size.
    num_classes: width of the result.
    dim:        width of the tokens, a multiple of 4, at least 8.
    depth:      number of blocks.
    ff_mult:    hidden width of a feed-forward over dim.
    heads, dim_head: of the attention. channels: of an image.
    dropout:    chance of zeroing an entry after attention and inside feed-forwards; emb_dropout: of the tokens at the start;
                both only when a dropout_key is passed.
    """

    image_size: int
    patch_size: int
    num_classes: int
    dim: int
    depth: int
    ff_mult: int = 4
    heads: int = 16
    channels: int = 3
    dim_head: int = 8
    dropout: float = 0.0
    emb_dropout: float = 0.0

    def __post_init__(self):
        for name in ("image_size", "patch_size", "num_classes", "depth", "channels"):
            check(getattr(self, name) >= 1, "vit.Config: {} must be at least 1; got {}.", name, getattr(self, name),
                  remedy="Give a positive number.")
        check(self.image_size % self.patch_size == 0, "vit.Config: patch_size must divide image_size={}; got {}.",
              self.image_size, self.patch_size, remedy="Choose a divisor.")
        check(self.dim % 4 == 0 and self.dim >= 8, "vit.Config: dim must be a multiple of 4 and at least 8; got {}.", self.dim,
              remedy="The table of positions has a sine and a cosine for each of two axes.")

    @property
    def side(self) -> int:
        """Patches along one edge of the image."""
        return self.image_size // self.patch_size

    @property
    def attention(self) -> taylor.Config:
        """The attention of a block."""
        return taylor.Config(dim=self.dim, heads=self.heads, dim_head=self.dim_head, dropout=self.dropout)


class ConvFeedForward(NamedTuple):
    """Tokens as an image: widen, depth-wise 3 x 3, mix, narrow. Weights are [out, in, height, width]."""

    widen: Tensor        # [hidden, dim, 1, 1]
    widen_bias: Tensor   # [hidden]
    depth: Tensor        # [hidden, 1, 3, 3]
    depth_bias: Tensor   # [hidden]
    mix: Tensor          # [hidden, hidden, 1, 1]
    mix_bias: Tensor     # [hidden]
    narrow: Tensor       # [dim, hidden, 1, 1]
    narrow_bias: Tensor  # [dim]


class Block(NamedTuple):
    """One layer."""

    attn_norm: LayerNorm
    attn: taylor.Params
    ff_norm: LayerNorm
    ff: ConvFeedForward


class Params(NamedTuple):
    """All parameters; weights are [out, in]."""

    cfg: Config
    patch_norm: LayerNorm     # over p p c
    to_tokens: Tensor         # [dim, p p c]
    to_tokens_bias: Tensor    # [dim]
    token_norm: LayerNorm     # over dim
    blocks: tuple             # depth x Block
    head_norm: LayerNorm
    head: Tensor              # [num_classes, dim]
    head_bias: Tensor         # [num_classes]


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key, as torch.nn.Linear and Conv2d draw theirs."""
    kind = {"dtype": dtype, "device": device}
    patch = cfg.channels * cfg.patch_size ** 2

    def one(i: int) -> Block:
        key = random.fold_in(random.fold_in(params_key, "blocks"), i)
        return Block(norm_init("layer", cfg.dim, **kind), taylor.init(random.fold_in(key, "attn"), cfg.attention, **kind),
                     norm_init("layer", cfg.dim, **kind), _ff_init(random.fold_in(key, "ff"), cfg, **kind))

    return Params(
        cfg, norm_init("layer", patch, **kind), linear_init(params_key, "to_tokens", cfg.dim, patch, **kind),
        uniform_init(params_key, "to_tokens_bias", (cfg.dim,), patch ** -0.5, **kind), norm_init("layer", cfg.dim, **kind),
        tuple(one(i) for i in range(cfg.depth)), norm_init("layer", cfg.dim, **kind),
        linear_init(params_key, "head", cfg.num_classes, cfg.dim, **kind),
        uniform_init(params_key, "head_bias", (cfg.num_classes,), cfg.dim ** -0.5, **kind))


def _ff_init(key: Tensor, cfg: Config, **kind) -> ConvFeedForward:
    dim, hidden = cfg.dim, int(cfg.dim * cfg.ff_mult)
    shapes = {"widen": (hidden, dim, 1, 1), "depth": (hidden, 1, 3, 3), "mix": (hidden, hidden, 1, 1), "narrow": (dim, hidden, 1, 1)}
    drawn = []
    for name, shape in shapes.items():
        bound = (shape[1] * shape[2] * shape[3]) ** -0.5
        drawn += [uniform_init(key, name, shape, bound, **kind), uniform_init(key, f"{name}_bias", shape[:1], bound, **kind)]
    return ConvFeedForward(*drawn)


def apply(params: Params, images: Tensor, *, dropout_key: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Class scores [b, num_classes] of images [b, channels, image_size, image_size]."""
    cfg = params.cfg
    check_images("vit.apply", images, cfg.channels, cfg.image_size, params.to_tokens)
    patches = images.unflatten(2, (cfg.side, -1)).unflatten(4, (cfg.side, -1))  # [b, c, side, p, side, p]
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)        # [b, n, p p c]
    x = F.linear(layer_norm(patches, *params.patch_norm), params.to_tokens, params.to_tokens_bias)
    x = layer_norm(x, *params.token_norm) + positions(cfg, x)
    x = dropout(dropout_key, "tokens", x, cfg.emb_dropout)
    for i, block in enumerate(params.blocks):
        with taps.scope(f"blocks.{i}"):
            key = None if dropout_key is None else random.fold_in(dropout_key, i)
            x = x + taylor.apply(block.attn, layer_norm(x, *block.attn_norm), dropout_key=key, impl=impl)[0]
            x = taps.tap("out", x + _feed_forward(block.ff, layer_norm(x, *block.ff_norm), cfg, key))
    return F.linear(layer_norm(x.mean(1), *params.head_norm), params.head, params.head_bias)


def _feed_forward(ff: ConvFeedForward, x: Tensor, cfg: Config, key: Tensor | None) -> Tensor:
    image = x.mT.unflatten(2, (cfg.side, cfg.side))
    hidden = F.hardswish(F.conv2d(image, ff.widen, ff.widen_bias))
    hidden = F.conv2d(hidden, ff.depth, ff.depth_bias, padding=1, groups=hidden.shape[1])
    hidden = dropout(key, "ff_hidden", F.hardswish(F.conv2d(hidden, ff.mix, ff.mix_bias)), cfg.dropout)
    return dropout(key, "ff_out", F.conv2d(hidden, ff.narrow, ff.narrow_bias).flatten(2).mT, cfg.dropout)


def positions(cfg: Config, like: Tensor) -> Tensor:
    """The fixed table of positions [n, dim]: sines and cosines of x, then of y, patches in rows."""
    quarter = cfg.dim // 4
    omega = 10000.0 ** -(torch.arange(quarter, device=like.device) / (quarter - 1))
    at = torch.arange(cfg.side, device=like.device, dtype=torch.float32)
    x, y = at.repeat(cfg.side)[:, None] * omega, at.repeat_interleave(cfg.side)[:, None] * omega
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), 1).to(like.dtype)
