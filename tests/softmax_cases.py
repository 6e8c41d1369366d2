"""What the tests of softmax attention share: inputs of every kind, and an average taken row by row."""

from __future__ import annotations

import torch

from fnattn.ops import softmax_attention

F64, F32 = torch.float64, torch.float32

# name -> b, h, g, n, m, d, e, options; mask is the shape of a random one
CASES = {
    "all keys": (2, 3, 3, 5, 7, 3, 3, {}),
    "causal": (2, 3, 3, 7, 7, 5, 5, dict(causal=True)),
    "causal, aligned to the end": (1, 2, 2, 5, 11, 3, 2, dict(causal=True)),
    "causal, more queries than keys": (1, 2, 2, 11, 5, 2, 3, dict(causal=True)),
    "one key head, wide values": (2, 5, 1, 3, 7, 2, 11, dict(causal=True, scale=0.7)),
    "grouped heads, narrow values": (2, 6, 2, 5, 7, 11, 2, dict(causal=True, offset=1)),
    "queries before the first key": (1, 2, 2, 7, 5, 3, 3, dict(causal=True, offset=-3)),
    "queries after the last key": (1, 2, 2, 3, 5, 3, 3, dict(causal=True, offset=11)),
    "one query": (2, 6, 2, 1, 13, 3, 3, dict(causal=True, offset=7)),
    "mask of keys": (2, 3, 3, 5, 7, 3, 3, dict(mask=(2, 1, 1, 7))),
    "mask of pairs, causal": (2, 6, 3, 5, 11, 3, 3, dict(mask=(5, 11), causal=True)),
    "mask of everything, causal": (2, 6, 3, 7, 5, 3, 2, dict(mask=(2, 6, 7, 5), causal=True, offset=2)),
    "mask of heads": (1, 3, 1, 5, 5, 3, 3, dict(mask=(3, 1, 1))),
    "several tiles": (1, 2, 1, 131, 149, 7, 5, dict(mask=(131, 149), causal=True)),
}


def make(case, dtype=F64, seed=0):
    """q, k, v and the keyword arguments of a case."""
    b, h, g, n, m, d, e, options = CASES[case]
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(s, generator=source, dtype=F64).to(dtype) for s in ((b, h, n, d), (b, g, m, d), (b, g, m, e)))
    options = dict(options)
    if "mask" in options:
        mask = torch.rand(options["mask"], generator=source) > 0.4
        mask.view(-1, mask.shape[-1])[0] = False  # someone sees nothing
        options["mask"] = mask
    return (q, k, v), options


def brute(q, k, v, mask=None, causal=False, scale=None, offset=None):
    """Each row by itself: softmax over the keys that it sees, by index."""
    (b, h, n, d), (_, g, m, e) = q.shape, v.shape
    first = m - n if offset is None else int(offset)
    mask = torch.ones(b, h, n, m, dtype=torch.bool) if mask is None else mask.expand(b, h, n, m)
    out = []
    for i in range(b * h * n):
        bi, hi, ni = i // (h * n), i // n % h, i % n
        keys = [j for j in range(m) if mask[bi, hi, ni, j] and (not causal or j <= first + ni)]
        k_i, v_i = k[bi, hi * g // h, keys], v[bi, hi * g // h, keys]
        scores = k_i @ q[bi, hi, ni] * (d ** -0.5 if scale is None else scale)
        out.append(scores.softmax(0) @ v_i if keys else 0 * q[bi, hi, ni].sum() + q.new_zeros(e))
    return torch.stack(out).view(b, h, n, e)


def attending(impl, options):
    """softmax_attention as a function of q, k, v alone."""
    return lambda q, k, v: softmax_attention(q, k, v, **options, impl=impl)


def directions(tensors, seed=5):
    source = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, generator=source, dtype=F64).to(t.dtype) for t in tensors)
