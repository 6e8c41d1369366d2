"""A family from outside the package, right in every way, and copies of it that each break one law."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fnattn import random
from fnattn.core import EMPTY, Empty, Family, check_input, config, refuse


@config
class Config:
    """A running mean of a projection."""

    dim: int
    decay: float = 0.5


class Params(NamedTuple):
    cfg: Config
    weight: Tensor  # [dim, dim]


class State(NamedTuple):
    total: Tensor  # [b, dim]
    pos: Tensor    # [] int64


def init(params_key, cfg, *, dtype=torch.float32, device=None):
    if device == "meta":
        return Params(cfg, torch.empty(cfg.dim, cfg.dim, dtype=dtype, device=device))
    return Params(cfg, random.normal(random.fold_in(params_key, "weight"), (cfg.dim, cfg.dim)).to(dtype=dtype, device=device))


def init_state(params, batch, *, capacity=0):
    wide = torch.float64 if params.weight.dtype == torch.float64 else torch.float32
    return State(params.weight.new_zeros(batch, params.cfg.dim, dtype=wide), torch.zeros((), dtype=torch.int64))


def _total(params, x, state):
    before = x.new_zeros(x.shape[0], params.cfg.dim) if isinstance(state, Empty) else state.total
    return before[:, None] + (x @ params.weight.T).to(before.dtype).cumsum(1)


def _checked(params, x, impl, mask, context):
    check_input("stranger.apply", x, params.cfg.dim)
    refuse("stranger.apply", "A running sum has no keys.", "Leave it out.", mask=mask, context=context)
    if impl not in ("auto", "reference"):
        raise ValueError(f"stranger.apply: impl must be 'auto' or 'reference'; got {impl!r}.\n  Leave it out.")


def apply(params, x, state=EMPTY, *, mask=None, context=None, dropout_key=None, impl="auto"):
    _checked(params, x, impl, mask, context)
    total = _total(params, x, state)
    out = total.to(x.dtype).tanh() * x
    if isinstance(state, Empty):
        return out, EMPTY
    last = torch.cat((state.total[:, None], total), 1)[:, -1]
    return out, State(last, state.pos + x.shape[1])


FAMILY = Family(name="stranger", config=Config, init=init, init_state=init_state, apply=apply, streams=True, masks=False,
                contexts=False, source="nowhere", examples=(Config(dim=3),))


def leaky(params, x, state=EMPTY, **options):
    out, after = apply(params, x, state, **options)
    return out + x.mean(1, keepdim=True), after


def forgetful(params, x, state=EMPTY, **options):
    return apply(params, x, state if isinstance(state, Empty) else state._replace(total=state.total * 0), **options)


def detached(params, x, state=EMPTY, **options):
    return apply(params._replace(weight=params.weight.detach()), x, state, **options)


def writer(params, x, state=EMPTY, **options):
    out = apply(params, x, state, **options)
    with torch.no_grad():
        x.mul_(1.0)
    return out


def silent(params, x, state=EMPTY, *, mask=None, context=None, **options):
    return apply(params, x, state, **options)


def mixing(params, x, state=EMPTY, **options):
    return apply(params, x + x.mean(0, keepdim=True), state, **options)


LEAKY, FORGETFUL, DETACHED, WRITER, SILENT, MIXING = (
    FAMILY._replace(name=fn.__name__, apply=fn) for fn in (leaky, forgetful, detached, writer, silent, mixing))
