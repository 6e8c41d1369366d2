"""What every attention is: a pure `init` / `apply` pair with an explicit state, described by one `Family` record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from fnattn_kernels.contracts import DerivativeUnsupported, KernelUnavailable
from torch import Tensor

from . import tree

__all__ = ["EMPTY", "ApplyFn", "DerivativeUnsupported", "Empty", "Family", "InitFn", "KernelUnavailable", "check", "check_input",
           "config", "peek", "peek_int", "refuse"]


class Empty(NamedTuple):
    """Nothing here: a tree without leaves. Stands where a parameter or a state does not exist."""


EMPTY = Empty()


def config(cls: type) -> type:
    """Makes a class a Config: a frozen, keyword-only dataclass that is a tree node without leaves.

    It can therefore travel inside params, be compared, hashed, printed in errors and guarded by torch.compile.
    """
    return tree.static(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


class InitFn(Protocol):
    """init(params_key, cfg, *, dtype, device) -> params: parameters drawn by name from the key."""

    def __call__(self, params_key: Tensor, cfg: Any, *, dtype: torch.dtype = torch.float32, device: Any = None) -> Any: ...


class ApplyFn(Protocol):
    """apply(params, x, state, *, mask, context, dropout_key, impl) -> (out, state).

    x: [batch, seq, dim]. state: from init_state or a former call; EMPTY for one pass over a whole sequence. mask: bool
    [batch, keys], True where a key may be attended; it describes context if that is given, else x. context: [batch, keys,
    dim]. Nothing is written to; the state that comes back has the structure, shapes and dtypes of the one that went in.
    """

    def __call__(self, params: Any, x: Tensor, state: Any = EMPTY, *, mask: Tensor | None = None,
                 context: Tensor | None = None, dropout_key: Tensor | None = None,
                 impl: str = "auto") -> tuple[Tensor, Any]: ...


class Family(NamedTuple):
    """One kind of attention.

    name:       how users call it.
    config:     its Config class; the type of a config names its family.
    init, init_state, apply: the functions described above.
    streams:    whether apply accepts a state, so that a sequence can be cut anywhere.
    masks:      whether apply accepts mask.
    contexts:   whether apply accepts context (cross attention).
    source:     the paper and code that it follows.
    examples:   small configs on which every law is tested.
    combine:    combine(state_a, state_b) -> state of both segments one after the other, or None. state_b must have been
                grown from resume(state_a).
    resume:     resume(state) -> a state that stands at the same position and has seen nothing; with combine.
    step:       one new position in a single call, where nothing watches, or None; see `attentions/_step.py`.
    """

    name: str
    config: type
    init: InitFn
    init_state: Callable
    apply: ApplyFn
    streams: bool
    masks: bool
    contexts: bool
    source: str
    examples: tuple
    combine: Callable | None = None
    resume: Callable | None = None
    step: Callable | None = None


def check(ok: bool, message: str, *values: Any, remedy: str = "", error: type[Exception] = ValueError) -> None:
    """Raises error(message) unless ok. `{}` in the message are filled with values; the remedy follows on its own line."""
    if not ok:
        raise error(message.format(*values) + (f"\n  {remedy.format(*values)}" if remedy else ""))


def check_input(who: str, x: Tensor, dim: int, **others: Tensor | None) -> None:
    """x must be a floating [batch, seq, dim] tensor; others may be None or [batch, keys, dim] with x's batch."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{who}: x must be a tensor; got {type(x).__name__}.\n  Convert it: torch.as_tensor(x).")
    check(x.ndim == 3 and x.shape[-1] == dim, "{}: x must be [batch, seq, {}] (cfg.dim={}); got {}.", who, dim, dim, list(x.shape),
          remedy="A single sequence needs a batch axis: x[None]." if x.ndim == 2 else "Give x a last axis of cfg.dim.")
    if not x.is_floating_point():
        raise TypeError(f"{who}: x must be floating point; got {x.dtype}.\n  Embed tokens first, or cast: x.float().")
    context = others.get("context")
    if context is not None:
        check(context.ndim == 3 and context.shape[-1] == dim and context.shape[0] == x.shape[0],
              "{}: context must be [{}, keys, {}] (batch of x, cfg.dim); got {}.", who, x.shape[0], dim, list(context.shape),
              remedy="Project the context to cfg.dim first.")
    mask = others.get("mask")
    if mask is not None:
        keys = x.shape[1] if context is None else context.shape[1]
        if mask.dtype != torch.bool:
            raise TypeError(f"{who}: mask must be bool, True = may be attended; got {mask.dtype}.\n  Cast it: mask.bool().")
        check(tuple(mask.shape) == (x.shape[0], keys), "{}: mask must be [batch, keys] = [{}, {}], describing {}; got {}.",
              who, x.shape[0], keys, "x" if context is None else "context", list(mask.shape),
              remedy="Give one bool for each position of this call; a state remembers the earlier ones.")


def refuse(who: str, reason: str, remedy: str, **given: Any) -> None:
    """Raises ValueError if any of the given keyword values is there (neither None nor EMPTY)."""
    for keyword, value in given.items():
        if value is not None and not isinstance(value, Empty):
            raise ValueError(f"{who}: cannot take {keyword}. {reason}\n  {remedy}")


def peek(t: Tensor) -> Tensor | None:
    """The tensor's values where Python may look at them, without gradient or tangent; None where they are mapped or traced."""
    # Inside make_fx, FakeTensorMode and functionalisation even a plain tensor stands for others.
    modes = torch._C._TorchDispatchModeKey
    if torch.compiler.is_compiling() or any(torch._C._get_dispatch_mode(m) for m in (modes.PROXY, modes.FAKE, modes.FUNCTIONAL)):
        return None
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t) or functorch.is_functionaltensor(t):
            return None
        t = functorch.get_unwrapped(t)
    return t.detach() if type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta" else None


def peek_int(t: Tensor) -> int | None:
    """The value of a 0-d integer tensor where Python may look at it, None where it is mapped or traced, or on a device."""
    value = peek(t) if t.device.type == "cpu" else None
    return None if value is None else int(value)
