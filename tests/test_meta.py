"""Tensors on the meta device, of more than 2^31 elements: every operator gives shapes and dtypes, and takes no memory and no time."""

from __future__ import annotations

import time

import pytest
import torch

from fnattn import ops
from fnattn.ops.report import CASES

LONG = 1 << 27  # times the other axes: beyond 2^31 elements


def draw(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def qkv(b=2, h=8, g=4, n=LONG, d=4, e=2):
    return draw(b, h, n, d), draw(b, g, n, d), draw(b, g, n, e)


PICTURE = {"text_len": 256, "image_size": 1 << 10}
WIDE = dict(b=1 << 10, h=4, n=256 + (1 << 20))
CALLS = {
    "causal_dot": lambda: (ops.causal_dot(*qkv()), (2, 8, LONG, 2)),
    "scan": lambda: (ops.scan(draw(3, LONG, 8), draw(3, LONG, 8)), (3, LONG, 8)),
    "taylor": lambda: (ops.taylor(*qkv())[0], (2, 8, LONG, 2)),
    "gate_loop": lambda: (ops.gate_loop(*qkv(), draw(2, 8, LONG, 2))[0], (2, 8, LONG, 2)),
    "simple_gate_loop": lambda: (ops.simple_gate_loop(*(draw(3, LONG, 8) for _ in range(3)))[0], (3, LONG, 8)),
    "softmax_attention": lambda: (ops.softmax_attention(*qkv(), causal=True), (2, 8, LONG, 2)),
    "cached_attention": lambda: (ops.cached_attention(draw(64, 8, 1, 4), *(draw(64, 4, n, 4) for n in (LONG, LONG, 7, 7)), first=LONG,
                                                      length=LONG + 7), (64, 8, 1, 4)),
    "linear": lambda: (ops.linear(draw(2, LONG, 8), draw(16, 8)), (2, LONG, 16)),
    "rms_norm": lambda: (ops.rms_norm(draw(2, LONG, 16), draw(16)), (2, LONG, 16)),
    "masked_softmax": lambda: (ops.masked_softmax(draw(17, LONG)), (17, LONG)),
    "rotary": lambda: (ops.rotary(draw(2, 8, LONG, 4), torch.arange(LONG, device="meta"), draw(2, dtype=torch.float32)), (2, 8, LONG, 4)),
    "coor_descent": lambda: (ops.coor_descent(draw(17, LONG), 2.0), (17, LONG)),
    "coor_descent_attention": lambda: (ops.coor_descent_attention(*qkv(), sparsity_k=2.0), (2, 8, LONG, 2)),
    "block_sparse_attention": lambda: (ops.block_sparse_attention(*qkv(g=8), draw(1, 1 << 11, 1 << 11, dtype=torch.bool), block=LONG >> 11),
                                       (2, 8, LONG, 2)),
    "conv_attention": lambda: (ops.conv_attention(*qkv(**WIDE), **PICTURE), (WIDE["b"], 4, WIDE["n"], 2)),
    "axial_attention": lambda: (ops.axial_attention(*qkv(**WIDE), **PICTURE), (WIDE["b"], 4, WIDE["n"], 2)),
}


def test_every_operator_is_here():
    assert set(CALLS) == set(CASES)


@pytest.mark.parametrize("name", [name for name in CALLS if hasattr(ops, name)])
def test_beyond_2_to_the_31_elements(name):
    began = time.process_time()
    out, shape = CALLS[name]()
    assert out.shape == shape
    assert out.numel() >= 1 << 31 or name == "cached_attention"  # one query: the keys are large
    assert out.dtype == torch.bfloat16 and out.device.type == "meta"
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", ["causal_dot", "taylor", "softmax_attention"])
def test_gradients_too(name):
    args = [t.requires_grad_() for t in qkv()]
    out = getattr(ops, name)(*args)
    out = out[0] if isinstance(out, tuple) else out
    assert [g.shape for g in torch.autograd.grad(out.sum(), args)] == [t.shape for t in args]


def test_no_compiler_is_needed(monkeypatch):
    monkeypatch.setenv("FNATTN_NATIVE", "0")
    assert ops.causal_dot(*qkv()).shape == (2, 8, LONG, 2)
    with pytest.raises(TypeError, match="floating point"):
        ops.causal_dot(*(t.long() for t in qkv(n=3)))
