"""Triton's kernels of the gated loops, compiled for a GPU that need not be here.

Each is compiled for common sizes in float32, and in float64 for sizes of 1, which Triton takes for constants.
"""

from __future__ import annotations

import pytest
import torch
from compiling import compiled, compiles, needs_triton
from fnattn_kernels.triton import gate_loop_channels as channels
from fnattn_kernels.triton import gate_loop_heads as heads
from fnattn_kernels.triton import lang

pytestmark = [needs_triton, compiles]
SIZES = "n", "c", "d", "e", "tiles", "slots", "segments", "chunks", "size"


def build(device, name, ones, **constants):
    """One kernel; `ones`: in float64, for sizes of 1."""
    names = getattr(device, name).arg_names
    constants = {"ACC": lang.accumulator(kind(ones)), "PRECISION": lang.PRECISION} | constants
    if ones:
        constants |= dict.fromkeys(set(SIZES) - {"slots"}, 1)
    constants = {key: value for key, value in constants.items() if key in (*names, "num_warps")}
    integers = [x for x in names if x in SIZES and x not in constants]
    pointers = [x for x in names if x not in (*integers, *constants)]
    compiled(device, name, pointers, integers, constants, dtype="fp64" if ones else "fp32")


def kind(ones):
    return torch.float64 if ones else torch.float32


@pytest.mark.parametrize("ones", [False, True])
def test_one_complex_number_per_channel(ones):
    from fnattn_kernels.triton import gate_loop_narrow_device as device

    shape = channels.shape(1, 1, kind(ones)) if ones else channels.shape(1000, 1000, kind(ones))
    for name in ("forward", "backward", "tangent", "carry"):
        build(device, name, ones, START=not ones, FIXED=not ones, OUT=True, FINISH=True, **shape)


@pytest.mark.parametrize("ones", [False, True])
def test_one_real_number_per_channel(ones):
    from fnattn_kernels.triton import gate_loop_simple_device as device

    shape = channels.shape(1, 1, kind(ones)) if ones else channels.shape(1000, 1000, kind(ones))
    for name in ("forward", "backward", "tangent", "carry"):
        build(device, name, ones, REVERSE=not ones, START=not ones, OUT=True, FINISH=True, **shape)


@pytest.mark.parametrize("ones, width", [(False, 64), (False, heads.WIDTH), (True, 1)])
def test_a_complex_number_per_head(ones, width):
    from fnattn_kernels.triton import gate_loop_heads_device as forward
    from fnattn_kernels.triton import gate_loop_heads_grad_device as grad

    kinds = heads.kinds(width, width, kind(ones))
    build(forward, "gates", ones, TANGENT=True, M=heads.CHUNK)
    build(forward, "sums", ones, BACK=ones, **kinds["sums"])
    build(forward, "carry", ones, START=not ones, REVERSE=ones, **kinds["flat"])
    build(forward, "outputs", ones, **kinds["rows"])
    build(grad, "queries", ones, **kinds["queries"])
    build(grad, "keys", ones, **kinds["keys"])
    build(grad, "gates_back", ones, FIXED=not ones, M=heads.CHUNK, **kinds["flat"])
    build(grad, "tangent_sums", ones, **kinds["sums"])
    build(grad, "tangent_outputs", ones, **kinds["rows"])
