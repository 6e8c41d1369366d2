"""bfloat16 against float32 with the same kernel: what converting rows at the ends costs, as times as fast as float32."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..ops.report import CASES as OPERATORS
from . import implementations
from .case import Side, cast
from .transforms import Multiple, Transform

NAMES = ("causal_dot", "scan", "taylor", "gate_loop", "simple_gate_loop", "softmax_attention", "conv_attention", "axial_attention",
         "block_sparse_attention", "coor_descent", "coor_descent_attention")
LEAST = 0.7  # times as fast as float32
TOLERANCE = 0.01  # of the largest entry: results in bfloat16 have eight bits


def _speed(name: str, gradient: bool, s: dict, device: torch.device) -> Multiple:
    fn = implementations.function(name, "auto", s)
    args = implementations.inputs(OPERATORS[name], s, str(device), torch.float32)
    low, wide = Side(fn, args, dtype=torch.bfloat16), Side(fn, args)

    def check() -> tuple[list[Tensor], list[Tensor]]:
        plain = Side(implementations.function(name, "reference", s), cast(args, torch.bfloat16), dtype=torch.float64)
        return _results(low, gradient), _results(plain, gradient)

    run = Side.both if gradient else Side.forward
    return Multiple(partial(run, wide), partial(run, low), check)


def _results(side: Side, gradient: bool) -> list[Tensor]:
    """The value, and the gradient of every leaf."""
    return [side.both().detach(), *(t.grad for t in side.leaves if t.grad is not None)] if gradient else [side.forward()]


CASES: dict[str, Transform] = {case.name: case for case in (
    Transform(f"bfloat16 {name}{', gradient' if gradient else ''}", partial(_speed, name, gradient),
              {"b": 1, "h": 4, "n": 1024, "d": 64}, {"b": 1, "h": 2, "n": 64, "d": 16}, LEAST, "float32", more=True, tolerance=TOLERANCE)
    for name in NAMES for gradient in (False, True))}
