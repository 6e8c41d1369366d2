"""Calls of every operator with two sequences and four heads, for splitting over two devices; importable by their processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from fnattn_kernels.native import linear as native_linear
from fnattn_kernels.native import rms_norm as native_rms_norm
from torch import Tensor

from fnattn import ops


class Call(NamedTuple):
    """run(*tensors) -> the first result; made(source) -> the tensors; the first `moving` of them are differentiated."""

    run: Callable
    shapes: tuple[tuple[int, ...], ...]
    others: Callable[[], tuple[Tensor, ...]] = tuple

    def tensors(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Differentiable ones and others, the same every time."""
        source = torch.Generator().manual_seed(5)
        return [torch.randn(shape, generator=source, dtype=torch.float64) for shape in self.shapes], self.others()


def _qkv(n: int = 6, m: int | None = None, h: int = 4, g: int = 2, d: int = 4, e: int = 2) -> tuple:
    return (2, h, n, d), (2, g, m or n, d), (2, g, m or n, e)


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _keep() -> Tensor:
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, 1] = keep[1, 4] = False
    return keep


def _layout(heads: int) -> Tensor:
    return torch.eye(3, dtype=torch.bool).expand(heads, 3, 3).clone().index_fill_(2, torch.tensor([0]), True)


_PICTURE = {"text_len": 2, "image_size": 2}
_SOLVER = {"n_iters": 3, "eps": 0.3, "eps_init": 2.0, "eps_decay": 0.7}
CALLS = {
    "causal_dot": Call(lambda q, k, v: ops.causal_dot(q, k, v, impl="native"), _qkv()),
    "scan": Call(lambda a, x, h0: ops.scan(a.sigmoid(), x, h0, impl="native"), ((2, 6, 4), (2, 6, 4), (2, 4))),
    "scan, pairs": Call(lambda a, x: ops.scan(a.sigmoid(), x, pairs=True, impl="native"), ((2, 6, 4, 2),) * 2),
    "scan, bfloat16": Call(lambda a, x: ops.scan(a.sigmoid().bfloat16(), x.bfloat16(), impl="native").double(), ((2, 6, 4),) * 2),
    "taylor": Call(lambda q, k, v, s: _first(ops.taylor(q, k, v, sums=s * s, impl="native")), (*_qkv(d=2), (2, 2, 6, 3))),
    "taylor, keep": Call(lambda q, k, v, keep: _first(ops.taylor(q, k, v, keep=keep, causal=False, impl="native")), _qkv(d=2),
                         lambda: (_keep(),)),
    "gate_loop": Call(lambda q, k, v, a: _first(ops.gate_loop(q, k, v, a, impl="native")), (*_qkv(g=4), (2, 4, 6, 2))),
    "gate_loop, width 1": Call(lambda q, k, v, a: _first(ops.gate_loop(q, k, v, a, impl="native")),
                               (*_qkv(g=4, d=1, e=1), (2, 4, 6, 2))),
    "simple_gate_loop": Call(lambda q, kv, a: _first(ops.simple_gate_loop(q, kv, a, impl="native")), ((2, 6, 4),) * 3),
    "softmax_attention": Call(lambda q, k, v, mask: ops.softmax_attention(q, k, v, mask=mask, causal=True, impl="native"), _qkv(),
                              lambda: (_keep()[:, None, None],)),
    "softmax_attention, a mask per head": Call(
        lambda q, k, v, mask: ops.softmax_attention(q, k, v, mask=mask, impl="native"), _qkv(),
        lambda: (torch.ones(6, 6, dtype=torch.bool).tril().expand(1, 4, 6, 6).clone().index_fill_(1, torch.tensor([2]), True),)),
    "cached_attention": Call(lambda q, *kv: ops.cached_attention(q, *kv, first=5, length=6, impl="native"),
                             ((2, 4, 1, 4), (2, 2, 5, 4), (2, 2, 5, 2), (2, 2, 1, 4), (2, 2, 1, 2))),
    "linear": Call(lambda x, weight, bias: ops.linear(x, weight, bias, impl="native"), ((2, 6, 4), (8, 4), (8,))),
    "linear, weights for each sequence": Call(native_linear.linear, ((2, 6, 4), (2, 8, 4), (2, 8))),
    "rms_norm, gamma for each sequence": Call(native_rms_norm.norm, ((2, 6, 4), (2, 4))),
    "rms_norm": Call(lambda x, gamma: ops.rms_norm(x, gamma, impl="native"), ((2, 6, 4), (4,))),
    "rotary": Call(lambda x, positions, freqs: ops.rotary(x, positions, freqs, impl="native"), _qkv()[:1],
                   lambda: (torch.arange(6), torch.tensor([1.0, 0.1]))),
    "coor_descent": Call(lambda s, k: ops.coor_descent(s, k.square() + 1, **_SOLVER, impl="native"), ((2, 4, 6), (2, 4))),
    "coor_descent, exact": Call(lambda s: ops.coor_descent(s, 2.0, solver="exact", eps=0.3, impl="native"), ((2, 4, 6),)),
    "coor_descent_attention": Call(lambda q, k, v: ops.coor_descent_attention(q, k, v, sparsity_k=2.0, **_SOLVER, impl="native"), _qkv()),
    "block_sparse_attention": Call(
        lambda q, k, v, layout: ops.block_sparse_attention(q, k, v, layout, block=2, causal=True, impl="native"), _qkv(g=4),
        lambda: (_layout(1),)),
    "block_sparse_attention, a layout per head": Call(
        lambda q, k, v, layout: ops.block_sparse_attention(q, k, v, layout, block=2, impl="native"), _qkv(g=4), lambda: (_layout(4),)),
    "conv_attention": Call(lambda q, k, v, keep: ops.conv_attention(q, k, v, **_PICTURE, kernel_size=3, mask=keep, impl="native"), _qkv(),
                           lambda: (_keep(),)),
    "axial_attention": Call(lambda q, k, v: ops.axial_attention(q, k, v, **_PICTURE, axis=1, impl="native"), _qkv()),
}
