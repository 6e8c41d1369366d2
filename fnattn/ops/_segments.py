"""Static patterns of attention as lists: which keys each block of queries reads, and which of its queries see which.

A pattern is a tuple of integers (below) and, for block-sparse attention, a layout. `sees` is its meaning; the lists that the
native kernel walks are made from it, block by block: the queries of a block are chosen so that they share keys (a tile of the
picture for a window, a row or a column for an axis), the keys are those that any of them sees, first those of all 32 queries,
then those of the first and of the last 16 alone. Made once per pattern and length, in milliseconds, and kept.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator

import torch
from fnattn_kernels.native.segment_attention import KEYS, SPAN, Lists
from torch import Tensor

# n positions, t text positions, S image_size, nb blocks of a layout, c candidate keys
CONV, AXIAL, BLOCKS = range(3)
HALF = SPAN // 2
TILE_ROWS = 4  # of the picture; each half of a block of the native kernel is a square


def conv(text_len: int, image_size: int, kernel_size: int, dilation: int, text_sees_all: bool) -> list[int]:
    """The pattern of `conv_attention`."""
    return [CONV, text_len, image_size, kernel_size, dilation, int(text_sees_all)]


def axial(text_len: int, image_size: int, axis: int, text_sees_all: bool) -> list[int]:
    """The pattern of `axial_attention`."""
    return [AXIAL, text_len, image_size, axis, 0, int(text_sees_all)]


def blocks(block: int, causal: bool) -> list[int]:
    """The pattern of `block_sparse_attention`; needs a layout."""
    return [BLOCKS, block, int(causal)]


def sees(pattern: tuple[int, ...], layout: Tensor | None, i: Tensor, j: Tensor) -> Tensor:
    """Whether queries at positions i see keys at positions j; i and j broadcast. layout [.., nb, nb] gives leading axes."""
    if pattern[0] == BLOCKS:
        _, block, causal = pattern
        there = layout[..., i // block, j // block]
        return there & (j <= i) if causal else there
    kind, t, side, size, dilation = pattern[:5]
    row, column = torch.div(i - t, side, rounding_mode="floor"), (i - t) % side
    down, right = row - torch.div(j - t, side, rounding_mode="floor"), column - (j - t) % side
    if kind == CONV:
        near = _in_window(down, size, dilation) & _in_window(right, size, dilation)
    else:
        near = ((right if size else down) == 0) & (j <= i)
    return torch.where(i < t, j <= i, (j < t) | near)


def _in_window(distance: Tensor, size: int, dilation: int) -> Tensor:
    return (distance >= 0) & (distance <= (size - 1) * dilation) & (distance % dilation == 0)


def table(pattern: tuple[int, ...], layout: Tensor | None, keep: Tensor | None, n: int, device: torch.device) -> Tensor:
    """What is visible, as a mask bool [b or 1, h or 1, n, n], in operations that a tracer can follow."""
    i, j = torch.arange(n, device=device)[:, None], torch.arange(n, device=device)
    seen = sees(pattern, layout, i, j)
    seen = seen if layout is not None else seen[None, None]
    if keep is None:
        return seen
    kept = keep[:, None, None, :]
    return seen & (kept | (i < pattern[1]) if pattern[0] != BLOCKS and pattern[5] else kept)


# ------------------------------------------------------------------------------------------------ lists


def lists(b: int, h: int, n: int, layout: Tensor | None, pattern: tuple[int, ...]) -> Lists:
    """The pattern's lists for n positions; a group of blocks for each layout that differs."""
    if layout is None:
        return _lists(pattern, None, 0, 1, n)
    layout = layout.contiguous()
    values = ctypes.string_at(layout.data_ptr(), layout.numel()) if layout.numel() else b""
    return _of_layouts(pattern, values, tuple(layout.shape[:3]), b, h, n)


@functools.lru_cache(maxsize=64)
def _of_layouts(pattern: tuple[int, ...], values: bytes, shape: tuple[int, int, int], b: int, h: int, n: int) -> Lists:
    """The lists for layouts [*shape, shape[-1]] whose bytes are `values`."""
    number, each = shape[0] * shape[1], shape[2] ** 2
    if number == 1:
        return _lists(pattern, values, shape[2], 1, n)
    different: dict[bytes, int] = {}
    which = [different.setdefault(values[at * each:(at + 1) * each], len(different)) for at in range(number)]
    found = _lists(pattern, b"".join(different), shape[2], len(different), n)
    group = torch.tensor(which, dtype=torch.int32, device="cpu").view(shape[:2]).expand(b, h).contiguous()
    return found._replace(group=group)


@functools.lru_cache(maxsize=64)
def _lists(pattern: tuple[int, ...], values: bytes | None, nb: int, groups: int, n: int) -> Lists:
    """The lists of `groups` layouts whose bytes are `values`, or of a pattern without one."""
    made = _Made()
    for group in range(groups):
        layout = None
        if values is not None:
            layout = torch.tensor(list(values[group * nb * nb:(group + 1) * nb * nb]), dtype=torch.bool, device="cpu").view(nb, nb)
        pairs = made.pairs
        for positions, candidates in _blocks(pattern, layout, n):
            free = pattern[0] != BLOCKS and pattern[5] and bool(positions[0] < pattern[1])
            made.add(positions, candidates, sees(pattern, layout, positions[:, None], candidates), free)
        made.largest = max(made.largest, made.pairs - pairs)
    blocks, tiles, data = (torch.tensor(x, dtype=torch.int32, device="cpu") for x in (made.blocks, made.tiles, made.data))
    return Lists(blocks.view(groups, -1, 5), tiles.view(-1, 6), data, None, made.largest, made.row)


def _blocks(pattern: tuple[int, ...], layout: Tensor | None, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The positions of each block of queries, and the keys that they may see, in order."""
    every = torch.arange(n, device="cpu")
    if pattern[0] == BLOCKS:
        _, block, causal = pattern
        inside = torch.arange(block, device="cpu")
        for start in range(0, n, SPAN):
            stop = min(n, start + SPAN)
            columns = layout[start // block:(stop - 1) // block + 1].any(0).nonzero()
            keys = (columns * block + inside).flatten()
            yield every[start:stop], keys[keys < (stop if causal else n)]
        return
    text = every[:min(n, pattern[1])]
    for tile in tiles(pattern, n, SPAN):
        if tile[0] < len(text):
            yield tile, text[:int(tile[-1]) + 1]
        else:
            yield tile, torch.cat((text, around(pattern, n, tile)))


def tiles(pattern: tuple[int, ...], n: int, span: int) -> Iterator[Tensor]:
    """The positions of text and picture, at most `span` together: such as share keys, and none of text with some of the picture.

    span is a multiple of 8.
    """
    t, side = min(n, pattern[1]), pattern[2]
    yield from torch.arange(t, device="cpu").split(span) if t else ()
    pixels = n - t
    rows = -(-pixels // side)
    picture = torch.arange(rows * side, device="cpu").view(rows, side)
    for tile in _conv_tiles(picture, pattern[4], span) if pattern[0] == CONV else _lines(picture, pattern[3], span):
        tile = tile[tile < pixels]
        if tile.numel():
            yield t + tile


def _conv_tiles(picture: Tensor, dilation: int, span: int) -> Iterator[Tensor]:
    """Tiles of the pictures that are left when only every dilation-th row and column counts: pixels of a tile share keys."""
    columns = span // TILE_ROWS
    for first in range(dilation * dilation):
        part = picture[first // dilation::dilation, first % dilation::dilation]
        for rows in part.split(TILE_ROWS):
            for tile in rows.split(columns, 1):
                yield torch.cat([half.flatten() for half in tile.split(columns // 2, 1)])


def _lines(picture: Tensor, columns: int, span: int) -> Iterator[Tensor]:
    """The picture's rows or columns, several to a tile where they are short."""
    lines = picture.T if columns else picture
    if not lines.numel():
        return
    for some in lines.split(max(1, span // lines.shape[1])):
        yield from some.flatten().split(span)


def around(pattern: tuple[int, ...], n: int, tile: Tensor, after: bool = False) -> Tensor:
    """The positions of pixels that those of a tile may see, or that may see them (after): a box for a window, whole lines."""
    t, side = pattern[1], pattern[2]
    last = -(-(n - t) // side) - 1
    rows, columns = (tile - t) // side, (tile - t) % side
    top, bottom, left, right = (int(x) for x in (rows.min(), rows.max(), columns.min(), columns.max()))
    if pattern[0] == CONV:
        reach = (pattern[3] - 1) * pattern[4]
        top, left = (top, left) if after else (max(0, top - reach), max(0, left - reach))
        bottom, right = (min(last, bottom + reach), min(side - 1, right + reach)) if after else (bottom, right)
    elif pattern[3]:
        top, bottom = (top, last) if after else (0, bottom)
    else:
        left, right = (left, side - 1) if after else (0, right)
    box = (torch.arange(top, bottom + 1, device="cpu")[:, None] * side + torch.arange(left, right + 1, device="cpu")).flatten()
    return t + box[box < n - t]


class _Made:
    """Lists under construction: numbers in the order of the C structs."""

    def __init__(self) -> None:
        self.blocks: list[list[int]] = []
        self.tiles: list[list[int]] = []
        self.data: list[int] = []
        self.pairs = self.largest = self.row = 0

    def add(self, positions: Tensor, keys: Tensor, seen: Tensor, free: bool) -> None:
        """A block of queries at `positions` against `keys`, of which seen [positions, keys] are visible."""
        count, first, at = len(positions), len(self.tiles), len(self.data)
        self.data += positions.tolist()
        whole, low = (1 << count) - 1, (1 << HALF) - 1
        words = (seen.long() << torch.arange(count, device="cpu")[:, None]).sum(0)
        lower, upper = (words & low) != 0, (words >> HALF) != 0
        half = torch.where(lower & upper, 0, torch.where(lower, 1, 2))
        if count <= HALF:
            half = torch.ones_like(half)
        full = torch.tensor([whole, whole & low, whole & ~low], device="cpu")[half]
        rank = torch.where(lower | upper, 2 * half + (words != full), 6)
        for kind in (0, 1, 2):
            chosen = torch.cat([(rank == 2 * kind + part).nonzero().squeeze(1) for part in (0, 1)])
            partly = (words != full)[chosen].tolist()
            these, those = keys[chosen].tolist(), words[chosen].tolist()
            for start in range(0, len(these), KEYS):
                here = slice(start, start + KEYS)
                self._tile(these[here], those[here] if any(partly[here]) else None, kind)
        self.blocks.append([count, at, first, len(self.tiles), int(free)])
        self.row = max(self.row, sum(tile[2] for tile in self.tiles[first:]))

    def _tile(self, keys: list[int], words: list[int] | None, half: int) -> None:
        stride, index, mask = keys[1] - keys[0] if len(keys) > 1 else 1, -1, -1
        if keys != list(range(keys[0], keys[0] + stride * len(keys), stride)):
            index = len(self.data)
            self.data += keys
        if words is not None:
            mask = len(self.data)
            self.data += [word - (1 << SPAN) if word >> (SPAN - 1) else word for word in words]
        self.tiles.append([keys[0], stride, len(keys), half, index, mask])
        self.pairs += len(keys) * (HALF if half else SPAN)
