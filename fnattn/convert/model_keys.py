"""The table, part two: upstream key -> name of our leaf, for every model; and the look-up for both parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..attentions import coor_descent, gate_loop, gate_loop_full
from ..models import clip, dalle, dalle_transformer, discrete_vae, feedforward_coor_descent, linformer_lm, lm, vit
from . import keys
from .keys import KeyMap, linear_keys, norm_keys, under


def key_map(cfg: Any) -> KeyMap:
    """The entry of the table for this config.

    Raises:
        TypeError: no upstream class belongs to this config.
    """
    for rules in (keys.RULES, RULES):
        if type(cfg) in rules:
            return KeyMap(*rules[type(cfg)](cfg))
    known = ", ".join(f"{k.__module__.removeprefix('fnattn.')}.Config" for k in (*keys.RULES, *RULES))
    raise TypeError(f"convert: expected a Config that has an upstream class; got {type(cfg).__name__}.\n  Choose one of: {known}.")


def _vit(cfg: vit.Config):
    leaves = {
        **norm_keys("to_patch_embedding.1", "patch_norm"), **linear_keys("to_patch_embedding.2", "to_tokens"),
        **norm_keys("to_patch_embedding.3", "token_norm"), **norm_keys("mlp_head.1", "head_norm"), **linear_keys("mlp_head.2", "head"),
    }
    attn, block = key_map(cfg.attention).leaves, {}
    for theirs, ours in (("0", "widen"), ("2.0", "depth"), ("2.1", "mix"), ("5", "narrow")):
        block |= linear_keys(f"3.net.{theirs}", f"ff.{ours}")
    block |= {**norm_keys("0", "attn_norm"), **under("1.", attn, "attn."), **norm_keys("2", "ff_norm")}
    for i in range(cfg.depth):
        leaves |= under(f"transformer.layers.{i}.", block, f"blocks.{i}.")
    return vit.init, leaves, {}


def _lm(cfg: lm.Config):
    rules = {gate_loop.Config: _gate_loop_transformer, gate_loop_full.Config: _gate_loop_transformer,
             coor_descent.Config: _coor_descent_transformer}
    if type(cfg.attention) not in rules:
        raise TypeError(f"convert: expected a language model that upstream has; got one over {type(cfg.attention).__module__}.Config.\n"
                        f"  Choose an attention of gate_loop, gate_loop_full or coor_descent.")
    return rules[type(cfg.attention)](cfg)


def _gate_loop_transformer(cfg: lm.Config):
    """Transformer of gateloop-transformer."""
    kind = {"rms": lambda theirs, ours: {f"{theirs}.gamma": f"{ours}.gamma"}, "layer": norm_keys}[cfg.norm]
    leaves, constants = {"token_emb.weight": "embed"}, {}
    attn = key_map(cfg.attention)
    for i in range(cfg.depth):
        theirs, ours = f"layers.{i}.", f"blocks.{i}."
        leaves |= kind(f"{theirs}0.norm", f"{ours}attn_norm") | under(f"{theirs}0.fn.", attn.leaves, f"{ours}attn.")
        leaves |= kind(f"{theirs}1.norm", f"{ours}ff_norm")
        for number, name in (("0", "in"), ("2", "out")):
            leaves |= {f"{theirs}1.fn.{number}.weight": f"{ours}ff.w_{name}", f"{theirs}1.fn.{number}.bias": f"{ours}ff.b_{name}"}
        constants |= {f"{theirs}0.fn.{key}": value for key, value in attn.constants.items()}
    leaves |= {"to_logits.weight": "to_logits"} if cfg.post_norm else \
        {**kind("to_logits.0", "norm"), "to_logits.1.weight": "to_logits"}
    return lm.init, leaves, constants


def _coor_descent_transformer(cfg: lm.Config):
    """Transformer of coordinate-descent-attention."""
    leaves = {"token_emb.weight": "embed", "pos_emb.weight": "positions", **norm_keys("to_logits.0", "norm"),
              "to_logits.1.weight": "to_logits", "to_logits.1.bias": "logits_bias"}
    for i in range(cfg.depth):
        theirs, ours = f"layers.{i}.", f"blocks.{i}."
        leaves |= under(f"{theirs}0.", key_map(cfg.attention).leaves, f"{ours}attn.") | norm_keys(f"{theirs}1.proj_in.0", f"{ours}ff_norm")
        for number, name in (("proj_in.1", "in"), ("proj_out", "out")):
            leaves |= {f"{theirs}1.{number}.weight": f"{ours}ff.w_{name}", f"{theirs}1.{number}.bias": f"{ours}ff.b_{name}"}
    return lm.init, leaves, {}


def _coor_descent_ff(cfg: feedforward_coor_descent.Config):
    leaves = {"proj_in.0.weight": "norm", "proj_in.0.bias": "norm_bias", "proj_in.1.weight": "w_in", "proj_in.1.bias": "b_in",
              "proj_out.weight": "w_out", "proj_out.bias": "b_out"}
    return feedforward_coor_descent.init, leaves, {}


def _linformer_lm(cfg: linformer_lm.Config):
    """LinformerLM, or Linformer if there are no tokens; sequential or reversible layout."""
    stack: dict[str, str] = {}
    for i in range(cfg.depth):
        attn, ff = (f"net.blocks.{i}.{h}.net." for h in "fg") if cfg.reversible else (f"net.layers.{i}.{h}." for h in "01")
        ours = f"layers.{i}."
        stack |= norm_keys(f"{attn}norm", f"{ours}attn_norm") | under(f"{attn}fn.", key_map(cfg.attention).leaves, f"{ours}attn.")
        stack |= norm_keys(f"{ff}norm", f"{ours}ff_norm")
        for theirs, name in (("w1", "in"), ("w2", "out")):
            stack |= {f"{ff}fn.{theirs}.weight": f"{ours}ff.w_{name}", f"{ff}fn.{theirs}.bias": f"{ours}ff.b_{name}"}
    if not cfg.num_tokens:
        return linformer_lm.init, stack, {}
    leaves = {"token_emb.weight": "token_emb", "pos_emb.weight": "pos_emb", **under("linformer.", stack),
              **linear_keys("to_logits", "to_logits")}
    return linformer_lm.init, leaves, {}


def _dalle_transformer(cfg: dalle_transformer.Config):
    """Transformer of dalle-pytorch; shared layers appear under every layer that uses them."""
    leaves: dict[str, str] = {}
    shapes: dict[str, tuple] = {}
    attn_at, ff_at = (list(dict.fromkeys(ids)) for ids in (cfg.attn_ids, cfg.ff_ids))
    # PreNorm, then a wrapper for the cache around the attention, then two more around both parts with token shift.
    attn_in, ff_in = ("fn.fn.fn.fn.fn.", "fn.fn.fn.fn.") if cfg.shift_tokens else ("fn.fn.fn.", "fn.fn.")
    for i, kind in enumerate(cfg.types):
        attn, ff = (f"layers.blocks.{i}.{h}.net." for h in "fg") if cfg.reversible else (f"layers.layers.{i}.{h}." for h in "01")
        for theirs, ours in ((attn, "attn"), (ff, "ff")):
            leaves |= {f"{theirs}scale": f"layers.{i}.{ours}_scale"} | norm_keys(f"{theirs}fn.norm", f"layers.{i}.{ours}_norm")
            if cfg.sandwich_norm:
                leaves |= norm_keys(f"{theirs}fn.norm_out", f"layers.{i}.{ours}_norm_out")
        number = attn_at.index(cfg.attn_ids[i])
        inner = key_map(attn_cfg := cfg.attention(kind))
        leaves |= under(attn + attn_in, inner.leaves, f"attns.{number}.")
        if kind == "sparse":  # whose layout there is that of one position less
            blocks = -(-cfg.seq_len // attn_cfg.block_size)
            shapes[attn + attn_in + keys.LAYOUT] = (cfg.heads, blocks, blocks)
        number = ff_at.index(cfg.ff_ids[i])
        for theirs, name in (("net.0", "in"), ("net.3", "out")):
            leaves |= {f"{ff}{ff_in}{theirs}.weight": f"ffs.{number}.w_{name}", f"{ff}{ff_in}{theirs}.bias": f"ffs.{number}.b_{name}"}
    table = dalle_transformer.rotary_table(cfg)
    shapes |= {theirs: (1, 1, cfg.dim) for theirs in leaves if theirs.endswith("scale")}
    return dalle_transformer.init, leaves, {} if table is None else {"pos_emb": table.repeat_interleave(2, 1)[None]}, shapes


def _dalle(cfg: dalle.Config):
    """DALLE without its vae; shared embeddings appear under three names."""
    inner = key_map(cfg.transformer)
    leaves = {**under("transformer.", inner.leaves, "transformer."), **norm_keys("to_logits.0", "norm"),
              **linear_keys("to_logits.1", "to_logits")}
    if cfg.share_input_output_emb:
        for name in ("text_emb", "image_emb"):
            leaves |= linear_keys(f"{name}.linear", "to_logits")
    else:
        leaves |= {"text_emb.weight": "text_emb", "image_emb.weight": "image_emb"}
    shapes = {f"transformer.{key}": shape for key, shape in inner.shapes.items()}
    if not cfg.rotary_emb:
        leaves |= {"text_pos_emb.weight": "text_positions", "image_pos_emb.weights.0": "row_positions",
                   "image_pos_emb.weights.1": "column_positions"}
        side = cfg.image_fmap_size
        shapes |= {"image_pos_emb.weights.0": (1, side, 1, cfg.dim), "image_pos_emb.weights.1": (1, 1, side, cfg.dim)}
    return dalle.init, leaves, {f"transformer.{key}": value for key, value in inner.constants.items()}, shapes


def _clip(cfg: clip.Config):
    leaves = {"text_emb.weight": "text_emb", "text_pos_emb.weight": "text_positions", "to_text_latent.weight": "to_text_latent",
              **linear_keys("to_visual_embedding", "to_visual"), "visual_pos_emb.weight": "visual_positions",
              "to_visual_latent.weight": "to_visual_latent", "temperature": "temperature"}
    shapes = {}
    for name in ("text", "visual"):
        inner = key_map(getattr(cfg, name))
        leaves |= under(f"{name}_transformer.", inner.leaves, f"{name}_transformer.")
        shapes |= {f"{name}_transformer.{key}": shape for key, shape in inner.shapes.items()}
    return clip.init, leaves, {}, shapes


def _discrete_vae(cfg: discrete_vae.Config):
    def conv(theirs: str, ours: str) -> dict[str, str]:
        return {f"{theirs}.weight": f"{ours}.weight", f"{theirs}.bias": f"{ours}.bias"}

    blocks, layers = cfg.num_resnet_blocks, cfg.num_layers
    leaves = {"codebook.weight": "codebook"}
    for i in range(layers + blocks + 1):
        inside = i in range(layers, layers + blocks)
        here = f"encoder.{i}"
        leaves |= _residual(here, here) if inside else conv(f"{here}.0" if i < layers else here, here)
    first = 1 if blocks else 0
    for i in range(first + blocks + layers + 1):
        if i in range(first, first + blocks):
            leaves |= _residual(f"decoder.{i}", f"decoder.{i}")
        else:
            strided = first + blocks <= i < first + blocks + layers
            leaves |= conv(f"decoder.{i}.0" if strided else f"decoder.{i}", f"decoder.{i}")
    return discrete_vae.init, leaves, {}


def _residual(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.net.{2 * i}.{w}": f"{ours}.{i}.{w}" for i in range(3) for w in ("weight", "bias")}


RULES: dict[type, Callable] = {
    clip.Config: _clip,
    dalle.Config: _dalle,
    dalle_transformer.Config: _dalle_transformer,
    discrete_vae.Config: _discrete_vae,
    feedforward_coor_descent.Config: _coor_descent_ff,
    linformer_lm.Config: _linformer_lm,
    lm.Config: _lm,
    vit.Config: _vit,
}
