"""Triton's kernels of the gated loops, compiled for a GPU that need not be here."""

from __future__ import annotations

import pytest
import torch
from compiling import compiled, compiles, needs_triton
from fnattn_kernels.triton import gate_loop_channels as channels
from fnattn_kernels.triton import gate_loop_heads as heads
from fnattn_kernels.triton import lang

pytestmark = [needs_triton, compiles]
KINDS = {"fp32": torch.float32, "fp64": torch.float64}


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_one_complex_number_per_channel(dtype):
    from fnattn_kernels.triton import gate_loop_narrow_device as device

    acc = {"ACC": lang.accumulator(KINDS[dtype])}
    shape = dict(channels.shape(1000, 1000, KINDS[dtype]), START=True, OUT=True, FINISH=True, **acc)
    ends, sizes = ("starts", "ends", "products"), ("n", "c", "tiles", "slots")
    compiled(device, "forward", ("q", "k", "v", "a", "out", "marks", *ends), sizes, shape, dtype=dtype)
    compiled(device, "backward", ("q", "k", "v", "a", "marks", "g", "fixed", "dq", "dk", "dv", "da", *ends), sizes,
             {**shape, "FIXED": True}, dtype=dtype)
    compiled(device, "tangent", ("q", "k", "v", "a", "marks", "tq", "tk", "tv", "ta", "out", "logs", *ends), sizes, shape,
             dtype=dtype)
    compiled(device, "carry", ("products", "ends", "first", "starts", "last", "whole"), ("segments", "c"),
             {"C": 32, "START": True, **acc}, dtype=dtype)


@pytest.mark.parametrize("reverse", [False, True])
def test_one_real_number_per_channel(reverse):
    from fnattn_kernels.triton import gate_loop_simple_device as device

    acc = {"ACC": lang.accumulator(torch.float32)}
    shape = dict(channels.shape(1000, 1000, torch.float32), REVERSE=reverse, START=True, OUT=True, FINISH=True, **acc)
    ends, sizes = ("starts", "ends", "products"), ("n", "c", "tiles", "slots")
    compiled(device, "forward", ("q", "x", "a", "out", "marks", *ends), sizes, shape)
    compiled(device, "backward", ("q", "x", "a", "marks", "g", "dq", "dx", "da", *ends), sizes, shape)
    compiled(device, "tangent", ("q", "x", "a", "marks", "tq", "tx", "ta", "out", *ends), sizes, shape)
    if not reverse:
        compiled(device, "carry", ("products", "ends", "first", "starts", "last"), ("segments", "c"), {"C": 32, "START": True, **acc})


@pytest.mark.parametrize("width, dtype", [(16, "fp32"), (128, "fp32"), (64, "fp64")])
def test_a_complex_number_per_head(width, dtype):
    from fnattn_kernels.triton import gate_loop_heads_device as forward
    from fnattn_kernels.triton import gate_loop_heads_grad_device as grad

    kinds = heads.kinds(width, width, KINDS[dtype])
    acc = {"ACC": lang.accumulator(KINDS[dtype])}
    dot = {**acc, "PRECISION": lang.PRECISION}
    sizes = ("n", "d", "e")

    def check(device, name, pointers, integers, constants):
        compiled(device, name, pointers, integers, constants, dtype=dtype)

    check(forward, "gates", ("a", "ta", "p", "ends", "logs", "log_ends"), ("n",), {"TANGENT": True, "M": heads.CHUNK, **acc})
    check(forward, "sums", ("x", "y", "p", "ends", "states"), sizes, {"BACK": False, **kinds["sums"], **dot})
    check(forward, "carry", ("states", "ends", "first", "last", "product"), ("chunks", "size"),
          {"START": True, "REVERSE": True, **kinds["flat"], **acc})
    sizes = (*sizes, "chunks")
    rows = "q", "k", "v", "p", "states"
    check(forward, "outputs", (*rows, "out"), sizes, {**kinds["rows"], **dot})
    check(grad, "queries", (*rows, "g", "dq", "logs"), sizes, {**kinds["queries"], **dot})
    check(grad, "keys", ("q", "k", "v", "g", "p", "ends", "r", "dk", "dv", "logs"), sizes, {**kinds["keys"], **dot})
    check(grad, "gates_back", ("a", "logs", "states", "r", "fixed", "da"), ("n", "chunks", "size"),
          {"FIXED": True, "M": heads.CHUNK, **kinds["flat"], **acc})
    tangents = "tk", "tv", "logs", "states", "moves"
    check(grad, "tangent_sums", ("k", "v", "p", "ends", "log_ends", *tangents), sizes[:3], {**kinds["sums"], **dot})
    check(grad, "tangent_outputs", ("q", "k", "v", "p", "tq", "out", *tangents), sizes, {**kinds["rows"], **dot})
