"""Triton's language in torch operations: kernels run as the Python that they are, and every load and store is checked.

Thirty times as fast as Triton's own interpreter, so that all of testing.CHECKS can run on what is built around a kernel: rules of
derivatives, batching, tracing. What Triton makes of the same source is tested in its interpreter and by its compiler.

An address that lies outside the memory of its tensor raises. Integers are 32 bits wide where Triton's are, and wrap: with arguments
on the meta device, which hold no numbers and take no memory, addresses past 2^31 elements are checked as well (`corners`).
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAME = "fnattn_kernels.triton.lang"
GRID = (2 ** 31 - 1, 65535, 65535)  # what CUDA allows
NOT_CODE = ("num_warps", "num_stages")
_place: list[tuple[tuple[int, ...], tuple[int, ...]]] = []  # (program, grid) of the program that runs
_corners = False


class Pointer(NamedTuple):
    """Addresses: elements `at` of a tensor's memory."""

    memory: Tensor
    at: Any

    def __add__(self, steps: Any) -> Pointer:
        return Pointer(self.memory, self.at + steps)

    def __sub__(self, steps: Any) -> Pointer:
        return Pointer(self.memory, self.at - steps)


class Kernel:
    """A function of the language: called, it is part of another; kernel[grid](...) runs a program for each place of the grid."""

    def __init__(self, fn: Callable):
        self.fn, self.arg_names = _rebinding(fn), list(inspect.signature(fn).parameters)

    def __call__(self, *args, **kwargs):
        return self.fn(*args, **kwargs)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*args, **constants):
            if any(not 0 < size <= most for size, most in zip(grid, GRID)):
                raise ValueError(f"a grid of {grid}: CUDA allows {GRID}")
            given = [_given(a) for a in args]
            constants = {name: value for name, value in constants.items() if name not in NOT_CODE}
            programs = (tuple(0 for _ in grid), tuple(size - 1 for size in grid)) if _corners else itertools.product(*map(range, grid))
            for program in programs:
                _place.append((program, grid))
                try:
                    self.fn(*given, **constants)
                finally:
                    _place.pop()
        return launch


def _rebinding(fn: Callable) -> Callable:
    """fn with `x += y` read as `x = x + y`: in Triton a block never changes, in torch it would, under every name that it has."""
    class Rebind(ast.NodeTransformer):
        def visit_AugAssign(self, node):
            before = ast.Name(node.target.id, ast.Load())
            return ast.Assign([node.target], ast.BinOp(before, node.op, self.visit(node.value)))

    lines, first = inspect.getsourcelines(fn)
    tree = ast.increment_lineno(ast.parse(textwrap.dedent("".join(lines))), first - 1)
    tree.body[0].decorator_list = []
    made: dict[str, Callable] = {}
    exec(compile(ast.fix_missing_locations(Rebind().visit(tree)), fn.__code__.co_filename, "exec"), fn.__globals__, made)
    return made[fn.__name__]


def _given(a: Any) -> Any:
    """An argument as the kernel sees it: a scalar is a block of one, since torch would let any block's dtype win over a scalar's."""
    if isinstance(a, Tensor):
        count = a.untyped_storage().nbytes() // a.element_size()  # a view stands for the memory that it looks into
        return Pointer(a.as_strided((count,), (1,), 0), a.storage_offset())
    if isinstance(a, int) and not isinstance(a, bool):
        return torch.tensor([a], dtype=torch.int32 if abs(a) < 2 ** 31 else torch.int64)
    return a


@contextlib.contextmanager
def corners() -> Iterator[None]:
    """Of each grid only the first and the last program run."""
    global _corners
    _corners = True
    try:
        yield
    finally:
        _corners = False


# ------------------------------------------------------------------------------------------------ the language


def _both(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    a = a if isinstance(a, Tensor) else torch.tensor([a], dtype=b.dtype)
    return a, b if isinstance(b, Tensor) else torch.tensor([b], dtype=a.dtype)


def _addresses(pointer: Pointer, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    at = pointer.at if isinstance(pointer.at, Tensor) else torch.tensor([pointer.at])
    at, mask = torch.broadcast_tensors(at, torch.ones((), dtype=torch.bool) if mask is None else mask)
    wrong = mask & ((at < 0) | (at >= pointer.memory.numel()))
    if wrong.any():
        raise IndexError(f"elements {at[wrong].tolist()[:3]} of {pointer.memory.numel()}")
    return at, mask


def load(pointer: Pointer, mask: Tensor | None = None, other: Any = 0) -> Tensor:
    at, mask = _addresses(pointer, mask)
    if pointer.memory.is_meta or not pointer.memory.numel():
        found = torch.zeros(at.shape, dtype=pointer.memory.dtype)
    else:
        found = pointer.memory[at.where(mask, 0).long()]
    return found.where(mask, other)


def store(pointer: Pointer, value: Any, mask: Tensor | None = None) -> None:
    at, mask = _addresses(pointer, mask)
    if not pointer.memory.is_meta:
        value = torch.as_tensor(value).to(pointer.memory.dtype).expand(at.shape)
        pointer.memory[at[mask].long()] = value[mask]


def associative_scan(parts: tuple[Tensor, ...], axis: int, combine: Callable, reverse: bool = False) -> tuple[Tensor, ...]:
    if reverse:
        return tuple(t.flip(axis) for t in associative_scan(tuple(t.flip(axis) for t in parts), axis, combine))
    size, step = parts[0].shape[axis], 1
    while step < size:  # each entry takes in what lies `step` before it: as many as there are bits in the size
        later = combine(*(t.narrow(axis, 0, size - step) for t in parts), *(t.narrow(axis, step, size - step) for t in parts))
        parts, step = tuple(torch.cat((t.narrow(axis, 0, step), new), axis) for t, new in zip(parts, later)), 2 * step
    return parts


def _reduced(x: Tensor) -> Tensor:
    return x.view(1) if x.ndim == 0 else x


def cumsum(x: Tensor, axis: int, reverse: bool = False) -> Tensor:
    return x.flip(axis).cumsum(axis).flip(axis) if reverse else x.cumsum(axis)


tl = types.SimpleNamespace(
    constexpr=object, int32=torch.int32, int64=torch.int64, float32=torch.float32, float64=torch.float64,
    program_id=lambda axis: torch.tensor([_place[-1][0][axis]], dtype=torch.int32),
    num_programs=lambda axis: torch.tensor([_place[-1][1][axis]], dtype=torch.int32),
    arange=lambda first, last: torch.arange(first, last, dtype=torch.int32),
    zeros=lambda shape, dtype: torch.zeros(shape, dtype=dtype), full=lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
    load=load, store=store, exp=torch.exp, log=torch.log, sqrt=torch.sqrt, abs=torch.abs, trans=lambda x: x.mT,
    where=torch.where, maximum=lambda a, b: torch.maximum(*_both(a, b)), minimum=lambda a, b: torch.minimum(*_both(a, b)),
    sum=lambda x, axis: _reduced(x.sum(axis, dtype=x.dtype)), max=lambda x, axis: _reduced(x.amax(axis)), cumsum=cumsum,
    dot=lambda a, b, input_precision, out_dtype: a.to(out_dtype) @ b.to(out_dtype), associative_scan=associative_scan,
    debug_barrier=lambda: None)


def adopt(module: types.ModuleType, *names: str) -> None:
    """Lets kernels of another package run like ours; each of them is a function of `module`."""
    for name in names:
        fn = getattr(module, name).fn
        setattr(module, name, Kernel(types.FunctionType(fn.__code__, {**fn.__globals__, "tl": tl}, name)))


def install() -> None:
    """Puts this in the place of Triton under our kernels; before their first launch."""
    if any(name.startswith("fnattn_kernels.triton.") and name.endswith(("_device", ".lang")) for name in sys.modules):
        if not hasattr(sys.modules.get(NAME), "corners"):
            raise RuntimeError("torch_triton.install: Triton is in use already")
        return
    lang = types.ModuleType(NAME, __doc__)
    vars(lang).update(PROBLEM=None, INTERPRETED=True, PRECISION="ieee", jit=Kernel, tl=tl, corners=corners,
                      accumulator=lambda dtype: torch.float64 if dtype == torch.float64 else torch.float32)
    sys.modules[NAME] = lang
