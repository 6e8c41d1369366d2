"""Many models at once: stacked parameters, one `vmap` over members in place of a loop.

A member of an ensemble is the same training as a single one with the same key, up to the rounding of batched products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import random, tree
from .core import check


def keys(seed: int, members: int) -> Tensor:
    """One key per member, int64 [members, 2]: member i has random.key(seed + i), so it can be trained again alone."""
    check(members >= 1, "ensemble.keys: members must be at least 1; got {}.", members, remedy="Ask for one model or more.")
    return torch.stack([random.key(seed + i) for i in range(members)])


def init(init_one: Callable[[Tensor], Any], member_keys: Tensor) -> Any:
    """init_one(key) for every key [members, 2]: one tree whose leaves have a leading axis of members."""
    check(member_keys.ndim == 2, "ensemble.init: member_keys must be [members, 2]; got {}.", list(member_keys.shape),
          remedy="Use ensemble.keys(seed, members) or random.split(key, members).")
    return tree.vmap(init_one)(member_keys)


def member(stacked: Any, index: int) -> Any:
    """The tree of one member of a stacked tree."""
    return tree.map(lambda leaf: leaf[index], stacked)


def size(stacked: Any) -> int:
    """The number of members of a stacked tree."""
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tree.leaves(stacked)}
    check(len(sizes) == 1, "ensemble.size: expected one leading size for all leaves; got {}.", sorted(sizes),
          remedy="Pass what ensemble.init or tree.stack gave.")
    return sizes.pop()
