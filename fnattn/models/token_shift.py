"""DALLE's token shift: part of each token's channels come from the token before, or above it in the picture.

A text token takes the first half of its channels from the token before it. An image token takes the first quarter from the
token above it and the second from the token to its left; both are zero at the picture's edge. Nothing crosses from text to
image. Positions decide, so a sequence can be cut anywhere: the state is the last `image_size` tokens as they came in.

Source: PreShiftToken of dalle-pytorch 1.6.6. Different here: its cache, filled with tokens that were shifted already, gives
wrong results after a prefill with image tokens; and it leaves sequences shorter than the text unshifted, as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

# b batch, n positions of this call, s image_size


def token_shift(x: Tensor, last: Tensor, pos: Tensor, *, text_len: int, image_size: int) -> tuple[Tensor, Tensor]:
    """Shifts the tokens x that follow position pos.

    Args:
        x: [b, n, dim].
        last: [b, image_size, dim], the tokens before x; zeros where there are none.
        pos: [] int64, how many tokens came before x.
        text_len: number of text tokens, begin-of-sequence included. image_size: width of the picture in tokens.
    Returns:
        x shifted, [b, n, dim]; the new `last`.
    """
    dim, n = x.shape[-1], x.shape[1]
    known = torch.cat((last.to(x.dtype), x), 1)
    before, above = known.narrow(1, image_size - 1, n), known.narrow(1, 0, n)
    at = pos + torch.arange(n, device=x.device)
    cell = at - text_len                                  # place in the picture, row by row
    is_text, channel = (cell < 0)[:, None], torch.arange(dim, device=x.device)
    half, quarter = (dim + 1) // 2, -(-dim // 4)          # as torch.chunk cuts
    take_before = torch.where(is_text, channel < half,
                              (channel >= quarter) & (channel < 2 * quarter) & (cell % image_size != 0)[:, None])
    take_above = ~is_text & (channel < quarter) & (cell >= image_size)[:, None]
    keep = torch.where(is_text, channel >= half, channel >= 2 * quarter)
    zero = torch.zeros_like(x)
    shifted = torch.where(take_before, before, torch.where(take_above, above, torch.where(keep, x, zero)))
    return shifted, known.narrow(1, n, image_size).to(last.dtype)
