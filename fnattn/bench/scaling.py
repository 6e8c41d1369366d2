"""Cost per token against the length: flat where the mathematics is linear.

A pixel of axial attention sees a line of the picture, which is longer in a larger picture: there the cost per key of a token is flat.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from .. import ops
from . import work
from .case import Side, normal

TEXT = 257


class Scaling(NamedTuple):
    """build(n, device) -> (side, tokens): lengths are rounded to what the case allows.

    pairs: tokens -> (query, key) pairs, where keys per token grow with the length; the growth is then that of the cost per key.
    """

    name: str
    build: Callable[[int, torch.device], tuple[Side, int]]
    pairs: Callable[[int], float] | None = None


def _taylor(n: int, device: torch.device) -> tuple[Side, int]:
    args = tuple(normal(name, 1, 2, n, 16, device=device) for name in ("q", "k", "v"))
    return Side(lambda q, k, v: ops.taylor(q, k, v)[0], args), n


def _gate_loop(d: int, h: int, n: int, device: torch.device) -> tuple[Side, int]:
    args = tuple(normal(name, 1, n, h, w, device=device).transpose(1, 2) for name, w in (("q", d), ("k", d), ("v", d), ("a", 2)))
    return Side(lambda *args: ops.gate_loop(*args)[0], args), n


def _picture(operator: Callable, n: int, device: torch.device) -> tuple[Side, int]:
    """A text and the largest square picture that n holds."""
    side = int((n - TEXT) ** 0.5)
    length = TEXT + side * side
    args = tuple(normal(name, 1, 1, length, 64, device=device) for name in ("q", "k", "v"))
    return Side(partial(operator, text_len=TEXT, image_size=side), args), length


CASES: dict[str, Scaling] = {case.name: case for case in (
    Scaling("scaling taylor", _taylor),
    Scaling("scaling gate_loop d64", partial(_gate_loop, 64, 1)),
    Scaling("scaling gate_loop d1", partial(_gate_loop, 1, 64)),
    Scaling("scaling conv", partial(_picture, ops.conv_attention)),
    Scaling("scaling axial", partial(_picture, ops.axial_attention), lambda n: work.axial_pairs(TEXT, round((n - TEXT) ** 0.5))),
)}
LENGTHS = tuple(1024 * 2 ** i for i in range(8))
QUICK = (512, 1024)
FLAT = 1.5  # growth, a cost over a smaller one at a shorter length, beyond which the table says that it is not flat
