"""Calls of operators with any sizes, options and order of memory, as hypothesis draws them; see test_any_call.py.

CALLS[name](draw) gives (function of impl and tensors, tensors in float64 that it is differentiated in).
"""

from __future__ import annotations

from hypothesis import strategies as st
from torch import float64, ones, rand, randint, randn, tensor, tril

from fnattn import ops

# b batch, h query heads, g key heads, n queries, m keys, d width of q and k, e width of v
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129)
WIDTHS = (1, 2, 3, 5, 8, 16, 17, 24, 33)
of, maybe = st.sampled_from, st.booleans()


def normal(*shape, scale=1.0):
    return randn(*shape, dtype=float64) * scale


def some(draw, *shape, share=0.7):
    """A bool tensor, or None."""
    return rand(*shape) < share if draw(maybe) else None


def heads(draw, lengths=LENGTHS, widths=WIDTHS, apart=False):
    """b, h, g, n, m, d, e; m is n unless apart."""
    b, g, n = draw(of((1, 2, 3))), draw(of((1, 2, 3))), draw(of(lengths))
    return b, g * draw(of((1, 1, 2, 3))), g, n, draw(of(lengths)) if apart and draw(maybe) else n, draw(of(widths)), draw(of(widths))


def qkv(b, h, g, n, m, d, e):
    return [normal(b, h, n, d), normal(b, g, m, d), normal(b, g, m, e)]


def causal_dot(draw):
    options = {"reverse": draw(maybe)}
    return lambda impl, *args: ops.causal_dot(*args, impl=impl, **options), qkv(*heads(draw))


def taylor(draw):
    causal = draw(maybe)
    b, h, g, n, m, d, e = heads(draw, widths=(1, 2, 3, 5, 8, 16, 17), apart=not causal)
    args, kind = qkv(b, h, g, n, m, d, e), draw(of(("none", "bool", "weights")))
    keep = None if kind == "none" else rand(b, m) < 0.7
    earlier = draw(maybe)
    # Sums of keys that came before: of anything else, normalisers may be anything.
    args += [ops.taylor(*qkv(b, g, g, 5, 5, d, e), impl="reference")[1]] * earlier + [rand(b, m, dtype=float64)] * (kind == "weights")

    def call(impl, q, k, v, *rest):
        mask = rest[-1] if kind == "weights" else keep
        return ops.taylor(q, k, v, sums=rest[0] if earlier else None, keep=mask, causal=causal, impl=impl)
    return call, args


def scan(draw):
    b, n, c, pairs = draw(of((1, 2))), draw(of(LENGTHS)), draw(of((1, 3, 8, 17, 40))), draw(maybe)
    last, options = (2,) * pairs, {"pairs": pairs, "reverse": draw(maybe)}
    args = [normal(b, n, c, *last, scale=0.5), normal(b, n, c, *last)] + [normal(b, c, *last)] * draw(maybe)
    return lambda impl, *args: ops.scan(*args, impl=impl, **options), args


def gate_loop(draw):
    b, h, g, n, _, d, e = heads(draw)
    d, e = draw(of(((d, e), (1, 1))))
    args = [*qkv(b, h, g, n, n, d, e), normal(b, h, n, 2, scale=draw(of((0.3, 1.0, 3.0))))]
    args += [normal(b, h, d, e, 2), normal(b, h, 2)] * draw(maybe)
    return lambda impl, q, k, v, a, *state: ops.gate_loop(q, k, v, a, state=state or None, impl=impl), args


def simple_gate_loop(draw):
    b, n, c = draw(of((1, 2))), draw(of(LENGTHS)), draw(of((1, 3, 16, 17, 40)))
    options = {"reverse": draw(maybe)}
    args = [normal(b, n, c) for _ in range(3)] + [normal(b, c)] * draw(maybe)
    return lambda impl, *args: ops.simple_gate_loop(*args, impl=impl, **options), args


def schedule(draw):
    return {"eps": draw(of((0.1, 0.3, 0.05))), "eps_init": draw(of((None, 4.0, 1.0, 0.05))), "eps_decay": draw(of((1.0, 0.7, 0.5))),
            "n_iters": draw(of((1, 2, 3, 5, 20))), "solver": draw(of(("iterate", "exact")))}


def coor_descent(draw):
    shape = [*draw(of(((), (3,), (2, 2)))), draw(of(LENGTHS))]
    options, k = {**schedule(draw), "mask": some(draw, *shape)}, draw(of((1.0, 3.5, 0.5)))
    args = [normal(*shape, scale=draw(of((0.3, 1.0, 5.0))))]
    args += draw(of(([], [tensor(k, dtype=float64)], [rand(shape[:-1], dtype=float64) * 3 + 1])))
    return lambda impl, s, *own: ops.coor_descent(s, *(own or (k,)), impl=impl, **options), args


def coor_descent_attention(draw):
    b, h, g, n, m, d, e = heads(draw, apart=True)
    nulls = draw(of((0, 0, 1, 3)))
    options = {**schedule(draw), "nulls": nulls, "keep": some(draw, b, m + nulls), "causal": draw(maybe), "offset": draw(of((None, 0, 3))),
               "scale": draw(of((None, 0.4)))}
    args = qkv(b, h, g, n, m + nulls, d, e) + [rand(b, h, n, dtype=float64) * 3 + 1] * draw(maybe)
    return lambda impl, q, k, v, *own: ops.coor_descent_attention(q, k, v, *(own or (2.0,)), impl=impl, **options), args


def softmax_attention(draw):
    b, h, g, n, m, d, e = heads(draw, apart=True)
    shape, causal = draw(of((None, (b, 1, 1, m), (1, 1, n, m), (b, h, n, m), (n, m), (b, 1, n, m)))), draw(maybe)
    options = {"mask": None if shape is None else rand(*shape) < draw(of((0.1, 0.7))), "causal": causal, "scale": draw(of((None, 0.4))),
               "offset": draw(of((None, 0, 2, m - n))) if causal else None}
    return lambda impl, *args: ops.softmax_attention(*args, impl=impl, **options), qkv(b, h, g, n, m, d, e)


def cached_attention(draw):
    b, h, g, n, _, d, e = heads(draw, lengths=(1, 2, 3, 7))
    w, room = draw(of((1, 4, 8))), draw(of((8, 17, 40)))
    first = w * draw(st.integers(max(0, -(-(n - w) // w)), room // w))
    length = draw(st.integers(max(first, n), max(first + w, n)))
    options = {"first": first, "length": length, "mask": some(draw, b, 1, 1, length)}
    args = [*qkv(b, h, g, n, room, d, e), normal(b, g, w, d), normal(b, g, w, e)]
    return lambda impl, *args: ops.cached_attention(*args, impl=impl, **options), args


def picture(draw, **more):
    """Heads and options of attention over a text and a picture, of which the last pixels may be missing."""
    b, h, g, _, _, d, e = heads(draw)
    text, side = draw(of((1, 2, 3, 5, 17))), draw(of((1, 2, 3, 5, 8)))
    n = max(1, text + side * side - draw(of((0, 0, 1, 3))))
    options = {"text_len": text, "image_size": side, "mask": some(draw, b, n, share=0.8), "text_sees_all": draw(maybe)}
    return qkv(b, h, g, n, n, d, e), {**options, **more}


def conv_attention(draw):
    args, options = picture(draw, kernel_size=draw(of((1, 3, 5))), dilation=draw(of((1, 1, 2))))
    return lambda impl, *args: ops.conv_attention(*args, impl=impl, **options), args


def axial_attention(draw):
    args, options = picture(draw, axis=draw(of((0, 1))))
    return lambda impl, *args: ops.axial_attention(*args, impl=impl, **options), args


def block_sparse_attention(draw):
    b, h, _, _, _, d, e = heads(draw)
    block, blocks, causal = draw(of((1, 2, 4, 16))), draw(of((1, 2, 3, 5))), draw(maybe)
    n = draw(st.integers(1, block * blocks))
    layout = rand(draw(of((1, h))), blocks, blocks) < 0.6
    options = {"layout": layout & tril(ones(blocks, blocks)).bool() if causal else layout, "block": block, "causal": causal,
               "keep": some(draw, b, n)}
    return lambda impl, *args: ops.block_sparse_attention(*args, impl=impl, **options), qkv(b, h, h, n, n, d, e)


def rotary(draw):
    d, n = draw(of((2, 4, 7, 16, 33))), draw(of(LENGTHS))
    freqs, positions = rand(draw(st.integers(1, d // 2))), randint(0, 50, (n,))
    return lambda impl, x: ops.rotary(x, positions, freqs, impl=impl), [normal(*draw(of(((2, 3), (3,), ()))), n, d)]


def linear(draw):
    k, m = draw(of((1, 5, 16, 33))), draw(of((1, 7, 16, 40)))
    args = [normal(*draw(of(((2, 3), (5,), (1, 1), ()))), k), normal(m, k)] + [normal(m)] * draw(maybe)
    return lambda impl, *args: ops.linear(*args, impl=impl), args


def rms_norm(draw):
    d = draw(of((2, 5, 16, 33)))
    return lambda impl, *args: ops.rms_norm(*args, impl=impl), [normal(*draw(of(((2, 3), (5,), (1, 1), (), (2, 70)))), d), normal(d)]


CALLS = {call.__name__: call for call in (
    causal_dot, taylor, scan, gate_loop, simple_gate_loop, coor_descent, coor_descent_attention, softmax_attention, cached_attention,
    conv_attention, axial_attention, block_sparse_attention, rotary, linear, rms_norm)}
