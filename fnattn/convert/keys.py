"""The table: upstream key -> dotted name of our leaf, for every config that has an upstream class.

Upstream versions: taylor-series-linear-attention 0.2.0, gateloop-transformer 0.2.5, dalle-pytorch 1.6.6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .. import ops
from ..attentions import full, gate_loop, gate_loop_full, simple_gate_loop, taylor, taylor_poly
from ..models import vit


class KeyMap(NamedTuple):
    """One upstream class at given options.

    init:      our init function, for structure and shapes.
    leaves:    upstream key -> our leaf; several upstream keys may name one shared leaf.
    constants: upstream keys that are no parameters, with their values: written by dump, ignored by load.
    """

    init: Callable
    leaves: dict[str, str]
    constants: dict[str, Tensor]


def key_map(cfg: Any) -> KeyMap:
    """The entry of the table for this config.

    Raises:
        TypeError: no upstream class belongs to this type of config.
    """
    for kind, rule in RULES.items():
        if type(cfg) is kind:
            init, leaves, constants = rule(cfg)
            return KeyMap(init, leaves, constants)
    known = ", ".join(f"{k.__module__.removeprefix('fnattn.')}.Config" for k in RULES)
    raise TypeError(f"convert: expected a Config that has an upstream class; got {type(cfg).__name__}.\n  Choose one of: {known}.")


def under(prefix: str, entries: dict[str, str], ours: str = "") -> dict[str, str]:
    """The same entries with prefixes on both sides."""
    return {prefix + theirs: ours + name for theirs, name in entries.items()}


def _when(condition: bool, **entries: str) -> dict[str, str]:
    return {theirs: ours for ours, theirs in entries.items()} if condition else {}


def _taylor(cfg: taylor.Config):
    leaves = {
        **_when(cfg.prenorm, norm="norm.gamma"), "to_q.0.weight": "to_q", "to_kv.0.weight": "to_kv",
        **_when(cfg.gate_value_heads, to_v_gates="to_v_gates.0.weight"),
        **_when(cfg.combine_heads, to_out="to_out.0.weight"),
    }
    return taylor.init, leaves, {"rotary_emb.freqs": ops.lang_freqs(cfg.dim_head)} if cfg.rotary_emb else {}


def _gate_loop(cfg: gate_loop.Config):
    leaves = {
        "to_qkv.weight": "to_qkv", "to_a.0.weight": "to_a", "to_a.0.bias": "to_a_bias",
        **_when(cfg.add_swish_gating, to_gates="to_gates.0.weight"),
        **_when(cfg.sub_ln, sub_ln="maybe_sub_ln.weight", sub_ln_bias="maybe_sub_ln.bias"),
        **_when(cfg.projects_out, to_out="to_out.weight"),
    }
    return gate_loop.init, leaves, {}


def _gate_loop_full(cfg: gate_loop_full.Config):
    leaves = {
        "to_qkv.0.weight": "to_qkv", "to_out.1.weight": "to_out", "to_out.1.bias": "to_out_bias",
        **_when(cfg.data_dependent_rel_pos, to_a="to_a.0.weight"),
        **_when(cfg.add_swish_gating, to_gates="to_gates.0.weight"),
    }
    return gate_loop_full.init, leaves, {"rotary_emb.freqs": ops.lang_freqs(cfg.dim_head)} if cfg.rotary_emb else {}


def _simple_gate_loop(cfg: simple_gate_loop.Config):
    leaves = {
        "to_qkva.0.weight": "to_qkva", **_when(cfg.prenorm, norm="norm.gamma"),
        **_when(cfg.post_ln, post_ln="maybe_post_ln.weight", post_ln_bias="maybe_post_ln.bias"),
    }
    return simple_gate_loop.init, leaves, {}


def _full(cfg: full.Config):
    return full.init, {"to_qkv.weight": "to_qkv", "to_out.0.weight": "to_out", "to_out.0.bias": "to_out_bias"}, {}


def _taylor_poly(cfg: taylor_poly.Config):
    leaves = {
        "to_q.weight": "to_q", "to_kvs.0.weight": "to_kv1", "to_kvs.1.weight": "to_kv2",
        **{f"q_norms.{i}.gamma": f"q_norms.{i}" for i in range(3)},
        "to_out.weight": "to_out", "to_out.bias": "to_out_bias", **_when(cfg.prenorm, norm="norm.gamma"),
    }
    constants = {"rotary_emb.freqs": ops.lang_freqs(cfg.dim_head)} if cfg.use_rotary_embed else {}
    return taylor_poly.init, leaves, constants


def _vit(cfg: vit.Config):
    leaves = {
        **_norm("to_patch_embedding.1", "patch_norm"), **_linear("to_patch_embedding.2", "to_tokens"),
        **_norm("to_patch_embedding.3", "token_norm"), **_norm("mlp_head.1", "head_norm"), **_linear("mlp_head.2", "head"),
    }
    attn, block = _taylor(cfg.attention)[1], {}
    for theirs, ours in (("0", "widen"), ("2.0", "depth"), ("2.1", "mix"), ("5", "narrow")):
        block |= _linear(f"3.net.{theirs}", f"ff.{ours}")
    block |= {**_norm("0", "attn_norm"), **under("1.", attn, "attn."), **_norm("2", "ff_norm")}
    for i in range(cfg.depth):
        leaves |= under(f"transformer.layers.{i}.", block, f"blocks.{i}.")
    return vit.init, leaves, {}


def _norm(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.weight": f"{ours}.weight", f"{theirs}.bias": f"{ours}.bias"}


def _linear(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.weight": ours, f"{theirs}.bias": f"{ours}_bias"}


RULES: dict[type, Callable] = {
    taylor.Config: _taylor,
    full.Config: _full,
    gate_loop.Config: _gate_loop,
    gate_loop_full.Config: _gate_loop_full,
    simple_gate_loop.Config: _simple_gate_loop,
    taylor_poly.Config: _taylor_poly,
    vit.Config: _vit,
}

__all__ = ["RULES", "KeyMap", "key_map", "under"]
