"""Triton's kernels of Taylor attention, compiled for a GPU that need not be here."""

from __future__ import annotations

import pytest
import torch
from compiling import compiled, compiles, needs_triton
from fnattn_kernels.triton import lang, taylor_launch

pytestmark = [needs_triton, compiles]
KINDS = {"fp32": torch.float32, "fp64": torch.float64}
SIZES = ("n", "m", "d", "e", "features", "segments", "visits", "length", "tiles")


def build(name, d, e, dtype="fp32", sizes=None, **flags):
    """One kernel for these widths; `sizes` are those that are 1, which Triton compiles for."""
    from fnattn_kernels.triton import taylor_device as device

    kind, names = KINDS[dtype], getattr(device, name).arg_names
    flags = dict(ALONG=False, REVERSE=False, INTER=True, CAUSAL=True, SHARE=1, GROUP=1, EPS=0.0, PRECISION=lang.PRECISION,
                 ACC=lang.accumulator(kind)) | taylor_launch.tiles(d, e, kind) | (sizes or {}) | flags
    constants = {key: value for key, value in flags.items() if key in (*names, "num_warps")}
    integers = [x for x in names if x in SIZES]
    compiled(device, name, [x for x in names if x not in (*integers, *constants)], integers, constants, dtype=dtype)


@pytest.mark.parametrize("d, e, dtype", [(8, 16, "fp32"), (16, 64, "fp32"), (32, 64, "fp32"), (64, 128, "fp32"), (64, 128, "fp64")])
def test_values_and_gradients(d, e, dtype):
    build("states", d, e, dtype, GROUP=2)
    build("gather", d, e, dtype, EPS=1e-5, SHARE=2)
    build("slope", d, e, dtype, REVERSE=True, GROUP=2)


@pytest.mark.parametrize("d, e, dtype", [(64, 128, "fp32"), (16, 16, "fp64")])
def test_tangents(d, e, dtype):
    for name in ("states", "gather", "slope"):
        build(name, d, e, dtype, ALONG=True)


def test_without_order_and_without_earlier_segments():
    for name in ("gather", "slope"):
        build(name, 16, 16, CAUSAL=False)
        build(name, 16, 16, INTER=False, REVERSE=True)


def test_sizes_of_one():
    for name in ("states", "gather", "slope"):
        build(name, 1, 1, sizes=dict.fromkeys(("n", "m", "d", "e", "segments", "tiles"), 1))


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_running_sums(dtype):
    from fnattn_kernels.triton import taylor_device as device

    compiled(device, "add_up", ("sums",), ("visits", "width"), {"W": taylor_launch.COLUMNS, "num_warps": 1}, dtype=dtype)
