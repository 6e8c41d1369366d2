"""Rows of heads that lie far apart are copied side by side where that pays: results are the same to the last bit."""

from __future__ import annotations

import pytest
import torch
from fnattn_kernels.native import build
from torch.func import jvp

from fnattn import ops

REASON = next(filter(None, map(build.why_not, ("softmax", "segment_attention", "coor_descent"))), None)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
PICTURE = {"text_len": 45, "image_size": 16}
LAYOUT = torch.ones(1, 19, 19).tril().bool()
CALLS = {
    "softmax": lambda *qkv, **how: ops.softmax_attention(*qkv, causal=True, **how),
    "masked": lambda *qkv, **how: ops.softmax_attention(*qkv, mask=MASK, **how),
    "conv": lambda *qkv, **how: ops.conv_attention(*qkv, **PICTURE, **how),
    "axial": lambda *qkv, **how: ops.axial_attention(*qkv, **PICTURE, **how),
    "column": lambda *qkv, **how: ops.axial_attention(*qkv, **PICTURE, axis=1, **how),
    "block_sparse": lambda *qkv, **how: ops.block_sparse_attention(*qkv, LAYOUT, block=16, causal=True, **how),
    "coor_descent": lambda *qkv, **how: ops.coor_descent_attention(*qkv, 2.0, eps_init=4.0, eps_decay=0.7, **how),
}
MASK = torch.rand(300, 300, generator=torch.Generator().manual_seed(9)) < 0.7


def draw(n, d, e, g, dtype, seed):
    """q, k, v as a packed projection has them: heads side by side in rows of all of them."""
    h, torch_seed = 4, torch.Generator().manual_seed(seed)
    packed = torch.randn(2, n, h * d + g * (d + e), generator=torch_seed, dtype=torch.float64).to(dtype)
    parts = packed.split((h * d, g * d, g * e), -1)
    return [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t, heads in zip(parts, (h, g, g))]


def everything(call, args, tangents):
    leaves = [a.detach().requires_grad_() for a in args]
    out = call(*leaves, impl="native")
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
    slope = jvp(lambda *a: call(*a, impl="native"), tuple(args), tuple(tangents))[1]
    return out.detach(), slope, *torch.autograd.grad(out, leaves, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d, e, g", [(16, 16, 4), (12, 20, 4), (16, 8, 2)])
@pytest.mark.parametrize("name", CALLS)
def test_a_packed_projection_gives_the_bits_of_separate_heads(name, d, e, g, dtype):
    n = {"softmax": 300, "masked": 300, "block_sparse": 304, "coor_descent": 300}.get(name, 45 + 16 * 16 - 1)
    g = 4 if name == "block_sparse" else g  # it has a key head for each query head
    packed, tangents = draw(n, d, e, g, dtype, 1), draw(n, d, e, g, dtype, 2)
    alone = everything(CALLS[name], [t.contiguous() for t in packed], [t.contiguous() for t in tangents])
    for mine, theirs in zip(everything(CALLS[name], packed, tangents), alone):
        assert torch.equal(mine, theirs) and mine.abs().max() > 0


@pytest.mark.parametrize("threads", [1, 2])
def test_heads_too_long_for_a_copy_are_read_where_they_lie(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed, tangents = draw(2100, 32, 32, 2, torch.float64, 3), draw(2100, 32, 32, 2, torch.float64, 4)
        call = CALLS["softmax"]
        alone = everything(call, [t.contiguous() for t in packed], [t.contiguous() for t in tangents])
        for mine, theirs in zip(everything(call, packed, tangents), alone):
            assert torch.equal(mine, theirs) and mine.abs().max() > 0
    finally:
        torch.set_num_threads(before)
