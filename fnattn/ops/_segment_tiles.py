"""Static patterns of attention as what the Triton kernels walk: for each tile of one side, what it meets on the other.

Of a picture, positions one by one: made on the CPU once per pattern and length, and kept with each device. Of a layout, its
blocks: made anew in each call by a few operations where the layout is, which nobody waits for.
"""

from __future__ import annotations

import functools

import torch
from fnattn_kernels.triton.segment_attention import Walk
from torch import Tensor

from ._segments import around, sees, tiles

# n positions, nb blocks of a layout, t tiles, N positions of a tile, r layout rows that a tile touches, G groups


def walk(pattern: tuple[int, ...], n: int, layout: Tensor | None, size: int, keys: bool, device: torch.device) -> Walk:
    """What tiles of `size` queries (keys: of keys) walk. layout: [b or 1, h or 1, nb, nb], a group for each leading entry."""
    if layout is None:
        return _of_picture(pattern, n, size, keys, device)
    _, block, causal = pattern
    positions, rows, masks, past = _of_blocks(block, n, size, keys, bool(causal), device)
    layout = layout.flatten(0, 1)                                                             # [G, nb, nb]
    layout = layout.mT if keys else layout
    touched = layout[:, rows] & past[:, None, :]                         # [G, t, r, nb]
    words = (touched * masks[:, :, None]).sum(2)                                              # [G, t, nb]
    # Present blocks first, in order.
    order = (words == 0).to(torch.uint8).sort(dim=-1, stable=True).indices
    count = (words != 0).sum(-1)
    first = torch.arange(count.numel(), device=device).view_as(count) * layout.shape[2]
    starts = torch.stack((first, count), -1)
    return Walk(positions, starts.int(), order.int().contiguous(), words.gather(2, order).int().contiguous(), block, bool(causal), 0)


@functools.lru_cache(maxsize=64)
def _of_picture(pattern: tuple[int, ...], n: int, size: int, keys: bool, device: torch.device) -> Walk:
    bit = torch.arange(size, device="cpu")
    every = torch.arange(n, device="cpu")
    text = min(n, pattern[1])
    positions, starts, runs, words, total = [], [], [], [], 0
    for tile in tiles(pattern, n, size):
        is_text = bool(tile[0] < text)
        if keys:
            others = every[int(tile[0]):] if is_text else around(pattern, n, tile, after=True)
            seen = sees(pattern, None, others[:, None], tile)
        else:
            others = every[:int(tile[-1]) + 1] if is_text else torch.cat((every[:text], around(pattern, n, tile)))
            seen = sees(pattern, None, tile[:, None], others).T
        word = (seen.long() << bit[:len(tile)]).sum(1)
        there = word != 0
        positions.append(torch.nn.functional.pad(tile, (0, size - len(tile)), value=-1))
        runs.append(others[there])
        words.append(_signed(word[there]))
        starts.append((total, len(runs[-1])))
        total += len(runs[-1])
    made = (torch.stack(positions), torch.tensor([starts], device="cpu"), torch.cat(runs), torch.cat(words))
    return Walk(*(t.to(torch.int32).contiguous().to(device) for t in made), 1, False, pattern[1] if pattern[5] else 0)


@functools.lru_cache(maxsize=64)
def _of_blocks(block: int, n: int, size: int, keys: bool, causal: bool, device: torch.device) -> tuple[Tensor, ...]:
    """What does not depend on the layout: positions [t, N], the rows that tiles touch [t, r], which of a tile's members are in each
    as words [t, r], and which blocks the causal rule leaves to a tile [t, nb]."""
    count = -(-n // size)
    positions = torch.arange(count * size, device="cpu").view(count, size)
    row = positions // block
    rows = row[:, :1] + torch.arange(int((row[:, -1] - row[:, 0]).max()) + 1, device="cpu")
    member = (row[:, None, :] == rows[:, :, None]) & (positions < n)[:, None, :]              # [t, r, N]
    masks = _signed((member.long() << torch.arange(size, device="cpu")).sum(2))
    blocks = torch.arange(-(-n // block), device="cpu")
    past = torch.ones(count, len(blocks), dtype=torch.bool, device="cpu")
    if causal:
        past = (blocks + 1) * block > positions[:, :1] if keys else blocks * block <= positions[:, -1:]
    made = (positions.where(positions < n, -1).int(), rows.clamp(max=len(blocks) - 1), masks, past)
    return tuple(t.to(device) for t in made)


def _signed(words: Tensor) -> Tensor:
    """Words of 32 bits as the int64 that, cut to int32, have those bits."""
    return words - ((words >> 31) << 32)
