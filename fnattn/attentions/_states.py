"""What a state must be, written down once per family: `init_state` makes it, `apply` and a step compare with it.

A layout is a tree of the kind of the state with a `Leaf` in the place of each tensor. A state that another config, batch or family
made often fits into the sums by broadcasting or by cutting, and then the numbers are wrong: so everything is compared, kinds,
names, shapes and dtypes. Nothing but these is read, which works under every transform and while tracing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import Empty, kind_of

WIDER = {torch.float32: (torch.float64,), torch.bfloat16: (torch.float32, torch.float64), torch.float16: (torch.float32, torch.float64)}


class Leaf(NamedTuple):
    """One tensor of a state.

    axes, shape: what the axes are, in words, and their sizes.
    fill: what the tensor holds before the first position.
    free: the axis that may have any size, as this one has for this state, if there is one.
    """

    axes: str
    shape: tuple
    dtype: torch.dtype
    fill: int = 0
    free: int | None = None


POSITION = Leaf("", (), torch.int64)


def wide(weight: Tensor) -> torch.dtype:
    """What sums over the sequence are kept in."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def fresh(layout: Any, like: Tensor) -> Any:
    """The state before the first position, on the device of `like`."""
    if isinstance(layout, Leaf):
        if layout.dtype == torch.int64:  # positions count alike for all members that vmap maps over
            return torch.zeros(layout.shape, dtype=torch.int64, device=like.device)
        return (like.new_ones if layout.fill else like.new_zeros)(layout.shape, dtype=layout.dtype)
    items = [fresh(part, like) for part in layout]
    return type(layout)(*items) if hasattr(layout, "_fields") else tuple(items)


def check(who: str, state: Any, layout: Any, make: str = "init_state(params, batch, capacity=...)") -> None:
    """Raises unless the state is as the layout says. Floating leaves may be wider. make: how the right one is made.

    Raises:
        TypeError: another kind of state, or of leaf. ValueError: other shapes, or leaves that are missing or too many.
    """
    if not isinstance(state, type(layout)):
        raise TypeError(f"{who}.apply: state must come from {who}.init_state; got {kind_of(state)}.\n"
                        f"  Start a sequence with {make}.")
    fault = _fault(state, layout, "")
    if fault is not None:
        error, text = fault
        raise error(f"{who}.apply: the state must have {text}.\n  Make it with {make}.")


def within(x: Tensor, pos: Tensor, most: int) -> Tensor:
    """x [b, n, dim] of the positions from pos on, NaN from position `most` on: where no value can be read, nothing else can say so."""
    beyond = pos + torch.arange(x.shape[1], device=pos.device) >= most
    return torch.where(beyond[:, None], torch.full((), torch.nan, dtype=x.dtype, device=x.device), x)


def fits(state: Any, layout: Any) -> bool:
    """Whether the state is exactly as the layout says, no leaf wider: the same comparison in a fraction of the time, without a reason."""
    if type(state) is not type(layout):
        return False
    for item, want in zip(state, layout):
        if type(want) is Leaf:
            if not isinstance(item, Tensor) or item.shape != want[1] or item.dtype is not want[2]:
                return False
        elif not fits(item, want):
            return False
    return True


def _fault(item: Any, want: Any, path: str) -> tuple[type[Exception], str] | None:
    """What is wrong with a part of a state: the error, and what it must have."""
    if isinstance(want, Leaf):
        return None if isinstance(item, Tensor) and item.shape == want.shape and item.dtype == want.dtype else _leaf_fault(item, want, path)
    if want is Ellipsis:  # the state of a part, which looks at it itself; but EMPTY would be none
        return (ValueError, f"a state; got nothing in {path}") if isinstance(item, Empty) else None
    if not isinstance(item, type(want)):
        if isinstance(want, Empty):
            return ValueError, f"nothing; got {_what(item)} in {path}"
        return (ValueError if isinstance(item, Empty) else TypeError), f"{kind_of(want)}; got {_what(item)} in {path}"
    if len(item) != len(want):
        return ValueError, f"{len(want)} parts; got {len(item)} in {path}"
    for name, a, b in zip(getattr(want, "_fields", range(len(want))), item, want):
        fault = _fault(a, b, f"{path}.{name}" if path else str(name))
        if fault is not None:
            return fault
    return None


def _leaf_fault(item: Any, want: Leaf, path: str) -> tuple[type[Exception], str] | None:
    words = want.axes.split(", ")
    sizes = ", ".join(words[i] if i == want.free else str(size) for i, size in enumerate(want.shape))
    whole = f"[{want.axes}] = [{sizes}]" if want.axes else f"[{sizes}]"
    if not isinstance(item, Tensor):
        return (ValueError if isinstance(item, Empty) else TypeError), f"{whole}; got {_what(item)} in {path}"
    if item.shape != want.shape:
        return ValueError, f"{whole}; got {list(item.shape)} in {path}"
    if item.dtype == want.dtype or item.dtype in WIDER.get(want.dtype, ()):
        return None
    return TypeError, f"{want.dtype}{' or wider' if want.dtype in WIDER else ''}; got {item.dtype} in {path}"


def _what(item: Any) -> str:
    if isinstance(item, Empty):
        return "nothing"
    return f"a tensor {list(item.shape)}" if isinstance(item, Tensor) else kind_of(item)
