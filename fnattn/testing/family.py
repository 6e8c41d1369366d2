"""A family as a function of tensors: the Subject that transforms, compile checks and the derivative table look at."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .. import random, tree
from ..core import Family
from .subject import Subject, ripple
from .world import make_params, make_x

SEED = 17


class Flat:
    """apply(params, x) as a function of the params' leaves and x; equal arguments make it again in another process."""

    def __init__(self, family: Family, cfg: Any, impl: str):
        self.family, self.cfg, self.impl = family, cfg, impl
        self.form = tree.structure(family.init(random.key(SEED), cfg, device="meta"))

    def __call__(self, *tensors: Tensor) -> Tensor:
        params = tree.unflatten(tensors[:-1], self.form)
        return self.family.apply(params, tensors[-1], impl=self.impl)[0]

    def __reduce__(self):
        return _flat, (_origin(self.family), self.cfg, self.impl)


def _origin(family: Family) -> Any:
    """The family as something that pickle can send: where its record lies, if it lies at the top of its module."""
    module = importlib.import_module(family.apply.__module__)
    return f"{module.__name__}:FAMILY" if getattr(module, "FAMILY", None) is family else family


def _flat(origin: Any, cfg: Any, impl: str) -> Flat:
    if isinstance(origin, str):
        module, _, name = origin.partition(":")
        origin = getattr(importlib.import_module(module), name)
    return Flat(origin, cfg, impl)


def family_subject(family: Family, cfg: Any, impl: str, key: Tensor | None = None, batch: int = 1, length: int = 3,
                   device: str = "cpu") -> Subject:
    """A small float64 Subject for this family: all params and x are differentiated."""
    key = random.key(SEED) if key is None else key
    args = tuple(t.to(device) for t in (*tree.leaves(make_params(family, cfg, key)), make_x(cfg, key, batch, length)))
    fn = Flat(family, cfg, impl)
    with torch.no_grad():
        pulls = (ripple(fn(*args), 7),)
    diff = tuple(i for i, a in enumerate(args) if a.is_floating_point())
    return Subject(fn, args, diff, pulls, tuple({} for _ in args[:-1]) + ({0: "b"},))
