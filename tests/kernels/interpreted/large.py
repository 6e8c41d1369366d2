"""Triton kernels on tensors of more than 2^31 elements, as Taylor attention at B16 H16 n 131072 e 64 has them: no address is out of reach.

On the meta device, which has addresses but no memory, by `torch_triton`: the first and the last program of each launch.
"""

from __future__ import annotations

import pytest
import torch
import torch_triton

torch_triton.install()

from fnattn_kernels.triton import causal_dot, gate_loop_channels, gate_loop_heads, scan, softmax, taylor  # noqa: E402


def shape(*sizes):
    return torch.empty(sizes, device="meta")


def many(b, n, h=16, d=16, e=64):
    return shape(b, h, n, d), shape(b, h, n, d), shape(b, h, n, e)


def channels(*tail):
    return shape(2048, 1031, 1024, *tail)


def back(run, args, fn):
    """fn(args, results of run(*args))."""
    out = run(*args)
    return fn(*args, *(out if isinstance(out, tuple) else (out,)))


TAYLOR = False, True, 0.25, 1e-5  # hard, causal, scale, eps
CALLS = {
    "taylor": lambda: back(lambda *a: taylor._forward(*a, None, None, *TAYLOR), many(256, 8209), lambda q, k, v, out, den, _: (
        taylor._backward(q, k, v, None, None, out, den, shape(*out.shape), None, *TAYLOR),
        taylor._tangent(q, k, v, None, None, out, den, q, k, v, None, None, *TAYLOR))),
    "causal_dot": lambda: causal_dot._dot(*many(b=2048, n=1031), True),
    "softmax_attention": lambda: back(lambda *a: softmax._attend(*a, None, 0, 0.25), many(b=2048, n=1031), lambda q, k, v, out, lse: (
        softmax._backward(shape(*out.shape), q, k, v, None, out, lse, 0, 0.25),
        softmax._tangent(q, k, v, None, out, lse, q, k, v, 0, 0.25))),
    "scan": lambda: scan._scan(channels(), channels(), None, True, False, True, False),
    "simple_gate_loop": lambda: back(lambda *a: gate_loop_channels._simple(*a, None, False), (channels(),) * 3,
                                     lambda q, x, a, out, last, marks: gate_loop_channels._simple_backward(
                                         q, x, a, None, marks, out, None, False)),
    "gate_loop, width 1": lambda: back(lambda *a: gate_loop_channels._narrow(*a, None), ((channels(),) * 3 + (channels(2),)),
                                       lambda q, k, v, a, out, last, product, marks: gate_loop_channels._narrow_backward(
                                           q, k, v, a, None, marks, product, out, None, None)),
    "gate_loop": lambda: back(lambda *a: gate_loop_heads._wide(*a, None), (*many(b=2048, n=1031, d=64), shape(2048, 16, 1031, 2)),
                              lambda q, k, v, a, out, *rest: (gate_loop_heads._wide_backward(q, k, v, a, None, out, None, None),
                                                              gate_loop_heads._wide_tangent(q, k, v, a, None, q, k, v, a, None))),
}


@pytest.mark.parametrize("name", CALLS)
def test_addresses_past_2_to_the_31_are_right(name):
    with torch_triton.corners():
        CALLS[name]()


def test_an_address_that_wraps_is_found():
    @torch_triton.Kernel
    def copy(x, y, n):
        at = torch_triton.tl.program_id(0) * n + torch_triton.tl.arange(0, 16)
        torch_triton.tl.store(y + at, torch_triton.tl.load(x + at))

    x = shape(1 << 16, 1 << 16)
    with torch_triton.corners(), pytest.raises(IndexError):
        copy[(1 << 16,)](x, x, 1 << 16)
