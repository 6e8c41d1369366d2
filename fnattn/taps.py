"""Names for intermediate values: read them with `harvest`, replace them with `plant`, without changing the function.

    def f(x):
        h = tap("hidden", x.sin())
        return h.sum()

    out, values = harvest(f)(x)                          # values["hidden"] is x.sin()
    out = plant(f, {"hidden": torch.zeros(3)})(x)        # as if sin had returned zeros

Both are pure function transforms: derivatives flow through harvested and planted values, and they may be mapped and
differentiated like any other function. The gradient with respect to an intermediate value is
grad(lambda h: plant(f, {"hidden": h})(x))(h). A tap that nobody listens to costs one attribute lookup and is invisible
to torch.compile.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch._C._functorch import get_dynamic_layer_stack_depth

from . import tree

__all__ = ["harvest", "in_use", "plant", "scope", "tap"]


class _Listener:
    """A harvest or a plant under way. `scope` and `depth` say where it began: names count from there."""

    def __init__(self, replacements: Mapping[str, Any] | None, only: Collection[str] | None):
        self.replacements = replacements  # None: a harvest
        self.only = only
        self.parent = _HERE.listener
        self.scope = _HERE.scope
        self.depth = _depth()
        self.seen: set[str] = set()
        self.values: dict[str, Any] = {}


class _Here(threading.local):
    # Not a ContextVar: torch.compile can trace this one.
    def __init__(self):
        self.listener: _Listener | None = None
        self.scope = ""


_HERE = _Here()


def tap(name: str, value: Any) -> Any:
    """Gives an intermediate value a name and returns it, or what has been planted in its place.

    Args:
        name: unique within the function, among taps in the same scope.
        value: a tensor or a tree of tensors.
    """
    if _HERE.listener is None:
        return value
    return _visit(name, value)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Puts `name.` in front of the names of all taps inside: with scope("layer0"): tap("q", q) is named "layer0.q"."""
    if _HERE.listener is None:
        yield
        return
    before = _HERE.scope
    _HERE.scope = f"{before}{name}."
    try:
        yield
    finally:
        _HERE.scope = before


def in_use() -> bool:
    """Whether a harvest or plant is under way in this thread. Functions that run their body a second time ask this."""
    return _HERE.listener is not None


def harvest(fn: Callable, only: Collection[str] | None = None) -> Callable:
    """A function that returns what fn returns, and the values that fn taps: (out, {name: value}).

    Inside the function a harvest keeps its values to itself: an outer one does not see them. Hand them on with
    tap("name", values).

    Args:
        only: names to keep; the others are let go, and may be tapped anywhere. Default: all.
    Raises:
        ValueError: a name was tapped twice, a name in `only` was not tapped, or a value was tapped inside a transform
            (grad, vmap, ...) that began inside fn and so means nothing outside it.
    Works under grad, vjp, jvp, vmap, torch.compile and inside one another.
    """
    def wrapped(*args, **kwargs):
        out, listener = _listen(fn, _Listener(None, only), args, kwargs)
        _check_known("harvest", only or (), listener.seen)
        return out, listener.values

    return wrapped


def plant(fn: Callable, replacements: Mapping[str, Any]) -> Callable:
    """fn, with the values of some of its taps replaced.

    Everything after the tap sees the replacement, a surrounding harvest too. Where the old value is not used, nothing
    flows back through what computed it.

    Args:
        replacements: name -> new value, or a function from the old value to the new one. Structure, shapes and dtypes
            must stay. Inside a vmap in fn, a value is the same for all members; a function may use the old value.
    Raises:
        ValueError: fn has no tap of that name (its names are listed), a name was tapped twice, or a replacement has
            another structure, shape or dtype.
    Works under grad, vjp, jvp, vmap, torch.compile and inside one another, also for taps inside transforms in fn. Code
    that recomputes in the backward pass, such as torch.utils.checkpoint, recomputes without the replacement;
    fnattn.tree.remat knows and does not recompute while a plant is under way.
    """
    def wrapped(*args, **kwargs):
        out, listener = _listen(fn, _Listener(replacements, None), args, kwargs)
        _check_known("plant", replacements, listener.seen)
        return out

    return wrapped


def _listen(fn: Callable, listener: _Listener, args: tuple, kwargs: dict) -> tuple[Any, _Listener]:
    _HERE.listener = listener
    try:
        return fn(*args, **kwargs), listener
    finally:
        _HERE.listener = listener.parent


def _visit(name: str, value: Any) -> Any:
    """Lets every plant replace the value, innermost first, then the innermost harvest keep it."""
    full = _HERE.scope + name
    keeper, listener = None, _HERE.listener
    while listener is not None:
        label = full[len(listener.scope):]
        if listener.replacements is not None:
            _note("plant", label, listener)
            if label in listener.replacements:
                value = _replaced(label, value, listener.replacements[label])
        elif keeper is None:
            keeper = listener
        listener = listener.parent
    if keeper is not None:
        label = full[len(keeper.scope):]
        _note("harvest", label, keeper)
        if keeper.only is None or label in keeper.only:
            _check_depth(label, keeper.depth)
            keeper.values[label] = value
    return value


def _replaced(name: str, old: Any, replacement: Any) -> Any:
    new = replacement(old) if callable(replacement) and not isinstance(replacement, Tensor) else replacement
    want, got = _describe(old), _describe(new)
    if tree.structure(new) != tree.structure(old) or want != got:
        raise ValueError(f"taps.plant: the replacement for {name!r} must be {want}; got {got}.\n"
                         f"  Match the value that harvest returns under that name.")
    return new


def _describe(value: Any) -> str:
    parts = [f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in tree.leaves(value)]
    return ", ".join(parts) if isinstance(value, Tensor) else f"{type(value).__name__}({', '.join(parts)})"


def _note(who: str, name: str, listener: _Listener) -> None:
    if name in listener.seen:
        raise ValueError(f"taps.{who}: every name must be tapped once; got {name!r} twice.\n"
                         f'  Tell them apart: with fnattn.taps.scope("layer0"): ...')
    listener.seen.add(name)


def _check_known(who: str, wanted: Collection[str], seen: Collection[str]) -> None:
    unknown = [name for name in wanted if name not in seen]
    if unknown:
        raise ValueError(f"taps.{who}: expected names that the function taps; got {unknown}.\n"
                         f"  Its names are {sorted(seen)}.")


def _check_depth(name: str, began: int) -> None:
    if _depth() != began:
        raise ValueError(f"taps.harvest: values must not come from a transform (grad, vmap, ...) that begins inside "
                         f"the harvested function; got {name!r}, which means nothing outside it.\n"
                         f"  Harvest inside it, as in torch.vmap(harvest(fn)), or leave it out with only=...")


def _depth() -> int:
    """How many transforms of torch.func are under way."""
    return get_dynamic_layer_stack_depth()


# While a tracer follows a transform the depth is as it would be in eager mode.
_depth._dynamo_marked_constant = True
