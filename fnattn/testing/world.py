"""What a law is tried on: params and inputs made from a key, small and in float64; and what a config can do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from fnattn_kernels.contracts import KernelUnavailable
from torch import Tensor

from .. import random, tree
from ..core import Family
from . import cases


class NotApplicable(Exception):
    """The law says nothing about this family, config or implementation; the text says why."""


def require(holds: bool | Tensor, message: str) -> None:
    """Raises AssertionError(message) unless it holds."""
    if not bool(holds):
        raise AssertionError(message)


def equal(actual: Any, expected: Any, what: str, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """Every tensor of one tree is close to that of the other; integers are equal."""
    a, e = tree.leaves(actual), tree.leaves(expected)
    require(tree.structure(actual) == tree.structure(expected), f"{what}: the trees have different structures")
    for x, y in zip(a, e):
        require(x.shape == y.shape, f"{what}: shape {list(x.shape)} instead of {list(y.shape)}")
        if x.is_floating_point():
            gap = (x - y).abs()
            worst = gap.max().item() if gap.numel() else 0.0
            require((gap <= atol + rtol * y.abs()).all(), f"{what}: differs by {worst:.1e}")
        else:
            require(torch.equal(x, y), f"{what}: integers differ")


def same_bits(actual: Any, expected: Any, what: str) -> None:
    """Every tensor of one tree equals that of the other, bit for bit."""
    a, e = tree.leaves(actual), tree.leaves(expected)
    require(len(a) == len(e) and all(torch.equal(x, y) for x, y in zip(a, e)), what)


def make_params(family: Family, cfg: Any, key: Tensor, dtype: torch.dtype = torch.float64) -> Any:
    """Params with a little noise on every entry, so that no derivative vanishes because something starts at 0 or 1."""
    params = family.init(random.fold_in(key, "params"), cfg, dtype=dtype)
    flat = tree.to_flat(params)
    noisy = {name: p + 0.05 * random.normal(random.fold_in(key, f"noise {name}"), tuple(p.shape), torch.float64).to(p.dtype)
             if p.is_floating_point() else p for name, p in flat.items()}
    return tree.from_flat(noisy, params)


def make_x(cfg: Any, key: Tensor, batch: int = 2, length: int = 5, dtype: torch.dtype = torch.float64, name: str = "x") -> Tensor:
    """[batch, length, dim], the length cut to what the config can take."""
    length = min(length, getattr(cfg, "seq_len", None) or length)
    return random.normal(random.fold_in(key, name), (batch, length, cfg.dim), torch.float64).to(dtype)


def streaming(family: Family, params: Any) -> bool:
    """Whether this config takes a state: the family streams and init_state does not refuse."""
    if not family.streams:
        return False
    try:
        family.init_state(params, 1, capacity=1)
    except ValueError:
        return False
    return True


def need_state(family: Family, params: Any, capacity: int, batch: int = 2) -> Any:
    """A fresh state, or NotApplicable."""
    if not streaming(family, params):
        raise NotApplicable("this config has no state")
    return family.init_state(params, batch, capacity=capacity)


def takes(family: Family, params: Any, x: Tensor, impl: str, **keyword: Any) -> bool:
    """Whether this config honours a keyword that its family says it can; other configs of it may refuse."""
    if not getattr(family, {"mask": "masks", "context": "contexts"}[next(iter(keyword))]):
        return False
    try:
        family.apply(params, x, impl=impl, **keyword)
    except ValueError:
        return False
    return True


def implementations(family: Family, cfg: Any, key: Tensor, device: str = "cpu") -> dict[str, str | None]:
    """Every implementation that some operator has: None if it serves this config here, else why not."""
    names = ["reference"]
    for module in cases.modules():
        names += [kernel for kernel in cases.kernels(module) if kernel not in names]
    found: dict[str, str | None] = {}
    params, x = tree.map(lambda t: t.to(device), make_params(family, cfg, key)), make_x(cfg, key).to(device)
    for name in names:
        try:
            with torch.no_grad():
                family.apply(params, x, impl=name)
            found[name] = None
        except KernelUnavailable as error:
            found[name] = " ".join(str(error).split())
        except ValueError as error:
            if "impl" not in str(error):
                raise
            found[name] = "no operator of this family has it"
    return found


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fills the memory that torch.empty and its kin hand out with NaN: what is not written shows."""
    def poison(t: Tensor) -> Tensor:
        return t.fill_(float("nan")) if t.is_floating_point() or t.is_complex() else t

    def wrap(fn):
        return lambda *args, **kwargs: poison(fn(*args, **kwargs))

    places = [(torch, n) for n in ("empty", "empty_like", "empty_strided")]
    places += [(Tensor, n) for n in ("new_empty", "new_empty_strided")]
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    try:
        for owner, name, fn in before:
            setattr(owner, name, wrap(fn))
        yield
    finally:
        for owner, name, fn in before:
            setattr(owner, name, fn)
