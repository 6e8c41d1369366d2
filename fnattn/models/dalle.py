"""DALLE: one causal transformer over the tokens of a text and then of a picture.

    logits = to_logits(norm(transformer(embed([BOS, text, image]) (+ positions))))

Text and image tokens share one vocabulary: num_text_tokens text tokens, one padding token per text position, then the image
tokens. Positions in the text may only predict text, positions from its end on only image.

`loss` trains, `generate_images` draws through explicit states: one for the conditional and one for the unconditional branch
of guidance.

Source: DALLE of dalle-pytorch 1.6.6; Ramesh et al. 2021, arXiv 2102.12092; guidance: Ho & Salimans 2022, arXiv 2207.12598.
Different here: pictures come as tokens (see `models.discrete_vae`); the text given is never written to; the cache is used
whether or not there is guidance, and each branch has its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import random
from ..attentions._heads import linear_init, uniform_init
from ..core import EMPTY, Empty, check, check_ids, check_init, check_sizes, config, config_of
from . import dalle_transformer as stack
from .block import LayerNorm, norm, norm_init
from .dalle_transformer import Config as Stack
from .generate import guide

# b batch, t text_seq_len, m image tokens given, s image_fmap_size, v total vocabulary


@config
class Config:
    """Options of DALLE.

    dim, depth: width and number of layers.
    num_image_tokens: vocabulary of the picture. image_fmap_size: the picture's side in tokens. (Upstream reads both from
                its vae.)
    num_text_tokens: vocabulary of the text; 0 is padding. text_seq_len: tokens of a text.
    loss_img_weight: weight of the picture's loss against the text's.
    share_input_output_emb: embeddings are the rows of the projection to logits.
    All others: as in `models.dalle_transformer.Config`.
    """

    dim: int
    depth: int
    num_image_tokens: int
    image_fmap_size: int
    num_text_tokens: int = 10000
    text_seq_len: int = 256
    heads: int = 8
    dim_head: int = 64
    reversible: bool = False
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    sparse_attn: bool = False
    attn_types: tuple | str | None = None
    loss_img_weight: float = 7
    stable: bool = False
    sandwich_norm: bool = False
    shift_tokens: bool = True
    rotary_emb: bool = True
    shared_attn_ids: tuple | None = None
    shared_ff_ids: tuple | None = None
    share_input_output_emb: bool = False
    optimize_for_inference: bool = False

    def __post_init__(self):
        check_sizes("dalle.Config", 1, dim=self.dim, depth=self.depth, num_image_tokens=self.num_image_tokens,
                    image_fmap_size=self.image_fmap_size, num_text_tokens=self.num_text_tokens, text_seq_len=self.text_seq_len,
                    heads=self.heads, dim_head=self.dim_head)
        stack_cfg = self.transformer
        object.__setattr__(self, "attn_types", stack_cfg.attn_types)
        object.__setattr__(self, "shared_attn_ids", stack_cfg.shared_attn_ids)
        object.__setattr__(self, "shared_ff_ids", stack_cfg.shared_ff_ids)

    @property
    def text_vocabulary(self) -> int:
        """Text tokens and one padding token per text position."""
        return self.num_text_tokens + self.text_seq_len

    @property
    def image_seq_len(self) -> int:
        """Image tokens."""
        return self.image_fmap_size ** 2

    @property
    def seq_len(self) -> int:
        """Tokens without begin-of-sequence."""
        return self.text_seq_len + self.image_seq_len

    @property
    def transformer(self) -> Stack:
        """The config of the stack."""
        shared = {name: getattr(self, name) for name in Stack.__dataclass_fields__ if name in type(self).__dataclass_fields__}
        return Stack(**shared, seq_len=self.seq_len)


class Params(NamedTuple):
    """Weights are [out, in], as in torch.nn.Linear."""

    cfg: Config
    transformer: stack.Params
    norm: LayerNorm
    to_logits: Tensor                         # [v, dim]
    to_logits_bias: Tensor                    # [v]
    text_emb: Tensor | Empty = EMPTY          # [text vocabulary, dim]; Empty if shared
    image_emb: Tensor | Empty = EMPTY         # [num_image_tokens, dim]; Empty if shared
    text_positions: Tensor | Empty = EMPTY    # [t + 1, dim]; Empty with rotary_emb
    row_positions: Tensor | Empty = EMPTY     # [s, dim]; Empty with rotary_emb
    column_positions: Tensor | Empty = EMPTY  # [s, dim]; Empty with rotary_emb


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key; embeddings normal, the rest as in torch.nn."""
    check_init("dalle.init", cfg, Config, dtype)
    kind, vocabulary = {"dtype": dtype, "device": device}, cfg.text_vocabulary + cfg.num_image_tokens

    def table(name: str, rows: int) -> Tensor:
        if device is not None and torch.device(device).type == "meta":
            return torch.empty(rows, cfg.dim, **kind)
        wide = torch.promote_types(dtype, torch.float32)
        return random.normal(random.fold_in(params_key, name), (rows, cfg.dim), wide).to(**kind)

    shared, placed = cfg.share_input_output_emb, not cfg.rotary_emb
    return Params(
        cfg, stack.init(random.fold_in(params_key, "transformer"), cfg.transformer, **kind), norm_init("layer", cfg.dim, **kind),
        linear_init(params_key, "to_logits", vocabulary, cfg.dim, **kind),
        uniform_init(params_key, "to_logits_bias", (vocabulary,), cfg.dim ** -0.5, **kind),
        text_emb=EMPTY if shared else table("text_emb", cfg.text_vocabulary),
        image_emb=EMPTY if shared else table("image_emb", cfg.num_image_tokens),
        text_positions=table("text_positions", cfg.text_seq_len + 1) if placed else EMPTY,
        row_positions=table("row_positions", cfg.image_fmap_size) if placed else EMPTY,
        column_positions=table("column_positions", cfg.image_fmap_size) if placed else EMPTY)


def init_state(params: Params, batch: int) -> stack.State:
    """The state before begin-of-sequence. Its capacity is the whole sequence."""
    capacity = config_of("dalle.init_state", params, Params).seq_len
    check_sizes("dalle.init_state", 0, batch=batch)
    return stack.init_state(params.transformer, batch, capacity=capacity)


def tokens(cfg: Config, text: Tensor, image: Tensor | None = None) -> Tensor:
    """Text and image in the joint vocabulary, begin-of-sequence first: int64 [b, 1 + t + m].

    Args:
        text: int64 [b, t] in [0, num_text_tokens); 0 is padding and becomes the padding token of its position.
        image: int64 [b, m] in [0, num_image_tokens), m at most image_seq_len, or None.
    """
    check_ids("dalle.tokens", text, cfg.num_text_tokens, name="text")
    check(text.shape[1] == cfg.text_seq_len, "dalle.tokens: text must be [batch, {}] (cfg.text_seq_len); got {}.",
          cfg.text_seq_len, list(text.shape), remedy="Pad it with zeros at the end, or cut it.")
    pads = torch.arange(cfg.text_seq_len, device=text.device) + cfg.num_text_tokens
    parts = [torch.zeros_like(text[:, :1]), torch.where(text == 0, pads, text)]
    if image is not None:
        check_ids("dalle.tokens", image, cfg.num_image_tokens, name="image")
        check(image.shape[0] == text.shape[0] and image.shape[1] <= cfg.image_seq_len,
              "dalle.tokens: image must be [{}, at most {}] (batch of text, cfg.image_seq_len); got {}.", text.shape[0], cfg.image_seq_len,
              list(image.shape), remedy="Flatten the picture's tokens row by row.")
        parts.append(image + cfg.text_vocabulary)
    return torch.cat(parts, 1)


def apply(params: Params, ids: Tensor, state: stack.State | Empty = EMPTY, *, mask: Tensor | None = None,
          dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, stack.State | Empty]:
    """Logits over the joint vocabulary for the token after each position; impossible kinds of token are at -finfo.max.

    Args:
        params: from `init`.
        ids: int64 [b, n] in the joint vocabulary, from `tokens`; with a state, whatever comes next, in any chunks.
        state: from `init_state` or a former call.
        mask: bool [b, n], passed to every attention. dropout_key, impl: as for every attention.
    Returns:
        logits [b, n, v]; the state after ids, or EMPTY.
    """
    cfg, streaming = config_of("dalle.apply", params, Params), not isinstance(state, Empty)
    check_ids("dalle.apply", ids, cfg.text_vocabulary + cfg.num_image_tokens, mask=mask)
    if streaming:
        stack.check_state("dalle", params.transformer, ids.shape[0], state, "init_state(params, batch)")
    check(ids.shape[1] <= cfg.seq_len, "dalle.apply: ids must be [batch, at most {}]; got {}.", cfg.seq_len,
          list(ids.shape), remedy="The last image token predicts nothing: leave it out.")
    at = torch.arange(ids.shape[1], device=ids.device) + (state.pos if streaming else 0)
    x = _embed(params, ids, at)
    if cfg.stable:
        x = x * 0.1 + x.detach() * 0.9
    x, state = stack.apply(params.transformer, x, state, mask=mask, dropout_key=dropout_key, impl=impl)
    if cfg.stable:
        x = x / x.amax(-1, keepdim=True).detach()
    scores = F.linear(norm(params.norm, x), params.to_logits, params.to_logits_bias)
    is_text = torch.arange(scores.shape[-1], device=ids.device) < cfg.text_vocabulary
    # Not `is_text == ...`: torch's inductor cannot compare two bools that are made of nothing but positions.
    possible = torch.where((at < cfg.text_seq_len)[:, None], is_text, ~is_text)
    return scores.masked_fill(~possible, -torch.finfo(scores.dtype).max), state


def _embed(params: Params, ids: Tensor, at: Tensor) -> Tensor:
    cfg, words = params.cfg, params.cfg.text_vocabulary
    if cfg.share_input_output_emb:
        x = F.embedding(ids, params.to_logits)
    else:
        x = torch.where((ids < words)[..., None], F.embedding(ids.clamp(max=words - 1), params.text_emb),
                        F.embedding((ids - words).clamp(min=0), params.image_emb))
    if cfg.rotary_emb:
        return x
    in_text = at <= cfg.text_seq_len
    cell = torch.where(in_text, 0, at - cfg.text_seq_len - 1)  # not clamp: torch's inductor cannot divide what comes of it
    picture = F.embedding(cell // cfg.image_fmap_size, params.row_positions) + \
        F.embedding(cell % cfg.image_fmap_size, params.column_positions)
    return x + torch.where(in_text[:, None],
                           F.embedding(at.clamp(max=cfg.text_seq_len), params.text_positions), picture)


def loss(params: Params, text: Tensor, image: Tensor, *, null_cond_prob: float = 0.0, dropout_key: Tensor | None = None,
         impl: str = "auto") -> Tensor:
    """(cross entropy of the text + loss_img_weight * that of the picture) / (1 + loss_img_weight): 0-d, float32 or wider.

    Args:
        text: int64 [b, t]. image: int64 [b, image_seq_len].
        null_cond_prob: chance that a sample's text is replaced by padding, which trains guidance; needs dropout_key.
        dropout_key: drops if the config has a chance of dropout above 0: in training a new one for each step, fold_in(key, step);
            None for an evaluation.
    """
    cfg = config_of("dalle.loss", params, Params)
    check(null_cond_prob == 0 or dropout_key is not None, "dalle.loss: dropout_key must be given, because null_cond_prob={}; got None.",
          null_cond_prob, remedy="Pass dropout_key=fold_in(key, step).")
    for name, t in (("text", text), ("image", image)):
        check_ids("dalle.loss", t, name=name)
    check(image.shape[-1] == cfg.image_seq_len, "dalle.loss: image must be [batch, {}] (cfg.image_seq_len); got {}.",
          cfg.image_seq_len, list(image.shape), remedy="Training takes whole pictures.")
    if null_cond_prob > 0:
        dropped = random.bernoulli(random.fold_in(dropout_key, "null_cond"), null_cond_prob, (text.shape[0], 1))
        text = torch.where(dropped, torch.zeros_like(text), text)
    ids = tokens(cfg, text, image)
    scores, _ = apply(params, ids[:, :-1], dropout_key=dropout_key, impl=impl)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    words, t, labels = cfg.text_vocabulary, cfg.text_seq_len, ids[:, 1:]
    # Each half over its own vocabulary only: the same numbers as over the masked joint one, for half the work.
    in_text = F.cross_entropy(wide[:, :t, :words].flatten(0, 1), labels[:, :t].flatten())
    in_image = F.cross_entropy(wide[:, t:, words:].flatten(0, 1), labels[:, t:].flatten() - words)
    return (in_text + cfg.loss_img_weight * in_image) / (cfg.loss_img_weight + 1)


def generate_images(params: Params, text: Tensor, key: Tensor, *, filter_thres: float = 0.5, temperature: float = 1.0,
                    image: Tensor | None = None, cond_scale: float = 1.0, impl: str = "auto",
                    on_token: Any = None) -> Tensor:
    """Draws pictures for texts, one token at a time through the state.

    Args:
        params: from `init`.
        text: int64 [b, t].
        key: what the draw depends on.
        filter_thres: the share of the vocabulary that is never drawn: the max(int((1 - filter_thres) v), 1) best remain.
        temperature: of the draw; 0 takes the best token.
        image: int64 [b, m] tokens that the picture begins with.
        cond_scale: guidance, see `generate.guide`: null + (conditional - null) * cond_scale; 1 for none. Two states are kept.
        on_token: on_token(count, total), called after each token, for a progress bar.
    Returns:
        int64 [b, image_seq_len].
    """
    cfg = config_of("dalle.generate_images", params, Params)
    check(0.0 <= filter_thres <= 1.0, "dalle.generate_images: filter_thres must lie in [0, 1]; got {}.", filter_thres,
          remedy="It is the share of the vocabulary that is left out.")
    check(temperature >= 0.0, "dalle.generate_images: temperature must be at least 0; got {}.", temperature,
          remedy="0 takes the best token.")
    check_ids("dalle.generate_images", text, name="text")
    if image is not None:
        check_ids("dalle.generate_images", image, name="image")
    check(image is None or image.shape[-1] < cfg.image_seq_len, "dalle.generate_images: image must leave a token to draw; got {} of {}.",
          0 if image is None else image.shape[-1], cfg.image_seq_len, remedy="Prime with fewer tokens.")
    texts = [text] if cond_scale == 1.0 else [text, torch.zeros_like(text)]
    branches = [apply(params, tokens(cfg, one, image), init_state(params, text.shape[0]), impl=impl) for one in texts]
    drawn = [] if image is None else [image]
    start = 0 if image is None else image.shape[1]
    for i in range(start, cfg.image_seq_len):
        scores = [logits[:, -1, cfg.text_vocabulary:] for logits, _ in branches]
        scores = scores[0] if len(scores) == 1 else guide(*scores, cond_scale)
        token = _draw(random.fold_in(key, i), scores, cfg, filter_thres, temperature)
        drawn.append(token[:, None])
        if on_token is not None:
            on_token(i + 1 - start, cfg.image_seq_len - start)
        if i + 1 < cfg.image_seq_len:
            branches = [apply(params, token[:, None] + cfg.text_vocabulary, state, impl=impl) for _, state in branches]
    return torch.cat(drawn, 1)


def _draw(key: Tensor, scores: Tensor, cfg: Config, filter_thres: float, temperature: float) -> Tensor:
    """One image token per row of scores [b, num_image_tokens]."""
    if temperature == 0.0:
        return scores.argmax(-1)
    # The share counts the joint vocabulary, text included, as upstream does.
    best = max(int((1 - filter_thres) * (cfg.text_vocabulary + cfg.num_image_tokens)), 1)
    if best < scores.shape[-1]:
        least = scores.topk(best, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    return random.categorical(key, scores / temperature)


__all__ = ["Config", "Params", "apply", "generate_images", "init", "init_state", "loss", "tokens"]
