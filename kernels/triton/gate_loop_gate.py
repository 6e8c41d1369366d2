"""Device code that the gated loops share: the gate of a raw complex number, and steps of recurrences."""

from __future__ import annotations

from .lang import jit, tl


@jit
def make_gate(x, y, ACC: tl.constexpr):
    """Of raw gates: direction, size of alpha, 1 - size and 1 / length.

    At zero (below 2^-100) the direction is 1 and the last two are 0, so that no derivative passes. Squares of tiny and of huge
    numbers leave the range, so lengths are taken of numbers scaled by a power of 2.
    """
    largest = tl.maximum(tl.abs(x), tl.abs(y))
    zero = largest < 7.888609052210118e-31
    scale = tl.where(largest < 9.094947017729282e-13, 1.2089258196146292e24,
                     tl.where(largest > 1099511627776.0, 8.271806125530277e-25, 1.0)).to(ACC)
    if ACC == tl.float64:
        scale = tl.where(largest > 2.582249878086909e120, 2.409919865102884e-181, scale)
    x, y = tl.where(zero, 1.0, x * scale), tl.where(zero, 0.0, y * scale)
    length = tl.sqrt(x * x + y * y)
    small = tl.exp(-tl.where(zero, 0.0, length / scale))
    size = 1.0 / (1.0 + small)
    return x / length, y / length, size, tl.where(zero, 0.0, small * size), tl.where(zero, 0.0, scale / length)


@jit
def after(a, x, b, y):
    """The step (a, x) and then (b, y) as one step h -> a b h + (b x + y)."""
    return a * b, b * x + y


@jit
def after_pairs(ar, ai, xr, xi, br, bi, yr, yi):
    """The same for complex numbers."""
    return (ar * br - ai * bi, ar * bi + ai * br, br * xr - bi * xi + yr, br * xi + bi * xr + yi)


@jit
def times(ar, ai, br, bi):
    """A complex product."""
    return ar * br - ai * bi, ar * bi + ai * br


@jit
def at_row(x, row, ROWS: tl.constexpr):
    """One row of x [ROWS, columns]."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == row)[:, None], x, 0.0), 0)


@jit
def load_pairs(base, place, mask, first, ACC: tl.constexpr):
    """Pairs (re, im), (first, 0) where masked."""
    return (tl.load(base + 2 * place, mask=mask, other=first).to(ACC),
            tl.load(base + 2 * place + 1, mask=mask, other=0.0).to(ACC))


@jit
def store_pairs(base, place, re, im, mask):
    """Pairs (re, im)."""
    tl.store(base + 2 * place, re, mask=mask)
    tl.store(base + 2 * place + 1, im, mask=mask)
