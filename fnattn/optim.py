"""Optimisers as pairs of pure functions over trees of parameters.

    state          = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)
    params         = apply_updates(params, updates)

Nothing is written to, nothing is remembered outside `state`, and everything maps: with `tree.vmap` over params, grads and
state one call trains an ensemble. Hyper-parameters are numbers, 0-d tensors (so that an ensemble can map them: build the
optimiser inside the mapped function) or, for a learning rate, a schedule: a function of the number of updates made.

Leaves are worked on one by one, which every transform understands. Where nothing maps, traces or differentiates an update on
a CPU, all leaves take each step in one call (`_together`): the same numbers in a fraction of the time for small leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _together, tree
from .core import EMPTY, Empty, check

Schedule = Callable[[Tensor], Tensor]
Number = float | Tensor


class Optimizer(NamedTuple):
    """init(params) -> state; update(grads, state, params) -> (updates, state). Updates are added to the params."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


# ------------------------------------------------------------------------------------------------ schedules


def constant(value: Number) -> Schedule:
    """The same value at every step."""
    return lambda step: torch.as_tensor(value, dtype=_wide(step), device=step.device)


def cosine(peak: Number, steps: int, final: Number = 0.0) -> Schedule:
    """Half a cosine from `peak` at step 0 to `final` at step `steps`, and `final` from there on."""
    check(steps >= 1, "optim.cosine: steps must be at least 1; got {}.", steps, remedy="Give the length of the training.")

    def at(step: Tensor) -> Tensor:
        part = (step.to(_wide(step)) / steps).clamp(max=1.0)
        return final + (peak - final) * 0.5 * (1.0 + torch.cos(math.pi * part))

    return at


def warmup(schedule: Schedule | Number, steps: int) -> Schedule:
    """The schedule, multiplied by (step + 1) / steps during the first `steps` steps; 0 steps change nothing."""
    check(steps >= 0, "optim.warmup: steps must be at least 0; got {}.", steps, remedy="Use 0 for no warm-up.")
    inner = schedule if callable(schedule) else constant(schedule)
    return lambda step: inner(step) * ((step.to(_wide(step)) + 1) / max(steps, 1)).clamp(max=1.0)


def cooldown(schedule: Schedule | Number, steps: int, last: int) -> Schedule:
    """The schedule, falling linearly towards 0 over the `last` of `steps` updates: most of a cosine's gain, and until then the
    same training as without it.
    """
    check(1 <= last <= steps, "optim.cooldown: last must lie in [1, {}], the number of steps; got {}.", steps, last,
          remedy="A fifth of the steps is usual.")
    inner = schedule if callable(schedule) else constant(schedule)
    return lambda step: inner(step) * ((steps - step.to(_wide(step))) / last).clamp(0.0, 1.0)


def _wide(step: Tensor) -> torch.dtype:
    return torch.float32 if step.device.type == "mps" else torch.float64


def _rate(rate: Schedule | Number, step: Tensor) -> Tensor:
    return (rate if callable(rate) else constant(rate))(step)


# ------------------------------------------------------------------------------------------------ optimisers


class AdamState(NamedTuple):
    """step [] int64: updates made; mu, nu: trees of running means of the gradient and of its square, float32 or wider.

    Leaves that nothing differentiates have an empty tensor there.
    """

    step: Tensor
    mu: Any
    nu: Any


def adamw(learning_rate: Schedule | Number = 1e-3, *, betas: tuple[Number, Number] = (0.9, 0.999), eps: Number = 1e-8,
          weight_decay: Number = 0.01) -> Optimizer:
    """Adam with decoupled weight decay: a step of about the learning rate in each coordinate, whatever the gradient's size.

        mu <- b1 mu + (1 - b1) g         nu <- b2 nu + (1 - b2) g^2
        update = -rate (mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps) + weight_decay p)

    Equal to torch.optim.AdamW. Source: Loshchilov and Hutter 2019, arXiv 1711.05101.
    """
    b1, b2 = betas

    def init(params: Any) -> AdamState:
        return AdamState(_count(params), tree.map(_zeros, params), tree.map(_zeros, params))

    def update(grads: Any, state: AdamState, params: Any) -> tuple[Any, AdamState]:
        lists, shape = _same("adamw", grads, params, state.mu, state.nu)
        rate = _rate(learning_rate, state.step)
        t = state.step.to(_wide(state.step)) + 1
        at = [i for i, g in enumerate(lists[0]) if g is not None]
        some = tuple([x[i] for i in at] for x in lists)
        if _together.plain(some, rate, b1, b2, eps, weight_decay):
            new = _together.adamw(*some, t, *map(float, (b1, b2, eps, weight_decay, rate)))
            # None stays where nothing is differentiated, and so does what the state has there.
            change, mu, nu = (tree.put_together(_put(x, old, at), shape) for x, old in zip(new, (lists[0], *lists[2:])))
            return change, AdamState(state.step + 1, mu, nu)
        size, root = rate / (1 - b1 ** t), torch.sqrt(1 - b2 ** t)
        mu = tree.map(lambda g, m: m if g is None else m * b1 + g.to(m.dtype) * (1 - b1), grads, state.mu)
        nu = tree.map(lambda g, n: n if g is None else n * b2 + g.to(n.dtype).square() * (1 - b2), grads, state.nu)

        def change(g, m, n, p):
            if g is None:
                return None
            step = m / (n.sqrt() / root.to(n.dtype) + eps) * size.to(m.dtype)
            return -(step + (rate * weight_decay).to(m.dtype) * p)

        return tree.map(change, grads, mu, nu, params), AdamState(state.step + 1, mu, nu)

    return Optimizer(init, update)


def _put(new: list, old: list, at: list[int]) -> list:
    """old, with the new values at these places."""
    out = list(old)
    for i, x in zip(at, new):
        out[i] = x
    return out


def adam(learning_rate: Schedule | Number = 1e-3, *, betas: tuple[Number, Number] = (0.9, 0.999),
         eps: Number = 1e-8) -> Optimizer:
    """`adamw` without weight decay."""
    return adamw(learning_rate, betas=betas, eps=eps, weight_decay=0.0)


class SgdState(NamedTuple):
    """step [] int64: updates made; velocity: a tree like the params, or Empty without momentum."""

    step: Tensor
    velocity: Any | Empty


def sgd(learning_rate: Schedule | Number, *, momentum: Number = 0.0, nesterov: bool = False) -> Optimizer:
    """Steps against the gradient, with heavy-ball or Nesterov momentum.

        velocity <- momentum velocity + g         update = -rate velocity          (Nesterov: g + momentum velocity)

    Equal to torch.optim.SGD without dampening.
    """
    plain = not isinstance(momentum, Tensor) and momentum == 0.0

    def init(params: Any) -> SgdState:
        return SgdState(_count(params), EMPTY if plain else tree.map(_zeros, params))

    def update(grads: Any, state: SgdState, params: Any) -> tuple[Any, SgdState]:
        _same("sgd", grads, params)
        rate = _rate(learning_rate, state.step)
        velocity = EMPTY if plain else tree.map(
            lambda g, v: v if g is None else v * momentum + g.to(v.dtype), grads, state.velocity)
        if plain:
            change = grads
        elif nesterov:
            change = tree.map(lambda g, v: None if g is None else g.to(v.dtype) + v * momentum, grads, velocity)
        else:
            change = tree.map(lambda g, v: None if g is None else v, grads, velocity)
        return (tree.map(lambda c: None if c is None else -rate.to(c.dtype) * c, change),
                SgdState(state.step + 1, velocity))

    return Optimizer(init, update)


def clip_by_global_norm(max_norm: Number) -> Optimizer:
    """Scales all gradients together so that their norm is at most max_norm. The first link of a `chain`.

    The factor is min(1, max_norm / (norm + 1e-6)), as in torch.nn.utils.clip_grad_norm_.
    """

    def update(grads: Any, state: Empty, params: Any = None) -> tuple[Any, Empty]:
        (leaves,), (shape,) = tree.take_apart(grads)
        given = [g for g in leaves if g is not None]
        if _together.plain((given,), max_norm):
            norm = float(_together.norm(given))
            factor = min(1.0, float(max_norm) / (norm + 1e-6))
            if factor == 1.0:
                return grads, state
            scaled = iter(_together.scale(given, factor))
            return tree.put_together([None if g is None else next(scaled) for g in leaves], shape), state
        factor = (max_norm / (global_norm(grads) + 1e-6)).clamp(max=1.0)
        return tree.map(lambda g: None if g is None else g * factor.to(g.dtype), grads), state

    return Optimizer(lambda params: EMPTY, update)


def chain(*links: Optimizer) -> Optimizer:
    """One optimiser that hands the result of each link to the next: chain(clip_by_global_norm(0.5), adamw(1e-3))."""

    def update(grads: Any, state: tuple, params: Any) -> tuple[Any, tuple]:
        states = []
        for link, old in zip(links, state):
            grads, new = link.update(grads, old, params)
            states.append(new)
        return grads, tuple(states)

    return Optimizer(lambda params: tuple(link.init(params) for link in links), update)


def apply_updates(params: Any, updates: Any) -> Any:
    """params + updates, leaf by leaf, each in its own dtype; where the update is None the leaf stays."""
    (old, changes), (shape, found) = tree.take_apart(params, updates)
    if shape == found:
        at = [i for i, u in enumerate(changes) if u is not None]
        some = [old[i] for i in at], [changes[i] for i in at]
        if _together.plain(some):
            return tree.put_together(_put(_together.add(*some), old, at), shape)
    return tree.map(lambda p, u: p if u is None else (p.to(u.dtype) + u).to(p.dtype), params, updates)


def global_norm(grads: Any) -> Tensor:
    """The Euclidean norm of all leaves of a tree together, None counting as nothing; float32 or wider, 0-d."""
    squares = [g.to(_moment_dtype(g)).square().sum() for g in tree.leaves(grads) if g is not None]
    return torch.stack([s.to(squares[0].dtype) for s in squares]).sum().sqrt() if squares else torch.zeros(())


def _moment_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _zeros(p: Any) -> Tensor:
    return torch.zeros_like(p, dtype=_moment_dtype(p)) if tree.is_differentiable(p) else torch.zeros(0)


def _count(params: Any) -> Tensor:
    device = next((p.device for p in tree.leaves(params) if isinstance(p, Tensor)), None)
    return torch.zeros((), dtype=torch.int64, device=device)


def _same(who: str, grads: Any, params: Any, *others: Any) -> tuple[list[list], Any]:
    """The leaves of each tree, and the structure that grads and params must share."""
    lists, (found, expected, *_) = tree.take_apart(grads, params, *others)
    check(found == expected, "optim.{}.update: grads must have the structure of params; got {} and {}.", who, found, expected,
          remedy="Differentiate with tree.value_and_grad with respect to these params.")
    return lists, expected


# ------------------------------------------------------------------------------------------------ bridges


def from_torchopt(transformation: Any) -> Optimizer:
    """A torchopt (or torchopt.chain) gradient transformation as an optimiser. It sees the floating leaves as one tuple."""

    def init(params: Any) -> Any:
        return transformation.init(_floating(params))

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        values, state = transformation.update(_floating(grads), state, params=_floating(params), inplace=False)
        return _rebuild(params, values), state

    return Optimizer(init, update)


class TorchState(NamedTuple):
    """What a torch.optim optimiser keeps per parameter, by index and name; empty before the first update."""

    slots: dict


def from_torch(optimizer: type[torch.optim.Optimizer], **settings: Any) -> Optimizer:
    """A torch.optim class as an optimiser: from_torch(torch.optim.Adagrad, lr=0.1).

    Every update builds the class around copies and steps it once, so it costs a copy of the params and does not work
    under vmap or compile: a bridge for trying things, not for speed. Anything that the class keeps in its parameter
    groups instead of its per-parameter state is lost between updates.
    """

    def update(grads: Any, state: TorchState, params: Any) -> tuple[Any, TorchState]:
        old = _floating(params)
        new = [torch.nn.Parameter(p.detach().clone()) for p in old]
        made = optimizer(new, **settings)
        for i, (p, g) in enumerate(zip(new, _floating(grads))):
            p.grad = g.detach().clone()
            if str(i) in state.slots:
                made.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.slots[str(i)].items()}
        made.step()
        slots = {str(i): dict(made.state[p]) for i, p in enumerate(new) if made.state[p]}
        return _rebuild(params, [n.detach() - p for n, p in zip(new, old)]), TorchState(slots)

    return Optimizer(lambda params: TorchState({}), update)


def _floating(params: Any) -> tuple[Tensor, ...]:
    return tuple(p for p in tree.leaves(params) if tree.is_differentiable(p))


def _rebuild(params: Any, values: Any) -> Any:
    new = iter(values)
    return tree.map(lambda p: next(new) if tree.is_differentiable(p) else None, params)
