"""Discrete autoencoder of pictures: convolutions to token scores, a soft choice from a codebook, convolutions back.

    logits = encoder(normalised picture);   z = sum_n soft_n(logits) codebook_n;   picture' = decoder(z)

Its tokens are what `models.dalle` reads and draws.

Source: DiscreteVAE of dalle-pytorch 1.6.6; Gumbel-softmax: Jang et al. 2017, arXiv 1611.01144; ReinMax: Liu et al. 2023,
arXiv 2304.08612. Different here: the noise comes from a key, and the picture given is never written to.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import random
from ..attentions._heads import uniform_init
from ..core import check, check_ids, config
from ._images import check_images

# b batch, c channels, n num_tokens, d codebook_dim


@config
class Config:
    """Options of the autoencoder; a picture of image_size becomes (image_size / 2^num_layers)^2 tokens.

    num_tokens, codebook_dim: entries of the codebook and their width. hidden_dim: of the convolutions.
    num_resnet_blocks: residual blocks after the encoder's and before the decoder's strided layers.
    smooth_l1_loss: reconstruction loss in place of squared error.
    temperature: of the soft choice. straight_through: a hard choice with the soft one's gradient; reinmax: a better such
                gradient. kl_div_loss_weight: weight of the divergence of the choice from uniform.
    normalization: means and standard deviations per channel; None for none.
    """

    image_size: int = 256
    num_tokens: int = 512
    codebook_dim: int = 512
    num_layers: int = 3
    num_resnet_blocks: int = 0
    hidden_dim: int = 64
    channels: int = 3
    smooth_l1_loss: bool = False
    temperature: float = 0.9
    straight_through: bool = False
    reinmax: bool = False
    kl_div_loss_weight: float = 0.0
    normalization: tuple | None = ((0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 1.0))

    def __post_init__(self):
        check(self.image_size >= 1 and self.image_size & (self.image_size - 1) == 0,
              "discrete_vae.Config: image_size must be a power of 2; got {}.", self.image_size, remedy="Resize the pictures.")
        check(self.num_layers >= 1 and 2 ** self.num_layers <= self.image_size,
              "discrete_vae.Config: num_layers must lie in [1, log2(image_size)]; got {}.", self.num_layers,
              remedy="Each layer halves the picture.")
        check(self.normalization is None or all(len(row) >= self.channels for row in self.normalization),
              "discrete_vae.Config: normalization must cover {} channels; got {}.", self.channels, self.normalization,
              remedy="Give one mean and one standard deviation per channel, or None.")

    @property
    def image_fmap_size(self) -> int:
        """The picture's side in tokens."""
        return self.image_size // 2 ** self.num_layers


class Conv(NamedTuple):
    """A convolution: weight [out, in, h, w] (transposed ones [in, out, h, w]) and bias [out]."""

    weight: Tensor
    bias: Tensor


class Params(NamedTuple):
    """Layers in order; residual blocks are tuples of three convolutions."""

    cfg: Config
    codebook: Tensor    # [n, d]
    encoder: tuple      # num_layers x Conv, num_resnet_blocks x (Conv, Conv, Conv), Conv
    decoder: tuple      # Conv (if residual blocks), blocks, num_layers x transposed Conv, Conv


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key, as torch.nn.Conv2d, ConvTranspose2d and Embedding draw theirs."""
    kind, hidden = {"dtype": dtype, "device": device}, cfg.hidden_dim
    meta = device is not None and torch.device(device).type == "meta"

    def conv(name: str, shape: tuple, out: int) -> Conv:
        bound = prod(shape[1:]) ** -0.5  # torch counts a transposed convolution's fan in along its second axis, too
        return Conv(uniform_init(params_key, name, shape, bound, **kind), uniform_init(params_key, f"{name}_bias", (out,), bound, **kind))

    def block(name: str) -> tuple:
        return tuple(conv(f"{name}.{i}", (hidden, hidden, size, size), hidden) for i, size in enumerate((3, 3, 1)))

    blocks, first = cfg.num_resnet_blocks, hidden if cfg.num_resnet_blocks else cfg.codebook_dim
    encoder = [conv(f"down.{i}", (hidden, hidden if i else cfg.channels, 4, 4), hidden) for i in range(cfg.num_layers)]
    encoder += [block(f"encoder.block.{i}") for i in range(blocks)]
    encoder.append(conv("to_logits", (cfg.num_tokens, hidden, 1, 1), cfg.num_tokens))
    decoder: list = [conv("from_codebook", (hidden, cfg.codebook_dim, 1, 1), hidden)] if blocks else []
    decoder += [block(f"decoder.block.{i}") for i in range(blocks)]
    decoder += [conv(f"up.{i}", (hidden if i else first, hidden, 4, 4), hidden) for i in range(cfg.num_layers)]
    decoder.append(conv("to_picture", (cfg.channels, hidden, 1, 1), cfg.channels))
    wide = torch.promote_types(dtype, torch.float32)
    codebook = torch.empty(cfg.num_tokens, cfg.codebook_dim, **kind) if meta else random.normal(
        random.fold_in(params_key, "codebook"), (cfg.num_tokens, cfg.codebook_dim), wide).to(**kind)
    return Params(cfg, codebook, tuple(encoder), tuple(decoder))


def _residual(convs: tuple, x: Tensor) -> Tensor:
    h = F.relu(F.conv2d(x, *convs[0], padding=1))
    return F.conv2d(F.relu(F.conv2d(h, *convs[1], padding=1)), *convs[2]) + x


def normalise(cfg: Config, images: Tensor) -> Tensor:
    """(images - mean) / standard deviation per channel."""
    if cfg.normalization is None:
        return images
    mean, std = (torch.tensor(row[:cfg.channels], dtype=images.dtype, device=images.device)[:, None, None] for row in cfg.normalization)
    return (images - mean) / std


def encode(params: Params, images: Tensor) -> Tensor:
    """Token scores [b, n, side, side] of pictures [b, c, image_size, image_size]."""
    cfg = params.cfg
    check_images("discrete_vae.encode", images, cfg.channels, cfg.image_size, params.codebook)
    x = normalise(cfg, images)
    for down in params.encoder[:cfg.num_layers]:
        x = F.relu(F.conv2d(x, *down, stride=2, padding=1))
    for block in params.encoder[cfg.num_layers:-1]:
        x = _residual(block, x)
    return F.conv2d(x, *params.encoder[-1])


def codebook_indices(params: Params, images: Tensor) -> Tensor:
    """The best token of each place, row by row: int64 [b, side^2]."""
    return encode(params, images).argmax(1).flatten(1)


def decode(params: Params, tokens: Tensor) -> Tensor:
    """Pictures [b, c, image_size, image_size] of tokens int64 [b, side^2]; normalised, as the decoder gives them."""
    side = params.cfg.image_fmap_size
    check_ids("discrete_vae.decode", tokens, params.codebook.shape[0], name="tokens")
    check(tokens.shape[1] == side * side, "discrete_vae.decode: tokens must be [batch, {}]; got {}.", side * side,
          list(tokens.shape), remedy="Flatten the tokens row by row.")
    return _decode(params, F.embedding(tokens, params.codebook).mT.unflatten(2, (side, side)))


def _decode(params: Params, x: Tensor) -> Tensor:
    cfg, layers = params.cfg, params.decoder
    ups = len(layers) - 1 - cfg.num_layers
    if cfg.num_resnet_blocks:
        x = F.conv2d(x, *layers[0])
        for block in layers[1:ups]:
            x = _residual(block, x)
    for up in layers[ups:-1]:
        x = F.relu(F.conv_transpose2d(x, *up, stride=2, padding=1))
    return F.conv2d(x, *layers[-1])


def apply(params: Params, images: Tensor, key: Tensor, *, temperature: float | None = None) -> Tensor:
    """Pictures through the soft choice and back: [b, c, image_size, image_size]. The key draws the Gumbel noise."""
    return _decode(params, _choose(params, encode(params, images), key, temperature))


def _choose(params: Params, logits: Tensor, key: Tensor, temperature: float | None) -> Tensor:
    """[b, d, side, side]: the codebook's entries, weighted by a Gumbel-softmax of the scores."""
    cfg = params.cfg
    temperature = cfg.temperature if temperature is None else temperature
    uniform = random.uniform(key, tuple(logits.shape), torch.promote_types(logits.dtype, torch.float32), 1e-20, 1.0)
    noise = -torch.log((-torch.log(uniform)).clamp(min=1e-20))
    soft = ((logits + noise.to(logits.dtype)) / temperature).softmax(1)
    weights = soft
    if cfg.straight_through:
        hard = F.one_hot(soft.argmax(1), cfg.num_tokens).movedim(-1, 1).to(soft.dtype)
        weights = hard - soft.detach() + soft
        if cfg.reinmax:
            hard, p0 = weights.detach(), logits.softmax(1)
            p1 = (hard + (logits / temperature).softmax(1)) / 2
            p1 = ((torch.log(p1.clamp(min=1e-20)) - logits).detach() + logits).softmax(1)
            p2 = 2 * p1 - 0.5 * p0
            weights = p2 - p2.detach() + hard
    return torch.einsum("bnhw,nd->bdhw", weights, params.codebook)


def loss(params: Params, images: Tensor, key: Tensor, *, temperature: float | None = None) -> Tensor:
    """Reconstruction error of the normalised picture plus kl_div_loss_weight times the divergence from uniform; 0-d."""
    cfg = params.cfg
    logits = encode(params, images)
    out = _decode(params, _choose(params, logits, key, temperature))
    error = (F.smooth_l1_loss if cfg.smooth_l1_loss else F.mse_loss)(out, normalise(cfg, images))
    log_q = logits.flatten(2).log_softmax(1)
    # Summed over batch and places, as upstream's "batchmean" over a batch of one does.
    divergence = (log_q.exp() * (log_q + torch.log(torch.tensor(float(cfg.num_tokens))))).sum()
    return error + cfg.kl_div_loss_weight * divergence
