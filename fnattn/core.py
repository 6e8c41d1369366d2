"""What every attention is: a pure `init` / `apply` pair with an explicit state, described by one `Family` record."""

from __future__ import annotations

import dataclasses
import numbers
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from fnattn_kernels.contracts import DerivativeUnsupported, KernelUnavailable
from torch import Tensor

from . import tree

__all__ = ["EMPTY", "ApplyFn", "DerivativeUnsupported", "Empty", "Family", "InitFn", "KernelUnavailable", "check",
           "check_floating", "check_ids", "check_init", "check_input", "check_int", "check_sizes", "config", "config_of",
           "kind_of", "peek", "peek_int", "peek_most", "refuse"]


class Empty(NamedTuple):
    """Nothing here: a tree without leaves. Stands where a parameter or a state does not exist."""


EMPTY = Empty()


def config(cls: type) -> type:
    """Makes a class a Config: a frozen, keyword-only dataclass that is a tree node without leaves.

    It can therefore travel inside params, be compared, hashed, printed in errors and guarded by torch.compile.
    """
    own = getattr(cls, "__post_init__", None)
    typed: list[tuple[str, type, bool]] = []

    def checked(self) -> None:
        _check_fields(self, typed)
        if own is not None:
            own(self)

    cls.__post_init__ = checked
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    typed += _typed_fields(made)
    return tree.static(made)


def _check_fields(cfg: Any, typed: list[tuple[str, type, bool]]) -> None:
    """Fields that are numbers or switches must be such: a word for a switch would be true, and for a number fail much later."""
    for name, kind, optional in typed:
        value = getattr(cfg, name)
        if type(value) is kind or optional and value is None:
            continue
        is_bool = isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # Python's and numpy's
        if kind is bool and not is_bool:
            raise TypeError(f"{kind_of(cfg)}: {name} must be a bool; got {value!r} of type {kind_of(value)}.\n  Use True or False.")
        if kind is float and (is_bool or not isinstance(value, (int, float)) and not isinstance(value, numbers.Real)):
            raise TypeError(f"{kind_of(cfg)}: {name} must be a number; got {value!r} of type {kind_of(value)}.\n"
                            f"  Give a Python number; a config holds no tensors.")


def _typed_fields(cls: type) -> list[tuple[str, type, bool]]:
    """(name, bool or float, whether None will do) of the fields that are annotated so."""
    found = []
    for field in dataclasses.fields(cls):
        kinds = {kind.strip() for kind in str(getattr(field.type, "__name__", field.type)).split("|")}
        for word, kind in (("bool", bool), ("float", float)):
            if kinds - {"None"} == {word}:
                found.append((field.name, kind, "None" in kinds))
    return found


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
    resume:     resume(state, last=None, skipped=0) -> a state that has seen nothing: the start of a segment that `combine` joins to
                what came before. It stands at the position of `state`; or, given last [batch, 1, dim], `skipped` positions later,
                after the token `last`. With combine.
    absorb:     absorb(params, x, state, mask=, impl=) -> what apply gives as the state after x, without the outputs, or None where that
                is no less work.
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
    absorb: Callable | None = None


def check(ok: bool, message: str, *values: Any, remedy: str = "", error: type[Exception] = ValueError) -> None:
    """Raises error(message) unless ok. `{}` in the message are filled with values; the remedy follows on its own line."""
    if not ok:
        raise error(message.format(*values) + (f"\n  {remedy.format(*values)}" if remedy else ""))


def kind_of(value: Any) -> str:
    """The type of a value for a message. Of a NamedTuple or Config, given or as a class, with its module, since many have one name."""
    kind = value if isinstance(value, type) else type(value)
    own = hasattr(kind, "_fields") or dataclasses.is_dataclass(kind)
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" if own else kind.__name__


def check_sizes(who: str, least: int, remedy: str = "Give a positive size.", /, **sizes: Any) -> None:
    """Each size must be a whole number, no bool, and at least `least`."""
    for name, size in sizes.items():
        check_int(who, name, size)
        check(size >= least, "{}: {} must be at least {}; got {}.", who, name, least, size, remedy=remedy)


def check_int(who: str, name: str, value: Any) -> None:
    """A value must be a whole number and no bool; sizes that are symbols are such."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) and not _is_index(value):
        example = f", for example {name}={int(value)}" if isinstance(value, float) and value.is_integer() else ""
        raise TypeError(f"{who}: {name} must be an int; got {value!r} of type {kind_of(value)}.\n  Give a whole number{example}.")


def _is_index(size: Any) -> bool:
    """Whether Python takes this for a whole number, as it does numpy's."""
    try:
        return operator.index(size) is not None
    except TypeError:
        return False


def check_init(who: str, cfg: Any, kind: type, dtype: torch.dtype) -> None:
    """What `init` takes: the family's own Config, and a floating dtype."""
    if not isinstance(cfg, kind):
        raise TypeError(f"{who}: cfg must be {kind_of(kind)}; got {kind_of(cfg)}.\n"
                        f"  Make one with {kind_of(kind)}(...).")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{who}: dtype must be floating point; got {dtype}.\n  Use dtype=torch.float32.")


def config_of(who: str, params: Any, kind: type) -> Any:
    """The config in params, which must be of this kind."""
    if not isinstance(params, kind):
        family = who.partition(".")[0]
        raise TypeError(f"{who}: params must come from {family}.init; got {kind_of(params)}.\n"
                        f"  Draw them from a key and a config: params = {family}.init(fnattn.random.key(0), cfg).")
    return params.cfg


def check_input(who: str, x: Tensor, dim: int, *, like: Tensor | None = None, **others: Tensor | None) -> None:
    """x must be a floating [batch, seq, dim] tensor in the dtype of the weight `like`; others may be None.

    others: context [batch, keys, dim] with x's batch, likewise; mask, bool [batch, keys] of context if there is one, else of x.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{who}: x must be a tensor; got {kind_of(x)}.\n  Convert it: torch.as_tensor(x).")
    check(x.ndim == 3 and x.shape[-1] == dim, "{}: x must be [batch, seq, {}] (cfg.dim={}); got {}.", who, dim, dim, list(x.shape),
          remedy="A single sequence needs a batch axis: x[None]." if x.ndim == 2 else "Give x a last axis of cfg.dim.")
    check_floating(who, "x", x, like, "Embed tokens first, or cast: x.float().")
    context = others.get("context")
    if context is not None:
        if not isinstance(context, Tensor):
            raise TypeError(f"{who}: context must be a tensor; got {kind_of(context)}.\n  Convert it: torch.as_tensor(context).")
        check(context.ndim == 3 and context.shape[-1] == dim and context.shape[0] == x.shape[0],
              "{}: context must be [{}, keys, {}] (batch of x, cfg.dim); got {}.", who, x.shape[0], dim, list(context.shape),
              remedy="Project the context to cfg.dim first.")
        check_floating(who, "context", context, like, "Embed tokens first, or cast: context.float().")
    mask = others.get("mask")
    if mask is not None:
        keys = x.shape[1] if context is None else context.shape[1]
        _check_bool(who, mask)
        check(tuple(mask.shape) == (x.shape[0], keys), "{}: mask must be [batch, keys] = [{}, {}], describing {}; got {}.",
              who, x.shape[0], keys, "x" if context is None else "context", list(mask.shape),
              remedy="Give one bool for each position of this call; a state remembers the earlier ones.")


def check_floating(who: str, name: str, t: Tensor, like: Tensor | None, remedy: str) -> None:
    """t must be floating, and in the dtype of the weight `like`, or one that autocast brings it to."""
    if not t.is_floating_point():
        raise TypeError(f"{who}: {name} must be floating point; got {t.dtype}.\n  {remedy}")
    if like is None:
        return
    if like.is_meta != t.is_meta:  # torch would give empty memory for some of these
        raise ValueError(f"{who}: {name} and the params must be on one device; got {t.device} and {like.device}.\n"
                         f"  The meta device holds no numbers: draw or load the params on {name}'s device.")
    if like.ndim == 3:
        raise ValueError(f"{who}: the params must be those of one model; got {like.shape[0]} stacked ones.\n"
                         f"  Map over them: tree.vmap(lambda params: apply(params, x))(stacked).")
    if t.dtype == like.dtype:
        return
    if not like.is_floating_point():
        raise TypeError(f"{who}: the params must be floating point; got {like.dtype}.\n  Draw them with init(key, cfg, dtype={t.dtype}).")
    if _cast_by_torch(t.dtype, like):
        return
    raise TypeError(f"{who}: {name} must be {like.dtype}, as the params are; got {t.dtype}.\n  Convert it: {name}.to({like.dtype}); or the "
                    f"params: tree.map(lambda t: t.to({t.dtype}) if t.is_floating_point() else t, params).")


def _cast_by_torch(dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether autocast brings a tensor of this dtype and a weight into one: all but float64, which it leaves alone."""
    return torch.is_autocast_enabled("cuda" if weight.is_cuda else "cpu") and torch.float64 not in (dtype, weight.dtype)


def _check_bool(who: str, mask: Any) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{who}: mask must be a bool tensor, True = may be attended; got {kind_of(mask)}.\n"
                        f"  Convert it: torch.as_tensor(mask).")
    if mask.dtype != torch.bool:
        raise TypeError(f"{who}: mask must be bool, True = may be attended; got {mask.dtype}.\n  Cast it: mask.bool().")


def check_ids(who: str, ids: Any, count: int | None = None, *, name: str = "ids", mask: Any = None) -> None:
    """Token numbers must be an int64 (or int32) tensor [batch, seq], with a mask of the same shape if any.

    count: how many tokens there are; that each lies below is looked at where Python may look at no cost: on the CPU.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{who}: {name} must be an int64 tensor of token numbers; got "
                        f"{ids.dtype if isinstance(ids, Tensor) else kind_of(ids)}.\n  Convert it: torch.as_tensor({name}).long().")
    check(ids.ndim == 2, "{}: {} must be [batch, seq]; got {}.", who, name, list(ids.shape),
          remedy=f"A single sequence needs a batch axis: {name}[None].")
    if mask is not None:
        _check_bool(who, mask)
        check(mask.shape == ids.shape, "{}: mask must be [batch, seq] = {}, describing {}; got {}.", who, list(ids.shape), name,
              list(mask.shape), remedy="Give one bool for each token of this call.")
    values = peek(ids) if count is not None and ids.is_cpu else None
    if values is None or not values.numel():
        return
    low, high = (int(end) for end in torch.aminmax(values))
    if low < 0 or high >= count:
        raise ValueError(f"{who}: {name} must lie in [0, {count}); got {low if low < 0 else high}.\n"
                         f"  Build the config with as many tokens as there are, or look for a wrong tokenizer.")


def refuse(who: str, reason: str, remedy: str, **given: Any) -> None:
    """Raises ValueError if any of the given keyword values is there (neither None nor EMPTY). No state is EMPTY, not None: TypeError."""
    for keyword, value in given.items():
        if keyword == "state" and value is None:
            raise TypeError(f"{who}: state must be EMPTY where there is none; got None.\n  Leave it out, or pass fnattn.EMPTY.")
        if value is not None and not isinstance(value, Empty):
            raise ValueError(f"{who}: cannot take {keyword}. {reason}\n  {remedy}")


def peek(t: Tensor, *, mapped: bool = False) -> Tensor | None:
    """The tensor's values where Python may look at them, without gradient or tangent; None where they are traced or, unless
    `mapped`, mapped: then those of all members at once.
    """
    # Inside make_fx, FakeTensorMode and functionalisation even a plain tensor stands for others.
    modes = torch._C._TorchDispatchModeKey
    if torch.compiler.is_compiling() or any(torch._C._get_dispatch_mode(m) for m in (modes.PROXY, modes.FAKE, modes.FUNCTIONAL)):
        return None
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t) and not mapped or functorch.is_functionaltensor(t):
            return None
        t = functorch.get_unwrapped(t)
    return t.detach() if type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta" else None


def peek_int(t: Tensor) -> int | None:
    """The value of a 0-d integer tensor where Python may look at it, None where it is mapped or traced, or on a device."""
    value = peek(t) if t.device.type == "cpu" else None
    return None if value is None else int(value)


def peek_most(t: Tensor) -> int | None:
    """The largest value of an integer tensor, over all members where it is mapped; None where it is traced, or on a device."""
    value = peek(t, mapped=True) if t.device.type == "cpu" else None
    return None if value is None or not value.numel() else int(value.max())
