"""DALLE's transformer over text and image tokens: attention types in turn, shared layers, sandwich norms, token shift.

    x = x + scale * norm_out(attn(shift(norm(x))));   x = x + scale' * norm_out(ff(shift(norm(x))))

or, reversible, two streams whose activations the backward pass recomputes. All attention types stream, so the state of the
stack is one state per layer, and no layer computes the sequence again for a new token.

Source: Transformer of dalle-pytorch 1.6.6. Different here: 'sparse' runs; every type keeps its own cache (upstream's sparse
layers share one entry of a dictionary); positions decide what is shifted; a string is one attention type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops, random, taps
from ..attentions import _states, block_sparse, full, sparse_axial, sparse_conv
from ..attentions._heads import dropout, linear_init, uniform_init
from ..core import EMPTY, Empty, check, check_init, check_input, check_sizes, config, config_of
from .block import LayerNorm, norm, norm_init
from .reversible import reversible
from .token_shift import token_shift

# b batch, n positions, s image_fmap_size, f rotary angles per position

TEXT_AT_IMAGE = 8192.0  # the text position that image tokens are given
IMAGE_AT_TEXT = -10.0   # the picture coordinate that text tokens are given; the picture spans [-1, 1]


@config
class Config:
    """Options of the transformer.

    dim, depth: width and number of layers.
    seq_len:    text tokens and image tokens together, without begin-of-sequence.
    reversible: two streams, mean at the end; activation memory then does not grow with depth.
    causal:     for 'full' and 'sparse' layers; the axial and convolutional ones are causal always.
    heads, dim_head: of every attention. ff_mult: hidden width of feed-forwards over dim.
    attn_dropout, ff_dropout: chances of zeroing entries of an attention's result and of a hidden layer, with a dropout_key.
    attn_types: 'full', 'axial_row', 'axial_col', 'conv_like' or 'sparse' per layer, in turn; default all 'full'.
    image_fmap_size: the picture's side in tokens; None where there is no picture.
    sparse_attn: upstream's unused switch; accepted, without effect, as there.
    stable:     upstream's rescaled softmax; the same function.
    sandwich_norm: a second norm after attention and feed-forward.
    shift_tokens: token shift before attention and feed-forward.
    rotary_emb: DALLE's rotary table of text position, row and column, on queries, keys and values.
    shared_attn_ids, shared_ff_ids: one id per layer, in turn; layers of the same id share their weights.
    optimize_for_inference: upstream's switch from sparse layers to masked ones that it can cache; all layers here can.
    """

    dim: int
    depth: int
    seq_len: int
    reversible: bool = False
    causal: bool = True
    heads: int = 8
    dim_head: int = 64
    ff_mult: int = 4
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    attn_types: tuple | str | None = None
    image_fmap_size: int | None = None
    sparse_attn: bool = False
    stable: bool = False
    sandwich_norm: bool = False
    shift_tokens: bool = False
    rotary_emb: bool = True
    shared_attn_ids: tuple | None = None
    shared_ff_ids: tuple | None = None
    optimize_for_inference: bool = False

    def __post_init__(self):
        kinds = ("full", "axial_row", "axial_col", "conv_like", "sparse")
        types = ("full",) if self.attn_types is None else self.attn_types
        object.__setattr__(self, "attn_types", (types,) if isinstance(types, str) else tuple(types))
        for name in ("shared_attn_ids", "shared_ff_ids"):
            ids = getattr(self, name)
            object.__setattr__(self, name, None if ids is None else tuple(ids))
        check_sizes("dalle_transformer.Config", 1, dim=self.dim, depth=self.depth, seq_len=self.seq_len, heads=self.heads,
                    dim_head=self.dim_head, ff_mult=self.ff_mult)
        check(self.attn_types and all(t in kinds for t in self.attn_types),
              "dalle_transformer.Config: attn_types must be among {}; got {}.", ", ".join(map(repr, kinds)), self.attn_types,
              remedy="For example ('full', 'axial_row', 'axial_col', 'conv_like').")
        needs = [name for name, on in (("rotary_emb", self.rotary_emb), ("shift_tokens", self.shift_tokens)) if on]
        needs += [t for t in self.attn_types if t in ("axial_row", "axial_col", "conv_like")]
        check(self.image_fmap_size is not None or not needs, "dalle_transformer.Config: image_fmap_size must be given for {}; got None.",
              ", ".join(needs), remedy="It is the side of the picture in tokens.")
        check(self.image_fmap_size is None or self.seq_len >= self.image_fmap_size ** 2,
              "dalle_transformer.Config: seq_len must hold the {} image tokens; got {}.", (self.image_fmap_size or 0) ** 2, self.seq_len,
              remedy="seq_len = text length + image_fmap_size ** 2.")
        if self.shared_attn_ids is not None:
            seen: dict = {}
            for layer, (kind, one) in enumerate(zip(self.types, self.attn_ids)):
                check(seen.setdefault(one, kind) == kind, "dalle_transformer.Config: layers that share attention must have one type; "
                      "got id {} as {!r} and, in layer {}, as {!r}.", one, seen[one], layer, kind,
                      remedy="Let shared_attn_ids repeat in step with attn_types.")

    @property
    def types(self) -> tuple:
        """The attention type of each layer."""
        return tuple(self.attn_types[i % len(self.attn_types)] for i in range(self.depth))

    @property
    def attn_ids(self) -> tuple:
        """Which attention's weights each layer uses."""
        return _cycled(self.shared_attn_ids, self.depth)

    @property
    def ff_ids(self) -> tuple:
        """Which feed-forward's weights each layer uses."""
        return _cycled(self.shared_ff_ids, self.depth)

    @property
    def text_len(self) -> int:
        """Text tokens, begin-of-sequence included."""
        return self.seq_len + 1 - (self.image_fmap_size or 0) ** 2

    def attention(self, kind: str) -> Any:
        """The config of an attention of this type."""
        shape = {"dim": self.dim, "seq_len": self.seq_len, "heads": self.heads, "dim_head": self.dim_head,
                 "dropout": self.attn_dropout, "stable": self.stable}
        if kind == "full":
            return full.Config(causal=self.causal, **shape)
        if kind == "sparse":  # one more position than upstream, so that a sequence with begin-of-sequence fits
            return block_sparse.Config(causal=self.causal, **{**shape, "seq_len": self.seq_len + 1})
        if kind == "conv_like":
            return sparse_conv.Config(image_size=self.image_fmap_size, **shape)
        return sparse_axial.Config(image_size=self.image_fmap_size, axis=0 if kind == "axial_row" else 1, **shape)


def _cycled(ids: tuple | None, depth: int) -> tuple:
    return tuple(range(depth)) if ids is None else tuple(ids[i % len(ids)] for i in range(depth))


ATTEND = {full.Config: full, block_sparse.Config: block_sparse, sparse_conv.Config: sparse_conv, sparse_axial.Config: sparse_axial}


class FeedForward(NamedTuple):
    """a * gelu(gate) between two projections; the first half of w_in gives a, the second the gate."""

    w_in: Tensor   # [2 hidden, dim]
    b_in: Tensor   # [2 hidden]
    w_out: Tensor  # [dim, hidden]
    b_out: Tensor  # [dim]


class Layer(NamedTuple):
    """What a layer does not share: norms and scales."""

    attn_norm: LayerNorm
    attn_norm_out: LayerNorm | Empty
    attn_scale: Tensor  # [dim]
    ff_norm: LayerNorm
    ff_norm_out: LayerNorm | Empty
    ff_scale: Tensor    # [dim]


class Params(NamedTuple):
    """Attentions and feed-forwards once per id, in order of first use; layers one by one."""

    cfg: Config
    attns: tuple
    ffs: tuple
    layers: tuple


class State(NamedTuple):
    """What the past leaves behind."""

    pos: Tensor             # [] int64
    attns: tuple            # one state per layer
    attn_last: tuple        # per layer [b, s, dim]: the last tokens before the shift; empty unless shift_tokens
    ff_last: tuple


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key."""
    check_init("dalle_transformer.init", cfg, Config, dtype)
    kind = {"dtype": dtype, "device": device}
    types = dict(zip(cfg.attn_ids, cfg.types))

    def attention(number: int, name: str) -> Any:
        attn_cfg = cfg.attention(name)
        return ATTEND[type(attn_cfg)].init(random.fold_in(random.fold_in(params_key, "attns"), number), attn_cfg, **kind)

    def layer(i: int) -> Layer:
        scale = torch.full((cfg.dim,), 0.1 if i < 18 else 1e-5 if i < 24 else 1e-6, **kind)
        out = [norm_init("layer", cfg.dim, **kind) if cfg.sandwich_norm else EMPTY for _ in range(2)]
        return Layer(norm_init("layer", cfg.dim, **kind), out[0], scale, norm_init("layer", cfg.dim, **kind), out[1], scale.clone())

    ff_key = random.fold_in(params_key, "ffs")
    return Params(cfg, tuple(attention(i, name) for i, name in enumerate(types.values())),
                  tuple(_ff_init(random.fold_in(ff_key, i), cfg, **kind) for i in range(len(set(cfg.ff_ids)))),
                  tuple(layer(i) for i in range(cfg.depth)))


def _ff_init(key: Tensor, cfg: Config, **kind) -> FeedForward:
    hidden = cfg.dim * cfg.ff_mult
    return FeedForward(
        linear_init(key, "w_in", 2 * hidden, cfg.dim, **kind), uniform_init(key, "b_in", (2 * hidden,), cfg.dim ** -0.5, **kind),
        linear_init(key, "w_out", cfg.dim, hidden, **kind), uniform_init(key, "b_out", (cfg.dim,), hidden ** -0.5, **kind))


def init_state(params: Params, batch: int, *, capacity: int) -> State:
    """The state before the first token, for `batch` sequences of up to `capacity` tokens."""
    config_of("dalle_transformer.init_state", params, Params)
    check_sizes("dalle_transformer.init_state", 0, batch=batch, capacity=capacity)
    states = tuple(ATTEND[type(a.cfg)].init_state(a, batch, capacity=capacity) for a in _per_layer(params)[0])
    return _states.fresh(_layout(params, batch)._replace(attns=()), params.layers[0].attn_scale)._replace(attns=states)


def _layout(params: Params, batch: int) -> State:
    """What a state of these params must be; the attentions look at theirs themselves. See `attentions._states`."""
    cfg, dtype = params.cfg, params.layers[0].attn_scale.dtype
    last = _states.Leaf("batch, image_fmap_size, dim", (batch, cfg.image_fmap_size, cfg.dim), dtype)
    lasts = (last,) * cfg.depth if cfg.shift_tokens else ()
    return State(_states.POSITION, (...,) * cfg.depth, lasts, lasts)


def check_state(who: str, params: Params, batch: int, state: Any, make: str = "init_state(params, batch, capacity=...)") -> None:
    """Raises unless the state is one of these params for so many sequences; see `attentions._states.check`."""
    _states.check(who, state, _layout(params, batch), make)


def _per_layer(params: Params) -> tuple[list, list]:
    """The attention and the feed-forward of each layer."""
    attn_at, ff_at = (list(dict.fromkeys(ids)) for ids in (params.cfg.attn_ids, params.cfg.ff_ids))
    return ([params.attns[attn_at.index(i)] for i in params.cfg.attn_ids], [params.ffs[ff_at.index(i)] for i in params.cfg.ff_ids])


def rotary_table(cfg: Config, *, device: object = None) -> Tensor | None:
    """DALLE's angles [seq_len + 1, f]: text position, row and column; float32. None without rotary_emb.

    Image tokens stand at text position 8192; text tokens at row and column -10.
    """
    if not cfg.rotary_emb:
        return None
    width, side, text_len = cfg.dim_head // 3, cfg.image_fmap_size, cfg.text_len
    at = torch.cat((torch.arange(text_len, device=device).float(), torch.full((side * side,), TEXT_AT_IMAGE, device=device)))
    text = at[:, None] * ops.lang_freqs(width, device=device)
    pixel, line = ops.pixel_freqs(width, device=device), torch.linspace(-1, 1, side, device=device)
    outside = torch.full((text_len,), IMAGE_AT_TEXT, device=device)
    row = torch.cat((outside, line.repeat_interleave(side)))[:, None] * pixel
    column = torch.cat((outside, line.repeat(side)))[:, None] * pixel
    return torch.cat((text, row, column), 1)


def apply(params: Params, x: Tensor, state: State | Empty = EMPTY, *, mask: Tensor | None = None,
          dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """x [b, n, dim] through the stack.

    Args:
        params: from `init`.
        state: from `init_state` or a former call: x continues that sequence, in a chunk of any length.
        mask: bool [b, n], passed to every attention.
        dropout_key: drops where the config has a chance above 0.
        impl: passed to every attention.
    Returns:
        out [b, n, dim]; the state after x, or EMPTY.
    """
    cfg, streaming = config_of("dalle_transformer.apply", params, Params), not isinstance(state, Empty)
    check_input("dalle_transformer.apply", x, cfg.dim, like=params.layers[0].attn_scale, mask=mask)
    if streaming:
        check_state("dalle_transformer", params, x.shape[0], state)
    check(x.shape[1] <= cfg.seq_len + 1, "dalle_transformer.apply: x has {} positions, but cfg allows {} = seq_len + 1.", x.shape[1],
          cfg.seq_len + 1, remedy="Shorten x, or build the Config with a larger seq_len.")
    angles = rotary_table(cfg, device=x.device)
    pos = state.pos if streaming else torch.zeros((), dtype=torch.int64, device=x.device)
    fresh = x.new_zeros(x.shape[0], cfg.image_fmap_size, cfg.dim) if cfg.shift_tokens else EMPTY
    attns, ffs = _per_layer(params)
    key = lambda i, name: EMPTY if dropout_key is None else random.fold_in(random.fold_in(dropout_key, i), name)  # noqa: E731
    keys = [(key(i, "attn"), key(i, "ff")) for i in range(cfg.depth)]
    if cfg.reversible and not streaming:
        blocks = [(lambda p, x, *s, c=cfg, im=impl: _attn_part(c, p, x, im, *s), lambda p, x, *s, c=cfg: _ff_part(c, p, x, *s))
                  for _ in range(cfg.depth)]
        trees = [((layer, attn, k1), (layer, ff, k2)) for layer, attn, ff, (k1, k2) in zip(params.layers, attns, ffs, keys)]
        shared = (pos, fresh, EMPTY if angles is None else angles, EMPTY if mask is None else mask)
        return reversible(blocks, trees, x, *shared, merge="mean"), EMPTY

    new_attns, attn_last, ff_last = [], [], []
    y1 = y2 = x  # one stream, or two
    for i, (layer, attn, ff) in enumerate(zip(params.layers, attns, ffs)):
        with taps.scope(f"layers.{i}"):
            last = (state.attn_last[i], state.ff_last[i]) if streaming and cfg.shift_tokens else (fresh, fresh)
            out, new, seen = _attn(cfg, layer, attn, y2, state.attns[i] if streaming else EMPTY, last[0], pos, angles, mask,
                                   keys[i][0], impl)
            y1 = y1 + taps.tap("attn_out", out)
            if not cfg.reversible:
                y2 = y1
            out, seen_ff = _ff(cfg, layer, ff, y1, last[1], pos, keys[i][1])
            y2 = y2 + taps.tap("ff_out", out)
            if not cfg.reversible:
                y1 = y2
        new_attns.append(new)
        attn_last.append(seen)
        ff_last.append(seen_ff)
    out = (y1 + y2) / 2 if cfg.reversible else y2
    if not streaming:
        return out, EMPTY
    shifts = (tuple(attn_last), tuple(ff_last)) if cfg.shift_tokens else ((), ())
    return out, State(pos + x.shape[1], tuple(new_attns), *shifts)


def _shift(cfg: Config, x: Tensor, last: Tensor | Empty, pos: Tensor) -> tuple[Tensor, Tensor | Empty]:
    if not cfg.shift_tokens:
        return x, EMPTY
    return token_shift(x, last, pos, text_len=cfg.text_len, image_size=cfg.image_fmap_size)


def _attn(cfg, layer, attn, x, state, last, pos, angles, mask, key, impl):
    h, last = _shift(cfg, norm(layer.attn_norm, x), last, pos)
    with taps.scope("attn"):
        out, state = ATTEND[type(attn.cfg)].attend(attn, h, state, angles=angles, mask=mask, impl=impl,
                                                   dropout_key=None if isinstance(key, Empty) else key)
    return norm(layer.attn_norm_out, out) * layer.attn_scale, state, last


def _ff(cfg, layer, ff, x, last, pos, key):
    h, last = _shift(cfg, norm(layer.ff_norm, x), last, pos)
    a, gate = F.linear(h, ff.w_in, ff.b_in).chunk(2, -1)
    hidden = dropout(None if isinstance(key, Empty) else key, "hidden", a * F.gelu(gate), cfg.ff_dropout)
    return norm(layer.ff_norm_out, F.linear(hidden, ff.w_out, ff.b_out)) * layer.ff_scale, last


def _attn_part(cfg, params, x, impl, pos, fresh, angles, mask):
    """The f of a reversible block."""
    layer, attn, key = params
    given = [None if isinstance(t, Empty) else t for t in (angles, mask)]
    return _attn(cfg, layer, attn, x, EMPTY, fresh, pos, *given, key, impl)[0]


def _ff_part(cfg, params, x, pos, fresh, angles, mask):
    """The g of a reversible block."""
    layer, ff, key = params
    return _ff(cfg, layer, ff, x, fresh, pos, key)[0]
