"""Which blocks of the score table are present: DeepSpeed's sparsity patterns, from a config and a key.

A layout is a bool tensor [heads, blocks, blocks]; True at (r, c) lets the queries of block r attend to the keys of block c.
Layouts are made of blocks only: causality inside a block, and above the diagonal where a pattern reaches there, is the
attention's business.

Names and meanings follow the sparsity configs of DeepSpeed 0.19.6, the last release that has them. Different here: random
blocks come from a key instead of Python's global generator, so a layout can be made again; where a row has fewer blocks to
choose from than it should choose, it takes all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import random
from ..core import check, check_sizes, config

# h heads, nb blocks per side; uni = unidirectional


@config
class Dense:
    """All blocks."""

    num_heads: int
    block: int = 16
    different_layout_per_head: bool = False


@config
class Fixed:
    """Windows of num_local_blocks, and the last num_global_blocks of each window as global columns (Child et al. 2019,
    arXiv 1904.10509). Head h of several patterns takes the (1 + h mod num_different_global_patterns)-th group from the end;
    horizontal_global_attention adds the global rows (bidirectional only)."""

    num_heads: int
    block: int = 16
    different_layout_per_head: bool = False
    num_local_blocks: int = 4
    num_global_blocks: int = 1
    attention: str = "bidirectional"
    horizontal_global_attention: bool = False
    num_different_global_patterns: int = 1

    def __post_init__(self):
        _check_attention(self, self.horizontal_global_attention)
        groups = self.num_local_blocks // max(self.num_global_blocks, 1)
        check(self.num_global_blocks >= 1 and self.num_local_blocks % self.num_global_blocks == 0,
              "layouts.Fixed: num_global_blocks must divide num_local_blocks={}; got {}.", self.num_local_blocks,
              self.num_global_blocks, remedy="Choose a divisor.")
        check(1 <= self.num_different_global_patterns <= groups,
              "layouts.Fixed: num_different_global_patterns must be at most num_local_blocks / num_global_blocks = {}; got {}.",
              groups, self.num_different_global_patterns, remedy="Use fewer patterns or larger windows.")
        check(self.num_different_global_patterns == 1 or self.different_layout_per_head,
              "layouts.Fixed: {} global patterns need different_layout_per_head=True; got False.",
              self.num_different_global_patterns, remedy="Set it to True, or use one pattern.")


@config
class Variable:
    """Windows of the given sizes (the last one repeated), given global columns, and random blocks in each row. In a
    unidirectional layout random blocks may lie above the diagonal, as in DeepSpeed; a causal attention sees nothing there."""

    num_heads: int
    block: int = 16
    different_layout_per_head: bool = False
    num_random_blocks: int = 0
    local_window_blocks: tuple = (4,)
    global_block_indices: tuple = (0,)
    global_block_end_indices: tuple | None = None
    attention: str = "bidirectional"
    horizontal_global_attention: bool = False

    def __post_init__(self):
        _check_attention(self, self.horizontal_global_attention)
        _check_ranges(self)
        check(len(self.local_window_blocks) >= 1 and all(w >= 1 for w in self.local_window_blocks),
              "layouts.Variable: local_window_blocks must be positive sizes; got {}.", self.local_window_blocks,
              remedy="Give at least one window size, for example (4,).")


@config
class BigBird:
    """Random blocks, a sliding window and the first rows and columns (Zaheer et al. 2020, arXiv 2007.14062)."""

    num_heads: int
    block: int = 16
    different_layout_per_head: bool = False
    num_random_blocks: int = 1
    num_sliding_window_blocks: int = 3
    num_global_blocks: int = 1
    attention: str = "bidirectional"

    def __post_init__(self):
        _check_attention(self)


@config
class BSLongformer:
    """A sliding window and given global rows and columns (Beltagy et al. 2020, arXiv 2004.05150)."""

    num_heads: int
    block: int = 16
    different_layout_per_head: bool = False
    num_sliding_window_blocks: int = 3
    global_block_indices: tuple = (0,)
    global_block_end_indices: tuple | None = None
    attention: str = "bidirectional"

    def __post_init__(self):
        _check_attention(self)
        _check_ranges(self)


@config
class LocalSlidingWindow:
    """A sliding window."""

    num_heads: int
    block: int = 16
    different_layout_per_head: bool = False
    num_sliding_window_blocks: int = 3
    attention: str = "unidirectional"

    def __post_init__(self):
        _check_attention(self)


def make(cfg: Any, seq_len: int, *, key: Tensor | None = None, draw: Callable[[int, int], list[int]] | None = None) -> Tensor:
    """The layout of a pattern for sequences of seq_len.

    Args:
        cfg: Dense, Fixed, Variable, BigBird, BSLongformer or LocalSlidingWindow.
        seq_len: a multiple of cfg.block.
        key: where random blocks come from; needed if the pattern has any. Maps under vmap.
        draw: draw(population, count) -> columns, in place of the key: rows ask in order, head by head.
    Returns:
        bool [num_heads, seq_len / block, seq_len / block]. Without different_layout_per_head all heads are alike.
    Raises:
        ValueError: seq_len is no multiple of the block, or there are fewer blocks than the pattern needs; no key for
        random blocks. TypeError: cfg is not a pattern.
    """
    if type(cfg) not in _RULES:
        raise TypeError(f"layouts.make: cfg must be one of {', '.join(k.__name__ for k in _RULES)}; got {type(cfg).__name__}.\n"
                        f"  For example layouts.Fixed(num_heads=4).")
    check_sizes("layouts.make", 1, seq_len=seq_len)
    check(cfg.block >= 1 and seq_len % cfg.block == 0, "layouts.make: seq_len must be a multiple of cfg.block={}; got {}.",
          cfg.block, seq_len, remedy="Pad the sequence, or choose another block.")
    nb = seq_len // cfg.block
    for name in ("num_random_blocks", "num_sliding_window_blocks", "num_global_blocks"):
        check(type(cfg) is Fixed or getattr(cfg, name, 0) <= nb, "layouts.make: {} must be at most the {} blocks of a row; got {}.",
              name, nb, getattr(cfg, name, 0), remedy="Use a longer sequence or a smaller number.")
    count = getattr(cfg, "num_random_blocks", 0)
    check(not count or key is not None or draw is not None, "layouts.make: key must be given for {} random blocks per row; got None.",
          count, remedy="Pass key=fnattn.random.key(0).")
    heads = []
    for h in range(cfg.num_heads if cfg.different_layout_per_head else 1):
        layout = _RULES[type(cfg)](cfg, nb, h)
        if count:
            within = isinstance(cfg, BigBird) and cfg.attention == "unidirectional"
            layout = layout | _random(nb, count, within, None if key is None else random.fold_in(key, h), draw)
        heads.append(layout)
    return torch.stack(heads) if len(heads) == cfg.num_heads else heads[0].expand(cfg.num_heads, nb, nb).clone()


def _random(nb: int, count: int, within: bool, key: Tensor | None, draw: Callable | None) -> Tensor:
    """`count` random columns in each row; up to and with the row itself if `within`."""
    populations = [row + 1 if within else nb for row in range(nb)]
    if draw is not None:
        layout = torch.zeros(nb, nb, dtype=torch.bool)
        for row, population in enumerate(populations):
            layout[row, draw(population, min(count, population))] = True
        return layout
    # The `count` smallest of one uniform number per column; columns outside the population come last.
    drawn = random.uniform(key, (nb, nb))
    drawn = torch.where(torch.arange(nb) < torch.tensor(populations)[:, None], drawn, 2.0)
    return (drawn.argsort(-1).argsort(-1) < count) & (drawn < 2.0)


def _grid(nb: int) -> tuple[Tensor, Tensor]:
    return torch.arange(nb)[:, None], torch.arange(nb)[None, :]


def _windows(nb: int, sizes: tuple, uni: bool) -> Tensor:
    """Diagonal windows of the given sizes, the last one repeated; lower triangles if uni."""
    ends, total = [], 0
    while total < nb:
        total += sizes[min(len(ends), len(sizes) - 1)]
        ends.append(total)
    row, col = _grid(nb)
    member = torch.bucketize(torch.arange(nb), torch.tensor(ends or [1]), right=True)
    same = member[:, None] == member[None, :]
    return same & (col <= row) if uni else same


def _columns(nb: int, start: int, end: int, uni: bool, horizontal: bool) -> Tensor:
    """Global columns start:end, from their own row on if uni; and the rows if horizontal."""
    row, col = _grid(nb)
    layout = (col >= start) & (col < end) & ((row >= start) if uni else (row >= 0))
    return layout | ((row >= start) & (row < end) & (col >= 0)) if horizontal else layout


def _sliding(nb: int, width: int) -> Tensor:
    row, col = _grid(nb)
    return (row - col).abs() <= width // 2


def _dense(cfg: Dense, nb: int, head: int) -> Tensor:
    return torch.ones(nb, nb, dtype=torch.bool)


def _fixed(cfg: Fixed, nb: int, head: int) -> Tensor:
    uni, local, wide = cfg.attention == "unidirectional", cfg.num_local_blocks, cfg.num_global_blocks
    layout = _windows(nb, (local,), uni)
    first = local - (1 + head % cfg.num_different_global_patterns) * wide
    whole = nb - nb % local
    starts = list(range(first, whole, local))
    if whole < nb:  # the last window is short
        starts.append(min(whole + first, nb - wide))
    for start in starts:
        # A start before the first column counts from the end, as a slice does.
        layout = layout | _columns(nb, start % nb, start % nb + wide, uni, cfg.horizontal_global_attention)
    return layout


def _ranges(cfg: Variable | BSLongformer, nb: int) -> list[tuple[int, int]]:
    ends = cfg.global_block_end_indices or tuple(i + 1 for i in cfg.global_block_indices)
    return [(start, min(end, nb)) for start, end in zip(cfg.global_block_indices, ends) if start < nb]


def _variable(cfg: Variable, nb: int, head: int) -> Tensor:
    uni = cfg.attention == "unidirectional"
    layout = _windows(nb, cfg.local_window_blocks, uni)
    for start, end in _ranges(cfg, nb):
        layout = layout | _columns(nb, start, end, uni, cfg.horizontal_global_attention)
    return layout


def _big_bird(cfg: BigBird, nb: int, head: int) -> Tensor:
    layout = _sliding(nb, cfg.num_sliding_window_blocks) | _columns(nb, 0, cfg.num_global_blocks, False, True)
    return layout.tril() if cfg.attention == "unidirectional" else layout


def _longformer(cfg: BSLongformer, nb: int, head: int) -> Tensor:
    layout = _sliding(nb, cfg.num_sliding_window_blocks)
    for start, end in _ranges(cfg, nb):
        layout = layout | _columns(nb, start, end, False, True)
    return layout.tril() if cfg.attention == "unidirectional" else layout


def _local(cfg: LocalSlidingWindow, nb: int, head: int) -> Tensor:
    layout = _sliding(nb, cfg.num_sliding_window_blocks)
    return layout.tril() if cfg.attention == "unidirectional" else layout


_RULES: dict[type, Callable] = {Dense: _dense, Fixed: _fixed, Variable: _variable, BigBird: _big_bird,
                                BSLongformer: _longformer, LocalSlidingWindow: _local}


def _check_attention(cfg: Any, horizontal: bool = False) -> None:
    name = type(cfg).__name__
    check(cfg.attention in ("unidirectional", "bidirectional"),
          "layouts.{}: attention must be 'unidirectional' or 'bidirectional'; got {!r}.", name, cfg.attention,
          remedy="Use 'unidirectional' for causal attention.")
    check(not horizontal or cfg.attention == "bidirectional",
          "layouts.{}: horizontal_global_attention needs attention='bidirectional'; got {!r}.", name, cfg.attention,
          remedy="A causal row cannot attend to all blocks.")


def _check_ranges(cfg: Any) -> None:
    for name in ("global_block_indices", "global_block_end_indices"):
        value = getattr(cfg, name)
        check(value is None or isinstance(value, tuple), "layouts.{}: {} must be a tuple of ints; got {}.", type(cfg).__name__, name,
              type(value).__name__, remedy="Configs are hashable: write (0, 5) instead of [0, 5].")
    ends = cfg.global_block_end_indices
    check(ends is None or len(ends) == len(cfg.global_block_indices) and all(a < b for a, b in zip(cfg.global_block_indices, ends)),
          "layouts.{}: global_block_end_indices must give one later end per start of {}; got {}.", type(cfg).__name__,
          cfg.global_block_indices, ends, remedy="Ranges are [start, end).")
