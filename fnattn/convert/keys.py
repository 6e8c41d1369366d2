"""The table, part one: upstream key -> name of our leaf, for every attention. Models are in `fnattn.convert.model_keys`.

Upstream versions: taylor-series-linear-attention 0.2.0, linformer 0.2.3, dalle-pytorch 1.6.6,
coordinate-descent-attention 0.0.11, gateloop-transformer 0.2.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .. import ops
from ..attentions import (
    block_sparse,
    coor_descent,
    full,
    gate_loop,
    gate_loop_full,
    linformer,
    simple_gate_loop,
    sparse_axial,
    sparse_conv,
    taylor,
    taylor_poly,
)


class KeyMap(NamedTuple):
    """One upstream class at given options.

    init:      our init function, for structure and shapes.
    leaves:    upstream key -> our leaf; several upstream keys may name one shared leaf.
    constants: upstream keys that are no parameters, with their values: written by dump, ignored by load.
    shapes:    upstream shapes that have axes of length one which our leaves do not have, or as many layouts as heads.
    """

    init: Callable
    leaves: dict[str, str]
    constants: dict[str, Tensor]
    shapes: dict[str, tuple] = {}


def under(prefix: str, entries: dict[str, str], ours: str = "") -> dict[str, str]:
    """The same entries with prefixes on both sides."""
    return {prefix + theirs: ours + name for theirs, name in entries.items()}


def when(condition: bool, **entries: str) -> dict[str, str]:
    return {theirs: ours for ours, theirs in entries.items()} if condition else {}


def _taylor(cfg: taylor.Config):
    leaves = {
        **when(cfg.prenorm, norm="norm.gamma"), "to_q.0.weight": "to_q", "to_kv.0.weight": "to_kv",
        **when(cfg.gate_value_heads, to_v_gates="to_v_gates.0.weight"),
        **when(cfg.combine_heads, to_out="to_out.0.weight"),
    }
    return taylor.init, leaves, {"rotary_emb.freqs": ops.lang_freqs(cfg.dim_head)} if cfg.rotary_emb else {}


def _gate_loop(cfg: gate_loop.Config):
    leaves = {
        "to_qkv.weight": "to_qkv", "to_a.0.weight": "to_a", "to_a.0.bias": "to_a_bias",
        **when(cfg.add_swish_gating, to_gates="to_gates.0.weight"),
        **when(cfg.sub_ln, sub_ln="maybe_sub_ln.weight", sub_ln_bias="maybe_sub_ln.bias"),
        **when(cfg.projects_out, to_out="to_out.weight"),
    }
    return gate_loop.init, leaves, {}


def _gate_loop_full(cfg: gate_loop_full.Config):
    leaves = {
        "to_qkv.0.weight": "to_qkv", "to_out.1.weight": "to_out", "to_out.1.bias": "to_out_bias",
        **when(cfg.data_dependent_rel_pos, to_a="to_a.0.weight"),
        **when(cfg.add_swish_gating, to_gates="to_gates.0.weight"),
    }
    return gate_loop_full.init, leaves, {"rotary_emb.freqs": ops.lang_freqs(cfg.dim_head)} if cfg.rotary_emb else {}


def _simple_gate_loop(cfg: simple_gate_loop.Config):
    leaves = {
        "to_qkva.0.weight": "to_qkva", **when(cfg.prenorm, norm="norm.gamma"),
        **when(cfg.post_ln, post_ln="maybe_post_ln.weight", post_ln_bias="maybe_post_ln.bias"),
    }
    return simple_gate_loop.init, leaves, {}


DALLE_ATTENTION = {"to_qkv.weight": "to_qkv", "to_out.0.weight": "to_out", "to_out.0.bias": "to_out_bias"}


def _dalle(family):
    return lambda cfg: (family.init, DALLE_ATTENTION, {})


LAYOUT = "attn_fn.master_layout"  # a buffer of DeepSpeed's SparseSelfAttention


def _block_sparse(cfg: block_sparse.Config):
    return block_sparse.init, DALLE_ATTENTION | {LAYOUT: "layout"}, {}, {LAYOUT: (cfg.heads, cfg.blocks, cfg.blocks)}


def _linformer(cfg: linformer.Config):
    leaves = {"to_q.weight": "to_q", "to_k.weight": "to_k", "proj_k": "proj_k",
              **when(not cfg.share_kv, to_v="to_v.weight", proj_v="proj_v"),
              "to_out.weight": "to_out", "to_out.bias": "to_out_bias"}
    return linformer.init, leaves, {}


def _coor_descent(cfg: coor_descent.Config):
    leaves = {"norm.weight": "norm", "norm.bias": "norm_bias", "null_kv": "null_kv", "to_qkv.weight": "to_qkv",
              "to_out.weight": "to_out", **(linear_keys("to_learned_k", "to_learned_k") if cfg.learned_sparsity_k else {})}
    return coor_descent.init, leaves, {}


def _taylor_poly(cfg: taylor_poly.Config):
    leaves = {
        "to_q.weight": "to_q", "to_kvs.0.weight": "to_kv1", "to_kvs.1.weight": "to_kv2",
        **{f"q_norms.{i}.gamma": f"q_norms.{i}" for i in range(3)},
        "to_out.weight": "to_out", "to_out.bias": "to_out_bias", **when(cfg.prenorm, norm="norm.gamma"),
    }
    constants = {"rotary_emb.freqs": ops.lang_freqs(cfg.dim_head)} if cfg.use_rotary_embed else {}
    return taylor_poly.init, leaves, constants


def norm_keys(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.weight": f"{ours}.weight", f"{theirs}.bias": f"{ours}.bias"}


def linear_keys(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.weight": ours, f"{theirs}.bias": f"{ours}_bias"}


RULES: dict[type, Callable] = {
    block_sparse.Config: _block_sparse,
    coor_descent.Config: _coor_descent,
    full.Config: _dalle(full),
    gate_loop.Config: _gate_loop,
    gate_loop_full.Config: _gate_loop_full,
    linformer.Config: _linformer,
    simple_gate_loop.Config: _simple_gate_loop,
    sparse_axial.Config: _dalle(sparse_axial),
    sparse_conv.Config: _dalle(sparse_conv),
    taylor.Config: _taylor,
    taylor_poly.Config: _taylor_poly,
}
