"""Whether a side computes what it should, in value and gradients, against float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Contest, Opponent, Side, cast, floats, weights

THEIRS = 10.0  # how much worse than ours upstream may be: several sum in ways that lose a digit


def truth(contest: Contest, gradients: bool) -> list[Tensor]:
    """The result in float64 by plain torch, and the gradient of every floating argument."""
    args = cast(contest.args, torch.float64)
    wanted = floats(args) if gradients else []
    for t in wanted:
        t.requires_grad_()
    out = (contest.truth or contest.ours)(*args, impl="reference")
    if gradients:
        out.backward(weights(out))
    return [out.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in wanted)]


def found(side: Side, gradients: bool) -> list[Tensor]:
    """The same from one side, in float32."""
    if not gradients:
        return [side.forward()]
    out = side.both().detach()
    return [out, *(torch.zeros_like(t) if t.grad is None else t.grad for t in side.leaves)]


def difference(got: list[Tensor], true: list[Tensor], tolerance: float) -> str | None:
    """Which result is wrong and by how much; None if all are within tolerance times the largest true entry."""
    for i, (a, b) in enumerate(zip(got, true, strict=True)):
        what = "the value" if i == 0 else f"gradient {i}"
        if a.shape != b.shape:
            return f"{what} is {list(a.shape)}, not {list(b.shape)}"
        largest = float(b.abs().max()) if b.numel() else 0.0
        error = float((a.double() - b).abs().max()) if b.numel() else 0.0
        if not error <= tolerance * largest + 1e-30:  # so written, NaN is wrong
            return f"{what} is off by {error:.1e}, largest entry {largest:.1e}"
    return None


def wrong(contest: Contest, gradients: bool, tolerance: float, opponent: Opponent | None) -> tuple[str | None, str | None]:
    """What is wrong with ours, and with the opponent."""
    true = truth(contest, gradients)
    ours = difference(found(Side(contest.ours, contest.args), gradients), true, tolerance)
    if opponent is None:
        return ours, None
    # Its parameters are in another order, so of the gradients only those of the shared arguments are compared.
    side = Side(opponent.fn, contest.args, (), opponent.takes)
    shared = true
    if gradients and opponent.takes is not None:
        counts = [len(floats(a)) for a in contest.args]
        starts = [1 + sum(counts[:i]) for i in range(len(counts))]
        shared = [true[0], *(t for i in opponent.takes for t in true[starts[i]:starts[i] + counts[i]])]
    return ours, difference(found(side, gradients), shared, THEIRS * tolerance)
