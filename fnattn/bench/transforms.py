"""Forward mode, second order, ensembles and steps of generation: what they cost in units of something simpler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import ops, random, tree
from ..attentions import block_sparse, coor_descent, full, gate_loop, gate_loop_full, simple_gate_loop, taylor
from ..models import lm
from .case import cast, normal, weights


class Multiple(NamedTuple):
    """unit and cost are functions of nothing that are timed against each other.

    check: () -> (got, true): what the cost computes, and the same in float64 by plain torch. peer: the same cost elsewhere.
    """

    unit: Callable[[], Any]
    cost: Callable[[], Any]
    check: Callable[[], tuple[list[Tensor], list[Tensor]]]
    peer: Callable[[], Any] | None = None


class Transform(NamedTuple):
    """One row. goal: the largest multiple cost / unit; with more=True the least multiple unit / cost.

    tolerance: largest error as a part of the largest entry.
    """

    name: str
    build: Callable[[dict, torch.device], Multiple]
    sizes: dict[str, int]
    quick: dict[str, int]
    goal: float
    unit: str
    more: bool = False
    peer: str = ""
    tolerance: float = 1e-3


def _inputs(family: str, s: dict, device: torch.device) -> tuple[Tensor, ...]:
    shape = s["b"], s["h"], s["n"], s["d"]
    args = tuple(normal(name, *shape, device=device) for name in ("q", "k", "v"))
    return (*args, normal("a", *shape[:3], 2, device=device)) if family == "gate_loop" else args


def _run(family: str, *args: Tensor, impl: str = "auto") -> Tensor:
    if family == "full":
        return ops.softmax_attention(*args, causal=True, impl=impl)
    return getattr(ops, family)(*args, impl=impl)[0]


def _math(*args: Tensor) -> Tensor:
    """torch's attention with a table: its only one with forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(*args, is_causal=True)


def _jvp(fn: Callable, args: tuple, tangents: tuple) -> Tensor:
    return tree.jvp(fn, args, tangents)[1]


def _grad(fn: Callable, *args: Tensor) -> tuple[Tensor, ...]:
    def total(*args):
        out = fn(*args)
        return (out * weights(out)).sum()

    return torch.func.grad(total, argnums=tuple(range(len(args))))(*args)


def _hvp(fn: Callable, args: tuple, tangents: tuple) -> tuple[Tensor, ...]:
    return tree.jvp(partial(_grad, fn), args, tangents)[1]


def _derivative(family: str, order: int, s: dict, device: torch.device) -> Multiple:
    args = _inputs(family, s, device)
    tangents = tuple(normal(f"tangent {i}", *t.shape, device=device) for i, t in enumerate(args))
    fn, along = partial(_run, family), _jvp if order == 1 else _hvp

    def check():
        plain = partial(_run, family, impl="reference")
        few = tuple(t[:1, :1] for t in args), tuple(t[:1, :1] for t in tangents)  # heads do not meet
        return tree.leaves(along(fn, *few)), tree.leaves(along(plain, *cast(few, torch.float64)))

    def unit():
        if order == 2:
            return _grad(fn, *args)
        with torch.no_grad():
            return fn(*args)

    return Multiple(unit, lambda: along(fn, args, tangents), check,
                    (lambda: along(_math, args, tangents)) if family == "full" else None)


def _ensemble(s: dict, device: torch.device) -> Multiple:
    cfg = lm.Config(attention=taylor.Config(dim=s["dim"], heads=2, dim_head=s["dim"] // 2, causal=True), depth=2, num_tokens=256)
    keys = torch.stack([random.key(i, device=device) for i in range(s["members"])])
    stacked = tree.vmap(lambda key: lm.init(key, cfg))(keys)
    members = tree.unstack(stacked)
    ids = random.randint(random.key(1, device=device), (s["b"], s["n"]), 0, 256)
    step = tree.value_and_grad(lambda params, impl="auto": lm.loss(params, ids, impl=impl))

    def check():
        got = tree.map(lambda t: t[0], tree.vmap(step)(stacked))
        true = tree.value_and_grad(lambda params: lm.loss(params, ids, impl="reference"))(cast(members[0], torch.float64))
        return tree.leaves(got), tree.leaves(true)

    return Multiple(lambda: [step(one) for one in members], lambda: tree.vmap(step)(stacked), check)


ATTENTIONS = {"taylor": lambda dim, h: taylor.Config(dim=dim, heads=h, dim_head=dim // h, causal=True),
              "full": lambda dim, h: full.Config(dim=dim, seq_len=256, heads=h, dim_head=dim // h),
              "gate_loop": lambda dim, h: gate_loop.Config(dim=dim, heads=h),
              "simple_gate_loop": lambda dim, h: simple_gate_loop.Config(dim=dim),
              "coor_descent": lambda dim, h: coor_descent.Config(dim=dim, heads=h, dim_head=dim // h, use_coor_descent=True),
              "block_sparse": lambda dim, h: block_sparse.Config(dim=dim, seq_len=256, heads=h, dim_head=dim // h, text_seq_len=64),
              "gate_loop_full": lambda dim, h: gate_loop_full.Config(dim=dim, heads=h, dim_head=dim // h)}


def _token(family: str, s: dict, device: torch.device) -> Multiple:
    """A token through a language model: all of it in one call, against a kernel at a time."""
    params = lm.init(random.key(0, device=device), lm.Config(attention=ATTENTIONS[family](s["dim"], s["h"]), depth=s["depth"]))
    ids = random.randint(random.key(1, device=device), (s["b"], s["n"]), 0, 256)
    with torch.no_grad():
        _, state = lm.apply(params, ids[:, :-1], lm.init_state(params, s["b"], capacity=s["n"]))

    def step(impl="auto"):
        with torch.no_grad():
            return lm.apply(params, ids[:, -1:], state, impl=impl)[0]

    def check():
        return [step()], [lm.apply(cast(params, torch.float64), ids, impl="reference")[0][:, -1:]]

    return Multiple(partial(step, "native"), step, check)


def _narrow_token(family: str, s: dict, device: torch.device) -> Multiple:
    """A token through a language model with weights and caches in bfloat16, against the same in float32."""
    cfg = lm.Config(attention=ATTENTIONS[family](s["dim"], s["h"]), depth=s["depth"])
    ids = random.randint(random.key(1, device=device), (s["b"], s["n"]), 0, 256)
    made = lm.init(random.key(0, device=device), cfg)

    def step(dtype: torch.dtype) -> Callable[[], Tensor]:
        params = cast(made, dtype)
        with torch.no_grad():
            _, state = lm.apply(params, ids[:, :-1], lm.init_state(params, s["b"], capacity=s["n"]))

        def run() -> Tensor:
            with torch.no_grad():
                return lm.apply(params, ids[:, -1:], state)[0]

        return run

    narrow = step(torch.bfloat16)

    def check():
        return [narrow()], [lm.apply(cast(cast(made, torch.bfloat16), torch.float64), ids, impl="reference")[0][:, -1:]]

    return Multiple(step(torch.float32), narrow, check)


T16, T64 = {"b": 2, "h": 8, "n": 1024, "d": 16}, {"b": 1, "h": 4, "n": 1024, "d": 64}
SMALL = {"b": 1, "h": 2, "n": 64, "d": 16}

# Around a call there are some tenths of a millisecond that no length changes: the long rows show what is left without it.
LONG = {"n": 4096}

CASES: dict[str, Transform] = {case.name: case for case in (
    *(Transform(f"{word} {family}", partial(_derivative, family, order), sizes, SMALL, 3.0, unit,
                peer="torch SDPA, math" if family == "full" else "")
      for order, word, unit in ((1, "jvp", "forward"), (2, "hvp", "forward+backward"))
      for family, sizes in (("taylor", T16), ("gate_loop", T64), ("full", T64))),
    *(Transform(f"jvp {family} long", partial(_derivative, family, 1), sizes | LONG, SMALL, 3.0, "forward")
      for family, sizes in (("taylor", T16), ("gate_loop", T64))),
    Transform("vmap ensemble", _ensemble, {"members": 8, "b": 2, "n": 32, "dim": 32}, {"members": 3, "b": 1, "n": 8, "dim": 16},
              2.0, "loop", True),
    *(Transform(f"decode lm {family}", partial(_token, family), {"b": 1, "n": 120, "dim": 64, "h": 4, "depth": 2},
                {"b": 1, "n": 8, "dim": 16, "h": 2, "depth": 1}, 2.0, "kernel by kernel", True) for family in ATTENTIONS),
    *(Transform(f"decode lm {family}, bfloat16", partial(_narrow_token, family), {"b": 1, "n": 120, "dim": 512, "h": 8, "depth": 2},
                {"b": 1, "n": 8, "dim": 16, "h": 2, "depth": 1}, 0.7, "step in float32", True, tolerance=0.02)
      for family in ("taylor", "full", "gate_loop")),
)}
