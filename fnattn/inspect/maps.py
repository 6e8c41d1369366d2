"""The exact attention map of every family: the matrix that takes values to what the heads give, also where none is ever made.

    heads = map @ values

For softmax families it is the softmax; for Taylor attention the normalised polynomial; for the gated loops the scores times the
decay between key and query; for Linformer P E^T; for coordinate descent its y; for sparse kinds a dense matrix with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import attentions, ops, taps
from ..attentions import linformer
from ..attentions._heads import split_heads
from ..core import check
from ..models import dalle_transformer
from ._formulas import FORMULAS, each_head, wide, with_nulls

# b batch, h heads (channels, for simple_gate_loop), n queries, m keys, z null keys of coor_descent, e width of values


class Attended(NamedTuple):
    """What one attention does with its values: heads = map @ values."""

    map: Tensor      # [b, h, n, m], or [b, h, n, z + m] with null keys in front; float32 or wider
    values: Tensor   # [b, h, m (or z + m), e]
    heads: Tensor    # [b, h, n, e]: what the family computed, before gates, norms and the output projection


def attention_map(params: Any, x: Tensor, *, mask: Tensor | None = None, context: Tensor | None = None,
                  how: str = "formula") -> Tensor:
    """The map [b, h, n, m] of a family on x [b, n, dim]. Differentiable; see `attended` for the values it multiplies.

    Time and memory grow with n m, whatever the family's own do.

    Args:
        params: of a family. mask, context: as in its apply.
        how: "formula" writes the family's formula down; "probe" measures the map by sending one-hot values through the family
            itself (m times its cost), for any family, also a registered one, that taps "v" and "heads".
    Raises:
        ValueError: no formula for this family, or no such taps.
    """
    return attended(params, x, mask=mask, context=context, how=how).map


def attended(params: Any, x: Tensor, *, mask: Tensor | None = None, context: Tensor | None = None, how: str = "formula") -> Attended:
    """The map, the values that it multiplies, and the heads that the family computed from them. Arguments as in `attention_map`."""
    check(how in ("formula", "probe"), "inspect.attention_map: how must be 'formula' or 'probe'; got {!r}.", how,
          remedy="'probe' works for any family.")
    run = _runner(params, x, mask, context)
    _, seen = taps.harvest(run)()
    if how == "probe":
        return _probed(run, seen)
    return from_taps(params, seen, mask)


def _runner(params: Any, x: Tensor, mask: Tensor | None, context: Tensor | None) -> Callable:
    return lambda: attentions.apply(params, x, mask=mask, context=context, impl="reference")[0]


def from_taps(params: Any, seen: dict[str, Tensor], mask: Tensor | None = None) -> Attended:
    """The same from what `taps.harvest` found in one attention: {"q": ..., "k": ..., "v": ..., "heads": ...}."""
    name = attentions.find(params).name
    check(name in FORMULAS, "inspect.attention_map: no formula for the family {}.", name,
          remedy="Use attention_map(params, x, how='probe').")
    found = FORMULAS[name](params, seen, mask)
    values = _values(name, params, seen, found.shape[1])
    found, values = wide(found, values)
    return Attended(found, values, seen["heads"] if "heads" in seen else _channels(params, seen))


def _channels(params: Any, seen: dict[str, Tensor]) -> Tensor:
    """What simple_gate_loop computes before its norm, a head per channel: [b, c, n, 1]."""
    out, _ = ops.simple_gate_loop(seen["q"], seen["kv"], seen["a"], reverse=params.cfg.reverse)
    return out.mT.unsqueeze(-1)


def _values(name: str, params: Any, seen: dict[str, Tensor], heads: int) -> Tensor:
    if name == "simple_gate_loop":
        return seen["kv"].mT.unsqueeze(-1)
    if name == "linformer":  # before the mixing along the sequence, which the map contains
        cfg: linformer.Config = params.cfg
        given = torch.nn.functional.linear(seen["context"], params.to_k if cfg.share_kv else params.to_v)
        return each_head(split_heads(given, cfg.kv_heads), heads)
    if name == "coor_descent":
        return with_nulls(params.null_kv[1], seen["v"])
    return each_head(seen["v"], heads)


def _probed(run: Callable, seen: dict[str, Tensor]) -> Attended:
    check("v" in seen and "heads" in seen, "inspect.attention_map: probing needs taps 'v' and 'heads'; got {}.", sorted(seen),
          remedy="Tap them in the family's apply, or use how='formula'.")
    v = seen["v"]

    def heads(values: Tensor) -> Tensor:
        return taps.harvest(taps.plant(run, {"v": values}), only=["heads"])()[1]["heads"]

    nothing = heads(torch.zeros_like(v))  # null values add a constant

    def column(one: Tensor) -> Tensor:
        return (heads(one.to(v.dtype)[:, None].expand(v.shape)) - nothing)[..., 0]

    found = torch.vmap(column, out_dims=-1)(torch.eye(v.shape[2], dtype=v.dtype, device=v.device))
    return Attended(found, each_head(v, found.shape[1]), seen["heads"] - nothing)


# ------------------------------------------------------------------------------------------------ models


def attentions_of(params: Any) -> dict[str, Any]:
    """The params of every attention in a model, by the scope of its taps: {"blocks.0.attn": ..., "blocks.1.attn": ...}."""
    found: dict[str, Any] = {}
    _walk(params, "", found)
    return found


def _walk(node: Any, name: str, found: dict[str, Any]) -> None:
    cfg = getattr(node, "cfg", None)
    if isinstance(cfg, dalle_transformer.Config):
        # Layers may share attentions, which lie in order of first use.
        order = {one: i for i, one in enumerate(dict.fromkeys(cfg.attn_ids))}
        found.update({f"layers.{i}.attn": node.attns[order[one]] for i, one in enumerate(cfg.attn_ids)})
        return
    if cfg is not None:
        try:
            attentions.find(cfg)
        except TypeError:
            pass
        else:
            found[name] = node
            return
    children = node._asdict().items() if hasattr(node, "_asdict") else enumerate(node) if isinstance(node, (tuple, list)) else (
        node.items() if isinstance(node, dict) else ())
    for key, child in children:
        _walk(child, f"{name}.{key}" if name else str(key), found)


def attention_maps(apply: Callable, params: Any, *args: Any, mask: Tensor | None = None, **options: Any) -> dict[str, Attended]:
    """The maps of every attention in a model, by the scope of its taps, from one forward pass.

    Args:
        apply: apply(params, *args), for example lm.apply. mask: keys, as the model takes it.
    Returns:
        {"blocks.0.attn": Attended, ...} in the order of the layers.
    """
    if mask is not None:
        options["mask"] = mask
    _, seen = taps.harvest(apply)(params, *args, **options)
    found = {}
    for name, one in attentions_of(params).items():
        prefix = _scope_of(name, seen)
        if prefix is not None:
            inside = {key.removeprefix(prefix): value for key, value in seen.items()
                      if key.startswith(prefix) and "." not in key.removeprefix(prefix)}
            found[prefix.rstrip(".")] = from_taps(one, inside, mask)
    check(bool(found), "inspect.attention_maps: expected a model whose attentions have taps; got taps {}.", sorted(seen),
          remedy="Reversible stacks run without them: use reversible=False.")
    return found


def _scope_of(name: str, seen: dict[str, Tensor]) -> str | None:
    """The prefix under which the attention at `name` taps: its own path, or that without a last ".attn"."""
    scopes = {key.rpartition(".")[0] for key in seen if key.rpartition(".")[2] in ("v", "kv")}
    for candidate in (name, name.removesuffix(".attn")):
        for scope in scopes:
            if candidate == scope or candidate.endswith("." + scope):
                return scope + "." if scope else ""
    return None
