"""What a row of the benchmark is: two ways to compute the same thing, and how much work that is at the least."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import random, tree


class Work(NamedTuple):
    """Counted by hand from the algorithm: multiply and add are one flop each; bytes are those of inputs and results, once."""

    flops: float = 0.0
    exps: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> Work:
        """So much work `count` times."""
        return Work(*(a * count for a in self))


class Contest(NamedTuple):
    """One case at one size.

    args:    trees of tensors.
    ours:    ours(*args, impl=...) -> Tensor; impl="reference" in float64 is the truth.
    theirs:  makes the other side, called once: -> Opponent; raises upstream.Missing. None: there is no other side.
    forward, both: the least work of a forward, and of a forward with gradients. None: not counted.
    truth:   what `ours` must give, if that is not `ours` with impl="reference".
    calls:   how many steps `ours` and the other side take; times and work in the table are those of one.
    packed:  whether args[0] is queries, keys and values side by side, as the modules take them. An operator takes them apart,
             and its memory is measured so: torch puts the gradient of a packed one together in a second copy.
    """

    args: tuple
    ours: Callable[..., Tensor]
    theirs: Callable[[], Opponent] | None = None
    forward: Work | None = None
    both: Work | None = None
    truth: Callable[..., Tensor] | None = None
    calls: int = 1
    packed: bool = False


class Opponent(NamedTuple):
    """The other side: fn(*args) -> Tensor with the same meaning, and parameters of its own, not those in args.

    takes: which of the args it differentiates (those that it uses); None: all.
    """

    fn: Callable[..., Tensor]
    parameters: tuple[Tensor, ...] = ()
    takes: tuple[int, ...] | None = None


class Case(NamedTuple):
    """One row, or two: forward, and forward with gradients.

    name:    for --case.
    kind:    "operator", "layer" or "decode" (a step under no_grad: forward only).
    build:   build(sizes, device) -> Contest.
    sizes:   the sizes of the published table. quick: small ones.
    goal:    least ratio upstream / ours, forward and with gradients; None where there is none.
    peer:    what the other side is.
    check:   sizes of the comparison with float64, where those of the table need too much memory there.
    tolerance: largest error as a part of the largest entry, ours. Theirs may be ten times worse.
    memory:  whether the table says how much memory this takes.
    """

    name: str
    kind: str
    build: Callable[[dict, torch.device], Contest]
    sizes: dict[str, int]
    quick: dict[str, int]
    goal: tuple[float | None, float | None] = (None, None)
    peer: str = ""
    check: dict[str, int] = {}
    tolerance: float = 1e-4
    memory: bool = True

    @property
    def passes(self) -> tuple[str, ...]:
        """What is timed."""
        return ("forward",) if self.kind == "decode" else ("forward", "forward+backward")


def shape_text(sizes: dict[str, int]) -> str:
    """b=2, n=1024 -> "b2 n1024"."""
    return " ".join(f"{name}{size}" for name, size in sizes.items())


def normal(name: str, *shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on their name alone."""
    return random.normal(random.fold_in(random.key(0, device=device), name), shape, dtype)


def cast(args: Any, dtype: torch.dtype) -> Any:
    """The same tree with its floating tensors in dtype, as new leaves."""
    return tree.map(lambda t: t.detach().to(dtype) if tree.is_differentiable(t) else t, args)


def floats(args: Any) -> list[Tensor]:
    """The tensors of a tree that have gradients."""
    return [t for t in tree.leaves(args) if tree.is_differentiable(t)]


class Side:
    """One of the two: a function of nothing, and its gradients with respect to its leaves."""

    def __init__(self, fn: Callable[..., Tensor], args: tuple, parameters: tuple[Tensor, ...] = (),
                 takes: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32):
        self.args = cast(args, dtype)
        self.fn = fn
        used = self.args if takes is None else tuple(self.args[i] for i in takes)
        self.leaves = [*floats(used), *parameters]
        for t in self.leaves:
            t.requires_grad_()
        self.cotangent: Tensor | None = None

    def forward(self) -> Tensor:
        """The result, without a graph."""
        with torch.no_grad():
            return self.fn(*self.args)

    def both(self) -> Tensor:
        """The result; gradients land in leaves. By Tensor.backward, the one way that every upstream package supports."""
        for t in self.leaves:
            t.grad = None
        out = self.fn(*self.args)
        if self.cotangent is None:
            # Dense and contiguous: CausalDotProduct reads the gradient of a plain sum as garbage.
            self.cotangent = weights(out)
        out.backward(self.cotangent)
        return out


def weights(out: Tensor) -> Tensor:
    """A cotangent of uneven numbers, exact in every precision: a constant one cannot see a shift, the result no rotation."""
    at = torch.arange(out.numel(), device=out.device)
    return ((at * 389 % 1021).to(out.dtype) / 512 - 1).reshape(out.shape)


def triangle(n: int) -> float:
    """Pairs (i, j) with j <= i < n."""
    return n * (n + 1) / 2


def bytes_of(*shapes: tuple[int, ...]) -> float:
    """Bytes of float32 tensors."""
    return 4.0 * sum(math.prod(shape) for shape in shapes)
