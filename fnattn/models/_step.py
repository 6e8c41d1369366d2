"""One new token of a few sequences through a whole language model in a single call; see `attentions/_step.py`."""

from __future__ import annotations

from typing import Any

import torch
from fnattn_kernels.native.steps import Steps
from fnattn_kernels.native.steps_rows import Row, fits
from torch import Tensor

from .. import attentions
from ..attentions._step import in_one_call
from ..core import Empty
from .block import Block, Gelu, LayerNorm, RmsNorm


def model(params: Any, ids: Tensor, state: Any) -> tuple[Tensor, tuple] | None:
    """Logits [b, 1, num_tokens] of `lm.apply` for ids [b, 1], and the blocks' states; None where that cannot be."""
    cfg = params.cfg
    pos, before = state
    if cfg.seq_len or not isinstance(cfg.ff, Gelu) or not isinstance(before, tuple) or len(before) != len(params.blocks):
        return None
    if not isinstance(pos, Tensor) or pos.ndim or pos.dtype is not torch.int64:  # which no instruction reads
        return None
    head = params.embed if isinstance(params.to_logits, Empty) else params.to_logits

    def write(steps: Steps) -> tuple[Tensor, tuple]:
        out, row = steps.result(head.shape[0])
        x, after = steps.embed(ids, params.embed), []
        for one, its in zip(params.blocks, before):
            x, new = _block(steps, one, x, its, cfg.post_norm)
            after.append(new)
        steps.linear(_norm(steps, params.norm, x), head, None if isinstance(params.logits_bias, Empty) else params.logits_bias, out=row)
        return out, tuple(after)

    return in_one_call(write, params, ids, before)


def _block(steps: Steps, params: Block, x: Row, state: Any, post_norm: bool) -> tuple[Row, Any]:
    family = attentions.find(params.attn)
    fits(family.step is not None)
    out, state = family.step(steps, params.attn, x if post_norm else _norm(steps, params.attn_norm, x), state)
    x = _norm(steps, params.attn_norm, steps.add(out, x)) if post_norm else steps.add(out, x)
    ff, hidden = params.ff, x if post_norm else _norm(steps, params.ff_norm, x)
    hidden = steps.linear(hidden, ff.w_in, ff.b_in, act=steps.GELU)
    x = steps.linear(hidden, ff.w_out, ff.b_out, add=x)
    return (_norm(steps, params.ff_norm, x) if post_norm else x), state


def _norm(steps: Steps, params: RmsNorm | LayerNorm | Empty, x: Row) -> Row:
    if isinstance(params, RmsNorm):
        return steps.norm(x, params.gamma)
    return steps.layer_norm(x, *params) if isinstance(params, LayerNorm) else x
