"""Every eager check of testing.CHECKS on every operator that has a Triton kernel, by the kernels' source over `torch_triton`.

Triton's own interpreter, in the other files here, is thirty times as slow: there, arguments are larger and checks fewer. What is compiled
is in all_compiled.py.
"""

from __future__ import annotations

import pytest
import torch_triton
from fnattn_kernels import colt5, flex
from fnattn_kernels.triton import gate_loop_heads
from interpreted_checks import FEW, ROUNDED
from small_cases import OTHERS, SMALL, call
from versions import OLD

from fnattn import ops
from fnattn.ops import _segment_kernel
from fnattn.testing import CHECKS, autograd_checks, check_operator
from fnattn.testing.cases import CASES
from fnattn.testing.operators import APART
from fnattn.testing.subject import compare, subject

EAGER = [name for name in CHECKS if name not in APART]
TORCH_LIMITS = {"grad(checkpoint(f))"}  # what torch itself cannot do: saved-tensor hooks under torch.func
OLD_LIMITS = {"make_fx(hessian)"} if OLD else set()


@pytest.mark.parametrize("case", SMALL.values(), ids=lambda case: case.name)
def test_every_check_is_right(case, monkeypatch):
    monkeypatch.setattr(gate_loop_heads, "CHUNK", gate_loop_heads.SUM)
    report = check_operator(call(case), case.args(), reference=case.brute(), differentiable=case.diff, compile=False, only=EAGER)
    report.require()
    assert {row.check for row in report.rows} == set(EAGER)
    assert {row.check for row in report.rows if row.status != "ok"} - OLD_LIMITS == TORCH_LIMITS


@pytest.mark.parametrize("case", [case for case in CASES if case.name in SMALL and case.dynamic], ids=lambda case: case.name)
def test_an_exported_program_takes_arguments_of_other_sizes(case):
    """"export, free sizes": not with small cases, whose sizes of 1 torch does not leave free."""
    ours = subject(call(case), case.args(), like=case.brute(), dynamic=case.dynamic)
    compare(autograd_checks.export_free(ours), autograd_checks.expected_export_free(ours._replace(fn=case.brute())), 1e-8)


def test_no_operator_is_left_out():
    assert {case.operator for case in SMALL.values()} >= {case.operator for case in OTHERS}


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_other_options_are_right(case):
    check_operator(call(case), case.args(), reference=case.brute(), differentiable=case.diff, compile=False, only=FEW).require()


# ------------------------------------------------------------------------------------------------ other packages


def by_colt5(s, k):
    """In float32 by the package; in and out float64, as the checks want it."""
    return ops.coor_descent(s.float(), k.float(), eps=0.3, eps_init=2.0, eps_decay=0.7, n_iters=11, impl="colt5").double()


def test_every_check_of_colt5_but_numeric_differences_is_right():
    if colt5.missing("cpu"):
        pytest.skip(colt5.missing("cpu"))
    torch_triton.adopt(colt5._package()[0], "coor_descent_kernel_forward", "coor_descent_kernel_backward")
    case = SMALL["coor_descent"]._replace(options=dict(eps=0.3, eps_init=2.0, eps_decay=0.7, n_iters=11))
    report = check_operator(by_colt5, case.args(), reference=case.brute(), rtol=1e-3, compile=False, only=ROUNDED).require()
    assert {row.check for row in report.rows if row.status != "ok"} - OLD_LIMITS == TORCH_LIMITS


def by_flex(q, k, v, layout):
    """torch's operator without a compiler; its derivatives are those of our kernels."""
    return _segment_kernel.blocks(flex.attend, q, k, v, layout, 1, False, None, 1.0)


# Without a compiler torch's operator compiles itself, or traces, which it cannot do inside these: they say so with an error.
NOT_BY_FLEX = {"linearize(f)", "make_fx(hessian)", "autograd: functional.jacobian, forward mode", "gradcheck: batched"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_check_of_flex_attention_on_a_cpu_is_right():
    case = SMALL["block_sparse_attention"]
    names = [name for name in EAGER if name not in NOT_BY_FLEX]
    report = check_operator(by_flex, case.args(), reference=case.brute(), compile=False, only=names).require()
    assert {row.check for row in report.rows if row.status != "ok"} - OLD_LIMITS == TORCH_LIMITS
