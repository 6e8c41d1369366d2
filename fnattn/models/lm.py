"""A decoder language model over any causal family of attention.

    x = embed[ids] (+ positions);    x = block_i(x) for each layer;    logits = to_logits(norm(x))

A pure pair `init` / `apply` like every attention, on token numbers in place of vectors: the state goes in and comes out, so
a sequence can be cut anywhere. `loss` is the entrance for training.

The Transformers of gateloop-transformer (norm="rms", or norm="layer" with post_norm) and of
coordinate-descent-attention (norm="layer", norm_attention=False, logits_bias, seq_len) are configs of this one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import attentions, random, taps, tree
from ..attentions import _states
from ..attentions._heads import linear, linear_init, uniform_init
from ..attentions._step import asked_for
from ..core import EMPTY, Empty, check, check_ids, check_init, check_sizes, config, config_of, peek_int
from . import _step
from .block import ACTIVATIONS, Block, Gelu, LayerNorm, RmsNorm, block, block_init, check_norm, drop, norm, norm_init

# b batch, n positions of this call, v num_tokens

LOGITS_AT_ONCE = 1 << 22  # `loss` holds at most about so many logits at a time


@config
class Config:
    """A stack of blocks around one kind of attention.

    attention:  the Config of a causal family, for example taylor.Config(dim=128, causal=True).
    depth:      number of blocks.
    num_tokens: size of the vocabulary; 256 for bytes.
    dim:        width of the model; None takes attention.dim, which it must equal.
    ff_mult:    hidden width of the feed-forward, in multiples of dim.
    norm:       "rms" or "layer".
    norm_attention: False leaves the norm before the attention out, for families that norm their own input.
    post_norm:  norms after each residual sum in place of before each part; there is then no norm before the logits.
    ff:         what stands between the two projections of a feed-forward: block.Gelu() or
                feedforward_coor_descent.CoorDescent(...).
    seq_len:    number of learned positions; 0 for none, where the attention itself knows the order.
    tied:       the logits use the embedding's table.
    logits_bias: adds a bias per token to the logits.
    dropout:    chance of zeroing an entry of the embedding and of what each attention and feed-forward adds.
    remat:      recomputes each block in the backward pass in place of keeping its intermediates.
    """

    attention: Any
    depth: int
    num_tokens: int = 256
    dim: int | None = None
    ff_mult: float = 4
    norm: str = "rms"
    norm_attention: bool = True
    post_norm: bool = False
    ff: Any = Gelu()
    seq_len: int = 0
    tied: bool = False
    logits_bias: bool = False
    dropout: float = 0.0
    remat: bool = False

    def __post_init__(self):
        family = attentions.find(self.attention)
        check(family.streams and getattr(self.attention, "causal", True) and not getattr(self.attention, "reverse", False),
              "lm.Config: attention must be causal; got {}.", self.attention,
              remedy="Use causal=True, or a causal family: " + ", ".join(causal_families()) + ".")
        check(getattr(self.attention, "combine_heads", True), "lm.Config: attention must give back dim; got combine_heads=False.",
              remedy="Use combine_heads=True.")
        if self.dim is None:
            object.__setattr__(self, "dim", self.attention.dim)
        check(self.dim == self.attention.dim, "lm.Config: dim must equal attention.dim={}; got {}.", self.attention.dim, self.dim,
              remedy="Leave dim out.")
        check_sizes("lm.Config", 1, dim=self.dim, depth=self.depth, num_tokens=self.num_tokens)
        check_sizes("lm.Config", 0, "Use 0 for no learned positions.", seq_len=self.seq_len)
        check(not (self.seq_len and getattr(self.attention, "spread", False)), "lm.Config: seq_len must be 0 for an attention whose "
              "sequence is spread over processes; got {}.", self.seq_len, remedy="Use rotary positions of the attention itself.")
        check(int(self.dim * self.ff_mult) >= 1, "lm.Config: ff_mult must leave at least one hidden channel; got {}.", self.ff_mult,
              remedy="4 is usual.")
        check(0.0 <= self.dropout <= 1.0, "lm.Config: dropout must lie in [0, 1]; got {}.", self.dropout,
              remedy="It is the chance of zeroing an entry.")
        check(isinstance(self.ff, ACTIVATIONS), "lm.Config: ff must be the config of an activation; got {!r}.", self.ff,
              remedy="Use block.Gelu() or feedforward_coor_descent.CoorDescent().", error=TypeError)
        check_norm("lm.Config", "norm", self.norm)


class Params(NamedTuple):
    """Everything that is learned."""

    cfg: Config
    embed: Tensor                         # [v, dim]
    blocks: tuple[Block, ...]             # depth of them
    norm: RmsNorm | LayerNorm | Empty     # before the logits; Empty with post_norm
    to_logits: Tensor | Empty = EMPTY     # [v, dim]; Empty if tied
    logits_bias: Tensor | Empty = EMPTY   # [v]; Empty unless cfg.logits_bias
    positions: Tensor | Empty = EMPTY     # [seq_len, dim]; Empty unless cfg.seq_len


class State(NamedTuple):
    """What the tokens so far leave behind."""

    pos: Tensor     # [] int64: positions seen
    blocks: tuple   # the state of each block's attention


def causal_families() -> list[str]:
    """Names of the families that this model takes."""
    return sorted(name for name, family in attentions.FAMILIES.items() if family.streams)


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key; embeddings normal (times 0.02 if tied), the rest as in torch.nn."""
    check_init("lm.init", cfg, Config, dtype)
    kind = {"dtype": dtype, "device": device}
    blocks_key = random.fold_in(params_key, "blocks")
    return Params(
        cfg,
        embed=_normal(params_key, "embed", (cfg.num_tokens, cfg.dim), 0.02 if cfg.tied else 1.0, **kind),
        blocks=tuple(block_init(random.fold_in(blocks_key, i), cfg.attention, ff_mult=cfg.ff_mult, ff_norm=cfg.norm,
                                attn_norm=cfg.norm if cfg.norm_attention else "none", **kind) for i in range(cfg.depth)),
        norm=EMPTY if cfg.post_norm else norm_init(cfg.norm, cfg.dim, **kind),
        to_logits=EMPTY if cfg.tied else linear_init(params_key, "to_logits", cfg.num_tokens, cfg.dim, **kind),
        logits_bias=(uniform_init(params_key, "logits_bias", (cfg.num_tokens,), cfg.dim ** -0.5, **kind)
                     if cfg.logits_bias else EMPTY),
        positions=_normal(params_key, "positions", (cfg.seq_len, cfg.dim), 1.0, **kind) if cfg.seq_len else EMPTY)


def _normal(params_key: Tensor, name: str, shape: tuple[int, ...], std: float, *, dtype: torch.dtype, device: object) -> Tensor:
    if device is not None and torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    wide = torch.promote_types(dtype, torch.float32)
    return (random.normal(random.fold_in(params_key, name), shape, wide) * std).to(dtype=dtype, device=device)


def init_state(params: Params, batch: int, *, capacity: int) -> State:
    """The state before the first token, for `batch` sequences of up to `capacity` tokens."""
    cfg = config_of("lm.init_state", params, Params)
    check_sizes("lm.init_state", 0, "Count sequences, and prompt and new tokens.", batch=batch, capacity=capacity)
    check(not cfg.seq_len or capacity <= cfg.seq_len, "lm.init_state: capacity must be at most the {} learned positions "
          "(cfg.seq_len); got {}.", cfg.seq_len, capacity, remedy="Ask for fewer tokens, or train with a larger seq_len.")
    return State(torch.zeros((), dtype=torch.int64, device=params.embed.device),
                 tuple(attentions.init_state(b.attn, batch, capacity=capacity) for b in params.blocks))


def apply(params: Params, ids: Tensor, state: State | Empty = EMPTY, *, mask: Tensor | None = None,
          dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """Logits for the token after each position.

    Args:
        params: from `init`.
        ids: int64 [b, n], each in [0, num_tokens).
        state: from `init_state` or a former call: ids continue that sequence, in a chunk of any length.
        mask: bool [b, n]; False tokens are not attended to.
        dropout_key: drops if the config has a chance of dropout above 0.
        impl: passed to the attention.
    Returns:
        logits [b, n, num_tokens] in the params' dtype; the state after ids, or EMPTY.
    """
    config_of("lm.apply", params, Params)
    check_ids("lm.apply", ids, mask=mask)
    if isinstance(state, State) and asked_for(ids, state, impl, mask, dropout_key) and (done := _step.model(params, ids, state)):
        return done[0], State(state.pos + 1, done[1])
    x, state = hidden(params, ids, state, mask=mask, dropout_key=dropout_key, impl=impl)
    return logits(params, x), state


def hidden(params: Params, ids: Tensor, state: State | Empty = EMPTY, *, mask: Tensor | None = None,
           dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """What `apply` computes before the logits: [b, n, dim], not yet normed. Arguments as there."""
    cfg = config_of("lm.apply", params, Params)
    check_ids("lm.apply", ids, cfg.num_tokens, mask=mask)
    streaming = not isinstance(state, Empty)
    if streaming:
        _states.check("lm", state, State(_states.POSITION, (...,) * len(params.blocks)))
    x = F.embedding(ids, params.embed)
    if cfg.seq_len:
        seen = peek_int(state.pos) if streaming else 0
        check(seen is None or seen + ids.shape[1] <= cfg.seq_len, "lm.apply: ids must fit the {} learned positions (cfg.seq_len); "
              "got {} after {}.", cfg.seq_len, ids.shape[1], seen, remedy="Shorten ids, or train with a larger seq_len.")
        at = torch.arange(ids.shape[1], device=ids.device)
        x = x + F.embedding(state.pos + at if streaming else at, params.positions)
    x = drop(None if dropout_key is None else random.fold_in(dropout_key, "embed"), x, cfg.dropout)

    def layer(block_params, x, state, mask, key):
        return block(block_params, x, state, ff=cfg.ff, post_norm=cfg.post_norm, dropout=cfg.dropout, mask=mask,
                     dropout_key=key, impl=impl)

    run = tree.remat(layer) if cfg.remat and not streaming else layer
    states = []
    for i, block_params in enumerate(params.blocks):
        key = None if dropout_key is None else random.fold_in(random.fold_in(dropout_key, "blocks"), i)
        with taps.scope(f"blocks.{i}"):
            x, new = run(block_params, x, state.blocks[i] if streaming else EMPTY, mask, key)
        states.append(new)
    return x, State(state.pos + ids.shape[1], tuple(states)) if streaming else EMPTY


def logits(params: Params, x: Tensor) -> Tensor:
    """[..., dim] from `hidden` -> [..., num_tokens]"""
    bias = params.logits_bias
    return linear(norm(params.norm, x), params.embed if isinstance(params.to_logits, Empty) else params.to_logits,
                  None if isinstance(bias, Empty) else bias)


def nll(params: Params, ids: Tensor, *, mask: Tensor | None = None, dropout_key: Tensor | None = None,
        impl: str = "auto") -> Tensor:
    """-log p of each token after the first, given those before it: [b, n - 1] in float32 or wider, in nats.

    Logits are made for some positions at a time, and again in the backward pass, once there are more than LOGITS_AT_ONCE.
    """
    check_ids("lm.nll", ids, config_of("lm.nll", params, Params).num_tokens, mask=mask)
    check(ids.shape[1] >= 2, "lm.nll: ids must be [batch, seq] with at least 2 tokens, one to predict; got {}.", list(ids.shape),
          remedy="Give longer sequences.")
    x, _ = hidden(params, ids[:, :-1], mask=None if mask is None else mask[:, :-1], dropout_key=dropout_key, impl=impl)
    targets, head = ids[:, 1:], params._replace(blocks=())

    def part(head, x, targets):
        scores = logits(head, x)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return -wide.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    step = max(1, LOGITS_AT_ONCE // max(1, ids.shape[0] * params.cfg.num_tokens))
    if step >= targets.shape[1]:
        return part(head, x, targets)
    return torch.cat([tree.remat(part)(head, x_c, t_c) for x_c, t_c in zip(x.split(step, 1), targets.split(step, 1))], 1)


def loss(params: Params, ids: Tensor, *, mask: Tensor | None = None, dropout_key: Tensor | None = None,
         impl: str = "auto") -> Tensor:
    """The mean of `nll`: what training minimises. 0-d, float32 or wider.

    Args:
        ids: int64 [b, n], n >= 2; the first n - 1 tokens predict the last n - 1.
        mask: bool [b, n]; False tokens are neither attended to nor counted. If none is left to count, the loss is 0.
        dropout_key: drops if the config has a chance of dropout above 0 (`dropout_chances`): in training a new one for each step,
            fold_in(key, step); None for an evaluation.
    """
    config_of("lm.loss", params, Params)
    each = nll(params, ids, mask=mask, dropout_key=dropout_key, impl=impl)
    if mask is None:
        return each.mean()
    counted = mask[:, 1:]
    return torch.where(counted, each, torch.zeros_like(each)).sum() / counted.sum().clamp(min=1)


def dropout_chances(cfg: Config) -> dict[str, float]:
    """The chances of dropout above 0 in a config, by name."""
    named = {"cfg.dropout": cfg.dropout}
    inside = [("cfg.attention", cfg.attention)]
    while inside:  # a family around another has its config in its own
        where, part = inside.pop()
        named.update({f"{where}.{k}": v for k, v in vars(part).items() if k.endswith("dropout")})
        inside += [(f"{where}.{k}", v) for k, v in vars(part).items() if dataclasses.is_dataclass(v)]
    return {name: p for name, p in named.items() if p > 0}
