"""Triton's interpreter in three quarters of its time; conftest imports this where TRITON_INTERPRET=1.

At every call of a function inside a kernel it looks for the language's functions among all members of its modules, to put its own in
their places. Which names these are does not change: they are looked for once.
"""

from __future__ import annotations

import functools
import inspect
import types

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _names(owner) -> tuple[str, ...]:
    """Of the language's own functions, as long as nothing has been put in their places: when they are first asked for."""
    return tuple(name for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member))


def members(owner) -> list[tuple[str, object]]:
    """What the interpreter takes of `inspect.getmembers`: it passes over members that are not the language's."""
    return [(name, getattr(owner, name)) for name in _names(owner)]


for module in (tl, tl.core, tl.math, tl.tensor, getattr(tl.core, "tensor_descriptor_base", tl.tensor)):
    _names(module)
interpreter.inspect = types.SimpleNamespace(**{**vars(inspect), "getmembers": members})
