"""Axial sparse attention over a text and a picture: a pixel sees the text and its row, or its column, up to itself.

    pixel (row, col) attends to all text and to   axis 0: (row, col'), col' <= col   axis 1: (row', col), row' <= row

Source: SparseAxialCausalAttention of dalle-pytorch 1.6.6; Ho et al. 2019, arXiv 1912.12180.
Different here: a state that costs text and line per token, in chunks of any length; the mask may hide any key from any
query (`compat_mask` for upstream's, which hides text from pixels only). `stable` changes nothing: softmax runs in
float32 or wider with its maximum subtracted.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import ops
from ..core import EMPTY, Empty, Family, check, check_init, check_sizes, config
from . import _picture, _step
from ._picture import Params, Pattern, State

# b batch, n positions, text_len = seq_len + 1 - image_size^2


@config
class Config:
    """Options of axial sparse attention.

    dim:         width of x.
    seq_len:     text tokens and pixels, not counting the token that starts the text: a sequence has up to seq_len + 1
                 positions, of which the first text_len = seq_len + 1 - image_size^2 are text.
    image_size:  side of the picture.
    axis:        0: a pixel sees its row; 1: its column.
    heads, dim_head: number of heads, width of one head.
    dropout:     chance of zeroing an entry of the result, when a dropout_key is passed.
    stable:      upstream's rescaled softmax for float16; the same function, and always safe here.
    compat_mask: mask as upstream: pixels do not see masked text; text ignores the mask, and pixels are always visible.
    """

    dim: int
    seq_len: int
    image_size: int = 32
    axis: int = 0
    heads: int = 8
    dim_head: int = 64
    dropout: float = 0.0
    stable: bool = False
    compat_mask: bool = False

    def __post_init__(self):
        _picture.check_config("sparse_axial", self)
        check_sizes("sparse_axial.Config", 0, axis=self.axis)
        check(self.axis in (0, 1), "sparse_axial.Config: axis must be 0 (along a row) or 1 (along a column); got {}.",
              self.axis, remedy="Use sparse_conv for a window of both.")


def _same_row(row, column, key_row, key_column):
    return (row == key_row) & (key_column <= column)


def _same_column(row, column, key_row, key_column):
    return (column == key_column) & (key_row <= row)


def _pattern(cfg: Config) -> Pattern:
    operator = functools.partial(ops.axial_attention, text_len=_picture.text_len(cfg), image_size=cfg.image_size,
                                 axis=cfg.axis)
    sees = _same_column if cfg.axis else _same_row
    return Pattern("sparse_axial", cfg.image_size - 1, bool(cfg.axis), sees, operator)


def init(params_key: Tensor, cfg: Config, *, dtype: torch.dtype = torch.float32, device: object = None) -> Params:
    """Parameters of cfg, drawn by name from params_key: uniform in +-1/sqrt(fan in)."""
    check_init("sparse_axial.init", cfg, Config, dtype)
    return _picture.init(params_key, cfg, dtype=dtype, device=device)


def init_state(params: Params, batch: int, *, capacity: int) -> State:
    """The state before the first position: text and the current row, or text and all columns, whatever the capacity."""
    return _picture.init_state(_pattern(_picture.own("sparse_axial.init_state", params, Config)), params, batch, capacity)


def apply(params: Params, x: Tensor, state: State | Empty = EMPTY, *, mask: Tensor | None = None,
          context: Tensor | None = None, dropout_key: Tensor | None = None,
          impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """Attends to the text and to a line of the picture. Time per position is that of text_len + image_size keys.

    Args:
        params: from `init`.
        x: [b, n, dim], n up to cfg.seq_len + 1.
        state: from `init_state` or a former call: x continues that sequence, in a chunk of any length.
        mask: bool [b, n]; False keys are not there; a state remembers it. See cfg.compat_mask.
        context: refused.
        dropout_key: drops entries of the result if cfg.dropout > 0.
        impl: passed to `ops.axial_attention`.
    Returns:
        out [b, n, dim] in x's dtype, 0 where no key is visible; the state after x, or EMPTY.
    Raises:
        ValueError: shapes, more positions than cfg allows, a keyword that cannot be honoured.
    """
    return attend(params, x, state, mask=mask, context=context, dropout_key=dropout_key, impl=impl)


def attend(params: Params, x: Tensor, state: State | Empty = EMPTY, *, angles: Tensor | None = None,
           mask: Tensor | None = None, context: Tensor | None = None, dropout_key: Tensor | None = None,
           impl: str = "auto") -> tuple[Tensor, State | Empty]:
    """`apply` with a table of rotary angles [positions, f] that turns queries, keys and values, as DALLE does."""
    pattern = _pattern(_picture.own("sparse_axial.apply", params, Config))
    return _picture.attend(pattern, params, x, state, angles=angles, mask=mask, context=context, dropout_key=dropout_key, impl=impl)


def step(steps: _step.Steps, params: Params, x: _step.Row, state: State, out: _step.Row | None = None) -> tuple[_step.Row, State]:
    """What `apply` does for one pixel of few sequences, as instructions."""
    return _picture.step(_pattern(params.cfg), steps, params, x, state, out)


FAMILY = Family(
    name="sparse_axial", config=Config, init=init, init_state=init_state, apply=apply, streams=True, masks=True,
    contexts=False, source="dalle-pytorch 1.6.6, SparseAxialCausalAttention; arXiv 1912.12180",
    examples=(
        Config(dim=7, seq_len=18, image_size=4, heads=2, dim_head=5),
        Config(dim=7, seq_len=18, image_size=4, axis=1, heads=2, dim_head=5, dropout=0.25),
        Config(dim=5, seq_len=13, image_size=3, axis=1, heads=1, dim_head=3),
    ),
    step=step)
