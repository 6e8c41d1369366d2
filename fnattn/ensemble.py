"""Many models at once: stacked parameters, one `vmap` over members in place of a loop.

    params        = init(keys(seed, members), cfg)            every leaf gets a leading axis of members
    outs, _       = apply(params, x)                          [members, batch, seq, dim]
    losses, grads = value_and_grad(loss)(params, batch)
    step          = train_step(loss, lambda rate, decay: optim.adamw(rate, weight_decay=decay))
    params, opt_state, losses = step(params, opt_state, batch, hyper={"rate": rates, "decay": decays})

A member of an ensemble is the same training as a single one with the same key, up to the rounding of batched products.
Members may differ by key, by data (`each=True`) and by hyper-parameters (`hyper`). Time and memory are those of the members
together; `chunk_size` maps so many at a time, which bounds memory and nothing else.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attentions, optim, random, tree
from .core import check

# m members

Each = bool | tuple[bool, ...]


# ------------------------------------------------------------------------------------------------ making and taking apart


def keys(seed: int, members: int) -> Tensor:
    """One key per member, int64 [members, 2]: member i has random.key(seed + i), so it can be trained again alone."""
    check(members >= 1, "ensemble.keys: members must be at least 1; got {}.", members, remedy="Ask for one model or more.")
    return torch.stack([random.key(seed + i) for i in range(members)])


def init(member_keys: Tensor, cfg: Any, *, chunk_size: int | None = None, **kind: Any) -> Any:
    """Parameters of every member, each drawn as it would be alone.

    Args:
        member_keys: int64 [m, 2], from `keys` or random.split.
        cfg: the Config of a family or of a model; or a function key -> tree, for anything else.
        kind: dtype and device, passed on with a Config.
    Returns:
        One tree whose leaves have a leading axis of members.
    """
    if callable(member_keys):
        raise TypeError("ensemble.init: expected init(member_keys, cfg); got a function first.\n  Swap the two arguments.")
    check(member_keys.ndim == 2, "ensemble.init: member_keys must be [members, 2]; got {}.", list(member_keys.shape),
          remedy="Use ensemble.keys(seed, members) or random.split(key, members).")
    one = cfg if callable(cfg) else lambda key: _home(cfg).init(key, cfg, **kind)
    return tree.vmap(one, chunk_size=chunk_size)(member_keys)


def _home(cfg: Any) -> Any:
    """Where init and apply of a config lie: its family, or the module of a model's Config."""
    try:
        return attentions.find(cfg)
    except TypeError:
        home = importlib.import_module(type(cfg).__module__)
        if not (hasattr(home, "init") and hasattr(home, "apply")):
            raise
        return home


def member(stacked: Any, index: int) -> Any:
    """The tree of one member of a stacked tree."""
    return tree.map(lambda leaf: leaf[index], stacked)


def size(stacked: Any) -> int:
    """The number of members of a stacked tree."""
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tree.leaves(stacked)}
    check(len(sizes) == 1, "ensemble.size: expected one leading size for all leaves; got {}.", sorted(sizes),
          remedy="Pass what ensemble.init or tree.stack gave.")
    return sizes.pop()


def stack(members: Any) -> Any:
    """One stacked tree from a list of trees; `unstack` is the inverse."""
    return tree.stack(members)


def unstack(stacked: Any) -> list[Any]:
    """The list of the members' trees."""
    return tree.unstack(stacked)


def average(stacked: Any, weights: Tensor | None = None) -> Any:
    """The (weighted) mean of the members' parameters: one tree. Leaves that nothing differentiates are the first member's.

    weights: [m], normalised here; default equal. Source: Wortsman et al. 2022, arXiv 2203.05482 (model soups).
    """
    members = size(stacked)
    if weights is None:
        weights = torch.ones(members)
    check(tuple(weights.shape) == (members,), "ensemble.average: weights must be [members] = [{}]; got {}.", members,
          list(weights.shape), remedy="Give one number per member.")

    def mean(leaf: Tensor) -> Tensor:
        if not tree.is_differentiable(leaf):
            return leaf[0]
        wide = torch.promote_types(leaf.dtype, torch.float32)
        share = weights.to(device=leaf.device, dtype=wide)
        return torch.tensordot(share / share.sum(), leaf.to(wide), 1).to(leaf.dtype)

    return tree.map(mean, stacked)


# ------------------------------------------------------------------------------------------------ running and training


def apply(params: Any, *args: Any, each: Each = False, chunk_size: int | None = None, **options: Any) -> Any:
    """What every member computes: `apply` of its family or model, mapped.

    Args:
        params: stacked.
        args: x (and a stacked state); the same for all members unless `each` says otherwise.
        each: whether an argument has a leading axis of members; one bool per argument, or one for all.
        options: mask, impl, ... as in the family's apply; the same for all members.
    Returns:
        (out [m, ...], state stacked or EMPTY).
    """
    run = _home(params.cfg).apply
    return tree.vmap(lambda p, *rest: run(p, *rest, **options), _axes(each, args), chunk_size=chunk_size)(params, *args)


def value_and_grad(loss: Callable, *, each: Each = False, chunk_size: int | None = None) -> Callable:
    """A function (params, *args) -> (losses [m], grads stacked) from loss(params of one member, *args) -> 0-d."""
    def wrapped(params: Any, *args: Any) -> tuple[Tensor, Any]:
        return tree.vmap(tree.value_and_grad(loss), _axes(each, args), chunk_size=chunk_size)(params, *args)

    return wrapped


def opt_init(optimizer: optim.Optimizer | Callable[..., optim.Optimizer], params: Any,
             hyper: Mapping[str, Tensor] | None = None) -> Any:
    """The stacked state of an optimiser; arguments as in `train_step`."""
    return tree.vmap(lambda p, h: _made(optimizer, h).init(p))(params, dict(hyper or {}))


def train_step(loss: Callable, optimizer: optim.Optimizer | Callable[..., optim.Optimizer], *, each: Each = False,
               chunk_size: int | None = None) -> Callable:
    """One step of every member.

    Args:
        loss: loss(params of one member, *args) -> 0-d.
        optimizer: an optimiser for all members; or a function that makes one from each member's hyper-parameters, for example
            lambda rate, decay: optim.adamw(rate, weight_decay=decay).
        each: whether an argument of the loss has a leading axis of members (members over data): one bool per argument or for all.
    Returns:
        step(params, opt_state, *args, hyper=None) -> (params, opt_state, losses [m]); hyper: name -> [m], passed by name to
        the function that makes the optimiser.
    """
    def one(params: Any, opt_state: Any, hyper: dict, *args: Any) -> tuple[Any, Any, Tensor]:
        value, grads = tree.value_and_grad(loss)(params, *args)
        updates, opt_state = _made(optimizer, hyper).update(grads, opt_state, params)
        return optim.apply_updates(params, updates), opt_state, value

    def step(params: Any, opt_state: Any, *args: Any, hyper: Mapping[str, Tensor] | None = None) -> tuple[Any, Any, Tensor]:
        axes = (0, 0, *_axes(each, args))
        return tree.vmap(one, axes, chunk_size=chunk_size)(params, opt_state, dict(hyper or {}), *args)

    return step


def _made(optimizer: Any, hyper: Mapping[str, Tensor]) -> optim.Optimizer:
    if isinstance(optimizer, optim.Optimizer):
        check(not hyper, "ensemble.train_step: an optimiser that is made already takes no hyper-parameters; got {}.", sorted(hyper),
              remedy="Pass a function that makes it: lambda rate: optim.adamw(rate).")
        return optimizer
    return optimizer(**hyper)


def _axes(each: Each, args: tuple) -> tuple:
    per = (each,) * len(args) if isinstance(each, bool) else tuple(each)
    check(len(per) == len(args), "ensemble: each must be a bool, or one per argument ({}); got {}.", len(args), per,
          remedy="Leave it out where all members see the same.")
    return (0, *(0 if mapped else None for mapped in per))


# ------------------------------------------------------------------------------------------------ what members disagree about


class Disagreement(NamedTuple):
    """How unsure an ensemble is, in nats. total = expected + mutual_information."""

    total: Tensor               # [...]: entropy of the mean prediction
    expected: Tensor            # [...]: mean entropy of the members: what all of them are unsure about
    mutual_information: Tensor  # [...]: what they disagree about; 0 if all say the same


def disagreement(logits: Tensor) -> Disagreement:
    """Splits the uncertainty of members' predictions into what is noise and what more data would settle.

        total = H(mean_m p_m)     expected = mean_m H(p_m)     mutual_information = total - expected >= 0

    Args:
        logits: [m, ..., classes]. Computed in float32 or wider.
    Source: Houlsby et al. 2011, arXiv 1112.5745 (BALD).
    """
    check(logits.ndim >= 2, "ensemble.disagreement: logits must be [members, ..., classes]; got {}.", list(logits.shape),
          remedy="Stack the members' logits in front.")
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    mean = log_p.logsumexp(0) - torch.log(torch.tensor(float(logits.shape[0]), dtype=log_p.dtype, device=log_p.device))
    total, expected = _entropy(mean), _entropy(log_p).mean(0)
    return Disagreement(total, expected, (total - expected).clamp(min=0.0))


def _entropy(log_p: Tensor) -> Tensor:
    return -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)


# ------------------------------------------------------------------------------------------------ is it worth it


class Speed(NamedTuple):
    """Seconds of one gradient of all members, the best of some repeats."""

    mapped_s: float
    loop_s: float

    @property
    def gain(self) -> float:
        """How many times faster one vmap is than a loop."""
        return self.loop_s / self.mapped_s


def speed(loss: Callable, params: Any, *args: Any, each: Each = False, chunk_size: int | None = None, repeats: int = 5) -> Speed:
    """Times `value_and_grad` of all members in one vmap, and one member after the other. Repeats alternate; the best counts."""
    members, axes = unstack(params), _axes(each, args)[1:]

    def loop() -> None:
        for i, one in enumerate(members):
            tree.value_and_grad(loss)(one, *(member(a, i) if axis == 0 else a for a, axis in zip(args, axes)))

    def mapped() -> None:
        value_and_grad(loss, each=each, chunk_size=chunk_size)(params, *args)

    best = {loop: float("inf"), mapped: float("inf")}
    for _ in range(1 + repeats):  # the first of each is a warm-up that is rarely the best
        for run in best:
            began = time.perf_counter()
            run()
            _wait(params)
            best[run] = min(best[run], time.perf_counter() - began)
    return Speed(best[mapped], best[loop])


def _wait(params: Any) -> None:
    if any(leaf.is_cuda for leaf in tree.leaves(params)):
        torch.cuda.synchronize()
