"""What `fnattn bench --device cuda` checks before it measures, with the Triton kernels taking part, by `torch_triton`."""

from __future__ import annotations

import pytest
import torch
import torch_triton

torch_triton.install()

from fnattn_kernels.contracts import KernelUnavailable  # noqa: E402

from fnattn.bench import gpu, gpu_run, implementations, numbers  # noqa: E402
from fnattn.ops.report import CASES  # noqa: E402


@pytest.mark.parametrize("name", [name for name in gpu.RACES if name not in ("gate_loop d64", "coor_attention T20")])
def test_the_kernels_are_right_in_their_race(name):
    race = gpu.RACES[name]._replace(peers={}, yards={}, impls=("triton", "reference"))
    found = list(gpu_run.verdicts(race, torch.device("cpu"), True))
    assert [row["side"] for row in found if "wrong" not in row and "unavailable" not in row] == ["triton", "reference"] * 2


@pytest.mark.parametrize("name", ["softmax_attention", "scan", "simple_gate_loop", "taylor"])
def test_every_precision_is_right_in_value_gradients_and_tangent(name):
    rows = [row for row in numbers.rows(name, "cpu", True) if row["impl"] == "triton"]
    assert [row["dtype"] for row in rows if "wrong" not in row and row["errors"]["tangent"] > 0] == list(numbers.DTYPES)


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_given_float32_whatever_the_caller_has(name, monkeypatch):
    """So they are compiled for that, by the tests of compilation, and for float64 where a GPU takes it."""
    seen, launch = set(), torch_triton.Kernel.__getitem__

    def watched(kernel, grid):
        def run(*args, **constants):
            seen.update(a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
            return launch(kernel, grid)(*args, **constants)
        return run

    monkeypatch.setattr(torch_triton.Kernel, "__getitem__", watched)
    args = implementations.inputs(CASES[name], numbers.QUICK[0], "cpu", torch.bfloat16)
    try:
        numbers.everything(implementations.function(name, "triton", numbers.QUICK[0]), args)
    except (KernelUnavailable, ValueError):  # the operator has no Triton kernel
        assert not seen
    else:
        assert seen == {torch.float32}
