"""The table: upstream key -> dotted name of our leaf, for every config that has an upstream class.

Upstream versions: taylor-series-linear-attention 0.2.0, gateloop-transformer 0.2.5, dalle-pytorch 1.6.6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .. import ops
from ..attentions import full, gate_loop, taylor


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


def _full(cfg: full.Config):
    return full.init, {"to_qkv.weight": "to_qkv", "to_out.0.weight": "to_out", "to_out.0.bias": "to_out_bias"}, {}


RULES: dict[type, Callable] = {
    taylor.Config: _taylor,
    gate_loop.Config: _gate_loop,
    full.Config: _full,
}

__all__ = ["RULES", "KeyMap", "key_map", "under"]
