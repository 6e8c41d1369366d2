"""Softmax attention over a text followed by a picture in raster order, where a pixel sees the text and a few lines.

What `conv_attention` and `axial_attention` share. The picture is cut into lines (its rows, or its columns); a pixel
sees pixels of its own line and of lines a fixed number of lines before, those that a table of the line's places allows.
One matrix product per such line: no copies of keys per pixel, and no [n, n] table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import check_sizes
from .softmax import KERNELS, softmax_attention, weights

# b batch, h query heads, g key heads, r = h / g, n positions, t text positions, d width of q and k, e width of v
# S image_size, a lines, y place of a query in its line, x place of a key in its line
BAND = 256  # pixels that the fused kernel is given at once
TABLE = 1 << 20  # scores held at once: blocks that stay in the cache are as fast as larger ones, and small


def check_picture(who: str, n: int, text_len: int, image_size: int) -> None:
    """text_len >= 0, image_size >= 1, and n positions fit text and picture."""
    check_sizes(who, 0, "It is the number of positions before the first pixel.", text_len=text_len)
    check_sizes(who, 1, "It is the side of the square picture, in tokens.", image_size=image_size)
    if n > text_len + image_size ** 2:
        raise ValueError(f"{who}: expected at most {text_len + image_size ** 2} positions = text_len {text_len} + "
                         f"image_size^2 {image_size ** 2}; got {n}.\n"
                         f"  Shorten the sequence, or give the sizes that it has.")


def check_mask(who: str, mask: Tensor | None, b: int, n: int) -> None:
    """mask must be None or bool [b, n]."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{who}: mask must be a bool tensor, True = may be attended; got {got}.\n"
                        f"  Cast it: mask.bool().")
    if tuple(mask.shape) != (b, n):
        raise ValueError(f"{who}: mask must be [batch, seq] = [{b}, {n}]; got {list(mask.shape)}.\n"
                         f"  Give one bool for each position.")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, text_len: int, image_size: int, scale: float,
           columns: bool, shifts: Sequence[int], near: Tensor, text_sees_all: bool) -> Tensor:
    """Text attends causally to text; a pixel to all text and to lines `shifts` before its own, at places near[y, x].

    near: bool, [S, S] for rows, [rows, rows] for columns.
    """
    n, t = q.shape[2], min(q.shape[2], text_len)
    seen = None if mask is None or text_sees_all else mask[:, None, None, :t]
    text = softmax_attention(q[:, :, :t], k[:, :, :t], v[:, :, :t], mask=seen, causal=True, offset=0, scale=scale,
                             impl="reference")
    if n == t:
        return text
    image = _image(q[:, :, t:] * scale, (k[:, :, :t], v[:, :, :t]), (k[:, :, t:], v[:, :, t:]),
                   (None, None) if mask is None else (mask[:, :t], mask[:, t:]), image_size, columns, shifts, near)
    return torch.cat((text, image), 2)


def _image(q: Tensor, text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor], masks: tuple, side: int, columns: bool,
           shifts: Sequence[int], near: Tensor) -> Tensor:
    """The picture's queries, [b, h, pixels, e]. q is scaled."""
    b, h, pixels, _ = q.shape
    g = image[0].shape[1]
    q = _lines(q, side, columns).unflatten(1, (g, h // g if g else 0))
    lines, length = q.shape[3:5]
    shifts = [s for s in shifts if s < lines]
    # Lines before the first one are zeros that nobody may see.
    before = max(shifts)
    k, v = (F.pad(_lines(x, side, columns), (0, 0, 0, 0, before, 0)) for x in image)
    real = torch.arange(-before, lines, device=q.device)[None, :, None] >= 0
    text_seen, image_seen = masks
    if image_seen is not None:
        kept = _lines(image_seen[:, None, :, None], side, columns)[:, 0, :, :, 0]
        real = real & F.pad(kept, (0, 0, before, 0))
    width = text[0].shape[2] + len(shifts) * length
    at_once = lines
    # A compiler plans memory itself, and a size compared here would become a condition of the compiled program.
    if not torch.compiler.is_compiling() and b * h * pixels * width > TABLE:
        at_once = max(1, TABLE // (b * h * length * width))
    outs = []
    for start in range(0, lines, at_once):
        stop = min(start + at_once, lines)
        views = [slice(start + before - s, stop + before - s) for s in shifts]
        outs.append(_some_lines(q[:, :, :, start:stop], text, text_seen, [k[:, :, at] for at in views],
                                [v[:, :, at] for at in views], [real[:, at] for at in views], near))
    out = torch.cat(outs, 3).flatten(1, 2)
    return _raster(out, columns, pixels)


def _lines(x: Tensor, side: int, columns: bool) -> Tensor:
    """[b, h, pixels, c] -> [b, h, lines, length, c], the last row filled up with zeros."""
    rows = -(-x.shape[2] // side)
    x = F.pad(x, (0, 0, 0, rows * side - x.shape[2])).unflatten(2, (rows, side))
    return x.transpose(2, 3) if columns else x


def _raster(x: Tensor, columns: bool, pixels: int) -> Tensor:
    """The inverse of `_lines`: [b, h, lines, length, c] -> [b, h, pixels, c]."""
    return (x.transpose(2, 3) if columns else x).flatten(2, 3)[:, :, :pixels]


def _some_lines(q: Tensor, text: tuple[Tensor, Tensor], text_seen: Tensor | None, ks: list[Tensor], vs: list[Tensor],
                reals: list[Tensor], near: Tensor) -> Tensor:
    """Queries [b, g, r, a, y, d] against the text and, for each shift, one line of keys [b, g, a, x, d]."""
    scores = torch.einsum("bgrayd,bgtd->bgrayt", q, text[0])
    if text_seen is not None:
        scores = scores.masked_fill(~text_seen[:, None, None, None, None, :], -torch.inf)
    parts = [scores]
    for k, real in zip(ks, reals):
        allowed = near & real[:, None, None, :, None, :]
        parts.append(torch.einsum("bgrayd,bgaxd->bgrayx", q, k).masked_fill(~allowed, -torch.inf))
    p_text, *p_lines = weights(torch.cat(parts, -1)).split([part.shape[-1] for part in parts], -1)
    out = torch.einsum("bgrayt,bgte->bgraye", p_text, text[1])
    for p, v in zip(p_lines, vs):
        out = out + torch.einsum("bgrayx,bgaxe->bgraye", p, v)
    return out


# ------------------------------------------------------------------------------------------------ fused


def bands_reason(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the fused softmax attention cannot take these tensors; None if it can."""
    return next(kernel for kernel in KERNELS if kernel.name == "native").why_not(q, k, v)


def attend_bands(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, text_len: int, image_size: int, scale: float,
                  columns: bool, shifts: Sequence[int], near: Tensor, text_sees_all: bool) -> Tensor:
    """The same through the fused kernel of `softmax_attention`, one call for each band of lines.

    A band attends to the text and to its own and the reachable earlier lines under a mask, so that it computes some scores
    in vain, but holds no table.
    """
    n, t = q.shape[2], min(q.shape[2], text_len)
    seen = None if mask is None or text_sees_all else mask[:, None, None, :t]
    outs = [softmax_attention(q[:, :, :t], k[:, :, :t], v[:, :, :t], mask=seen, causal=True, offset=0, scale=scale, impl="native")]
    if n == t:
        return outs[0]
    lines_q, lines_k, lines_v = (_lines(x[:, :, t:], image_size, columns) for x in (q, k, v))
    kept = torch.ones_like(q[:, :1, :, :1], dtype=torch.bool) if mask is None else mask[:, None, :, None]
    lines_kept = _lines(kept[:, :, t:], image_size, columns)[..., 0]
    count, length = lines_q.shape[2:4]
    band = max(1, BAND // length)
    bands = []
    for start in range(0, count, band):
        stop, first = min(start + band, count), max(start - max(shifts), 0)
        line = torch.arange(count, device=q.device)
        apart = line[start:stop, None] - line[first:stop]
        allowed = torch.stack([apart == shift for shift in shifts]).any(0)[:, None, :, None] & near[:, None, :]
        allowed = allowed.flatten(2, 3).flatten(0, 1) & lines_kept[:, :, first:stop].flatten(2, 3).unsqueeze(2)
        text_kept = kept[:, :, None, :t, 0].expand(*allowed.shape[:3], t)
        keys, values = (torch.cat((text[:, :, :t], lines[:, :, first:stop].flatten(2, 3)), 2)
                        for text, lines in ((k, lines_k), (v, lines_v)))
        out = softmax_attention(lines_q[:, :, start:stop].flatten(2, 3), keys, values, scale=scale,
                                mask=torch.cat((text_kept, allowed), 3), impl="native")
        bands.append(out.unflatten(2, (stop - start, length)))
    return torch.cat((outs[0], _raster(torch.cat(bands, 2), columns, n - t)), 2)
