"""Weights from and to the upstream packages: `load(cfg, state_dict) -> params`, `dump(params) -> state_dict`.

Which upstream key is which of our leaves stands in one table, `fnattn.convert.keys` (attentions) and `model_keys`
(models). Tensors have the same number of entries on both sides, so a conversion only renames, and drops or adds axes of
length one; it never guesses: unknown, missing and misshapen keys are errors that name them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import random, tree
from ..core import check, kind_of
from .keys import KeyMap
from .model_keys import key_map

__all__ = ["KeyMap", "dump", "key_map", "load"]


def load(cfg: Any, state_dict: Mapping[str, Tensor], *, params_key: Tensor | None = None, dtype: torch.dtype | None = None,
         device: object = None) -> Any:
    """Params of cfg with the weights of an upstream state_dict.

    Args:
        cfg: the Config of a family or model; its fields are those of the upstream constructor.
        state_dict: exactly the keys that upstream has for these options. Tensors are copied, never aliased.
        params_key: where the random layouts of block_sparse come from if state_dict does not hold them.
        dtype, device: of the result; default those of the given tensors.
    Raises:
        ValueError: keys are missing or unknown, or a shape differs; all of them are named.
        TypeError: cfg is not a Config that has an upstream class.
    """
    entry = key_map(cfg)
    check(isinstance(state_dict, Mapping), "convert.load: state_dict must be a mapping of tensors; got {}.", kind_of(state_dict),
          remedy="Pass module.state_dict().", error=TypeError)
    unknown = sorted(set(state_dict) - set(entry.leaves) - set(entry.constants))
    template = tree.to_flat(entry.init(random.key(0), cfg, device="meta"))
    missing = sorted(key for key, ours in entry.leaves.items() if key not in state_dict and not _is_layout(template[ours]))
    check(not unknown and not missing, "convert.load: expected the state_dict of {}; got missing keys {}, unknown keys {}.",
          cfg, missing, unknown, remedy="Give cfg the options that the upstream module was built with.")
    flat: dict[str, Tensor] = {}
    for theirs, ours in entry.leaves.items():
        if theirs not in state_dict:
            continue
        given, want = state_dict[theirs], template[ours]
        check(isinstance(given, Tensor), "convert.load: {} must be a tensor; got {}.", theirs, kind_of(given),
              remedy="Convert the values: torch.as_tensor(value).", error=TypeError)
        if _is_layout(want):
            given = _layout(theirs, given, want, entry.shapes[theirs])
        check(_bare(given) == _bare(want), "convert.load: {} must be {}; got {}.", theirs, list(want.shape), list(given.shape),
              remedy="Give cfg the widths that the upstream module was built with.")
        check(ours not in flat or torch.equal(flat[ours], given.detach().reshape(want.shape).to(flat[ours])),
              "convert.load: {} must equal the other keys of the tensor it is shared with; got different values.", theirs,
              remedy="Take the state_dict from one module.")
        kind = given.dtype if _is_layout(want) else dtype or given.dtype
        flat[ours] = given.detach().reshape(want.shape).clone().to(dtype=kind, device=device or given.device)
    own = [name for name in template if name not in flat]
    check(not own or params_key is not None, "convert.load: params_key must be given, because state_dict does not hold {}; got None.",
          own, remedy="Pass params_key=fnattn.random.key(0) to draw it anew.")
    if own:
        drawn = tree.to_flat(entry.init(params_key, cfg))
        flat |= {name: drawn[name].to(device=device) for name in own}
    return tree.from_flat(flat, entry.init(random.key(0), cfg, device="meta"))


def _is_layout(leaf: Tensor) -> bool:
    """All other leaves are floating."""
    return leaf.dtype == torch.bool


def _layout(theirs: str, given: Tensor, want: Tensor, shape: tuple[int, ...]) -> Tensor:
    """DeepSpeed's layout [heads, nb, nb] of zeros and ones as ours, bool [heads or 1, nb, nb]. A block that ours has beyond upstream's
    attends to all before it.
    """
    (heads, _, _), (own, blocks, _) = shape, want.shape
    check(tuple(given.shape) in (shape, (heads, blocks, blocks)), "convert.load: {} must be {}; got {}.", theirs, list(shape),
          list(given.shape), remedy="Give cfg the heads and seq_len that the upstream module was built with.")
    layout = given != 0
    check(own == heads or bool((layout == layout[:1]).all()), "convert.load: {} must be the same for all heads; got different ones.",
          theirs, remedy="Give cfg a pattern with different_layout_per_head=True.")
    more = blocks - layout.shape[1]
    layout = torch.nn.functional.pad(layout[:own], (0, more, 0, more))
    if more:
        layout[:, -more:] = torch.ones(more, blocks, dtype=torch.bool, device=layout.device).tril(blocks - more)
    return layout


def _bare(t: Tensor) -> list[int]:
    """The shape without axes of length one, which upstream keeps for broadcasting."""
    return [size for size in t.shape if size != 1]


def dump(params: Any) -> dict[str, Tensor]:
    """The upstream state_dict of these params: load_state_dict(strict=True) of the upstream module takes it.

    Tensors are the params' own, not copies; upstream's constant entries (rotary frequencies) are added. A layout of block_sparse is
    written as DeepSpeed's int64 buffer; in a DALLE it has one block more than upstream's, whose sequences end one position earlier.
    """
    check(hasattr(params, "cfg"), "convert.dump: params must come from an init of this library; got {}.", kind_of(params),
          remedy="Pass what init or convert.load returned.", error=TypeError)
    entry = key_map(params.cfg)
    flat = tree.to_flat(params)
    like = next(iter(flat.values()))
    constants = {key: value.to(like.device) for key, value in entry.constants.items()}

    def as_theirs(theirs: str, leaf: Tensor) -> Tensor:
        if _is_layout(leaf):
            return leaf.long().expand(entry.shapes[theirs][0], -1, -1)
        return leaf.reshape(entry.shapes.get(theirs, leaf.shape))

    return {**{theirs: as_theirs(theirs, flat[ours]) for theirs, ours in entry.leaves.items()}, **constants}
