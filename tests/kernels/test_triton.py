"""Triton's kernels: right in its interpreter, and compiled for a GPU that need not be here.

The interpreter is switched on before Triton is imported, so the files of tests/kernels/interpreted run in other processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiling import SHARED, compiled, needs_triton
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.triton import lang
from versions import INTERPRETER_TOO_OLD

from fnattn import ops

HERE = Path(__file__).resolve().parent
# Short files share a process, which takes as long to start as they take to run; `torch_triton` and Triton itself cannot share one.
TOGETHER = [("causal_dot", "colt5", "coor_descent", "deepspeed", "scan"), ("gpu_suite", "large")]
FILES = [*TOGETHER, *((path.stem,) for path in sorted((HERE / "interpreted").glob("*.py")) if path.stem not in sum(TOGETHER, ()))]


@needs_triton
@pytest.mark.skipif(INTERPRETER_TOO_OLD, reason="Triton's interpreter before 3.7 needs numpy<2.4")
@pytest.mark.parametrize("names", FILES, ids=" ".join)
def test_interpreted(names):
    paths = [str(HERE / "interpreted" / f"{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    if " passed" not in done.stdout:  # all of it needs a package that is not here
        pytest.skip(done.stdout[-400:])


def test_on_a_cpu_the_reason_says_what_is_missing():
    q = torch.ones(1, 1, 3, 2)
    with pytest.raises(KernelUnavailable, match="needs CUDA tensors, got cpu.*TRITON_INTERPRET=1"):
        ops.causal_dot(q, q, q, impl="triton")


def test_setting_the_switch_too_late_is_noticed():
    program = """
import os, torch, triton, fnattn
os.environ["TRITON_INTERPRET"] = "1"
q = torch.ones(1, 3, 2)
try:
    fnattn.ops.scan(q, q, impl="triton")
except RuntimeError as error:
    print(error)
"""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert "imported before TRITON_INTERPRET=1 was set" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------ for a GPU


@needs_triton
@pytest.mark.skipif(lang.INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("width, dtype", [(16, "fp32"), (128, "fp32"), (64, "fp64")])
def test_causal_dot_compiles_for_a_gpu(width, dtype):
    from fnattn_kernels.triton import causal_dot, causal_dot_device

    kind = torch.float64 if dtype == "fp64" else torch.float32
    shape = dict(causal_dot.tiles(width, width, kind), REVERSE=True, GROUP=2, ACC=lang.accumulator(kind), PRECISION=lang.PRECISION)
    sizes = ("n", "d", "e", "heads", "groups", "chunks")
    compiled(causal_dot_device, "sums", ("k", "v", "states"), sizes, shape, dtype=dtype)
    compiled(causal_dot_device, "outputs", ("q", "k", "v", "states", "out"), (*sizes, "state_heads"), {**shape, "STATES": True},
             dtype=dtype)


@needs_triton
@pytest.mark.skipif(lang.INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("lag", [False, True])
def test_scan_compiles_for_a_gpu(lag):
    from fnattn_kernels.triton import scan, scan_device

    shape = dict(START=True, REVERSE=lag, LAG=lag, ACC=lang.accumulator(torch.float32), **scan.tiles(1000, 1000))
    compiled(scan_device, "scan", ("a", "x", "h0", "h"), ("n", "c"), shape)
    compiled(scan_device, "scan_pairs", ("a", "x", "h0", "h"), ("n", "c"), {**shape, "CONJUGATE": True})


@needs_triton
@pytest.mark.skipif(lang.INTERPRETED, reason="the interpreter does not compile")
def test_the_kernels_of_colt5_compile_for_a_gpu():
    device = pytest.importorskip("colt5_attention.triton_coor_descent")
    sizes = {"BLOCK_SIZE": 128}
    strides = ("input_row_stride", "b_row_stride", "mask_row_stride", "n_iters", "n_cols")
    compiled_colt5(device.coor_descent_kernel_forward, (*strides, "a_iter_stride", "b_iter_stride"),
                   ("current_eps", "eps_decay", "eps"), sizes)
    compiled_colt5(device.coor_descent_kernel_backward, (*strides, "ds_row_stride", "db_row_stride"),
                   ("eps_init", "eps_decay", "eps"), sizes)


def compiled_colt5(kernel, integers, floats, constants):
    kinds = {name: "*fp32" for name in kernel.arg_names} | {"mask_ptr": "*i32"}
    kinds |= dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32") | dict.fromkeys(constants, "constexpr")
    assert lang.compiled_for(kernel, kinds, constants).metadata.shared <= SHARED


@needs_triton
@pytest.mark.skipif(lang.INTERPRETED, reason="the interpreter does not compile")
def test_the_kernel_of_deepspeed_compiles_for_a_gpu():
    pytest.importorskip("deepspeed")
    from deepspeed.ops.transformer.inference.triton.softmax import softmax_kernel

    kinds = {"output_ptr": "*fp32", "input_ptr": "*fp32", "stride": "i32", "n_cols": "i32", "BLOCK_SIZE": "constexpr"}
    assert lang.compiled_for(softmax_kernel, kinds, {"BLOCK_SIZE": 64}).metadata.shared <= SHARED


@needs_triton
@pytest.mark.skipif(lang.INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("n, dtype", [(100, "fp32"), (2048, "fp32"), (2048, "fp64")])
def test_coor_descent_compiles_for_a_gpu(n, dtype):
    from fnattn_kernels.triton import coor_descent, coor_descent_device

    shape = dict(coor_descent.tiles(n), ACC=lang.accumulator(torch.float64 if dtype == "fp64" else torch.float32))
    given = ("s", "log_k", "epsilons", "m")
    for name, others in (("iterate", ("y",)), ("iterate_back", ("g", "ds", "dlog_k")), ("tangent", ("ts", "tlog_k", "ty"))):
        compiled(coor_descent_device, name, (*given, *others), ("n", "n_iters"), shape, dtype=dtype)
    given = ("s", "k", "epsilons", "cut", "m")
    for name, others in (("exact", ("y",)), ("exact_back", ("g", "ds", "dk")), ("exact_tangent", ("ts", "tk", "ty"))):
        compiled(coor_descent_device, name, (*given, *others), ("n",), shape, dtype=dtype)


@needs_triton
@pytest.mark.skipif(lang.INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("width", [16, 64, 128])
def test_softmax_attention_compiles_for_a_gpu(width):
    from fnattn_kernels.triton import softmax, softmax_device

    kind = torch.float32
    shape = dict(softmax.tiles(width, width, kind), CAUSAL=True, MASK=True, ACC=lang.accumulator(kind), PRECISION=lang.PRECISION)
    sizes = ("n", "m", "d", "e", "heads", "groups", "start", "mask_b", "mask_h", "mask_n", "mask_m")
    for name, others in (("attend", ("out", "lse")), ("backward_queries", ("g", "lse", "delta", "dq")),
                         ("backward_keys", ("g", "lse", "delta", "dk", "dv")),
                         ("tangent", ("out", "lse", "tq", "tk", "tv", "tout", "tlse"))):
        compiled(softmax_device, name, ("q", "k", "v", *others), sizes, shape, floats=("scale",), masks=("mask",))


@needs_triton
@pytest.mark.skipif(lang.INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("width", [64, 128])
def test_second_derivatives_of_softmax_attention_compile_for_a_gpu(width):
    from fnattn_kernels.triton import softmax, softmax_second_device

    kind = torch.float32
    shape = dict(softmax.tiles(width, width, kind), CAUSAL=True, MASK=True, ACC=lang.accumulator(kind), PRECISION=lang.PRECISION,
                 G_MOVES=width <= softmax.TOGETHER)
    sizes = ("n", "m", "d", "e", "heads", "groups", "start", "mask_b", "mask_h", "mask_n", "mask_m")
    given = ("q", "k", "v", "g", "lse", "delta", "t_lse", "t_delta", "tg", "tq", "tk", "tv")
    for name, results in (("second_queries", ("dq",)), ("second_keys", ("dk", "dv"))):
        compiled(softmax_second_device, name, (*given, *results), sizes, shape, floats=("scale",), masks=("mask",))
