"""A step of generation as a list of instructions that one C call carries out: csrc/steps.c, csrc/steps_code.h.

A dozen small products and a recurrence cost more to call than to compute. `begin` says whether a step can be done so: plain
CPU tensors in one precision, which no transform, mode or profiler watches and nothing differentiates. Then attentions and
models write their instructions one after the other, on rows (one per sequence) that live in the call's scratch, and `run`
does them. Shapes that do not fit raise `Unfit`, whereupon the ordinary way says what is wrong with them.

Nothing here has a derivative or a batching rule: whoever needs one takes the ordinary way, which computes the same.
"""

from __future__ import annotations

import array
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import crossovers
from ..watchers import unwatched
from .build import why_not
from .call import function
from .gate_loop import EVERY
from .steps_rows import (
    ADD,
    ALL,
    APPEND,
    CALL_DECODE,
    CALL_NARROW,
    CALL_SIMPLE,
    CALL_TAYLOR,
    CALL_WIDE,
    COMPLEX_PRODUCT,
    COPY,
    DONE,
    EMBED,
    FLUSH,
    GATE,
    GATHER,
    KINDS,
    LAYER_NORM,
    LAYOUT,
    LINE,
    LINEAR,
    MULTIPLY,
    NARROW_ROWS,
    NO_MEMORY,
    NORM,
    SEEN,
    SHIFT,
    TURN,
    Mask,
    Row,
    Rows,
    bits,
    fits,
    kernel,
)
from .taylor import features

ROWS = crossovers.limits("linear", "native")["rows"]
_MARKS = 1 // EVERY + 2  # states that the gated loops keep for a backward pass
_whole, _dtype = Tensor.is_contiguous, operator.attrgetter("dtype")  # by map, without a frame of Python for each tensor


def begin(rows: int, x: Tensor, tensors: Sequence[Tensor]) -> Steps | None:
    """An empty list for a step of `rows` sequences that reads x and all of `tensors`, if it can be done so, else None."""
    if not 0 < rows <= ROWS or not available() or not unwatched((x, *tensors)):
        return None
    dtype = tensors[0].dtype
    if dtype not in KINDS or x.is_floating_point() and x.dtype is not dtype:
        return None
    if not all(map(_whole, tensors)) or not {dtype, KINDS[dtype], torch.bool, torch.int64}.issuperset(map(_dtype, tensors)):
        return None
    return Steps(rows, dtype)


def available() -> bool:
    """Whether there is a C function for steps, and it may be used."""
    return why_not("steps") is None


class Steps(Rows):
    """The instructions so far, on `rows` rows of numbers.

    Weights are looked at here. Of states only what else depends on: whoever writes a step has compared them, kinds and dtypes too.
    """

    IDENTITY, GELU, SILU = range(3)

    def norm(self, x: Row, gamma: Tensor) -> Row:
        """gamma x / root mean square of x."""
        fits(gamma.shape == (x.width,) and gamma.dtype is self.dtype)
        y, gamma_at = self.room(x.width), self.vector(gamma)
        self.code += (NORM, x.at, x.stride, gamma_at, y.at, self.rows, x.width)
        return y

    def layer_norm(self, x: Row, weight: Tensor, bias: Tensor, out: Row | None = None) -> Row:
        """weight (x - mean) / std + bias, eps 1e-5."""
        y = out or self.room(x.width)
        fits(weight.shape == bias.shape == (x.width,) and y.width == y.stride == x.width and weight.dtype is bias.dtype is self.dtype)
        places = self.vector(weight), self.vector(bias)
        self.code += (LAYER_NORM, x.at, x.stride, *places, y.at, self.rows, x.width)
        return y

    def linear(self, x: Row, weight: Tensor, bias: Tensor | None = None, *, act: int = 0, add: Row | None = None,
               out: Row | None = None) -> Row:
        """act(x weight^T + bias) + add; into `out` if given."""
        fits(weight.ndim == 2 and weight.dtype is self.dtype)
        m, k = weight.shape
        out = out or self.room(m)
        fits(k == x.width and out.width == m and out.stride == m)
        code, places = (LINEAR, x.at, x.stride, weight.data_ptr()), (out.at, self.rows, 1, m, k, act)
        if bias is None and add is None:
            self.code += (*code, 0, 0, 0, *places)
        else:
            fits((bias is None or bias.shape == (m,) and bias.dtype is self.dtype) and (add is None or add.width == m))
            bias_at = 0 if bias is None else self.vector(bias)
            self.code += (*code, bias_at, *((add.at, add.stride) if add else (0, 0)), *places)
        return out

    def parts(self, x: Row, weight: Tensor, *widths: int) -> list[Row]:
        """x weight^T in parts that lie one after the other, as queries, keys and values are wanted. Equal ones are best together."""
        fits(weight.ndim == 2 and weight.dtype is self.dtype)
        m, k = weight.shape
        fits(k == x.width and sum(widths) == m)
        rows, first = [self.room(width) for width in widths], 0
        together = len(set(widths)) == 1 and self.rows * widths[0] % LINE == 0
        for row in rows[:1] if together else rows:
            self.code += (LINEAR, x.at, x.stride, weight.data_ptr() + first * k * self.size, 0, 0, 0, row.at, self.rows,
                          len(rows) if together else 1, row.width, k, 0)
            first += row.width
        return rows

    def embed(self, ids: Tensor, table: Tensor) -> Row:
        """Rows of a table; ids int64 [b, 1]. `run` says if one is not in it."""
        fits(table.ndim == 2 and table.dtype is self.dtype and ids.dtype == torch.int64 and ids.shape == (self.rows, 1))
        count, k = table.shape
        y = self.room(k)
        self.code += (EMBED, ids.data_ptr(), ids.stride(0), table.data_ptr(), count, y.at, self.rows, k)
        return y

    def copy(self, x: Row, y: Row, width: int, skip: int = 0) -> None:
        """y = x, `width` numbers of every row after the first `skip`."""
        fits(skip + width <= min(x.width, y.width))
        self.code += (COPY, self._behind(x.at, skip), x.stride, self._behind(y.at, skip), y.stride, self.rows, width)

    def _behind(self, at: int, count: int) -> int:
        return at - count if at < 0 else at + count * self.size

    def add(self, y: Row, x: Row) -> Row:
        """y += x, in place"""
        fits(y.width == x.width and y.stride == y.width)
        self.code += (ADD, y.at, x.at, x.stride, self.rows, y.width)
        return y

    def multiply(self, y: Row, by: Row) -> None:
        """y *= by"""
        fits(y.width == by.width == y.stride == by.stride)
        self.code += (MULTIPLY, y.at, by.at, self.rows * y.width)

    def gate(self, y: Row, gates: Row) -> None:
        """y *= sigmoid(gates), one gate per head of y."""
        fits(y.stride == y.width and gates.stride == gates.width and y.width % gates.width == 0)
        self.code += (GATE, y.at, gates.at, self.rows * gates.width, y.width // gates.width)

    def turn(self, x: Row, freqs: Tensor, d: int, position: int) -> None:
        """Rotary positions, in place, for heads of d numbers; float32 frequencies for up to d / 2 pairs."""
        fits(x.stride == x.width and x.width % d == 0 and 2 * freqs.shape[0] <= d and freqs.dtype is torch.float32)
        self.code += (TURN, x.at, freqs.data_ptr(), self.rows, x.width // d, d, freqs.shape[0], position)
        self.counted(1)

    def append(self, main: Tensor, late: Tensor, x: Row, position: int) -> tuple[Tensor, Tensor]:
        """Both parts of a cache, main [b, g, c, d] and late [b, g, w, d], after the heads of x at `position`: attentions/_cache.py.

        The late part, which begins at the last multiple of w, is copied; when it is full it goes into a copy of the main part.
        """
        shape, large = late.shape, main.shape  # asked for once: a shape is a new object each time
        fits(len(shape) == len(large) == 4 and shape[2] > 0)
        (b, g, w, d), room = shape, large[2]
        fits(b == self.rows and x.width == x.stride == g * d and large == (b, g, room, d) and 0 <= position < room)
        at = position % w
        if at + 1 < w:
            out, x_at = torch.empty_like(late), self.narrow(x)
            self.code += (APPEND, late.data_ptr(), x_at, out.data_ptr(), b * g, w, d, at)
            self.counted(1, min(position - at + w - 1, room))
            return main, out
        self.fixed = True
        whole, out, x_at = torch.empty_like(main), torch.zeros_like(late), self.narrow(x)
        self.code += (FLUSH, main.data_ptr(), late.data_ptr(), x_at, whole.data_ptr(), b * g, room, w, d, position - at)
        return whole, out

    def taylor(self, q: Row, k: Row, v: Row, sums: Tensor, scale: float, eps: float) -> tuple[Row, Tensor]:
        """Rows of the result, and the new sums; as `fnattn.ops.taylor` for one causal position. Values as wide as keys."""
        fits(sums.ndim == 4)
        b, g, f, e1 = sums.shape
        d = e1 - 1
        fits(b == self.rows and f == features(d) and k.width == v.width == g * d and q.width % k.width == 0)
        heads, out, new = q.width // d, self.room(q.width), torch.empty_like(sums)
        self.code += (CALL_TAYLOR, kernel("taylor", "try_taylor_forward", self.wide), q.at, k.at, v.at, sums.data_ptr(), out.at,
                      self.room(heads).at, new.data_ptr(), b, heads, g, d, bits(scale), bits(eps))
        return out, new

    def decode(self, q: Row, k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], visible: Mask | None, first: int, length: int,
               scale: float) -> Row:
        """One query per head over a cache in two parts, of which a mask hides some: `fnattn.ops.cached_attention`."""
        g, d, room, late = self.cache(q, k, v, first, length)
        fits(visible is None or visible.width >= length)
        places = (k[0].data_ptr(), v[0].data_ptr(), k[1].data_ptr(), v[1].data_ptr(), *((visible or ALL)[:3]))
        return self._decode(q, places, (g, d, room, late, first, length), scale)

    def cache(self, q: Row, k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], first: int, length: int) -> tuple[int, ...]:
        """Key heads, width, and room of both parts of a cache that holds `length` positions, `first` of them in the main part."""
        large, small = k[0].shape, k[1].shape
        fits(len(large) == len(small) == 4)
        (b, g, room, d), late = large, small[2]
        fits(b == self.rows and v[0].shape == large and v[1].shape == small == (b, g, late, d) and q.width % (g * d) == 0
              and 0 <= first <= room and max(first, 1) <= length <= first + late)
        return g, d, room, late

    def mask(self, visible: Tensor) -> Mask:
        """A mask [b, capacity] of keys, for all heads."""
        shape = visible.shape
        fits(visible.dtype is torch.bool and len(shape) == 2 and shape[0] == self.rows)
        return Mask(visible.data_ptr(), shape[1], 0, shape[1])

    def layout(self, layout: Tensor, heads: int, row: int, block: int, visible: Tensor, length: int) -> Mask:
        """What row `row` of a layout [heads or 1, blocks, blocks] and a mask [b, capacity] show of `length` keys, by heads.

        `run` says if a sequence sees no key in any head, and computes nothing.
        """
        known, shape = self.mask(visible), layout.shape
        fits(layout.dtype is torch.bool and len(shape) == 3)
        count, blocks, _ = shape
        fits(count in (1, heads) and shape[2] == blocks and 0 <= row < blocks and length <= min(known.width, blocks * block))
        y = self.room(-(-count * length // self.number)).at  # bytes, [b, heads, length] without a gap: room for all of them
        self.code += (LAYOUT, layout.data_ptr(), count, blocks, row, block, known.at, known.batch, y, self.rows, length)
        return Mask(y, count * length, length if count > 1 else 0, length)

    def _decode(self, q: Row, places: tuple[int, ...], sizes: tuple[int, ...], scale: float) -> Row:
        out = self.room(q.width)
        self.code += (CALL_DECODE, kernel("decode", "try_decode", self.dtype), q.at, *places, out.at, self.rows, q.width // sizes[1],
                      *sizes, bits(scale))
        self.counted(2)  # the length; the keys in the main part are as many until it changes
        return out

    def slots(self, q: Row, new: tuple[Row, Row], text: Sequence[Tensor], image: Sequence[Tensor], slots: Tensor, every: bool,
              scale: float) -> Row:
        """One query per head over a text and some slots of a picture, each (keys, values, which are there): attentions/_picture.py.

        text: [b, h, t, d] twice, bool [b, t]; image: [b, h, w, d] twice, bool [b, w]. slots: int64, in [0, w], w being what is new.
        every: whether all these slots are there whatever the last mask says.
        """
        words, pixels = text[0].shape, image[0].shape
        fits(len(words) == len(pixels) == 4)
        (b, h, t, d), w, picks = words, pixels[2], slots.shape[0]
        fits(b == self.rows and text[1].shape == words and text[2].shape == (b, t) and image[2].shape == (b, w)
              and image[1].shape == pixels == (b, h, w, d) and text[2].dtype is image[2].dtype is torch.bool
              and q.width == new[0].width == new[1].width == h * d)
        parts = []
        for x, old in zip(new, image[:2]):
            parts.append(self.room(h * picks * d).at)
            x_at = self.narrow(x)
            self.code += (GATHER, old.data_ptr(), x_at, slots.data_ptr(), parts[-1], b * h, w, d, picks)
        seen = self.room(-(-(t + picks) // self.number)).at
        self.code += (SEEN, text[2].data_ptr(), t, image[2].data_ptr(), w, slots.data_ptr(), picks, int(every), seen, b)
        self.kept.append(slots)
        return self._decode(q, (text[0].data_ptr(), text[1].data_ptr(), *parts, seen, t + picks, 0), (h, d, t, picks, t, t + picks), scale)

    def shift(self, old: Tensor, x: Row) -> Tensor:
        """old [b, h, w, d] without the first of its w rows, and the heads of x after the last, as a new tensor."""
        fits(old.ndim == 4)
        b, h, w, d = old.shape
        fits(b == self.rows and x.width == h * d and w > 0)
        new, x_at = torch.empty_like(old), self.narrow(x)
        self.code += (SHIFT, old.data_ptr(), x_at, new.data_ptr(), b * h, w, d)
        return new

    def place(self, old: Tensor, x: Row, at: int) -> Tensor:
        """old [b, h, w, d] with the heads of x in slot `at`, as a new tensor."""
        fits(old.ndim == 4)
        b, h, w, d = old.shape
        fits(b == self.rows and x.width == h * d and 0 <= at < w)
        new, x_at = torch.empty_like(old), self.narrow(x)
        self.code += (APPEND, old.data_ptr(), x_at, new.data_ptr(), b * h, w, d, at)
        return new

    def simple_gate_loop(self, q: Row, x: Row, a: Row, h: Tensor, out: Row | None = None) -> tuple[Row, Tensor]:
        """Rows of the result, and the new state [b, c]: `fnattn.ops.simple_gate_loop`."""
        c = q.width
        out = out or self.room(c)
        fits(h.shape == (self.rows, c) and x.width == a.width == out.width == c)
        new = torch.empty_like(h)
        self.code += (CALL_SIMPLE, kernel("gate_loop", "simple_gate_loop", self.wide), q.at, x.at, a.at, h.data_ptr(), out.at,
                      new.data_ptr(), self.room(_MARKS * c).at, self.rows, c)
        return out, new

    def gate_loop(self, q: Row, k: Row, v: Row, a: Row, h: Tensor, product: Tensor, out: Row | None = None) -> tuple[Row, Tensor, Tensor]:
        """Rows of the result, and the new state [b, h, d, d, 2] and product of gates [b, h, 2]: `fnattn.ops.gate_loop`."""
        fits(h.ndim == 5)
        b, heads, d, e, _ = h.shape
        out = out or self.room(q.width)
        fits(b == self.rows and d == e and q.width == k.width == v.width == out.width == heads * d and a.width == 2 * heads
              and h.shape[4:] == (2,) and product.shape == (b, heads, 2))
        new, after = torch.empty_like(h), torch.empty_like(product)
        rows = (q.at, k.at, v.at, a.at, h.data_ptr(), out.at, new.data_ptr(), after.data_ptr())
        if d == 1:
            marks = self.room(_MARKS * 2 * heads).at
            self.code += (CALL_NARROW, kernel("gate_loop", "gate_loop_narrow", self.wide), *rows, marks, b, heads)
        else:
            self.code += (CALL_WIDE, kernel("gate_loop", "gate_loop_wide", self.wide), *rows, b, heads, d)
        self.code += (COMPLEX_PRODUCT, after.data_ptr(), product.data_ptr(), b * heads)
        return out, new, after

    def run(self) -> bool:
        """Carries the instructions out; False if an id was not in its table, so that nothing was computed.

        Raises:
            MemoryError: there is none for the scratch.
        """
        for row, out in self.results:
            self.code += (NARROW_ROWS, row.at, row.stride, out.data_ptr(), row.width, self.rows, row.width)
        self.results = []
        return carry_out(array.array("q", self.code), self.space, self.dtype) == DONE


def carry_out(code: array.array, space: int, dtype: torch.dtype) -> int:
    """Carries out instructions that need `space` numbers of scratch. DONE or OUT_OF_RANGE; MemoryError as in `Steps.run`."""
    place, length = code.buffer_info()
    outcome = function("steps", "try_steps", dtype, "piii")(place, length, space + LINE, torch.get_num_threads())
    if outcome == NO_MEMORY:
        raise MemoryError(f"fnattn: no memory for the scratch of a step ({space} numbers of {dtype})")
    return outcome
