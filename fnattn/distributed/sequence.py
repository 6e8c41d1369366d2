"""Sequence parallelism: one sequence in parts of equal length, one part per process, over any family whose states combine.

    S_r  = what part r alone adds to a state                          every process by itself
    P_r  = combine(... combine(start, S_0) ..., S_{r - 1})            after one exchange of states, whose size no length changes
    out  = apply(params, part r, P_r)                                 every process by itself

The wrapper is a family itself: `lm` takes its Config in place of the attention's, and each process feeds its own part of the
tokens. The result is that of one process, with every derivative, up to the order of sums.

Source: the linear attention of LASP-2 (Sun et al. 2025, arXiv 2502.07563), for any state that combines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import attentions, tree
from ..attentions import taylor
from ..core import EMPTY, Empty, Family, check, check_input, config, config_of, refuse
from .collectives import all_gather, rank, world_size

# b batch, n positions of this process, r number of this process


@config
class Config:
    """Attention over a sequence that is spread over processes.

    attention: the Config of a causal family with `combine`: taylor, gate_loop.
    group:     name of a group of torch.distributed (`group.group_name`); "" is that of all processes.
    """

    attention: Any
    group: str = ""

    def __post_init__(self):
        family = attentions.find(self.attention)
        able = family.combine is not None and getattr(self.attention, "causal", True)
        check(able, "sequence.Config: attention must be causal and its states must combine; got {}.", self.attention,
              remedy="Use causal=True and one of: " + ", ".join(n for n, f in attentions.FAMILIES.items() if f.combine)
              + "; or spread its heads instead: fnattn.distributed.over_heads.")

    @property
    def dim(self) -> int:
        """Width of x."""
        return self.attention.dim

    @property
    def combine_heads(self) -> bool:
        """Whether it gives back dim."""
        return getattr(self.attention, "combine_heads", True)

    @property
    def spread(self) -> bool:
        """That a process sees a part of the positions only; `lm` then cannot add learned ones."""
        return True


class Params(NamedTuple):
    """Those of the attention, the same on every process."""

    cfg: Config
    attn: Any


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg.attention, with the bits that it has without this wrapper."""
    if not isinstance(cfg, Config):
        raise TypeError(f"sequence.init: cfg must be sequence.Config; got {type(cfg).__name__}.\n  Make one with sequence.Config(...).")
    return Params(cfg, attentions.init(params_key, cfg.attention, dtype=dtype, device=device))


def init_state(params: Params, batch: int, *, capacity: int = 0) -> Any:
    """The attention's own state before the first position of the whole sequence: the same on every process."""
    config_of("sequence.init_state", params, Params)
    return attentions.init_state(params.attn, batch, capacity=capacity)


def apply(params: Params, x: Tensor, state: Any = EMPTY, *, mask: Tensor | None = None, context: Tensor | None = None,
          dropout_key: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Any]:
    """The attention's `apply` on this process's part of a sequence.

    Costs each process `apply` and `absorb` of its part, about half an apply more, and one exchange of states.

    Args:
        params: from `init`; the same on every process.
        x: [b, n, dim], positions r n ... (r + 1) n of the whole; n the same on every process.
        state: from `init_state` or a former call, the same on every process: the whole continues that sequence.
        mask: bool [b, n], for families that mask: of this part.
        context: refused, as by every causal family.
        dropout_key: drops in this part; give each process its own: random.fold_in(key, distributed.rank()).
        impl: passed to the attention.
    Returns:
        out [b, n, dim] for this part; the state after the whole sequence, the same on every process, or EMPTY.

    Derivatives are those of the sum of what all processes compute (see `collectives`); those of params and state come in parts,
    which `distributed.value_and_grad` adds.
    """
    cfg = config_of("sequence.apply", params, Params)
    family, group = attentions.find(cfg.attention), cfg.group or None
    world, here = world_size(group), rank(group)
    options = {"mask": mask, "impl": impl}
    check_input("sequence.apply", x, cfg.dim, mask=mask)
    refuse("sequence.apply", "A query attends to its own past, and a context has none.", "Leave it out.", context=context)
    if world == 1 or not x.shape[1]:
        return family.apply(params.attn, x, state, dropout_key=dropout_key, **options)
    streaming = not isinstance(state, Empty)
    start = state if streaming else family.init_state(params.attn, x.shape[0], capacity=0)

    # The last token of the part before, which families that shift tokens begin with. A choice by number of process is made by
    # `where`: on all of them all exchanges must matter to the result, else some would leave out the transposed ones.
    lasts = all_gather(x[:, -1:], 1, group)
    moved = family.resume(start, lasts[:, here - 1:here] if here else lasts[:, -1:], here * x.shape[1])
    first = _pick(here > 0, moved, family.resume(start), x)
    own = (family.absorb or _absorb(family))(params.attn, x, first, **options)
    parts = tree.map(lambda t: all_gather(t.unsqueeze(0), 0, group), own)
    before = after = start
    for r in range(world):
        after = family.combine(after, tree.map(lambda t, r=r: t[r], parts))
        if r < world - 1:
            before = _pick(r < here, after, before, x)
    out, _ = family.apply(params.attn, x, before, dropout_key=dropout_key, **options)
    return out, after if streaming else EMPTY


def _absorb(family: Family) -> Callable:
    """The state after x for a family that has no shorter way to it."""
    return lambda *args, **options: family.apply(*args, **options)[1]


def _pick(first: bool, a: Any, b: Any, like: Tensor) -> Any:
    """a if first, else b, in a way that depends on both."""
    chosen = torch.full((), first, device=like.device)
    return tree.map(lambda s, t: torch.where(chosen, s, t), a, b)


FAMILY = attentions.register(Family(
    name="sequence", config=Config, init=init, init_state=init_state, apply=apply, streams=True, masks=True, contexts=False,
    source="arXiv 2502.07563",
    examples=(Config(attention=taylor.Config(dim=6, dim_head=2, heads=3, causal=True)),)))
