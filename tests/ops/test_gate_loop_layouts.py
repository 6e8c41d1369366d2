"""Heads of width one, wherever their numbers lie in memory."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.native import gate_loop as native_loops
from fnattn_kernels.native.build import why_not

from fnattn.ops import gate_loop


@pytest.mark.skipif(why_not("gate_loop") is not None, reason="no C kernel here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("b, h, n", [(1, 1, 1), (2, 3, 1), (2, 1, 5), (3, 5, 37)])
def test_heads_of_width_one_are_read_where_they_lie(b, h, n, dtype, monkeypatch):
    """In whatever order the axes lie in memory, without the dispatcher."""
    def run(q, k, v, a, H, A, impl):
        out, state = gate_loop(q, k, v, a, state=(H, A), impl=impl)
        return out, *state

    torch.manual_seed(11)
    args = [torch.randn(*shape, dtype=dtype) for shape in (*[(b, h, n, 1)] * 3, (b, h, n, 2), (b, h, 1, 1, 2), (b, h, 2))]
    expected = run(*args, "reference")
    monkeypatch.setattr(native_loops, "narrow", None)
    for axis in range(3):
        moved = [t.movedim(axis, -1).contiguous().movedim(-1, axis) if t.ndim > axis else t for t in args]
        spread = [torch.stack((t, t), -1)[..., 0] for t in args]
        for given in (moved, spread):
            for ours, plain in zip(run(*given, "native"), expected):
                assert ours.dtype == dtype and ours.shape == plain.shape
                assert_close(ours, plain)


@pytest.mark.parametrize("states", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_heads_of_width_one_in_any_precisions(rows, states):
    torch.manual_seed(5)
    args = [torch.randn(2, 3, 7, width).to(rows) for width in (1, 1, 1, 2)]
    state = torch.randn(2, 3, 1, 1, 2).to(states), torch.randn(2, 3, 2).to(states)
    for given in (None, state, (state[0], state[1].double())):
        out, after = gate_loop(*args, state=given)
        expected, truth = gate_loop(*args, state=given, impl="reference")
        assert out.dtype == expected.dtype == rows and after.H.dtype == truth.H.dtype and after.A.dtype == truth.A.dtype
        assert_close(out, expected)
        assert_close(after.H, truth.H)
        assert_close(after.A, truth.A)
